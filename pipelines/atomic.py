"""Write a file or folder whole or not at all, one process at a time; remove what killed writers left."""

import contextlib
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from pipelines.spec import visible

WAIT_LINE_SECONDS = 10.0


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` when the block ends without an error.

    After an error it is deleted, and `path` is as it was. Raises OSError.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return where this process writes what will be at `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of `path`, once no process of this host, or of any host if the file system can, has it.

    Where nothing can be locked it is not held, and every process works for itself. `what` the others do.
    """
    lock = FileLock(path.with_suffix(".lock"), fallback_to_soft=False)
    with contextlib.suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=WAIT_LINE_SECONDS)
            except Timeout:
                holder = f"the process that {what} (it holds {lock.lock_file})"
                sys.stderr.write(visible(f"waiting for {holder}") + "\n")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def remove_leftovers(path: Path) -> None:
    """Remove the partial files or folders for `path` whose writers are dead: nobody holds its lock."""
    with contextlib.suppress(OSError, NotImplementedError, Timeout):
        leftovers = list(path.parent.glob(f".{glob.escape(path.name)}.*"))
        if not leftovers:
            return
        with FileLock(path.with_suffix(".lock"), timeout=0, fallback_to_soft=False):
            for leftover in leftovers:
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink(missing_ok=True)
