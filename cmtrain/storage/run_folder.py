"""Write and read the files of a run folder (docs/checkpoints.md) and keep a second trainer out of it."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from cmtrain.config.strict_yaml import parse
from cmtrain.storage import records
from cmtrain.storage.records import DamagedRecordError, Losses, is_number, keep_lines, replace_file, retried
from pipelines.spec import DataError

SUMMARY_COLUMNS = ("epoch", "step", "train_loss", "eval_loss", "eval_top1", "eval_top5", "eval_ema_loss",
                   "eval_ema_top1", "eval_ema_top5", "lr", "eval_map", "eval_ema_map")  # fmt: skip
RUNS = Path("runs")
SUMMARY_HEADER = ",".join(SUMMARY_COLUMNS)
WEIGHTS_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
CLASSES_NAME, REPORT_NAME, RECEIPT_NAME = "classes.json", "report.html", "receipt.json"
SAMPLE_NAME, MISTAKES_NAME = "augmented.png", "mistakes.png"
HASHED = ("config.yaml", "log.jsonl", "events.jsonl", "summary.csv", CLASSES_NAME)
RECORDS = (
    "config.yaml", "status.json", "log.jsonl", "summary.csv", "events.jsonl", CLASSES_NAME, REPORT_NAME,
    RECEIPT_NAME,
)  # fmt: skip

# What readers of status.json rely on; a field of another type counts as missing.
_TYPES: dict[str, type] = dict.fromkeys(("result", "lost"), dict)
_TYPES |= dict.fromkeys(("state", "host", "reason", "resume_from", "metrics_url"), str)
_NUMBERS = ("step", "last_step", "total_steps", "updated", "pid", "exit_code", "loss", "eta_seconds",
            "images_per_second", "data_wait_ratio", "best_top1", "best_step")  # fmt: skip

# A running run that wrote nothing for this long has probably ended, unless it has a metrics.stall_seconds.
SILENT_SECONDS = 600.0

LOCK_SECONDS = 0.2
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunFolder:
    """Writes one run's files, on rank 0 only. What fails, as on a full disk, `losses` notes: no run ends."""

    def __init__(self, path: Path, losses: Losses | None = None) -> None:
        self.path, self.losses = path, losses or Losses()
        self._status: dict[str, Any] = read_status(path) or {}
        path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, text: str) -> None:
        self.losses.attempt(name, replace_file, self.path / name, text)

    def status(self, *, retries: bool = False, **fields: Any) -> bool:
        """Merge `fields` into status.json, atomically. Return whether that was written.
        `retries`: try again for a moment, and sync it: for what must not be lost, as how the run ended.
        """
        lost = dict(self.losses.counts)
        self._status |= fields | {"updated": time.time(), "pid": os.getpid(), "lost": lost}
        path, text = self.path / "status.json", json.dumps(self._status, indent=1) + "\n"
        if retries:
            return bool(self.losses.attempt(path.name, retried, replace_file, path, text, durable=True))
        return bool(self.losses.attempt(path.name, replace_file, path, text))

    def snapshot(self) -> dict[str, Any]:
        """Return the content of status.json; for any thread."""
        return dict(self._status)

    def event(self, kind: str, /, **fields: Any) -> None:
        self._append("events.jsonl", {"time": time.time(), "event": kind} | fields)

    def log(self, record: dict[str, Any]) -> None:
        self._append("log.jsonl", record)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self.losses.attempt(name, records.append, self.path / name, json.dumps(record, default=str) + "\n")

    def summary(self, row: dict[str, Any]) -> None:
        text = io.StringIO(newline="")
        csv.DictWriter(text, SUMMARY_COLUMNS, restval="").writerow(row)
        path = self.path / "summary.csv"
        self.losses.attempt(path.name, records.append, path, text.getvalue(), f"{SUMMARY_HEADER}\r\n")

    def rewind(self, step: int) -> list[str]:
        """Remove log records and summary rows after `step`: a resumed run will do those steps again.
        Returns lines for the user on damaged tables. Raises OSError: a table would hold those steps twice.
        """

        def is_until(found: Any) -> bool | None:
            return found <= step if is_number(found) else None

        log, summary, header = self.path / "log.jsonl", self.path / "summary.csv", SUMMARY_HEADER.encode()
        found = [keep_lines(log, lambda line: is_until((records.parse_record(line) or {}).get("step")))]
        found += [keep_lines(summary, lambda line: is_until(_step_of_row(line)), header)]
        return list(filter(None, found))


class RunLock:
    """The right to write to `folder`, from `acquire` to `close` (shared file systems: docs/checkpoints.md).
    Rank 0 locks the file `.lock`, which names its process and host. The kernel frees it when that process
    ends, even by kill -9. Where a file system has no locks, the process is looked for, on its own host only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / ".lock"
        self._lock: Any = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock; make the folder if missing. Raises DataError: in use, or it cannot be written."""
        from filelock import FileLock, Timeout  # late: the launcher loads this module, and is to stay small

        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        lock = FileLock(self.path, fallback_to_soft=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                # More than one try: the last holder may delete the file between our open and our lock.
                lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 10)
            except Timeout:
                raise self._in_use() from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                if is_alive(records.read_json(self.path) or {}):
                    raise self._in_use() from None
            self._lock = lock
            self.path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        except OSError as error:
            self.close()
            place = error.filename or self.folder
            raise DataError(f"{place}: cannot be written: {error.strerror}") from error

    def _in_use(self) -> DataError:
        holder = records.read_json(self.path)
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


