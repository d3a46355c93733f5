"""Define ConfigError (a mistake that the user can fix), the exit codes, and the hint `did you mean`."""

import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

EXIT_DONE, EXIT_ERROR, EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, EXIT_EXPECTATION = 0, 1, 2, 3, 4, 5
EXIT_INTERRUPTED, EXIT_PIPE, EXIT_PREEMPTED = 130, 141, 143


class ConfigError(Exception):
    """A mistake in a configuration or on the command line: one line, with its place and what to do instead.
    The program ends with exit code 2. Missing or broken data is pipelines.spec.DataError, exit code 3.
    """


def message_of(error: Exception) -> str:
    """Return what to print of a ConfigError, which has one line for each mistake, or of another error."""
    from pipelines.spec import visible  # not before `check_pipelines`

    lines = str(error).split("\n") if isinstance(error, ConfigError) else [str(error)]
    return "\n".join(map(visible, lines))


def did_you_mean(given: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return ", did you mean X?" with the choice that is closest to `given`; "" if none is close."""
    close = difflib.get_close_matches(given, list(choices), n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def check_pipelines() -> None:
    """Raise ImportError, in one line, where another package called `pipelines` hides ours."""
    ours, spec = Path(__file__).resolve().parent.parent / "pipelines", importlib.util.find_spec("pipelines")
    found = [*(spec.submodule_search_locations or [str(spec.origin)])] if spec else []
    if str(ours) not in [str(Path(place).resolve()) for place in found]:
        what = f"{found[0]} hides cmtrain's own package `pipelines`" if found else f"{ours} is missing"
        advice = "rename it, start cmtrain from another folder (or as `cmtrain`), or take it off PYTHONPATH"
        raise ImportError(f"{what}; {advice if found else 'install cmtrain again'}")
