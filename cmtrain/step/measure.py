"""Measure steps without waiting: what a step leaves on the device, the next log point reads."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmtrain.step.evaluate import all_reduce_sum
from cmtrain.step.guard import running_statistics
from pipelines.spec import Batch

PHASES = ("forward", "backward", "optimizer")
MAX_PENDING_STEPS = 64  # not yet finished on the device; the host seldom is more than a few steps ahead


class StepBuffer:
    """Loss (mean over ranks), gradient norm and samples of the steps since the last log point."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self.read_steps: list[tuple[float, float]] = []
        self.unread_steps: list[Tensor] = []
        self.indices: list[list[Tensor]] = []  # of each step, this rank's samples: (B,) per micro-batch

    def add(self, loss: Tensor, grad_norm: Tensor, indices: list[Tensor]) -> None:
        """Append a step: this rank's `loss`, the reduced `grad_norm`, both scalars."""
        self.unread_steps.append(torch.stack([loss, grad_norm]))
        self.indices.append(indices)

    def read(self) -> list[tuple[float, float]]:
        """Return each step's (loss, gradient norm), equal on all ranks. Synchronises; all must call it."""
        if self.unread_steps:
            loss, grad_norm = torch.stack(self.unread_steps, dim=1).unbind()  # (steps,) each
            all_reduce_sum(loss)
            steps = torch.stack([loss / self.num_processes, grad_norm], dim=1)
            self.read_steps += [(loss, grad_norm) for loss, grad_norm in steps.tolist()]
            self.unread_steps = []
        return self.read_steps

    def samples(self, steps_ago: int) -> list[int]:
        """Return this rank's samples of an earlier step; 0 is the last. [] if another process ran it."""
        return samples_of(self.indices[-1 - steps_ago]) if steps_ago < len(self.indices) else []

    def clear(self) -> None:
        """Forget all steps, at a log point."""
        self.read_steps, self.unread_steps, self.indices = [], [], []

    def state_dict(self) -> dict[str, Any]:
        """Synchronises; all ranks must call it."""
        return {"steps": list(self.read())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        self.read_steps = [(loss, grad_norm) for loss, grad_norm in state["steps"]]


def samples_of(indices: Sequence[Tensor]) -> list[int]:
    """Return the samples of a step, given the indices (B,) of its micro-batches. Synchronises."""
    return [index for batch in indices for index in batch.tolist()]


@dataclass(frozen=True)
class StepReport:
    """One rank's measurements at a log point. Console, log.jsonl and metrics read the same object."""

    step: int
    epoch: int
    loss: float  # mean over ranks and over the good steps since the last log point, NaN if there was none
    lr: float
    grad_norm: float
    loss_scale: float
    bad_steps: int  # since the start of the run, as restores and spikes
    bad_steps_in_a_row: int  # that end at this step
    good_steps_in_a_row: int  # likewise; good: neither bad nor a spike
    restores: int
    spikes: int
    bn_mean_abs_max: float = 0.0  # the last three: see `extremes`
    bn_var_max: float = 0.0
    weight_norm: float = 0.0


@torch.no_grad()
def extremes(model: nn.Module) -> dict[str, Tensor]:
    """Return the last three fields of a StepReport, on the model's device: the largest |running_mean| and
    running_var of all BatchNorms (0 without any), and the L2 norm of all trainable parameters together.
    """
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    norm = torch.stack(torch._foreach_norm(parameters)).norm()
    statistics = running_statistics(model) or [torch.zeros_like(norm)[None]] * 2
    means, variances = torch.cat(statistics[0::2]), torch.cat(statistics[1::2])
    return {"bn_mean_abs_max": means.abs().max(), "bn_var_max": variances.max(), "weight_norm": norm}


class Phases:
    """Times forward, backward and optimizer of each step; on a GPU by events, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.pending: deque[list[tuple[str, Any]]] = deque(maxlen=MAX_PENDING_STEPS)

    def begin(self, phase: str) -> None:
        """Begin one of PHASES, or "" for time that belongs to none of them."""
        mark: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            mark.record()
        self.marks.append((phase, mark))

    def end_step(self) -> None:
        self.begin("")
        self.pending.append(self.marks)
        self.marks = []

    def pop_finished(self) -> list[dict[str, float]]:
        """Return seconds by phase of each step that the device finished since the last call, in order."""
        finished = []
        while self.pending and (not self.on_gpu or self.pending[0][-1][1].query()):
            seconds = dict.fromkeys(PHASES, 0.0)
            for (phase, begin), (_, end) in pairwise(self.pending.popleft()):
                if phase:
                    seconds[phase] += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
            finished.append(seconds)
        return finished


class Stopwatch:
    """Measures the laps of a run, usually steps, and how much of each lap was waiting for data."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.waited = 0.0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield `batches` and count the time until each comes."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def lap(self) -> tuple[float, float]:
        """Return the seconds since the last lap, and how many of them were waiting; begin a new lap."""
        now = time.perf_counter()
        lap = now - self.last, self.waited
        self.last, self.waited = now, 0.0
        return lap


class Pace:
    """Averages the pace of steps: since the last log point, and over this process's part of the run."""

    def __init__(self) -> None:
        # Images, seconds, seconds of waiting and steps
        self._sums, self._totals = np.zeros(4), np.zeros(4)

    def step(self, images: int, seconds: float, waited: float) -> None:
        """Add a step. `waited`: the part of its `seconds` that it waited for data."""
        self._sums += images, seconds, waited, 1

    def pop_averages(self) -> tuple[float, float, float]:
        """Return (images/s, share of the time spent waiting, seconds per step) since the last call."""
        images, seconds, waited, steps = self._sums.tolist()
        self._totals += self._sums
        self._sums[:] = 0
        return images / seconds, waited / seconds, seconds / steps

    @property
    def images_per_second(self) -> float | None:
        """The average up to the last log point; None before the first one."""
        images, seconds, *_ = self._totals.tolist()
        return round(images / seconds, 1) if seconds else None


MEMORY_STEPS = 128
WARMUP_STEPS = 64  # finite steps before the first possible spike: half the memory, as in OLMo-core
MIN_DEVIATION = 0.01  # of the logarithm: less than 1 % times sigma above the mean is never a spike
MIN_VALUE = 1e-12  # a loss of exactly 0 has no logarithm


@dataclass(frozen=True)
class Spike:
    """`step` counts from 1, as log points do. `loss_z`, `grad_norm_z`: deviations above the mean."""

    step: int
    loss: float
    grad_norm: float
    loss_z: float
    grad_norm_z: float

    @property
    def z(self) -> float:
        return max(self.loss_z, self.grad_norm_z)


@dataclass(frozen=True)
class Trend:
    """Exponential mean and variance of a measurement's logarithm over `steps` steps; at first plain ones."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def z(self, value: float) -> float:
        """Return how many standard deviations `value` is above the mean; 0 during the warm-up."""
        if self.steps < WARMUP_STEPS:
            return 0.0
        return (math.log(max(value, MIN_VALUE)) - self.mean) / max(math.sqrt(self.variance), MIN_DEVIATION)

    def with_value(self, value: float, max_z: float) -> "Trend":
        """Return the trend after one more step, whose value counts as `max_z` deviations away at most.
        So one spike moves the trend little, and a new level that stays is learned in some tens of steps.
        """
        difference = math.log(max(value, MIN_VALUE)) - self.mean
        if abs(z := self.z(value)) > max_z:
            difference *= max_z / abs(z)
        weight = max(1 / (self.steps + 1), 1 / MEMORY_STEPS)
        variance = (1 - weight) * (self.variance + weight * difference**2)
        return Trend(self.steps + 1, self.mean + weight * difference, variance)


class SpikeDetector:
    """Finds the spikes among a run's steps, given in order: finite ones more than `sigma` deviations above
    the mean, in loss or gradient norm.

    The rule is that of OLMo-core's and levanter's skip-step optimizers: more than 6 standard deviations
    above the mean of the last 128 steps. Two things differ. The values are logarithms, because the noise of
    both measurements grows with their size. Mean and variance are exponential, so the state is a few
    numbers. All ranks find the same spikes, however often the run was stopped: of the mean loss over ranks,
    in float64.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma
        self.loss, self.grad_norm = Trend(), Trend()
        self.num_spikes, self.good_steps_in_a_row = 0, 0  # good: finite and no spike

    def find_spikes(self, steps_before: int, measured: Sequence[tuple[float, float]]) -> list[Spike]:
        """Return the spikes among the steps after `steps_before`, given (loss, gradient norm) of each.
        A step that is not finite is left to the guard: it is no spike and does not change the trends.
        """
        spikes = []
        for step, (loss, grad_norm) in enumerate(measured, start=steps_before + 1):
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self.good_steps_in_a_row = 0
                continue
            spike = Spike(step, loss, grad_norm, self.loss.z(loss), self.grad_norm.z(grad_norm))
            self.loss = self.loss.with_value(loss, self.sigma)
            self.grad_norm = self.grad_norm.with_value(grad_norm, self.sigma)
            self.good_steps_in_a_row += 1
            if spike.z > self.sigma:
                self.good_steps_in_a_row = 0
                spikes.append(spike)
        self.num_spikes += len(spikes)
        return spikes

    def state_dict(self) -> dict[str, Any]:
        trends = {"loss": list(astuple(self.loss)), "grad_norm": list(astuple(self.grad_norm))}
        return trends | {"num_spikes": self.num_spikes, "good_steps_in_a_row": self.good_steps_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.grad_norm = Trend(*state["loss"]), Trend(*state["grad_norm"])
        self.num_spikes, self.good_steps_in_a_row = state["num_spikes"], state["good_steps_in_a_row"]
