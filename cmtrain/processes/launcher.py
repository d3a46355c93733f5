"""`cmtrain` as the parent of one process per GPU: starts the ranks, passes signals on, restarts, says how it ended.

Not torch's elastic agent, which is what torchrun and accelerate are for on several hosts, because it stands in the way
of what is promised here: it restarts on any exit code, a preempted rank's too, it handles a signal by an exception from
its handler, so that a second one interrupts the shutdown, it waits a fixed 30 s for a rank that is frozen, and it ends
with exit code 1 whatever the ranks ended with. It also needs torch: 2.9 s of CPU time, which the ranks would wait for,
and 533 MiB, where this process takes 0.4 s and 35 MiB (torch 2.15).

This process imports no torch, starts no thread and opens no CUDA device. Signals are blocked and taken one by one from
`sigtimedwait`, which works as process 1 of a container, too; every child is reaped, adopted ones included.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cmtrain.errors import (
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_EXPECTATION,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
)
from cmtrain.processes.failure import (
    STOP_SIGNALS,
    Failure,
    conclude,
    crash_loop,
    death,
    leave_word,
    words_left,
)
from cmtrain.processes.rank import PARENT, RESTARTS
from cmtrain.storage.run_folder import read_status

# How long the other ranks have to notice that one is gone, and to leave word. It is more than the 2 s that a rank waits
# for another's word (launch.WORD_SECONDS), and that faulthandler's timer comes late (watchdog.C_TIMER_SECONDS).
GRACE_SECONDS = 5.0

# What all ranks end with together: divergence, a missed expectation, a stop.
AGREED = (EXIT_DIVERGED, EXIT_EXPECTATION, EXIT_INTERRUPTED, EXIT_PREEMPTED)

# Starting again does not help against any of these.
FINAL = (EXIT_DONE, EXIT_CONFIG, EXIT_DATA, *AGREED)

POLL_SECONDS = 0.5

Start = Callable[[Sequence[str], dict[str, str]], int]


@dataclass
class Attempt:
    """The ranks of one start, by process id, and how those that ended have ended (as subprocess gives it)."""

    ranks: dict[int, int]
    began: float = field(default_factory=time.time)
    exit_codes: dict[int, int] = field(default_factory=dict)
    deaths: list[Failure] = field(default_factory=list)

    @property
    def running(self) -> list[int]:
        return [pid for pid, rank in self.ranks.items() if rank not in self.exit_codes]

    @property
    def failed(self) -> bool:
        return any(code and code not in AGREED for code in self.exit_codes.values())


def visible_gpus() -> int:
    """How many GPUs training would see, without CUDA, which would put a context into this process.

    The driver's management library counts what this container has; CUDA_VISIBLE_DEVICES leaves some of them out.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint()
    if library.nvmlInit_v2() != 0:
        return 0
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlShutdown()
    return num_visible(os.environ.get("CUDA_VISIBLE_DEVICES"), count.value)


def num_visible(devices: str | None, num_installed: int) -> int:
    """How many of the installed GPUs CUDA_VISIBLE_DEVICES leaves: those before the first entry that is none."""
    if devices is None:
        return num_installed
    entries = [entry.strip() for entry in devices.split(",")]
    is_one = [
        entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < num_installed)
        for entry in entries
    ]
    return is_one.index(False) if False in is_one else len(entries)


def start(command: Sequence[str], environment: dict[str, str]) -> int:
    """Start `command` in a session of its own, so that a terminal's Ctrl-C reaches it once, through us."""
    return os.posix_spawn(
        sys.executable, list(command), os.environ | environment, setsid=True, setsigmask=()
    )


def run_ranks(
    command: Sequence[str], nproc: int, *, max_restarts: int, run_path: Path, start: Start = start
) -> int:
    """Run `command` as ranks 0..nproc-1, again if it fails, at most `max_restarts` times. Returns the exit code.

    Args:
        run_path: the run folder, which tells how far the run came and what failed.
        start: starts a process with additional environment variables and returns its id.
    """
    taken = {signal.SIGCHLD} | {n for n in STOP_SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    try:
        for restarts in range(max_restarts + 1):
            attempt = _start_ranks(command, nproc, restarts, start)
            stopped = _watch(attempt, taken, run_path)
            code = _outcome(attempt, run_path)
            if code in FINAL or stopped:
                break
            if loop := crash_loop(run_path):
                _say(loop)
                break
            if restarts < max_restarts:
                _say(f"restart {restarts + 1} of {max_restarts}")
        return code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_ranks(command: Sequence[str], nproc: int, restarts: int, start: Start) -> Attempt:
    common = {PARENT: str(os.getpid()), RESTARTS: str(restarts)}
    if nproc == 1:
        return Attempt({start(command, common): 0})
    with socket.socket() as free:  # a new port each time: nothing of the attempt before can answer
        free.bind(("127.0.0.1", 0))
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    return Attempt(
        {start(command, common | {"RANK": str(r), "LOCAL_RANK": str(r)}): r for r in range(nproc)}
    )


def _watch(attempt: Attempt, taken: set[signal.Signals], run_path: Path) -> bool:
    """Wait until all ranks have ended; when one fails, end the others. Returns whether a stop signal came."""
    stopped = False
    deadline = float("inf")
    while attempt.running:
        received = signal.sigtimedwait(taken, POLL_SECONDS)
        if received and received.si_signo != signal.SIGCHLD:
            stopped = True
            _send(attempt, received.si_signo)
        failed_before = attempt.failed
        _reap(attempt, run_path)
        if attempt.failed and not failed_before:
            deadline = time.monotonic() + GRACE_SECONDS
            _send(attempt, signal.SIGTERM)  # for those that have not begun to train; the others take note
        if time.monotonic() > deadline:
            _send(attempt, signal.SIGKILL)
    return stopped


def _reap(attempt: Attempt, run_path: Path) -> None:
    """Take note of every child that has ended, and leave word for those that began to train and could not."""
    intact = not attempt.failed
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in attempt.ranks:
            rank, code = attempt.ranks[pid], os.waitstatus_to_exitcode(status)
            attempt.exit_codes[rank] = code
            if code and intact:  # what ends later is a consequence, or was ended by us
                attempt.deaths.append(death(rank, len(attempt.ranks), code))
                if _has_begun(attempt, run_path) and rank not in {
                    word.rank for word in words_left(run_path)
                }:
                    leave_word(run_path, attempt.deaths[-1])


def _has_begun(attempt: Attempt, run_path: Path) -> bool:
    status = read_status(run_path) or {}
    return status.get("state") in ("running", "failed") and status["updated"] >= attempt.began


def _send(attempt: Attempt, number: int) -> None:
    for pid in attempt.running:
        os.kill(pid, number)  # not reaped yet, so the id is still this process's


def _outcome(attempt: Attempt, run_path: Path) -> int:
    """The exit code of an attempt that has ended, and status.json made to tell the same."""
    if not any(attempt.exit_codes.values()):
        return EXIT_DONE
    status = read_status(run_path) or {}
    if status.get("state") in ("finished", "preempted", "diverged") and status["updated"] >= attempt.began:
        return int(status["exit_code"])
    cause = conclude(run_path, since=attempt.began) if _has_begun(attempt, run_path) else attempt.deaths[0]
    if cause is None:
        return EXIT_ERROR
    if cause.exit_code not in FINAL and cause.exit_code > 128:  # killed, and so unable to say it
        _say(cause.said())
    return cause.exit_code


def _say(line: str) -> None:
    sys.stderr.write(f"cmtrain: {line}\n")
    sys.stderr.flush()
