"""Show the state, speed and time left of a run (`cmtrain status RUN` and `cmtrain watch RUN`).

status.json holds what the run last wrote. A run that was killed cannot write that it was, so its process is
looked up on its own host, and a long silence is reported on any host.
"""

import contextlib
import http.client
import json
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cmtrain.errors import did_you_mean
from cmtrain.monitoring.units import duration, percent, state_name, step_place
from cmtrain.storage import records, run_record
from cmtrain.storage.run_folder import RUNS, SILENT_SECONDS, is_alive, read_status
from pipelines.spec import DataError, visible

ANSWER_SECONDS = 2.0
REFRESH_SECONDS = 1.0
MAX_ANSWER_BYTES = 1_000_000


class RunStatus(NamedTuple):
    """The content of status.json, checked against the live process."""

    path: Path
    status: dict[str, Any]
    now: dict[str, Any] | None  # the run's own answer ("now" of /status.json)
    alive: bool | None  # whether its process exists; None if not known from here, or if the run has ended
    age_seconds: float
    warning: str  # what contradicts status.json, or ""

    @property
    def is_running(self) -> bool:
        return self.status.get("state") == "running" and self.alive is not False

    @property
    def step(self) -> int:
        now = (self.now or {}).get("step")
        return int(max(self.status.get("step") or 0, now if records.is_number(now) else 0))


def find_run(run: str) -> Path:
    """Return the run folder `run`, or the one of that name below runs/. Raises DataError: there is none."""
    for path in (Path(run), RUNS / run):
        damage: list[str] = []
        if read_status(path, damage) is not None:
            return path
        if damage:
            advice = "the run itself is not harmed: run its command again, or see cmtrain report"
            raise DataError(f"{path}: {damage[0]}; {advice}")
    known = sorted(path.parent.name for path in RUNS.glob("*/status.json"))
    hint = did_you_mean(Path(run).name, known, f"{RUNS}/").removeprefix(", ")
    hint = hint or "a run is a folder with a status.json, such as runs/demo"
    raise DataError(f"{run}: no such run; {hint}")


def current_status(path: Path) -> RunStatus:
    """Return the status of the run in the folder `path` at this moment."""
    status = read_status(path) or {}
    age_seconds = max(0.0, time.time() - (status.get("updated") or 0.0))
    if status.get("state") != "running":
        return RunStatus(path, status, None, None, age_seconds, "")
    now = _ask(status)
    alive = True if now else is_alive(status)
    warning = ""
    if alive is False:
        warning = f"process {status.get('pid')} is gone; run the same command to continue"
    elif now and now.get("stalled") and records.is_number(now.get("seconds_since_progress")):
        warning = f"no step finished for {duration(now['seconds_since_progress'])}"
    elif now is None and age_seconds > _silent_seconds(path):
        warning = f"has written nothing for {duration(age_seconds)}"
    return RunStatus(path, status, now, alive, age_seconds, warning)


def print_status(run: str, *, as_json: bool) -> None:
    """Print the status of `run`, as lines or as one JSON object. Raises DataError: there is no such run."""
    run_status = current_status(find_run(run))
    text = "\n".join(describe(run_status))
    if as_json:
        facts = {"run_dir": str(run_status.path), "alive": run_status.alive, "warning": run_status.warning}
        text = json.dumps(run_status.status | facts | {"now": run_status.now}, indent=1)
    print(text)  # noqa: T201


def watch(run: str) -> None:
    """Show the status of `run` until it ends, on a terminal in place. Raises DataError: no such run."""
    console, printed = Console(highlight=False), ""
    on_screen = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with on_screen or contextlib.nullcontext():
        while True:
            run_status = current_status(find_run(run))
            line = "  ".join(filter(None, (_headline(run_status), _speed(run_status.status))))
            if on_screen:
                on_screen.update(Text("\n".join(describe(run_status))), refresh=True)
            elif line != printed:
                print(visible(line), flush=True)  # noqa: T201
                printed = line
            if not run_status.is_running:
                return
            time.sleep(REFRESH_SECONDS)


def describe(run_status: RunStatus) -> list[str]:
    """Return the lines that a person reads."""
    status, now = run_status.status, run_status.now
    lines = [f"{run_status.path}: {_headline(run_status)}"]
    if now and now.get("state") != "train":
        lines.append(f"doing    {now.get('state')}")
    if status.get("loss") is not None:
        lines.append(f"loss     {status['loss']:.4f}")
    if speed := _speed(status):
        lines.append(f"speed    {speed}")
    if run_status.is_running and status.get("eta_seconds") is not None:
        lines.append(f"left     {duration(status['eta_seconds'])}")
    if status.get("best_step") is not None and status.get("best_top1") is not None:
        lines.append(f"best     top-1 {percent(status['best_top1'])} at step {status['best_step']:,}")
    if status.get("resume_from"):
        lines.append(f"saved    {status['resume_from']}")
    if run_status.is_running and status.get("metrics_url"):
        page = str(status["metrics_url"]).removesuffix("metrics")
        lines.append(f"watch    {page}{'' if now else ' (no answer)'}")
    lines += [f"lost     {what} ({count} times)" for what, count in (status.get("lost") or {}).items()]
    writer = f"process {status.get('pid')} on {status.get('host')}"
    lines.append(f"written  {duration(run_status.age_seconds)} ago by {writer}")
    return list(map(visible, lines))


def _headline(run_status: RunStatus) -> str:
    status, steps = run_status.status, step_place(run_status.status, run_status.step)
    if run_status.warning:
        return f"claims to run, {steps}, but {run_status.warning}"
    reason = f": {status['reason']}" if status.get("reason") else ""
    return f"{state_name(status)}, {steps}{reason}"


def _speed(status: dict[str, Any]) -> str:
    if status.get("images_per_second") is None:
        return ""
    wait = percent(status.get("data_wait_ratio") or 0.0, 0)
    return f"{status['images_per_second']:,.0f} images/s, {wait} of the time waiting for data"


def _silent_seconds(path: Path) -> float:
    """Return how long the run in `path` may write nothing: its metrics.stall_seconds."""
    value = run_record.read_config(path / "config.yaml", damage=[]).get("metrics.stall_seconds")
    return float(value) if records.is_number(value) and value > 0 else SILENT_SECONDS


def _ask(status: dict[str, Any]) -> dict[str, Any] | None:
    """Ask the run's first rank for its status; None without an answer or if another process has the port."""
    try:
        url = urlsplit(str(status.get("metrics_url")))
        if url.scheme != "http" or not url.hostname:
            return None
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=ANSWER_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", "/status.json")
            answer = json.loads(connection.getresponse().read(MAX_ANSWER_BYTES))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    same = isinstance(answer, dict) and all(answer.get(key) == status.get(key) for key in ("pid", "host"))
    now = answer.get("now") if same else None
    return now if isinstance(now, dict) else None
