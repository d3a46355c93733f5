"""What the steps since the last log point measured: on the device until the log point reads it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cmtrain.step.evaluate import all_reduce_sum


class Window:
    """Loss, gradient norm and samples of one step after another; a step costs one kernel and no synchronisation.

    Args:
        num_processes: the loss of a step is the mean over so many ranks.
    """

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self.read_steps: list[tuple[float, float]] = []
        self.unread_steps: list[Tensor] = []
        self.indices: list[list[Tensor]] = []  # of this rank's samples, a list a step of one (B,) a micro-batch

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
