"""End a process that hangs, and write down where it hung.

Of two timers, a thread reports, writes stacks to the run folder and stderr, and ends the process, but cannot
run while something holds the interpreter's lock. faulthandler's, in C, fires later, and only writes stacks.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from cmtrain.errors import EXIT_ERROR
from cmtrain.processes.failure import Failure, record_cause, write_failure
from cmtrain.storage.records import Losses

T = TypeVar("T")

FIRST_TIME_FACTOR = 3  # the first step and the first evaluation compile, tune and build the input pipeline
C_TIMER_SECONDS = 2.0  # delay of the C timer after the thread; less than launcher.GRACE_SECONDS
POLL_SECONDS = 0.5


class Watchdog:
    """Allows `timeout_seconds` (None: any time) between calls of `begin`, three times that the first time.
    `run_path`/hang-rank<rank>.txt is empty or absent unless it hung. `losses` notes if it cannot be written.
    """

    def __init__(
        self, run_path: Path, rank: int, world_size: int, *, timeout_seconds: float | None,
        losses: Losses | None = None,
    ) -> None:  # fmt: skip
        self.run_path, self.rank, self.world_size = run_path, rank, world_size
        self.losses = losses or Losses()
        self.timeout_seconds = timeout_seconds
        self.phase, self.step, self.limit_seconds, self.deadline = "", 0, 0.0, float("inf")
        self.known_phases: set[str] = set()
        self.closed = threading.Event()
        self.path = run_path / f"hang-rank{rank}.txt"
        if timeout_seconds is None:
            return
        opened = self.losses.attempt(self.path.name, open, self.path, "a")
        self.file: IO[Any] = opened or open(2, "w", closefd=False)  # noqa: SIM115
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, phase: str, step: int) -> None:
        """Begin `phase` after `step` finished steps, and start its time; takes some 50 microseconds."""
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
        if self.timeout_seconds is None or self.closed.is_set():
            return
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()
        self.losses.attempt(self.path.name, self._remove)

    def _remove(self) -> None:
        self.file.close()
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()

    def _watch(self) -> None:
        while not self.closed.wait(POLL_SECONDS):
            if time.monotonic() >= self.deadline:
                self._end()

    def _end(self) -> None:
        what = f"the {self.phase} after step {self.step} took longer than {self.limit_seconds:g} s"
        reason = f"hung: {what} (train.step_timeout_seconds); hang-rank*.txt have the stacks of each rank"
        failure = Failure(self.rank, self.world_size, reason, step=self.step)
        write_failure(self.run_path, failure)  # before the stacks, which alone mean a hang without a report
        for file in (self.file, sys.stderr):
            self.losses.attempt(self.path.name, print, failure.describe(), file=file, flush=True)
            self.losses.attempt(self.path.name, faulthandler.dump_traceback, file)
        self.losses.attempt("status.json", record_cause, self.run_path)
        os._exit(EXIT_ERROR)
