"""Run cmtrain while one operation on its files fails.

FAIL: "open 17 EIO": the 17th `open` fails with EIO. Operations: open write fsync rename unlink mkdir. A
    `write` may also fail with SHORT: it takes half of what it is given, as on a disk that fills up. Of the
    writes to one file the 1st, 2nd, 4th, 8th and so on count: a checkpoint has one per tensor.
WATCHED: folders and ends of names, separated by colons: only operations on such files count.
COUNT: a file to write the number of each operation to, by name; `failed` is there once one has failed.
"""

import builtins
import errno
import io
import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path

operation, number, error = os.environ.get("FAIL", "none 0 EIO").split()
watched = os.environ["WATCHED"].split(":")
unwatched = ("job.yaml", "stdout.txt", "stderr.txt", "count.json", ".pyc")
counts: Counter[str] = Counter()
lock = threading.Lock()
EVENTS = {"open": "open", "os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def is_watched(path):
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    path = os.path.abspath(os.fsdecode(path))
    inside = any(path.startswith(f"{place}/") or path.endswith(place) for place in watched)
    return inside and not path.endswith(unwatched)


def is_due(what, path):
    """Count an operation; return whether it is the one that fails."""
    if not is_watched(path):
        return False
    with lock:
        counts[what] += 1
        due = what == operation and counts[what] == int(number)
        counts["failed"] += due
    return due


def failure(path):
    code = errno.ENOSPC if error == "SHORT" else getattr(errno, error)
    return OSError(code, os.strerror(code), os.fsdecode(path))


def hook(event, arguments):
    what = EVENTS.get(event)
    # Nothing fails for want of space where nothing is written.
    is_reading = what == "open" and not arguments[2] & WRITES
    if what and not (is_reading and error == "ENOSPC") and is_due(what, arguments[0]):
        raise failure(arguments[0])


class Failing:
    """A file open for writing."""

    def __init__(self, file, path):
        self.file, self.path, self.num_writes = file, path, 0

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.num_writes += 1
        if self.num_writes & (self.num_writes - 1) or not is_due("write", self.path):
            return self.file.write(data)
        if error == "SHORT":
            written = self.file.write(data[: len(data) // 2])
            if isinstance(self.file, io.RawIOBase):
                return written  # as the kernel may
        raise failure(self.path)


def failing_open(file, mode="r", *arguments, **keywords):
    opened = real_open(file, mode, *arguments, **keywords)
    return Failing(opened, file) if set(mode) & set("wax+") and is_watched(file) else opened


def failing_fsync(descriptor):
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if is_due("fsync", path):
        raise failure(path)
    real_fsync(descriptor)


from cmtrain.cli.main import main  # noqa: E402 - with the real functions

real_open, real_fsync = open, os.fsync
builtins.open = io.open = failing_open
os.fsync = failing_fsync
sys.addaudithook(hook)
try:
    code = main()
finally:
    operation = "none"
    Path(os.environ["COUNT"]).write_text(json.dumps(counts))
sys.exit(code)