def read_status(path: Path, damage: list[str] | None = None) -> dict[str, Any] | None:
    """Return status.json of a run folder, as records.read_json does, without fields of a wrong type."""
    status = records.read_json(path / "status.json", damage)
    return None if status is None else {key: v for key, v in status.items() if _is_field(key, v)}


def _is_field(key: str, value: Any) -> bool:
    is_right = is_number(value) if key in _NUMBERS else isinstance(value, _TYPES.get(key, object))
    return value is None or is_right


def read_finished(path: Path, config_yaml: str, max_steps: int | None) -> dict[str, Any] | None:
    """Return status.json of the run folder `path` if this very run has finished, with nothing left to do."""
    status = read_status(path) or {}
    needed = ("last_step", "total_steps", "exit_code", "result", "resume_from")
    if status.get("state") != "finished" or any(status.get(key) is None for key in needed):
        return None
    try:
        if retried(records.read_bytes, path / "config.yaml").decode() != config_yaml:
            return None
        has_checkpoint = Path(status["resume_from"]).is_dir()
    except (OSError, ValueError):
        return None  # then the run goes on from its last checkpoint, and writes what is missing
    whole = status["last_step"] >= min(status["total_steps"], max_steps or status["total_steps"])
    return status if whole and has_checkpoint else None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of the run folder `path`, without damaged lines."""
    return list(filter(records.is_event, records.read_records(path / "events.jsonl")))


def set_damaged_aside(path: Path) -> list[str]:
    """Rename the damaged records of the run folder `path`, and delete what killed writers left.
    Only for the process that holds the run's lock. Log and summary: see RunFolder.rewind. Returns a line for
    the user about each damaged record. Raises OSError: one cannot be renamed.
    """
    events = keep_lines(
        path / "events.jsonl", lambda line: records.is_event(records.parse_record(line) or {}) or None
    )
    lines = [events] if events else []
    files = [path / name for name in ("status.json", CLASSES_NAME, "config.yaml")]
    for record in [*files, *sorted(path.glob("failed-rank*.json"))]:
        try:
            load_config(record) if record.suffix == ".yaml" else records.load_json(record)
        except DamagedRecordError as error:
            lines.append(f"{record.name}: {error}; it is kept as {records.set_aside(record).name}")
        except OSError:
            continue  # missing; or the machine cannot read it, which is no damage
    records.remove_leftovers(path, *RECORDS, SAMPLE_NAME, MISTAKES_NAME, "failed-rank*.json")
    records.remove_leftovers(path.parent / ".targets", f"{path.name}-[0-9]*.json")
    return lines


def load_config(path: Path) -> dict[str, Any]:
    """Return the sections of a run's config.yaml, unchecked. Raises DamagedRecordError, OSError."""
    try:
        root, problems = parse(retried(records.read_bytes, path).decode())
    except UnicodeDecodeError as error:
        raise DamagedRecordError(f"not text: {error}") from error
    if problems or root is None or not isinstance(root.value, dict):
        raise DamagedRecordError("cannot be read as a configuration")
    return root.value


def is_alive(process: dict[str, Any]) -> bool | None:
    """Return whether the process with this `pid` and `host` runs; None if it is on another host."""
    pid = process.get("pid")
    if process.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return None
    return records.is_running(pid)


def write_receipt(run: Path, facts: dict[str, Any]) -> None:
    """Write receipt.json, by which `cmtrain verify` knows a run again: `facts`, and `hashes` of files."""
    content = json.dumps(facts | {"sha256": hashes(run)}, indent=1, default=str)
    replace_file(run / RECEIPT_NAME, f"{content}\n")


def hashes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each of HASHED and of each checkpoint's manifest, which has its content's."""
    files = [run / name for name in HASHED] + sorted(run.glob("checkpoints/step-*/manifest.json"))
    found = {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def _step_of_row(line: bytes) -> float | None:
    """Return the step of a row of summary.csv; None if it is not a row of numbers, one per column."""
    try:
        numbers = [float(cell) if cell else 0.0 for cell in line.strip().split(b",")]
    except ValueError:
        return None
    return numbers[1] if len(numbers) == len(SUMMARY_COLUMNS) else None


def find_run(place: str, *, trained: bool = True) -> tuple[Path, Path]:
    """Return the run folder that `place` is or is in, and its path, maybe below runs/. Raises DataError.
    `trained`: whether it needs checkpoints; a run that ended before its first one has a configuration.
    """
    for path in (Path(place), RUNS / place):
        # RUN for RUN/checkpoints/step-* and RUN/repaired/step-*
        for run in (path, path.absolute().parent.parent) if path.name.startswith("step-") else (path,):
            if (run / "checkpoints").is_dir() or (not trained and (run / "config.yaml").is_file()):
                return run, path
    raise DataError(f"{place}: no run and no checkpoint of one: it has no checkpoints of a run")


def find_export(place: str) -> Path | None:
    """Return the weights or ONNX file of the export at `place`: that file, or one of its folder; or None."""
    path = Path(place)
    files = [path / "model.safetensors", path / "model.onnx"] if path.is_dir() else [path]
    return next(filter(Path.is_file, files), None)


def why_no_weights(path: Path) -> str:
    """Return why `path` cannot hold weights for model.init_from, as far as its name and kind show, or ""."""
    if path.is_dir() or (path.exists() and path.resolve().suffix in WEIGHTS_SUFFIXES):
        return ""
    endings = ", ".join(WEIGHTS_SUFFIXES)
    what = "neither a folder nor a weights file" if path.exists() else "no such file or folder"
    return f"{what}; weights are a run, a checkpoint, an export or a file that ends in {endings}"
