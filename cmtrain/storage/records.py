"""Write and read the small files of a run folder: a lost or damaged one costs that record, never the run.

A damaged file has wrong content (cut by a kill, saved by a spreadsheet): the next start sets it aside. One
that the machine cannot read (I/O error, permissions) is read again. No torch, no numpy: for the launcher.
"""

import contextlib
import errno
import fnmatch
import io
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeGuard, TypeVar

from pydantic_core import from_json

from pipelines.atomic import delete, replacing

P = ParamSpec("P")
T = TypeVar("T")

CORRUPT = ".corrupt-"  # begins the name of a file or checkpoint that was set aside
PAUSES_SECONDS = (0.1, 0.5)
MAX_BYTES = 2**28  # of what is no table; the largest, confusion matrices of 1,000 classes, have some 10 MB
STALE_SECONDS = 3600.0  # then a temporary file is nobody's, although its process number is in use
# Errors that are the file's fault, and that the next attempt would meet again: it is missing or of another
# kind. Others (EIO, ESTALE, EACCES, EMFILE) are the machine's.
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EEXIST)
_LEFTOVER = re.compile(r"\.(.+)[.-](\d+)(\.tmp)?")  # the name it was for, and the number of its process


class DamagedRecordError(ValueError):
    """A record whose content is wrong, and why, in one line."""


class Losses:
    """What this process could not write, of the records that a run can do without."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}  # a line for each kind of loss -> how often
        self._news: list[str] = []

    def attempt(self, name: str, write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the result of `write`, or None after any error, which is noted under `name`."""
        try:
            return write(*args, **kwargs)
        except Exception as error:  # no record is worth a run
            self.note(f"{name}: {reason_of(error)}")
            return None

    def note(self, line: str) -> None:
        if line not in self.counts:
            self._news.append(line)
        self.counts[line] = self.counts.get(line, 0) + 1

    def take_news(self) -> list[str]:
        """Return the lines that are new since the last call."""
        news, self._news = self._news, []
        return news


def reason_of(error: Exception) -> str:
    """Return why a read or write failed, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) if isinstance(error, DamagedRecordError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def retried(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of `work`, tried again after trouble of the machine, which may pass."""
    for pause_seconds in PAUSES_SECONDS:
        try:
            return work(*args, **kwargs)
        except OSError as error:
            if error.errno in LASTING:
                raise
        time.sleep(pause_seconds)
    return work(*args, **kwargs)


# Writing


def replace_file(path: Path, content: str | bytes, *, durable: bool = False) -> Path:
    """Write `content` to `path`, in place of what it held, by one rename, as `replacing`. Returns `path`."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


def append(path: Path, text: str, header: str = "") -> None:
    """Append all of `text`, after the `header` if the file is empty, or nothing: no half a line."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        rest = (text if end else header + text).encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def remove_leftovers(folder: Path, *names: str) -> None:
    """Delete what killed writers of `names` (patterns) left in `folder`, such as `.status.json.4711`."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            found = _LEFTOVER.fullmatch(path.name)
            if not found or not any(fnmatch.fnmatchcase(found[1], name) for name in names):
                continue
            pid, age_seconds = int(found[2]), time.time() - path.lstat().st_mtime
            if pid == os.getpid() or not is_running(pid) or age_seconds > STALE_SECONDS:
                delete(path)


def is_running(pid: int) -> bool:
    """Return whether this host has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True


# Reading


