"""Where a step's time goes on the device: forward, backward, optimizer.

On a GPU the host is long past a kernel when it runs, so host clocks would measure nothing. There, marks are CUDA
events, and they are read once the device has passed them, a step or so later: nobody waits. On a CPU, marks are times.
"""

import time
from collections import deque
from itertools import pairwise
from typing import Any

import torch

PHASES = ("forward", "backward", "optimizer")

# Steps whose events the device may not have passed yet; the host seldom is more than a few steps ahead.
MAX_PENDING_STEPS = 64


class Phases:
    """Marks set during a step, and what they say once the step is over."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.pending: deque[list[tuple[str, Any]]] = deque(maxlen=MAX_PENDING_STEPS)

    def begin(self, phase: str) -> None:
        """The step is in `phase` from here on; "" is none of PHASES."""
        self.marks.append((phase, self._mark()))

    def end_step(self) -> None:
        self.begin("")
        self.pending.append(self.marks)
        self.marks = []

    def take(self) -> list[dict[str, float]]:
        """Seconds by phase of each step that the device has finished since the last call, oldest first; never waits."""
        taken = []
        while self.pending and self._is_passed(self.pending[0][-1][1]):
            taken.append(self._seconds(self.pending.popleft()))
        return taken

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _is_passed(self, mark: Any) -> bool:
        return not self.on_gpu or mark.query()

    def _seconds(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in pairwise(marks):
            if phase:
                seconds[phase] += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
        return seconds
