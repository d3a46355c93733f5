"""Write a file or folder whole or not at all, one process at a time; remove what killed writers left."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.spec import is_device, print_lines

WAIT_LINE_SECONDS = 10.0


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` when the block ends without an error.

    `durable`: wait until the disk holds it, so that a power failure leaves no empty file. After an error
    `path` is as it was; only a device is written directly. Raises OSError, which names `path`.
    """
    partial = partial_path(path)
    try:
        if is_device(path):
            with open(path, "ab") as file:
                yield file
            return
        with open(partial, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)  # nobody knows the temporary file
        raise


@contextlib.contextmanager
def new_folder(final: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Publish as `final`, by a rename, a folder made here and yielded; the caller fills and syncs it.
    `temporary`: its path until then; None for partial_path.
    """
    temporary = temporary or partial_path(final)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync(temporary)
        temporary.rename(final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until the disk holds the file or folder `path`: only then does it survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Return where this process writes what will be at `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of `path`, once no process of this host, or of any host if the file system can, has it.
    What killed writers left of `path` is then removed. Where nothing can be locked, every process works for
    itself. `what` the others do, for a message.
    """
    from filelock import FileLock, Timeout  # late: it takes long to load, and the launcher needs none of it

    lock = FileLock(path.with_suffix(".lock"), fallback_to_soft=False)
    with contextlib.suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=WAIT_LINE_SECONDS)
            except Timeout:
                print_lines(f"waiting for the process that {what} (it holds {lock.lock_file})")
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
            delete(leftover)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def delete(path: Path) -> None:
    """Delete a file or folder, and never what a symbolic link in its place, or in it, leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