def open_regular(path: Path, flags: int = 0, buffering: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """Open a regular file; never wait for a pipe. Raises OSError, DamagedRecordError: something else."""
    if path.is_symlink() and not path.exists():
        raise DamagedRecordError("a link that leads nowhere")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedRecordError("not a regular file")
    return io.BufferedReader(io.FileIO(descriptor), buffering)


def read_bytes(path: Path, limit: float = MAX_BYTES) -> bytes:
    """Return the content of a file. Raises as open_regular, and DamagedRecordError: above `limit` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise DamagedRecordError(f"larger than {limit:,} bytes")
        return file.read()


def load_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises DamagedRecordError: it holds none. OSError: not readable."""
    content = retried(read_bytes, path)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedRecordError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DamagedRecordError(f"holds a {type(record).__name__} where an object should be")
    return record


def read_json(path: Path, damage: list[str] | None = None) -> dict[str, Any] | None:
    """Return the JSON object in `path`; None if missing, or, noted in `damage`, damaged or unreadable."""
    with noting(path, damage), contextlib.suppress(FileNotFoundError):
        return load_json(path)
    return None


def read_records(path: Path, damage: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one per line. `damage` gets a line on those that are none."""
    cut = 0
    with noting(path, damage), retried(open_regular, path) as file:
        for record in map(parse_record, file):
            if record is None:
                cut += 1
            else:
                yield record
    note_left_out(path, damage, "line", cut)


@contextlib.contextmanager
def noting(path: Path, damage: list[str] | None = None) -> Iterator[None]:
    """Go on after the block if it cannot read `path`, and note in `damage` why."""
    try:
        yield
    except (OSError, DamagedRecordError) as error:
        if damage is not None:
            why = "missing" if isinstance(error, FileNotFoundError) else reason_of(error)
            damage.append(f"{path.name}: {why}")


def note_left_out(path: Path, damage: list[str] | None, what: str, count: int) -> None:
    if count and damage is not None:
        damage.append(f"{path.name}: {count} damaged {what}{'s' if count > 1 else ''} left out")


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line; None if it holds none."""
    try:
        record = from_json(line)
    except ValueError:
        # The standard library's parser takes eight times as long, but also file names that are not UTF-8.
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return record if isinstance(record, dict) else None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether `value`, as read from JSON, is a finite number of a size to calculate with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def finite(value: Any) -> Any:
    """Return None for NaN and infinity, which JSON lacks: a window without a good step has no loss."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_event(record: Mapping[str, Any]) -> bool:
    """Return whether a record of events.jsonl has a kind and a time."""
    return isinstance(record.get("event"), str) and is_number(record.get("time"))


# Setting aside


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is neither read again nor lost. Returns its new path."""
    return path.rename(path.with_name(f"{CORRUPT}{path.name}-{time.time_ns()}"))


def keep_lines(path: Path, is_kept: Callable[[bytes], bool | None], header: bytes = b"") -> str:
    """Remove from a table, one record per line, those lines for which `is_kept` is false.

    None marks a damaged line: the table is then set aside as it was, and its good lines are kept. With
    another first line than `header` it is set aside, and a new one begun. A last line cut by a kill is no
    damage. Returns a line for the user about damage, else "". Raises OSError.
    """
    if not os.path.lexists(path):
        return ""
    try:
        lines = retried(read_bytes, path, math.inf).splitlines(keepends=True)
    except DamagedRecordError as error:
        return f"{path.name}: {error}; it is kept as {set_aside(path).name}"
    head, rows = (lines[:1], lines[1:]) if header else ([], lines)
    if header and (not head or head[0].strip() != header):
        what = "is empty" if not lines else "has another header"
        return f"{path.name} {what}; it is kept as {set_aside(path).name}, and a new one begun"
    verdicts = [is_kept(row) if row.strip() else False for row in rows]
    if verdicts and verdicts[-1] is None and not rows[-1].endswith(b"\n") and b"\0" not in rows[-1]:
        verdicts[-1] = False
    kept = [*head, *(row for row, verdict in zip(rows, verdicts, strict=True) if verdict)]
    if kept and not kept[-1].endswith(b"\n"):
        kept[-1] += b"\n"
    line = ""
    if num_damaged := verdicts.count(None):
        line = f"{path.name} has {num_damaged} damaged lines; as it was it is kept as {set_aside(path).name}"
    if kept == lines[: len(kept)] and not line:
        retried(os.truncate, path, sum(map(len, kept)))  # which needs no space on a full disk
    else:
        replace_file(path, b"".join(kept))
    return line
