"""Where a step's wall time goes: waiting for data, or not. Host clocks only."""

import time
from collections.abc import Iterator

from pipelines.spec import Batch


class Stopwatch:
    """Reads one lap after another, and how much of each was waiting."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.waited = 0.0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass `batches` on, and note how long each one let us wait."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them were waiting."""
        now = time.perf_counter()
        lap = now - self.last, self.waited
        self.last, self.waited = now, 0.0
        return lap
