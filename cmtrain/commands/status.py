"""`cmtrain status RUN` and `cmtrain watch RUN`: how a run stands, from its folder, and from itself if it answers.

status.json says what the run knew when it last wrote. A run that was killed cannot write that it was; so its process is
looked for on its own host, and its silence is told anywhere.
"""

import contextlib
import difflib
import http.client
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cmtrain.config.strict_yaml import Node, parse
from cmtrain.monitoring.units import duration
from cmtrain.storage.run_folder import SILENT_SECONDS, is_alive, read_status
from pipelines.spec import DataError

RUNS = Path("runs")
ANSWER_SECONDS = 2.0
REFRESH_SECONDS = 1.0
MAX_ANSWER_BYTES = 1_000_000


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    `status`: status.json. `now`: what the run itself answered ("now" of /status.json), None if it did not.
    `alive`: whether its process is there, None if that cannot be known from here or does not matter, because it ended.
    `warning`: what is wrong with what status.json claims, or "".
    """

    path: Path
    status: dict[str, Any]
    now: dict[str, Any] | None
    alive: bool | None
    age_seconds: float
    warning: str

    @property
    def goes_on(self) -> bool:
        return self.status.get("state") == "running" and self.alive is not False

    @property
    def step(self) -> int:
        return max(self.status.get("step") or 0, (self.now or {}).get("step", 0))


def find_run(run: str) -> Path:
    """The run folder `run`, or the one of that name below runs/.

    Raises:
        DataError: there is none.
    """
    for path in (Path(run), RUNS / run):
        if _read(path) is not None:
            return path
    known = sorted(path.parent.name for path in RUNS.glob("*/status.json"))
    close = difflib.get_close_matches(Path(run).name, known, n=1)
    hint = (
        f"did you mean {RUNS / close[0]}?"
        if close
        else "a run is a folder with a status.json, such as runs/demo"
    )
    raise DataError(f"{run}: no such run; {hint}")


def stand(path: Path) -> Standing:
    """How the run in the folder `path` stands at this moment."""
    status = _read(path) or {}
    age_seconds = max(0.0, time.time() - status.get("updated", 0.0))
    if status.get("state") != "running":
        return Standing(path, status, None, None, age_seconds, "")
    now = _ask(status)
    alive = True if now else is_alive(status)
    warning = ""
    if alive is False:
        warning = f"process {status.get('pid')} is gone; the same command resumes"
    elif now and now.get("stalled"):
        warning = f"no step finished for {duration(now['seconds_since_progress'])}"
    elif now is None and age_seconds > _silent_seconds(path):
        warning = f"has written nothing for {duration(age_seconds)}"
    return Standing(path, status, now, alive, age_seconds, warning)


def print_status(run: str, *, as_json: bool) -> int:
    """Print how `run` stands, for people or as one JSON object. Returns the exit code, 0.

    Raises:
        DataError: there is no such run.
    """
    standing = stand(find_run(run))
    if as_json:
        facts = {"run_dir": str(standing.path), "alive": standing.alive, "warning": standing.warning}
        text = json.dumps(standing.status | facts | {"now": standing.now}, indent=1)
    else:
        text = "\n".join(describe(standing))
    print(text)  # noqa: T201
    return 0


def watch(run: str) -> int:
    """Show how `run` stands until it ends: in place on a terminal, elsewhere a line whenever it got further.

    Returns:
        The exit code, 0.

    Raises:
        DataError: there is no such run.
    """
    path, console = find_run(run), Console(highlight=False)
    standing, said = stand(path), ""
    if console.is_terminal:
        with Live(Text("\n".join(describe(standing))), console=console, auto_refresh=False) as live:
            while standing.goes_on:
                time.sleep(REFRESH_SECONDS)
                standing = stand(path)
                live.update(Text("\n".join(describe(standing))), refresh=True)
        return 0
    while True:
        line = "  ".join(part for part in (_headline(standing), _speed(standing.status)) if part)
        if line != said:
            print(line, flush=True)  # noqa: T201
            said = line
        if not standing.goes_on:
            return 0
        time.sleep(REFRESH_SECONDS)
        standing = stand(path)


def describe(standing: Standing) -> list[str]:
    """`standing` in lines for people."""
    status = standing.status
    lines = [f"{standing.path}: {_headline(standing)}"]
    if standing.now and standing.now["state"] != "train":
        lines.append(f"doing    {standing.now['state']}")
    if status.get("loss") is not None:
        lines.append(f"loss     {status['loss']:.4f}")
    if speed := _speed(status):
        lines.append(f"speed    {speed}")
    if standing.goes_on and status.get("eta_seconds") is not None:
        lines.append(f"left     {duration(status['eta_seconds'])}")
    if status.get("best_step") is not None:
        lines.append(f"best     top-1 {status['best_top1']:.4f} at step {status['best_step']:,}")
    if status.get("resume_from"):
        lines.append(f"saved    {status['resume_from']}")
    if standing.goes_on and status.get("metrics_url"):
        lines.append(f"metrics  {status['metrics_url']}{'' if standing.now else ' (no answer)'}")
    who = f"process {status.get('pid')} on {status.get('host')}"
    lines.append(f"written  {duration(standing.age_seconds)} ago by {who}")
    return lines


def _headline(standing: Standing) -> str:
    status = standing.status
    steps = f"step {standing.step:,} of {status.get('last_step') or 0:,}"
    if standing.warning:
        return f"claims to run, {steps}, but {standing.warning}"
    reason = f": {status['reason']}" if status.get("reason") else ""
    return f"{status.get('state')}, {steps}{reason}"


def _speed(status: dict[str, Any]) -> str:
    if status.get("images_per_second") is None:
        return ""
    return f"{status['images_per_second']:,.0f} images/s, {status['data_wait_ratio']:.0%} of the time waiting for data"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        status = read_status(path)
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def _silent_seconds(path: Path) -> float:
    """How long the run in the folder `path` may write nothing: its metrics.stall_seconds."""
    try:
        root, _ = parse((path / "config.yaml").read_text())
    except (OSError, ValueError):
        return SILENT_SECONDS
    node = root
    for key in ("metrics", "stall_seconds"):
        node = node.value.get(key) if isinstance(node, Node) and isinstance(node.value, dict) else None
    value = node.value if node else None
    return float(value) if isinstance(value, int | float) and value > 0 else SILENT_SECONDS


def _ask(status: dict[str, Any]) -> dict[str, Any] | None:
    """What the run's first rank says of itself; None if nobody answers, or another process has got its port."""
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
    return answer.get("now") if same else None
