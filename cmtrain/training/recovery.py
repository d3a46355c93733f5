"""Go back to a good state in memory when skipping bad steps is not enough, and find what made them bad.

An overflow in the *forward* pass comes back at every step: skipping protects the weights that cause it, the
loss scale falls to its floor, and the run is frozen for ever. (cmt_micro, SGD at learning rate 1.6 without
warm-up, fp16: 97 of 100 steps skipped.) So the learner goes back to a copy in memory, with a lower learning
rate, while the data goes on. PaLM (arXiv 2204.02311, section 5.1) did the same by hand.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cmtrain.step.learner import Learner
from cmtrain.step.measure import samples_of

MAX_SNAPSHOTS = 3


@dataclass(kw_only=True)
class Recovery:
    """In-memory snapshots of good states, and how many rollbacks remain.

    `after_bad_steps` in a row call for a rollback; after `max_rollbacks`, the run has diverged. A loss spike
    calls for one while one remains, if `on_spikes`. A snapshot is trusted only between
    `after_bad_steps` good steps and as many later steps: a failing run is still finite for a while.
    `lr_backoff`: learning rate factor, which returns to 1 evenly over `backoff_steps` (inf: it stays).
    """

    after_bad_steps: int
    max_rollbacks: int
    lr_backoff: float
    backoff_steps: float
    on_spikes: bool
    rollback_steps: list[int] = field(default_factory=list)
    snapshots: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def lr_factor(self, step: int) -> float:
        """Return the factor on the schedule's learning rate at `step`."""
        ends, low = self.backoff_steps, self.lr_backoff
        come_back = [min(1.0, (step - at) / ends) if ends else 1.0 for at in self.rollback_steps]
        return math.prod(low + (1 - low) * share for share in come_back)

    @property
    def exhausted(self) -> bool:
        return len(self.rollback_steps) >= self.max_rollbacks

    def keep(self, step: int, learner: Learner) -> None:
        """Take a snapshot of a good state, unless the newest is recent. For all ranks together."""
        if self.snapshots and step - self.snapshots[-1][0] < self.after_bad_steps:
            return
        self.snapshots = [*self.snapshots[1 - MAX_SNAPSHOTS :], (step, _clone(learner.state_dict()))]

    def roll_back(self, step: int, learner: Learner, *, good_until: int) -> int | None:
        """Put the learner back to a good state. Returns the step of that state, None if no rollback remains.
        `good_until`: the last step before the trouble. Where no snapshot is trusted, the oldest is taken.
        It is dropped, with newer ones, unless it is the oldest: the next rollback goes further back.
        """
        if self.exhausted or not self.snapshots:
            return None
        trusted = [taken for taken in self.snapshots if good_until - taken[0] >= self.after_bad_steps]
        good_step, state = trusted[-1] if trusted else self.snapshots[0]
        self.snapshots = [taken for taken in self.snapshots if taken[0] < good_step] or [(good_step, state)]
        learner.roll_back(_clone(state))
        self.rollback_steps.append(step)
        return good_step

    def state_dict(self) -> dict[str, Any]:
        """Return the rollbacks so far, for a checkpoint; a restarted process takes its own snapshots."""
        return {"rollback_steps": list(self.rollback_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollback_steps = list(state["rollback_steps"])


def _clone(tree: Any) -> Any:
    """Return a copy of nested values with copies of their tensors, on the same device."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


@dataclass(frozen=True)
class BadStep:
    """What is known of a bad step, by one rank or by all of them together."""

    cause: str  # one line
    # Samples whose activations, or their partners' in a mix, are not finite in the layer that `cause` names
    suspects: tuple[int, ...]
    samples: tuple[int, ...]  # all of the step


def find_overflow(learner: Learner) -> BadStep:
    """Run the last micro-batch of this rank again, and find the first module whose output is not finite.
    Synchronises. `cause`: "stem.conv2: not finite in 5 of 16 images, largest finite value 6.5e+04", or "".
    """
    batch = samples_of(learner.last_indices[-1:])
    cause, suspects = "", list[int]()

    def look(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal cause
        finite = torch.isfinite(output)
        if cause or finite.all():
            return
        where = ""
        if len(output) == len(batch):  # not so for a table of position biases
            bad = (~finite).flatten(1).any(1)  # (B,)
            suspects.extend(sample for sample, is_bad in zip(batch, bad.tolist(), strict=True) if is_bad)
            where = f" in {len(suspects)} of {len(batch)} images"
        largest = f"{output[finite].abs().max().item():.1e}" if finite.any() else "none"
        cause = f"{name}: not finite{where}, largest finite value {largest}"

    # A compiled model does not look for hooks that were not there when it was compiled.
    with contextlib.ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
        for name, module in learner.model.named_modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(functools.partial(look, name)))
        learner.replay()
    return BadStep(cause, tuple(suspects), tuple(samples_of(learner.last_indices)))


def merge_ranks(found: Sequence[BadStep]) -> BadStep:
    """Return what all ranks found together: the first cause, with its rank, and the samples of all."""
    causes = [f"rank {rank}: " * (len(found) > 1) + bad.cause for rank, bad in enumerate(found) if bad.cause]
    return BadStep(
        next(iter(causes), "every value of the last forward pass was finite"),
        tuple(sample for bad in found for sample in bad.suspects),
        tuple(sample for bad in found for sample in bad.samples),
    )
