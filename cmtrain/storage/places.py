"""Find what a person names: a run, a checkpoint or weights. Needs no torch."""

from pathlib import Path

from pipelines.spec import DataError

RUNS = Path("runs")


def find_run(place: str) -> tuple[Path, Path]:
    """Return the run folder of `place`, and `place` as a path: itself, or a run of that name below runs/.

    Raises DataError: neither a run folder nor a checkpoint in one.
    """
    for path in (Path(place), RUNS / place):
        if run := _run_of(path):
            return run, path
    raise DataError(f"{place}: no run and no checkpoint of one: it has no checkpoints of a run")


def _run_of(path: Path) -> Path | None:
    """Return the run folder of `path`: itself, or RUN for RUN/checkpoints/step-* and RUN/repaired/step-*."""
    for folder in (path, path.absolute().parent.parent) if path.name.startswith("step-") else (path,):
        if (folder / "checkpoints").is_dir():
            return folder
    return None


def why_no_weights(path: Path) -> str:
    """Return why `path` cannot hold weights for model.init_from, as far as its name and kind show, or ""."""
    if path.is_dir() or (path.exists() and path.resolve().suffix == ".safetensors"):
        return ""
    what = "neither a folder nor a .safetensors file" if path.exists() else "no such file or folder"
    return f"{what}; weights are a run, a checkpoint, an export or a .safetensors file"
