"""What a process does because a launcher started it, as one of several ranks or alone. Needs no torch until it must."""

import ctypes
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from cmtrain.errors import EXIT_CONFIG, EXIT_DATA, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError
from cmtrain.processes.failure import (
    STOP_SIGNALS,
    Failure,
    cause_of,
    conclude,
    crash_loop,
    leave_word,
    stop_code,
    words_left,
)
from cmtrain.storage.run_folder import read_status
from pipelines.spec import DataError

# Variables by which launchers can be told from a shell; cmtrain's own parent sets the first, to its process id.
PARENT = "CMTRAIN_PARENT"
LAUNCHERS = (PARENT, "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"

# The kernel sends it when the launcher is gone. A signal of its own, because the kernel also sends it when only the
# launcher's thread that started us ends, which must not stop a run.
LAUNCHER_GONE = signal.SIGRTMIN + 10
PR_SET_PDEATHSIG = 1

# How long a rank keeps an error to itself that its host's first rank has most likely found as well. That one says it
# and ends, upon which the launcher ends the others.
HOLD_BACK_SECONDS = 5.0

# torch's own words for a connection that broke: gloo raises plain RuntimeErrors.
BROKEN = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
)


def is_started_by_launcher() -> bool:
    """Whether some launcher, cmtrain's own parent included, decides how many processes there are."""
    return "RANK" in os.environ or any(name in os.environ for name in LAUNCHERS)


def num_restarts() -> int:
    """How often the launcher has started this run before."""
    return int(os.environ.get(RESTARTS, "0"))


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def follow_launcher() -> None:
    """Have the kernel tell this process when its launcher dies, so that no rank outlives it as an orphan.

    `accelerate launch` with one process does not pass SIGTERM on: it dies and leaves the trainer alone. From
    StopRequest on this is answered with a checkpoint, before with an exit. A run that a shell started is not touched:
    nohup and & work as ever.
    """
    if not any(name in os.environ for name in LAUNCHERS):
        return
    launcher = int(os.environ.get(PARENT, os.getppid()))

    def leave_if_orphaned(number: int, frame: FrameType | None) -> None:
        if os.getppid() != launcher:
            os._exit(EXIT_PREEMPTED)

    signal.signal(LAUNCHER_GONE, leave_if_orphaned)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_GONE)
    leave_if_orphaned(LAUNCHER_GONE, None)  # it may have died before we asked


def leave_on_stop_signals() -> None:
    """Let a stop signal end this process before training begins, where the kernel does not: in process 1.

    The kernel does not deliver to process 1, which is what a container starts, what it has no handler for.
    """
    if os.getpid() == 1:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: os._exit(stop_code(number)))


def run_as_rank(work: Callable[[], int], run_path: Path) -> int:
    """Run `work` as whatever a launcher made of this process, and return the exit code.

    An error that all ranks have is printed by the first rank of a host. A restart of a run that fails at the same step
    again and again does not start it once more, and ends with the exit code of the failure.
    """
    follow_launcher()
    leave_on_stop_signals()
    if num_restarts() and is_first_rank() and PARENT not in os.environ:  # a parent has looked already
        conclude(run_path, silent=True)
        if loop := crash_loop(run_path):
            sys.stderr.write(f"{run_path}: {loop}\n")
            return int((read_status(run_path) or {}).get("exit_code") or EXIT_ERROR)
    if num_ranks() == 1:
        return work()
    try:
        code = work()
    except (ConfigError, DataError) as error:
        hold_back()
        sys.stderr.write(f"{error}\n")
        code = EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_DATA
    except Exception as error:
        if is_lost_contact(error):
            hold_back()
        traceback.print_exc()
        code = EXIT_ERROR
    if code:
        # torch's process groups may hang or abort when they are torn down without the other ranks, and the exit code
        # would be lost.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` says that another rank is gone, not that something is wrong with this one."""

    import torch.distributed as dist  # loaded by now, where a group can fail; the launcher never loads it

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in BROKEN)


def hold_back() -> None:
    """Leave it to the first rank of this host to say what all ranks have found."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(HOLD_BACK_SECONDS)


# How long a rank that lost contact waits for the word of the one that failed.
WORD_SECONDS = 2.0


def tell_failure(error: BaseException, run_path: Path, *, rank: int, world_size: int, step: int) -> Failure:
    """Leave word of what ended this rank after `step` steps, and find out what ended the run.

    The cause is printed by the rank that has it, and status.json tells it from then on, whichever rank is left.

    Returns:
        The cause, which is another rank's where this one only lost contact.
    """
    lost = is_lost_contact(error)
    reason = _in_one_line(error)
    if lost:  # without gloo's own source file and its guesses
        reason = f"lost contact with another rank: {re.sub(r'^.*?[]] ', '', reason).split('. This is')[0]}"
    failure = Failure(rank, world_size, reason, _exit_code_of(error), step, lost)
    leave_word(run_path, failure)
    deadline = time.monotonic() + WORD_SECONDS
    while lost and all(word.lost_contact for word in words_left(run_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    cause = cause_of(words_left(run_path)) or failure
    conclude(run_path)
    if cause.rank == rank != 0:  # rank 0 says it as the run's last word
        sys.stderr.write(f"{cause.said()}\n")
    return cause


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, DataError | ConfigError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _exit_code_of(error: BaseException) -> int:
    codes = {KeyboardInterrupt: EXIT_INTERRUPTED, DataError: EXIT_DATA, ConfigError: EXIT_CONFIG}
    return codes.get(type(error), EXIT_ERROR)
