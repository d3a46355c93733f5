"""Time work fairly: warm-up, a drained device, contenders in turns, and the ceilings of the machine.

Machines are shared and noisy. All contenders run in one process and take turns in alternating order, so that
a disturbance hits all of them; a ratio is the median of the ratios within a round.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipelines.spec import Batch, Loader

WARMUP_STEPS = 3
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}  # far beyond any cache
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
CEILING_REPEATS = 6

CPU = torch.device("cpu")

Clock = Callable[[], float]
WALL: Clock = time.perf_counter
Work = Callable[[], object]  # one step or pass
Row = dict[str, float]
Figures = dict[str, Row]  # rows of the table, by name
Rows = Iterator[tuple[str, Row]]  # each as soon as it is known; {}: the name of the part that now begins


@dataclass
class Contender:
    """A model in a race. `work` does one step or pass of `images` images; `seconds` of each, by round."""

    name: str
    images: int
    work: Work
    peak_bytes: int = 0
    seconds: list[list[float]] = field(default_factory=list)

    def figures(self, first: "Contender") -> dict[str, float]:
        """Return the row of this contender; `first_is_times`: how many times as fast `first` is."""
        times_ms = [1000 * seconds for turn in self.seconds for seconds in turn]
        rates = [len(turn) * self.images / sum(turn) for turn in self.seconds]
        row = {"images_per_second": statistics.median(rates)}
        row |= {f"ms_p{percent}": float(np.percentile(times_ms, percent)) for percent in (50, 95)}
        if self is not first:
            pairs = zip(first.seconds, self.seconds, strict=True)
            row["first_is_times"] = statistics.median(sum(others) / sum(mine) for mine, others in pairs)
        if self.peak_bytes:
            row["peak_memory_gib"] = self.peak_bytes / 2**30
        return row


def race(
    contenders: Sequence[Contender], device: torch.device, steps: int, rounds: int, clock: Clock = WALL
) -> None:
    """Let every contender do `steps` steps in each of `rounds` rounds, in alternating order."""
    for contender in contenders:
        contender.work()  # the very first step tries algorithms, and compiles
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARMUP_STEPS):
            contender.work()
        if device.type == "cuda":
            contender.peak_bytes = torch.cuda.max_memory_allocated(device)
    for turn in range(rounds):
        for contender in contenders if turn % 2 else reversed(contenders):
            contender.seconds.append(laps(contender.work, steps, device, clock))


def laps(work: Work, steps: int, device: torch.device, clock: Clock = WALL) -> list[float]:
    """Return the seconds of each step; on a GPU between events, so that the host may run ahead."""
    drain(device)
    if device.type != "cuda":
        marks = [clock()]
        for _ in range(steps):
            work()
            marks.append(clock())
        return [end - begin for begin, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    events[-1].synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(events)]


def best_seconds(work: Work, repeats: int, clock: Clock = WALL, device: torch.device = CPU) -> float:
    """Return the seconds of the fastest of `repeats` calls, as of laps."""
    return min(laps(work, repeats, device, clock))


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Row:
    """Return the best rates of large copies, read and written, and of square products in `dtype`."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), CEILING_REPEATS, device=device)
    copied = 2 * source.numel() * source.element_size()
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_seconds = best_seconds(lambda: left @ right, CEILING_REPEATS, device=device)
    tflops = 2 * side**3 / product_seconds / 1e12
    return {"copy_gb_per_second": copied / seconds / 1e9, "matrix_tflops": tflops}


def endless(loader: Loader) -> Iterator[Batch]:
    return itertools.chain.from_iterable(map(loader.epoch, itertools.count()))


def drain(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
