"""The run folder: what a run leaves behind for people and for programs.

config.yaml    the resolved configuration, loadable again
status.json    the truth about how the run stands or ended (launchers flatten exit codes to 1)
log.jsonl      one record a log point; after a resume it continues as if the run had never been killed
summary.csv    one row an evaluation, with timm's column names
events.jsonl   what happened: started, resumed, environment, evaluations, checkpoints, guard, signals
classes.json   the last evaluation by class: images, correct ones, confusion matrix
augmented.png  the first augmented batch
report.html    all of it for people, see report.py
checkpoints/   see checkpoint.py
"""

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SUMMARY_COLUMNS = (
    "epoch", "step", "train_loss", "eval_loss", "eval_top1", "eval_top5", "eval_ema_loss", "eval_ema_top1",
    "eval_ema_top5", "lr",
)  # fmt: skip


CLASSES_NAME = "classes.json"
SAMPLE_NAME = "augmented.png"
REPORT_NAME = "report.html"

# A run that says it runs and has written nothing for so long probably does not; its metrics.stall_seconds comes first.
SILENT_SECONDS = 600.0


class RunFolder:
    """Writes one run's files. Made on rank 0 only.

    A write that fails after `path` was made (a full disk) does not end the run: `trouble` says why the latest one did.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self._status: dict[str, Any] = read_status(path) or {}
        path.mkdir(parents=True, exist_ok=True)

    def write_config(self, text: str) -> None:
        self._try(_replace, "config.yaml", text)

    def status(self, **fields: Any) -> None:
        """Merge `fields` into status.json, atomically."""
        self._status |= fields | {"updated": time.time(), "pid": os.getpid()}
        self._try(_replace, "status.json", json.dumps(self._status, indent=1) + "\n")

    def snapshot(self) -> dict[str, Any]:
        """What status.json says; may be called from any thread."""
        return dict(self._status)

    def event(self, kind: str, /, **fields: Any) -> None:
        self._try(_append, "events.jsonl", json.dumps({"time": time.time(), "event": kind} | fields) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        self._try(_append, "log.jsonl", json.dumps(record) + "\n")

    def summary(self, row: dict[str, Any]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, SUMMARY_COLUMNS, restval="")
        if not (self.path / "summary.csv").exists():
            writer.writeheader()
        writer.writerow(row)
        self._try(_append, "summary.csv", text.getvalue())

    def classes(self, record: dict[str, Any]) -> None:
        _replace(self.path / CLASSES_NAME, json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Forget log records and summary rows after `step`: the steps that a resumed run is about to do again."""
        log = self.path / "log.jsonl"
        if log.exists():
            records = [line for line in log.read_text().splitlines() if _step_of(line) <= step]
            _replace(log, "".join(f"{line}\n" for line in records))
        summary = self.path / "summary.csv"
        if summary.exists():
            header, *rows = summary.read_text().splitlines()
            kept = [row for row in rows if int(row.split(",")[1]) <= step]
            _replace(summary, "".join(f"{line}\n" for line in [header, *kept]))

    def _try(self, write: Callable[[Path, str], None], name: str, text: str) -> None:
        try:
            write(self.path / name, text)
        except OSError as error:
            self.trouble = f"{name}: {error.strerror}"


def read_status(path: Path) -> dict[str, Any] | None:
    """status.json of the run folder `path`, or None: there is none, or a power failure left an empty file of it."""
    try:
        return json.loads((path / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def read_finished(path: Path, config_yaml: str, max_steps: int | None) -> dict[str, Any] | None:
    """status.json of the run folder `path`, if this very run has finished and the same command has nothing to do."""
    status = read_status(path)
    if status is None or status["state"] != "finished" or (path / "config.yaml").read_text() != config_yaml:
        return None
    whole = status["last_step"] >= min(status["total_steps"], max_steps or status["total_steps"])
    return status if whole and Path(status["resume_from"]).is_dir() else None


def read_events(path: Path) -> list[dict[str, Any]]:
    """events.jsonl of the run folder `path`, without lines that a kill cut short."""
    events = []
    try:
        lines = (path / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


def _step_of(line: str) -> float:
    # A line cut short by a kill is after every checkpoint.
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _append(path: Path, text: str) -> None:
    """Append all of `text` or nothing: half a line would spoil the next one, too."""
    rest = text.encode()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """JSON has no NaN: a window without one good step has no loss, nor does a model that was not guarded."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
