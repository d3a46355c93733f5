"""Write and read the files of a run folder, and keep a second trainer out of it.

config.yaml    the resolved configuration, loadable again
status.json    how the run is doing, or how it ended (launchers turn every exit code into 1)
log.jsonl      one record per log point; after a resume it continues as if the run had never been killed
summary.csv    one row per evaluation, with timm's column names
events.jsonl   started, resumed, environment, evaluations, checkpoints, guard, signals
classes.json   the last evaluation by class: images, correct ones, confusion matrix
augmented.png  the first augmented batch
report.html    all of it for people, see monitoring/report/page.py
checkpoints/   see checkpoint.py
"""

import contextlib
import csv
import errno
import io
import json
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.spec import DataError

SUMMARY_COLUMNS = ("epoch", "step", "train_loss", "eval_loss", "eval_top1", "eval_top5", "eval_ema_loss",
                   "eval_ema_top1", "eval_ema_top5", "lr")  # fmt: skip
CLASSES_NAME, SAMPLE_NAME, REPORT_NAME = "classes.json", "augmented.png", "report.html"

# A running run that wrote nothing for this long has probably ended, unless it has a metrics.stall_seconds.
SILENT_SECONDS = 600.0

LOCK_SECONDS = 0.2
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunFolder:
    """Writes one run's files, on rank 0 only.

    A write that fails later than the making of `path` (a full disk) does not end the run: see `trouble`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""  # why the latest write failed
        self._status: dict[str, Any] = read_status(path) or {}
        path.mkdir(parents=True, exist_ok=True)

    def write_config(self, text: str) -> None:
        self._try(replace_file, "config.yaml", text)

    def status(self, **fields: Any) -> None:
        """Merge `fields` into status.json, atomically."""
        self._status |= fields | {"updated": time.time(), "pid": os.getpid()}
        self._try(replace_file, "status.json", json.dumps(self._status, indent=1) + "\n")

    def snapshot(self) -> dict[str, Any]:
        """Return the content of status.json; for any thread."""
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
        replace_file(self.path / CLASSES_NAME, json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Remove log records and summary rows after `step`: a resumed run will do those steps again."""
        log, summary = self.path / "log.jsonl", self.path / "summary.csv"
        if log.exists():
            records = [line for line in log.read_text().splitlines() if _step_of(line) <= step]
            replace_file(log, "".join(f"{line}\n" for line in records))
        if summary.exists():
            header, *rows = summary.read_text().splitlines()
            kept = [row for row in rows if int(row.split(",")[1]) <= step]
            replace_file(summary, "".join(f"{line}\n" for line in [header, *kept]))

    def _try(self, write: Callable[[Path, str], None], name: str, text: str) -> None:
        try:
            write(self.path / name, text)
        except OSError as error:
            self.trouble = f"{name}: {error.strerror}"


class RunLock:
    """The right to write to the run folder `folder`, from `acquire` to `close`.

    Two trainers in one folder would mix their logs and overwrite each other's checkpoints. Rank 0 holds a
    lock on the file `.lock`, which names its process and host. The kernel frees the lock when that process
    ends, even by kill -9. On shared file systems see docs/checkpoints.md. Where a file system has no locks,
    the process named in the file is looked for, which works on its own host only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / ".lock"
        self._lock: Any = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock, and make the folder if it is missing.

        Raises DataError: another trainer holds it, or the folder cannot be written.
        """
        from filelock import FileLock, Timeout  # late: the launcher loads this module, and is to stay small

        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        lock = FileLock(self.path, fallback_to_soft=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                # More than one try: the last holder may delete the file between our open and our lock.
                lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 10)
            except Timeout:
                raise self._in_use(_read_holder(self.path)) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                holder = _read_holder(self.path)
                if is_alive(holder):
                    raise self._in_use(holder) from None
            self._lock = lock
            self.path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        except OSError as error:
            self.close()
            raise DataError(f"{self.folder}: cannot be written: {error.strerror}") from error

    def _in_use(self, holder: dict[str, Any]) -> DataError:
        who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
        advice = "wait for it or stop it, or choose another --run.name"
        return DataError(f"{self.folder} is in use by {who}; {advice}")

    def close(self) -> None:
        """Release the lock, if it is ours, and remove the folders that acquire made if they are empty."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._lock.release()
        made, self._made, self._lock = self._made, [], None
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def read_status(path: Path) -> dict[str, Any] | None:
    """Return status.json of the run folder `path`; None if missing, or empty after a power failure."""
    try:
        return json.loads((path / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def read_finished(path: Path, config_yaml: str, max_steps: int | None) -> dict[str, Any] | None:
    """Return status.json of the run folder `path` if this very run has finished, with nothing left to do."""
    status = read_status(path)
    if status is None or status["state"] != "finished" or (path / "config.yaml").read_text() != config_yaml:
        return None
    whole = status["last_step"] >= min(status["total_steps"], max_steps or status["total_steps"])
    return status if whole and Path(status["resume_from"]).is_dir() else None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of the run folder `path`, without lines that a kill cut short."""
    events = []
    with contextlib.suppress(FileNotFoundError):
        for line in (path / "events.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    return events


def is_alive(process: dict[str, Any]) -> bool | None:
    """Return whether the process with this `pid` and `host` runs; None if it is on another host."""
    if process.get("host") != socket.gethostname() or not isinstance(process.get("pid"), int):
        return None
    try:
        os.kill(process["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def finite(value: Any) -> Any:
    """Return None for NaN and infinity, which JSON lacks: a window without a good step has no loss."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf  # cut short by a kill, after every checkpoint


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, in place of what it held, by one rename: a kill leaves the old or the new.

    Raises OSError: `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
