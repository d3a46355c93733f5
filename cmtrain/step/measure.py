"""What the steps since the last log point measured: on the device until the log point reads it."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cmtrain.step.evaluate import all_reduce_sum
from cmtrain.step.guard import running_statistics
from pipelines.spec import Batch


class Window:
    """Loss, gradient norm and samples of one step after another; a step costs one kernel and no synchronisation.

    Args:
        num_processes: the loss of a step is the mean over so many ranks.
    """

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self.read_steps: list[tuple[float, float]] = []
        self.unread_steps: list[Tensor] = []
        self.indices: list[
            list[Tensor]
        ] = []  # of this rank's samples, a list a step of one (B,) a micro-batch

    def add(self, loss: Tensor, grad_norm: Tensor, indices: list[Tensor]) -> None:
        """Take in a step: this rank's `loss`, the reduced `grad_norm`, both scalars."""
        self.unread_steps.append(torch.stack([loss, grad_norm]))
        self.indices.append(indices)

    def read(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of every step, equal on all ranks. Synchronises; for all ranks together."""
        if self.unread_steps:
            loss, grad_norm = torch.stack(self.unread_steps, dim=1).unbind()  # (steps,) each
            all_reduce_sum(loss)
            steps = torch.stack([loss / self.num_processes, grad_norm], dim=1)
            self.read_steps += [(one, other) for one, other in steps.tolist()]
            self.unread_steps = []
        return self.read_steps

    def samples(self, steps_ago: int) -> list[int]:
        """This rank's samples of the step so many steps before the last one; none if another process did that step."""
        if steps_ago >= len(self.indices):
            return []
        return samples_of(self.indices[-1 - steps_ago])

    def clear(self) -> None:
        """Begin anew, at a log point."""
        self.read_steps, self.unread_steps, self.indices = [], [], []

    def state_dict(self) -> dict[str, Any]:
        """Synchronises; for all ranks together."""
        return {"steps": list(self.read())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        self.read_steps = [(loss, grad_norm) for loss, grad_norm in state["steps"]]


def samples_of(indices: Sequence[Tensor]) -> list[int]:
    """The samples of a step, given the indices of its micro-batches. Synchronises."""
    return [index for batch in indices for index in batch.tolist()]


@dataclass(frozen=True)
class StepReport:
    """What one rank knows at a log point. Console, log.jsonl and metrics read the same object.

    `loss` is the mean over ranks and over the good steps since the last log point, NaN when there was none.
    `bad_steps`, `restores` and `spikes` count since the start of the run; `bad_steps_in_a_row` and
    `good_steps_in_a_row` (neither bad nor a spike) end at this step.
    `bn_mean_abs_max`, `bn_var_max`, `weight_norm`: of this rank, see numerics.extremes.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    loss_scale: float
    bad_steps: int
    bad_steps_in_a_row: int
    good_steps_in_a_row: int
    restores: int
    spikes: int
    bn_mean_abs_max: float = 0.0
    bn_var_max: float = 0.0
    weight_norm: float = 0.0


@torch.no_grad()
def extremes(model: nn.Module) -> list[Tensor]:
    """Scalars on the model's device: largest |running_mean| and largest running_var of all BatchNorm layers (0 without
    any), and the L2 norm of all trainable parameters together. NaN where there is a NaN. For log points."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    norm = torch.stack(torch._foreach_norm(parameters)).norm()
    statistics = running_statistics(model)
    if not statistics:
        return [torch.zeros_like(norm), torch.zeros_like(norm), norm]
    means, variances = torch.cat(statistics[0::2]), torch.cat(statistics[1::2])
    return [means.abs().max(), variances.max(), norm]


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
