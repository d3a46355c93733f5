"""When skipping is not enough: go back to a state that was good, and go on more slowly.

A skipped step protects the weights, but an overflow in the *forward* pass comes back at every step: the weights that
cause it never change again, the loss scale falls to its floor, and the run is frozen for ever (cmt_micro, SGD at the
seed's learning rate 1.6 without warm-up, fp16: 97 of 100 steps skipped). Then the learner goes back to a copy
it kept in memory, with the learning rate lowered for a while; the data goes on, so the batches that broke it are behind
(PaLM, arXiv 2204.02311, section 5.1, does the same by hand).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cmtrain.learner import Learner

KEEP = 3


class Recovery:
    """Copies of the learner's good states, and what is left of the patience.

    Args:
        after_bad_steps: that many bad steps in a row call for a rollback.
        max_rollbacks: after that many, the next call means that the run has diverged.
        lr_backoff: factor on the learning rate after a rollback; factors of several rollbacks multiply.
        backoff_steps: how long a rollback's factor lasts.
    """

    def __init__(self, *, after_bad_steps: int, max_rollbacks: int, lr_backoff: float, backoff_steps: int) -> None:
        self.after_bad_steps, self.max_rollbacks = after_bad_steps, max_rollbacks
        self.lr_backoff, self.backoff_steps = lr_backoff, backoff_steps
        self.rollback_steps: list[int] = []
        self.copies: list[tuple[int, dict[str, Any]]] = []

    def lr_factor(self, step: int) -> float:
        """What the schedule's learning rate is multiplied with at `step`."""
        return self.lr_backoff ** sum(step < at + self.backoff_steps for at in self.rollback_steps)

    def keep(self, step: int, learner: Learner) -> None:
        """Remember the learner's state after `step`; for all ranks together, after good steps only."""
        self.copies = [*self.copies[1 - KEEP :], (step, _clone(learner.state_dict()))]

    def roll_back(self, step: int, learner: Learner) -> int | None:
        """Put the learner back to a good state. Returns the step of that state, None if patience is exhausted.

        The newest copy may have been taken on the way out already, so only one that was followed by `after_bad_steps`
        more steps is trusted, where there is such a one. A copy that was used is spent: the next rollback goes further
        back.
        """
        if len(self.rollback_steps) >= self.max_rollbacks or not self.copies:
            return None
        trusted = [entry for entry in self.copies if step - entry[0] >= 2 * self.after_bad_steps] or self.copies[:1]
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


@torch.no_grad()
def first_nonfinite(learner: Learner) -> str | None:
    """Run the model once more on its last batch and name the first module whose output is not finite.

    Synchronises; meant for the moment before a rollback. BatchNorm's statistics are put back. Returns a line such as
    `stem.conv2: not finite in 5 of 16 images, largest finite value 6.5e+04`, or None if all is finite.
    """
    found: list[str] = []

    def look(name: str, output: Tensor) -> None:
        if found or torch.isfinite(output).all():
            return
        bad = ~torch.isfinite(output).flatten(1).all(1)  # (B,)
        finite = output[torch.isfinite(output)].abs()
        largest = f"{finite.max().item():.1e}" if finite.numel() else "none"
        share = f"{int(bad.sum())} of {len(output)} images"
        found.append(f"{name}: not finite in {share}, largest finite value {largest}")

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: look(name, output)

    leaves = [(name, module) for name, module in learner.model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in leaves]
    try:
        learner.replay()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _clone(tree: Any) -> Any:
    """A deep copy in which tensors stay on their device."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: _clone(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_clone(value) for value in tree)
    return copy.copy(tree)
