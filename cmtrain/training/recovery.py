"""When skipping is not enough: go back to a state that was good, and go on more slowly.

A skipped step protects the weights, but an overflow in the *forward* pass comes back at every step: the weights that
cause it never change again, the loss scale falls to its floor, and the run is frozen for ever (cmt_micro, SGD at the
re-implementation's learning rate 1.6 without warm-up, fp16: 97 of 100 steps skipped). Then the learner goes back to a copy
it kept in memory, with the learning rate lowered; the data goes on, so the batches that broke it are behind
(PaLM, arXiv 2204.02311, section 5.1, does the same by hand).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmtrain.step.learner import Learner
from cmtrain.step.measure import samples_of

KEEP = 3


class Recovery:
    """Copies of the learner's good states, and what is left of the patience.

    Args:
        after_bad_steps: that many bad steps in a row call for a rollback. A copy is trusted only between as many good
            steps before it and as many steps after it: a run on its way out is finite for a while.
        max_rollbacks: after that many, the next call means that the run has diverged.
        lr_backoff: factor on the learning rate after a rollback; factors of several rollbacks multiply.
        backoff_steps: over how many steps a factor comes back to 1, evenly; None if it stays.
        on_spikes: whether a loss spike calls for a rollback, too.
    """

    def __init__(
        self,
        *,
        after_bad_steps: int,
        max_rollbacks: int,
        lr_backoff: float,
        backoff_steps: int | None,
        on_spikes: bool,
    ) -> None:
        self.after_bad_steps, self.max_rollbacks = after_bad_steps, max_rollbacks
        self.lr_backoff, self.backoff_steps = lr_backoff, backoff_steps
        self.on_spikes = on_spikes
        self.rollback_steps: list[int] = []
        self.copies: list[tuple[int, dict[str, Any]]] = []

    def lr_factor(self, step: int) -> float:
        """What the schedule's learning rate is multiplied with at `step`."""
        return math.prod(self._factor(step - at) for at in self.rollback_steps)

    def _factor(self, steps_since: int) -> float:
        if self.backoff_steps is None:
            return self.lr_backoff
        come_back = min(1.0, steps_since / self.backoff_steps) if self.backoff_steps else 1.0
        return self.lr_backoff + (1 - self.lr_backoff) * come_back

    @property
    def exhausted(self) -> bool:
        return len(self.rollback_steps) >= self.max_rollbacks

    def keep(self, step: int, learner: Learner) -> None:
        """Remember the learner's state after `step`, unless the last copy is nearly as new; for all ranks together.

        To be called after `after_bad_steps` good steps only.
        """
        if self.copies and step - self.copies[-1][0] < self.after_bad_steps:
            return
        self.copies = [*self.copies[1 - KEEP :], (step, _clone(learner.state_dict()))]

    def roll_back(self, step: int, learner: Learner, *, good_until: int) -> int | None:
        """Put the learner back to a good state. Returns the step of that state, None if patience is exhausted.

        The newest copy may have been taken on the way out already, so only one that was followed by `after_bad_steps`
        more steps up to `good_until`, the last step before the trouble, is trusted, where there is such a one. A copy
        that was used is spent: the next rollback goes further back.
        """
        if self.exhausted or not self.copies:
            return None
        trusted = [
            entry for entry in self.copies if good_until - entry[0] >= self.after_bad_steps
        ] or self.copies[:1]
        good_step, state = trusted[-1]
        older = [entry for entry in self.copies if entry[0] < good_step]
        self.copies = older or [(good_step, state)]
        learner.roll_back(_clone(state))
        self.rollback_steps.append(step)
        return good_step

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: the patience, not the copies, which a restarted process takes anew."""
        return {"rollback_steps": list(self.rollback_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollback_steps = list(state["rollback_steps"])


def _clone(tree: Any) -> Any:
    """A deep copy in which tensors stay on their device."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: _clone(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_clone(value) for value in tree)
    return copy.copy(tree)


@dataclass(frozen=True)
class Finding:
    """What one rank, or all of them together, found in the last step.

    `cause`: one line. `suspects`: samples whose activations are not finite in the layer that it names; where images are
    mixed, the one that each was mixed with is as suspect. `samples`: all samples of the step.
    """

    cause: str
    suspects: tuple[int, ...]
    samples: tuple[int, ...]


def examine(learner: Learner) -> Finding:
    """Run the model once more on this rank's last micro-batch and look for the first module whose output is not finite.

    Synchronises; meant for the moment before a rollback. BatchNorm's statistics are put back. `cause` reads like
    `stem.conv2: not finite in 5 of 16 images, largest finite value 6.5e+04`, or is empty if all is finite.
    """
    batch = samples_of(learner.last_indices[-1:])
    cause, suspects = "", list[int]()

    def look(name: str, output: Tensor) -> None:
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

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: look(name, output)

    leaves = [
        (name, module) for name, module in learner.model.named_modules() if not list(module.children())
    ]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in leaves]
    try:
        # A compiled model does not look for hooks that were not there when it was compiled.
        with torch.compiler.set_stance("force_eager"):
            learner.replay()
    finally:
        for handle in handles:
            handle.remove()
    return Finding(cause, tuple(suspects), tuple(samples_of(learner.last_indices)))


def conclude(findings: Sequence[Finding]) -> Finding:
    """What all ranks found, given what each of them did: the first cause, named by rank, and everybody's samples."""
    causes = [f"rank {rank}: {finding.cause}" for rank, finding in enumerate(findings) if finding.cause]
    if len(findings) == 1:
        causes = [finding.cause for finding in findings if finding.cause]
    return Finding(
        causes[0] if causes else "every value of the last forward pass was finite",
        tuple(sample for finding in findings for sample in finding.suspects),
        tuple(sample for finding in findings for sample in finding.samples),
    )
