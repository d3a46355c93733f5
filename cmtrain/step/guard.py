"""Undo what a bad step did to BatchNorm's running statistics (the NaN guard).

The failure (pytorch issues 88474, 90342 and 115500, and the SGD run of the re-implementation, section 4.3):
an fp16 activation overflows, and BatchNorm writes inf or NaN into its running statistics during the forward
pass. The loss scaler skips the step, and training goes on, because it never reads those statistics.
Evaluation does, and is NaN for good: 0.9 * NaN is NaN.

The cure: what a forward pass writes is only proposed. Once the gradients of all ranks are reduced, one flag
on the device commits or restores the statistics and lets the optimizer and the EMA move: in place, without a
host synchronisation, by 20 operations per step however deep the model is.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

COUNTERS = ("bad_steps", "bad_steps_in_a_row", "restores")


def tracked_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of `model` with running statistics that move, in module order."""
    batchnorms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    return [m for m in batchnorms if not getattr(m, "is_frozen", False)]  # see optimizer.set_frozen


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return running_mean and running_var (C,) of every BatchNorm in turn, in module order."""
    return _statistics(tracked_batchnorms(model))


def _statistics(batchnorms: Iterable[_BatchNorm]) -> list[Tensor]:
    return [t for m in batchnorms for t in (m.running_mean, m.running_var) if t is not None]


class Guard:
    """Commits or restores BatchNorm's statistics at the end of a step, and counts bad steps on the device.

    `model`: unwrapped, on its device. `protect`: False commits everything, and only counts bad steps.
    Each micro-batch of a step starts from the statistics that the last step committed, and the step commits
    the mean of their proposals. So they move once per step with BatchNorm's own momentum. The update is
    linear, so the mean over ranks is the same on 1 process x 8 micro-batches as on 8 x 1.

    num_batches_tracked is updated here, too, once per step: a layer would launch a kernel for it in every
    forward pass. SyncBatchNorm and those with momentum=None need it, and count refused steps, too.
    """

    def __init__(self, model: nn.Module, *, protect: bool = True) -> None:
        self.protect = protect
        device = next(model.parameters()).device
        # Modules are kept, not their buffers, which .to() or load_state_dict(assign=True) may replace.
        self.batchnorms = tracked_batchnorms(model)
        self.sizes = [t.numel() for t in _statistics(self.batchnorms)]
        self.committed = torch.zeros(0, device=device)
        self.accept_current()
        self.proposed, self.num_proposals = self.committed, 0
        zeros = (torch.zeros((), dtype=torch.int64, device=device) for _ in COUNTERS)
        self.bad_steps, self.bad_steps_in_a_row, self.restores = zeros

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Keep the BatchNorms from counting a forward pass, whose proposal commit_or_restore will count."""
        counts = self._counts()
        for buffers, _ in counts:
            buffers["num_batches_tracked"] = None
        try:
            yield
        finally:
            for buffers, count in counts:
                buffers["num_batches_tracked"] = count

    @torch.no_grad()
    def propose(self) -> None:
        """Collect the proposal of one micro-batch and restore the committed statistics for the next one.
        Call after the backward pass, which needs the buffers as they were: a write before it is an error.
        """
        if self.batchnorms:
            proposal = torch.cat(_statistics(self.batchnorms))
            self.proposed = self.proposed + proposal if self.num_proposals else proposal
            self._write(self.committed)
        self.num_proposals += 1

    @torch.no_grad()
    def commit_or_restore(self, ok: Tensor) -> Tensor:
        """End the step: commit the mean proposal if it is finite and `ok`, else restore the last commit.
        `ok`: bool scalar on the device, equal on all ranks: the global gradient norm is finite. Returns
        whether optimizer and EMA take this step: `ok` (True without `protect`), so all ranks do the same.
        """
        bad = ~ok
        self.bad_steps += bad
        self.bad_steps_in_a_row.add_(1).mul_(bad)
        if self.batchnorms:
            proposal = self.proposed / self.num_proposals
            # Statistics are checked too: a masked branch can hide an inf from loss and gradients.
            good = ok & (torch.linalg.vector_norm(proposal, math.inf) < math.inf)
            self.restores += ~good
            if self.protect:
                self.committed = torch.where(good, proposal, self.committed)
            else:
                self.committed, good = proposal, torch.ones_like(good)
            self._write(self.committed)
            if counts := [count for _, count in self._counts()]:
                torch._foreach_add_(counts, [good * self.num_proposals] * len(counts))
        self.num_proposals = 0
        return ok if self.protect else torch.ones_like(ok)

    @torch.no_grad()
    def discard(self) -> None:
        """Restore the committed statistics after a forward pass outside of any step, or one given up."""
        self.num_proposals = 0
        if self.batchnorms:
            self._write(self.committed)

    @torch.no_grad()
    def accept_current(self) -> None:
        """Commit the model's current statistics: after a checkpoint was loaded or ranks were averaged."""
        if self.batchnorms:
            self.committed = torch.cat(_statistics(self.batchnorms))

    def _write(self, flat: Tensor) -> None:
        # In place, so that DDP, the EMA and a captured graph keep their references.
        torch._foreach_copy_(_statistics(self.batchnorms), list(flat.split(self.sizes)))

    def _counts(self) -> list[tuple[dict[str, Tensor | None], Tensor]]:
        counted = [m for m in self.batchnorms if m.momentum and not isinstance(m, nn.SyncBatchNorm)]
        return [(m._buffers, m.num_batches_tracked) for m in counted if m.num_batches_tracked is not None]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in COUNTERS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in COUNTERS:
            getattr(self, name).copy_(state[name])
        self.accept_current()
