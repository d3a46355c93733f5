"""Write files and folders that exist whole or not at all, whenever the process is killed.

New content gets a temporary name beside the final one; one rename publishes it. Only what `sync` was called
for also survives a power failure.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, in place of what it held. Raises OSError: `path` is as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(final: Path, temporary: Path) -> Iterator[None]:
    """Publish as `final` the folder `temporary`, which is made here and filled by the caller.

    The caller syncs the files. An error in its block is raised again, and leaves no folder behind.
    """
    try:
        temporary.mkdir(parents=True)
        yield
        sync(temporary)
        temporary.rename(final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until the disk holds the file or folder `path`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
