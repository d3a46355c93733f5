"""One trainer a run folder.

Two trainers in one folder would delete each other's temporary files, mix their logs and overwrite each other's steps.
The first one (its rank 0) holds flock(2) on the file `.lock`, which names its process and host for people. The kernel
frees the lock when that process ends, whichever way, so a lock is never stale: after kill -9 the file is still there,
and the next trainer takes it over.

What shared folders make of it: NFS 4, and NFS 3 with its lock daemon, carry flock to the server, so that hosts exclude
each other; when a client host dies the server frees its locks after its lease (90 s by default on Linux). Lustre does
so when mounted with `flock`. Where flock is kept local (NFS mounted with `nolock` or `local_lock=flock`, most FUSE
object stores), only trainers of the same host exclude each other. Where there is no flock at all, the process named in
the file is looked for, which again can only be done on its own host.
"""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from pipelines.spec import DataError


class RunLock:
    """The right to write to the run folder `folder`, from `acquire` to `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / ".lock"
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock, and make the folder if it is missing.

        Raises:
            DataError: another trainer holds it, or the folder cannot be written.
        """
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
            assert self._descriptor is not None
            os.ftruncate(self._descriptor, 0)
            os.pwrite(
                self._descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0
            )
        except OSError as error:
            self.close()
            raise DataError(f"{self.folder}: cannot be written: {error.strerror}") from error

    def _try(self) -> bool:
        """Whether the lock is ours now; False if its last holder deleted the file between our open and our flock."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken, holder = False, {}
        except BlockingIOError:
            taken, holder = True, _holder(descriptor)
        except OSError:  # this file system has no flock
            holder = _holder(descriptor)
            taken = holder.get("host") == socket.gethostname() and _alive(holder.get("pid"))
        if taken:
            os.close(descriptor)
            who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
            raise DataError(
                f"{self.folder} is in use by {who}; wait for it or stop it, or choose another --run.name"
            )
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            same = False
        if not same:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def close(self) -> None:
        """Give the lock back, if it is ours, and leave no folder behind that is still as empty as it was made."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._descriptor)
        made, self._made, self._descriptor = self._made, [], None
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (TypeError, ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
