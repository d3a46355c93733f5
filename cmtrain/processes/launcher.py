"""Start one process per GPU, pass signals on, restart the ranks if they fail, and report how the run ended.

torch's elastic agent (torchrun, accelerate) is not used on one host. It restarts after any exit code, also
that of a preempted rank, ends with 1 whatever the ranks ended with, and waits a fixed 30 s for a frozen
rank. Its torch takes 2.9 s of CPU time and 533 MiB (torch 2.15); this process takes 0.4 s and 35 MiB.
Signals are blocked and taken by `sigtimedwait`, which also works as process 1 of a container. All children
are reaped, adopted ones included.
"""

import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from cmtrain import errors
from cmtrain.processes import failure
from cmtrain.processes.rank import PARENT, RESTARTS, answer_to_ctrl_c
from cmtrain.storage.run_folder import read_status
from pipelines.spec import print_lines

# How long the other ranks have to notice that one is gone, and to report. More than the 2 s of
# rank.CAUSE_WAIT_SECONDS and of watchdog.C_TIMER_SECONDS.
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.5

# Exit codes on which all ranks agree, and those against which starting again does not help.
AGREED = (errors.EXIT_DIVERGED, errors.EXIT_EXPECTATION, errors.EXIT_INTERRUPTED, errors.EXIT_PREEMPTED)
FINAL = (errors.EXIT_DONE, errors.EXIT_CONFIG, errors.EXIT_DATA, *AGREED)


@dataclass
class Attempt:
    """The ranks of one start, by process id, and the exit codes of those that ended (as of subprocess)."""

    ranks: dict[int, int]
    began: float = field(default_factory=time.time)
    exit_codes: dict[int, int] = field(default_factory=dict)
    failures: list[failure.Failure] = field(default_factory=list)

    @property
    def running(self) -> list[int]:
        return [pid for pid, rank in self.ranks.items() if rank not in self.exit_codes]

    @property
    def failed(self) -> bool:
        return any(code and code not in AGREED for code in self.exit_codes.values())


def start(command: list[str], environment: dict[str, str]) -> int:
    """Start `command` in a session of its own, so that a Ctrl-C reaches it once. Return its id."""
    return os.posix_spawn(sys.executable, command, os.environ | environment, setsid=True, setsigmask=())


def run_ranks(command: list[str], nproc: int, *, max_restarts: int, run_path: Path) -> int:
    """Run `command` as ranks 0..nproc-1, up to `max_restarts` times more if it fails. Return its code."""
    taken = {signal.SIGCHLD} | {n for n in failure.STOP_SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    try:
        for restarts in range(max_restarts + 1):
            attempt = _start_ranks(command, nproc, restarts)
            is_stopped = _watch(attempt, taken, run_path)
            code = _outcome(attempt, run_path)
            if code in FINAL or is_stopped:
                break
            if loop := failure.crash_loop(run_path):
                print_lines(f"cmtrain: {loop}")
                break
            if restarts < max_restarts:
                print_lines(f"cmtrain: restart {restarts + 1} of {max_restarts}")
        return code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_ranks(command: list[str], nproc: int, restarts: int) -> Attempt:
    common = {PARENT: str(os.getpid()), RESTARTS: str(restarts)}
    if nproc == 1:
        return Attempt({start(command, common): 0})
    with socket.socket() as free:  # a new port each time: nothing of the attempt before can answer
        free.bind(("127.0.0.1", 0))
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]
    return Attempt({start(command, environment): rank for rank, environment in enumerate(ranks)})


def _watch(attempt: Attempt, taken: set[signal.Signals], run_path: Path) -> bool:
    """Wait until all ranks have ended; when one fails, end the others. Return whether a stop signal came."""
    is_stopped, deadline = False, float("inf")
    while attempt.running:
        received = signal.sigtimedwait(taken, POLL_SECONDS)
        if received and received.si_signo != signal.SIGCHLD:
            if received.si_signo == signal.SIGINT and not is_stopped:
                print_lines(f"cmtrain: {_answer(attempt, run_path)}")
            is_stopped = True
            _send(attempt, received.si_signo)
        failed_before = attempt.failed
        _reap(attempt, run_path)
        if attempt.failed and not failed_before:
            deadline = time.monotonic() + GRACE_SECONDS
            _send(attempt, signal.SIGTERM)  # ends those that do not train yet; the others stop at a step
        if time.monotonic() > deadline:
            _send(attempt, signal.SIGKILL)
    return is_stopped


def _answer(attempt: Attempt, run_path: Path) -> str:
    """Return what a Ctrl-C does, which the ranks cannot print at once."""
    if not _has_begun(attempt, run_path):
        return "Ctrl-C: stopping before the first step; nothing is lost"
    saved = Path((read_status(run_path) or {}).get("resume_from") or "step-0").name
    return answer_to_ctrl_c(int(saved.rpartition("-")[2]))


def _reap(attempt: Attempt, run_path: Path) -> None:
    """Collect exit codes, and write the failures of ranks that began to train and wrote none."""
    failed_before, pid = attempt.failed, -1
    while pid:  # 0: no other child has ended
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid not in attempt.ranks:
            continue
        rank, code = attempt.ranks[pid], os.waitstatus_to_exitcode(status)
        attempt.exit_codes[rank] = code
        if code and not failed_before:  # a later end is a consequence, or was our doing
            dead = failure.failure_of_dead_process(rank, len(attempt.ranks), code)
            attempt.failures.append(dead)
            reported = [known.rank for known in failure.read_failures(run_path)]
            if _has_begun(attempt, run_path) and rank not in reported:
                failure.write_failure(run_path, dead)


def _has_begun(attempt: Attempt, run_path: Path) -> bool:
    status = read_status(run_path) or {}
    return status.get("state") in ("running", "failed") and (status.get("updated") or 0) >= attempt.began


def _send(attempt: Attempt, number: int) -> None:
    for pid in attempt.running:
        os.kill(pid, number)  # not reaped yet, so the id is still this process's


def _outcome(attempt: Attempt, run_path: Path) -> int:
    """Return the exit code of an attempt that has ended, and record the cause in status.json."""
    if not any(attempt.exit_codes.values()):
        return errors.EXIT_DONE
    status = read_status(run_path) or {}
    has_ended = status.get("state") in ("finished", "preempted", "diverged")
    if has_ended and (status.get("updated") or 0) >= attempt.began and status.get("exit_code") is not None:
        return int(status["exit_code"])
    recorded = failure.record_cause(run_path, since=attempt.began) if _has_begun(attempt, run_path) else None
    cause = recorded or attempt.failures[0]
    if cause.exit_code not in FINAL and cause.exit_code > 128:  # killed, so it could not print why
        print_lines(f"cmtrain: {cause.describe()}")
    return cause.exit_code
