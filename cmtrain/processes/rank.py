"""Run this process as a rank: find its place, follow its launcher, report its failure. Needs no torch."""

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

from cmtrain import errors
from cmtrain.processes import failure
from cmtrain.processes.failure import Failure
from cmtrain.storage.run_folder import read_status
from pipelines.spec import DataError, print_lines

PARENT = "CMTRAIN_PARENT"  # set by cmtrain's own launcher, to its process id
# `accelerate launch` is known by two together: people export the first alone. See environment.py.
ACCELERATE_LAUNCH = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"

# From the kernel when the launcher is gone, or only its thread that started us, which must not stop a run.
LAUNCHER_GONE = signal.SIGRTMIN + 10
PR_SET_PDEATHSIG = 1

HOLD_BACK_SECONDS = 5.0  # a rank keeps back an error that its host's first rank most likely prints as well
CAUSE_WAIT_SECONDS = 2.0  # a rank that lost contact waits for the report of the rank that failed

# Messages of a broken connection: gloo raises plain RuntimeErrors.
BROKEN = ("gloo", "Connection closed by peer", "Connection reset by peer", "Connection refused",
          "Broken pipe")  # fmt: skip


def is_started_by_launcher() -> bool:
    """Return whether a launcher, cmtrain's own included, decides how many processes there are."""
    return "RANK" in os.environ or _has_parent_to_follow()


def _has_parent_to_follow() -> bool:
    """Return whether cmtrain, torchrun or accelerate started this process, and not a shell."""
    is_torchrun = "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ
    return PARENT in os.environ or is_torchrun or all(name in os.environ for name in ACCELERATE_LAUNCH)


def num_restarts() -> int:
    """Return how often the launcher has started this run before."""
    return int(os.environ.get(RESTARTS, "0"))


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def answer_to_ctrl_c(saved_step: int) -> str:
    """Return what a first Ctrl-C does, and a second one, with the newest checkpoint at `saved_step`."""
    where = f"step {saved_step}" if saved_step else "the beginning"
    return f"Ctrl-C: stopping after this step and saving; Ctrl-C again stops now, to go on from {where}"


def follow_launcher() -> None:
    """Have the kernel signal this process when its launcher dies, so that no rank outlives it as an orphan.
    `accelerate launch` with one process does not pass SIGTERM on. Before training the answer is an exit,
    from StopRequest on a checkpoint. A run that a shell started is not affected: nohup and & work as usual.
    """
    if not _has_parent_to_follow():
        return
    launcher = int(os.environ.get(PARENT, os.getppid()))

    def leave_if_orphaned(number: int, frame: FrameType | None) -> None:
        if os.getppid() != launcher:
            os._exit(errors.EXIT_PREEMPTED)

    signal.signal(LAUNCHER_GONE, leave_if_orphaned)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_GONE)
    leave_if_orphaned(LAUNCHER_GONE, None)  # it may have died before we asked


def run_as_rank(work: Callable[[], int], run_path: Path) -> int:
    """Run `work` in the place that a launcher gave this process, and return the exit code.
    An error that all ranks have is printed by the first rank of each host. A run that failed at the same
    step again and again is not started once more; the exit code is then that of the failure.
    """
    follow_launcher()
    if os.getpid() == 1:  # of a container: the kernel drops signals that it does not handle
        for number in failure.STOP_SIGNALS:
            signal.signal(number, lambda number, frame: os._exit(failure.stop_code(number)))
    # Our own launcher has checked this already.
    if num_restarts() and is_first_rank() and PARENT not in os.environ:
        failure.record_cause(run_path, has_ended=True)
        if loop := failure.crash_loop(run_path):
            print_lines(f"{run_path}: {loop}")
            return int((read_status(run_path) or {}).get("exit_code") or errors.EXIT_ERROR)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return work()
    try:
        code = work()
    except (errors.ConfigError, DataError) as error:
        hold_back()
        sys.stderr.write(f"{errors.message_of(error)}\n")
        code = _exit_code_of(error)
    except Exception as error:
        if is_lost_contact(error):
            hold_back()
        traceback.print_exc()
        code = errors.EXIT_ERROR
    if code:
        # torch's process groups may hang or abort without the other ranks; the exit code would be lost.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_lost_contact(error: BaseException) -> bool:
    """Return whether `error` means that another rank is gone, not that something is wrong with this one."""
    import torch.distributed as dist  # loaded by now, where a group can fail; the launcher never loads it

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in BROKEN)


def hold_back() -> None:
    """Wait, on all but the first rank of this host, for that rank to print what all ranks have found."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(HOLD_BACK_SECONDS)


def report_failure(error: BaseException, run_path: Path, rank: int, world_size: int, step: int) -> Failure:
    """Write why this rank ended after `step` steps; record and return why the run ended.
    The cause is another rank's failure if this rank only lost contact. The rank that caused it prints it.
    """
    lost = is_lost_contact(error)
    reason = " ".join(str(error).split())
    if not isinstance(error, DataError | errors.ConfigError):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    if lost:  # without gloo's own source file and its guesses
        reason = f"lost contact with another rank: {re.sub(r'^.*?[]] ', '', reason).split('. This is')[0]}"
    mine = Failure(rank, world_size, reason, _exit_code_of(error), step, lost)
    failure.write_failure(run_path, mine)
    deadline = time.monotonic() + CAUSE_WAIT_SECONDS
    while (cause := failure.cause_of(failure.read_failures(run_path)) or mine).lost_contact:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    failure.record_cause(run_path)
    if cause.rank == rank != 0:  # rank 0 prints it as the run's last line
        print_lines(cause.describe())
    return cause


def _exit_code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return errors.EXIT_INTERRUPTED
    codes: dict[type, int] = {DataError: errors.EXIT_DATA, errors.ConfigError: errors.EXIT_CONFIG}
    return codes.get(type(error), errors.EXIT_ERROR)
