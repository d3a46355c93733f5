"""Kill a process before its N-th change of the file system."""

import os
import signal
import sys
from collections.abc import Callable

CHANGES = {"mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "link", "symlink", "ftruncate"}


def killed_before(number: int, work: Callable[[], None]) -> bool:
    """Do `work` in a fork that is killed before its change `number` (from 0). Return whether it was killed.

    Call from a process without threads of its own, such as conftest.FORKS starts.
    """
    pid = os.fork()
    if pid == 0:
        changes = 0

        def watch(frame, event, argument):
            nonlocal changes
            if event == "c_call" and argument.__name__ in CHANGES:
                if changes == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                changes += 1

        sys.setprofile(watch)
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)
