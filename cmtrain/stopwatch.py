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


class Pace:
    """How fast steps go, since the last log point and over this process's part of the run."""

    def __init__(self) -> None:
        self._steps, self._images, self._seconds, self._waited = 0, 0, 0.0, 0.0
        self._total_images, self._total_seconds = 0, 0.0

    def step(self, images: int, seconds: float, waited: float) -> None:
        """Count a step of so many images; `waited` of its `seconds` for data."""
        self._steps += 1
        self._images += images
        self._seconds += seconds
        self._waited += waited

    def take(self) -> tuple[float, float, float]:
        """(images/s, share of the time that steps waited, seconds a step) since the last call."""
        taken = self._images / self._seconds, self._waited / self._seconds, self._seconds / self._steps
        self._total_images += self._images
        self._total_seconds += self._seconds
        self._steps, self._images, self._seconds, self._waited = 0, 0, 0.0, 0.0
        return taken

    @property
    def images_per_second(self) -> float | None:
        """Up to the last `take`; None before the first one."""
        return round(self._total_images / self._total_seconds, 1) if self._total_seconds else None
