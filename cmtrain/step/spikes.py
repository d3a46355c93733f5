"""Find loss spikes: finite steps whose loss or gradient norm is far above those of the steps before.

The rule is that of OLMo-core's and levanter's skip-step optimizers: more than 6 standard deviations above
the mean of the last 128 steps. Two things differ. The values are logarithms, because the noise of both
measurements grows with their size. Mean and variance are exponential, so the state is a few numbers. All
ranks find the same spikes, however often the run was stopped: of the mean loss over ranks, in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

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
    """Finds the spikes among a run's steps, given in order: more than `sigma` deviations above the mean."""

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
