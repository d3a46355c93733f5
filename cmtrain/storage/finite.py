"""Check weights before a save: repair a non-finite EMA from a finite model, reject a non-finite model.

Should a non-finite value pass the guard, a saver that takes everything replaces good checkpoints by bad
ones, and one that only refuses saves nothing for the rest of the run: an EMA (moving average of the
weights) never loses a NaN by itself. Both happened: ultralytics pull requests 24731, 24986 and 25005.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class FiniteCheck(NamedTuple):
    """Names of tensors: `repaired` ones of the EMA, `nonfinite` ones of a model that must not be saved."""

    repaired: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()


@torch.no_grad()
def repair_or_reject(model: nn.Module, ema: nn.Module | None = None) -> FiniteCheck:
    """Check every parameter and buffer of `model` and `ema`, by one reduction on the device; synchronises.
    If the model is finite, non-finite tensors of the EMA become copies of its own. All ranks do the same.
    """
    weights = floating_tensors(model.state_dict())
    averages = floating_tensors(ema.state_dict()) if ema is not None else {}
    finite = all_finite([*weights.values(), *averages.values()])
    if nonfinite := tuple(name for name, good in zip(weights, finite, strict=False) if not good):
        return FiniteCheck(nonfinite=nonfinite)
    broken = tuple(name for name, good in zip(averages, finite[len(weights) :], strict=True) if not good)
    for name in broken:
        averages[name].copy_(weights[name])
    return FiniteCheck(repaired=broken)


def floating_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the floating-point entries of a state_dict that have elements."""
    return {name: t for name, t in state.items() if t.is_floating_point() and t.numel()}


def all_finite(tensors: list[Tensor]) -> list[bool]:
    """Return for each tensor whether all of its elements are finite."""
    # The sum of squares is the one reduction that is fused over tensors everywhere. It may overflow where no
    # element does, so each tensor that it suspects is checked again.
    finite = torch.stack(torch._foreach_norm(tensors)).isfinite().tolist()
    return [good or bool(tensor.isfinite().all()) for good, tensor in zip(finite, tensors, strict=True)]


def named(tensors: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
    return f"{tensors[0]}{more}"
