"""What the machine can do at most: the two ceilings that a training step is held against, measured in the same run."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}  # far beyond any cache
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """Bytes that a copy moves in a second, read and written, and floating-point operations of a matrix product."""

    copy_bytes_per_second: float
    matrix_flops_per_second: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of a few large copies and square matrix products in `dtype`. On a CPU, of torch's threads."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    copied = 2 * source.numel() * source.element_size()
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return Ceilings(copied / seconds, 2 * side**3 / _best_seconds(lambda: left @ right, device))


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        drain(device)
        begin = time.perf_counter()
        work()
        drain(device)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def drain(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
