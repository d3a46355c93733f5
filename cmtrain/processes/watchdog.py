"""Ends a process that hangs, and leaves behind where it hung.

Two timers, because each alone is blind: a thread of ours can say what happened and end the process with its stacks in
the run folder and on stderr, but it never runs while something holds the interpreter's lock; faulthandler's timer is
plain C and always fires, but can only write stacks and exit. It comes a little later.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from cmtrain.errors import EXIT_ERROR
from cmtrain.processes.failure import Failure, conclude, hang_path, leave_word

T = TypeVar("T")

# The first step of a process compiles, tunes kernels and builds the input pipeline; the first evaluation does as well.
FIRST_TIME_FACTOR = 3

# By how much the C timer comes after the thread. Less than the time a parent gives its ranks to end.
C_TIMER_SECONDS = 2.0

LOOK_SECONDS = 0.5


class Watchdog:
    """Between two calls of `begin` no more than `timeout_seconds` may pass, three times that the first time.

    Args:
        run_path: the run folder, in which `hang-rank<rank>.txt` is empty or absent unless there was a hang.
        timeout_seconds: None for no watchdog.
    """

    def __init__(self, run_path: Path, rank: int, world_size: int, *, timeout_seconds: float | None) -> None:
        self.run_path, self.rank, self.world_size = run_path, rank, world_size
        self.timeout_seconds = timeout_seconds
        self.phase, self.step, self.limit_seconds = "", 0, 0.0
        self.deadline = float("inf")
        self.known_phases: set[str] = set()
        self.closed = threading.Event()
        self.path = hang_path(run_path, rank)
        if timeout_seconds is None:
            return
        run_path.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a")  # noqa: SIM115
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, phase: str, step: int) -> None:
        """Say what is being done now, after `step` finished steps; takes some 50 microseconds."""
        if self.timeout_seconds is None:
            return
        self.limit_seconds = self.timeout_seconds * (1 if phase in self.known_phases else FIRST_TIME_FACTOR)
        self.known_phases.add(phase)
        self.phase, self.step = phase, step
        self.deadline = time.monotonic() + self.limit_seconds
        faulthandler.dump_traceback_later(self.limit_seconds + C_TIMER_SECONDS, exit=True, file=self.file)

    def over(self, items: Iterator[T], phase: str, step: int) -> Iterator[T]:
        """Pass `items` on, each of which may take the whole time."""
        self.begin(phase, step)
        for item in items:
            yield item
            self.begin(phase, step)

    def close(self) -> None:
        """Watch no more."""
        if self.timeout_seconds is None or self.closed.is_set():
            return
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()

    def _watch(self) -> None:
        while not self.closed.wait(LOOK_SECONDS):
            if time.monotonic() >= self.deadline:
                self._end()

    def _end(self) -> None:
        reason = (
            f"hung: the {self.phase} after step {self.step} took longer than {self.limit_seconds:g} s "
            "(train.step_timeout_seconds); hang-rank*.txt say where each rank stood"
        )
        failure = Failure(self.rank, self.world_size, reason, step=self.step)
        leave_word(self.run_path, failure)  # before the stacks: those alone would say "without a word"
        for file in (self.file, sys.stderr):
            file.write(f"{failure.said()}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        conclude(self.run_path)
        os._exit(EXIT_ERROR)
