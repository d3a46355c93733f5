"""The run folder: what a run leaves behind for people and for programs.

config.yaml    the resolved configuration, loadable again
status.json    the truth about how the run stands or ended (launchers flatten exit codes to 1)
log.jsonl      one record a log point; after a resume it continues as if the run had never been killed
summary.csv    one row an evaluation, with timm's column names
events.jsonl   what happened: started, resumed, checkpoints, guard, signals
checkpoints/   see checkpoint.py
"""

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

SUMMARY_COLUMNS = (
    "epoch", "step", "train_loss", "eval_loss", "eval_top1", "eval_top5", "eval_ema_loss", "eval_ema_top1",
    "eval_ema_top5", "lr",
)  # fmt: skip


class RunFolder:
    """Writes one run's files. Made on rank 0 only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._status: dict[str, Any] = read_status(path) or {}
        path.mkdir(parents=True, exist_ok=True)

    def write_config(self, text: str) -> None:
        _replace(self.path / "config.yaml", text)

    def status(self, **fields: Any) -> None:
        """Merge `fields` into status.json, atomically."""
        self._status |= fields | {"updated": time.time(), "pid": os.getpid()}
        _replace(self.path / "status.json", json.dumps(self._status, indent=1) + "\n")

    def event(self, kind: str, /, **fields: Any) -> None:
        _append(self.path / "events.jsonl", {"time": time.time(), "event": kind} | fields)

    def log(self, record: dict[str, Any]) -> None:
        _append(self.path / "log.jsonl", record)

    def summary(self, row: dict[str, Any]) -> None:
        path = self.path / "summary.csv"
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, SUMMARY_COLUMNS, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)

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


def read_status(path: Path) -> dict[str, Any] | None:
    """status.json of the run folder `path`, or None."""
    try:
        return json.loads((path / "status.json").read_text())
    except FileNotFoundError:
        return None


def _step_of(line: str) -> float:
    # A line cut short by a kill is after every checkpoint.
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
