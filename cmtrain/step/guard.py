"""The NaN guard: a training step is a transaction, and BatchNorm's running statistics are part of it.

The failure (pytorch issues 88474, 90342 and 115500, and the SGD run of the re-implementation, section 4.3): an fp16 activation
overflows, BatchNorm writes inf or NaN into its running statistics *during the forward pass*, the loss scaler then skips
the optimizer step, and training goes on as if nothing had happened, because training never reads those statistics.
Evaluation does, and is NaN for good: 0.9 * NaN is NaN.

The cure: what a forward pass writes is only *proposed*. Once the gradients of all ranks are reduced, one device-side
flag says whether the step was good; the statistics are committed or put back by the same flag that lets the optimizer
and the EMA move. Everything happens in place and on the device: no host synchronisation, no second pass over
activations, and 25 operations a step however deep the model is.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def tracked_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of `model` that keep running statistics, in module order."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """running_mean and running_var of every BatchNorm, in module order: 2 tensors of shape (C,) a layer."""
    return [t for m in tracked_batchnorms(model) for t in (m.running_mean, m.running_var) if t is not None]


class Guard:
    """Commits or puts back a step's effect on BatchNorm statistics, and counts bad steps on the device.

    Args:
        model: the unwrapped model (not DDP's wrapper), already on its device.
        protect: False only counts: statistics are committed whatever they hold. For comparisons and tests.

    A step may consist of several micro-batches (gradient accumulation). Each of them starts from the statistics
    committed by the last step, and the step commits the mean of their proposals. So the statistics move once a step
    with BatchNorm's own momentum, whatever the accumulation; and because the update is linear, the mean over ranks is
    the same on 1 process x 8 micro-batches as on 8 x 1.
    """

    def __init__(self, model: nn.Module, *, protect: bool = True) -> None:
        self.model = model
        self.protect = protect
        device = next(model.parameters()).device
        # Modules are kept, not their buffers, which .to() or load_state_dict(assign=True) may replace.
        self.batchnorms = tracked_batchnorms(model)
        self.sizes = [t.numel() for t in self._statistics()]
        self.committed = torch.cat(self._statistics()) if self.batchnorms else torch.zeros(0, device=device)
        self.proposed = torch.zeros_like(self.committed)
        self.num_proposals = 0
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_steps_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.restores = torch.zeros((), dtype=torch.int64, device=device)

    def _statistics(self) -> list[Tensor]:
        return [t for m in self.batchnorms for t in (m.running_mean, m.running_var) if t is not None]

    @torch.no_grad()
    def propose(self) -> None:
        """Take up one micro-batch's proposal and put the committed statistics back for the next micro-batch.

        Call after the backward pass, never between forward and backward: BatchNorm's backward holds the buffers and an
        in-place write there raises a version error.
        """
        self.num_proposals += 1
        if self.batchnorms:
            self.proposed += torch.cat(self._statistics())
            self._write(self.committed)

    @torch.no_grad()
    def settle(self, ok: Tensor) -> Tensor:
        """End the step: commit the mean proposal if it is finite and `ok`, else keep the last committed statistics.

        Args:
            ok: bool scalar on the device, equal on all ranks: the global gradient norm is finite.

        Returns:
            bool scalar on the device: whether optimizer and EMA may take this step (always True without `protect`).
            It is `ok` and not this rank's verdict on its statistics, so that all ranks do the same.
        """
        bad = ~ok
        self.bad_steps += bad
        self.bad_steps_in_a_row.add_(1).mul_(bad)
        if self.batchnorms:
            proposal = self.proposed / self.num_proposals
            # The buffers themselves are checked too: a masked branch can hide an inf from loss and gradients.
            good = ok & torch.isfinite(proposal).all()
            self.restores += ~good
            if self.protect:
                self.committed = torch.where(good, proposal, self.committed)
                self._uncount(~good)
            else:
                self.committed = proposal
            self._write(self.committed)
            self.proposed.zero_()
        self.num_proposals = 0
        return ok if self.protect else torch.ones_like(ok)

    @torch.no_grad()
    def discard(self) -> None:
        """Put the committed statistics back after a forward pass outside of any step."""
        if self.batchnorms:
            self._write(self.committed)
            counts = [m.num_batches_tracked for m in self.batchnorms if m.num_batches_tracked is not None]
            torch._foreach_sub_(counts, 1)

    @torch.no_grad()
    def resnapshot(self) -> None:
        """Take the model's present statistics as committed: after a checkpoint was loaded or ranks were averaged."""
        if self.batchnorms:
            self.committed = torch.cat(self._statistics())

    def _write(self, flat: Tensor) -> None:
        # In place, so that DDP, the EMA and a captured graph keep their references.
        torch._foreach_copy_(self._statistics(), list(flat.split(self.sizes)))

    def _uncount(self, dropped: Tensor) -> None:
        counts = [m.num_batches_tracked for m in self.batchnorms if m.num_batches_tracked is not None]
        torch._foreach_sub_(counts, [dropped * self.num_proposals] * len(counts))

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "bad_steps": self.bad_steps,
            "bad_steps_in_a_row": self.bad_steps_in_a_row,
            "restores": self.restores,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.bad_steps.copy_(state["bad_steps"])
        self.bad_steps_in_a_row.copy_(state["bad_steps_in_a_row"])
        self.restores.copy_(state["restores"])
        self.resnapshot()
