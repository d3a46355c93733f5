"""The last look before a state is saved: is it worth going back to?

The guard keeps non-finite values out of weights, statistics and EMA. Should they get in all the same, by a way that
nobody thought of, a saver that takes whatever it is given replaces good checkpoints by bad ones, and one that merely
refuses saves nothing for the rest of the run, because an EMA never loses a NaN by itself (ultralytics pull requests
24731, 24986 and 25005: both happened). So the EMA is healed from the model where the model is finite, and only a model
that is not finite is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Verdict:
    """Names of tensors: `healed` ones of the EMA, and `bad` ones of the model, which is not worth saving then."""

    healed: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()


@torch.no_grad()
def inspect(model: nn.Module, ema: nn.Module | None = None) -> Verdict:
    """Look at every parameter and buffer of `model` and `ema`, by one reduction on the device; synchronises.

    Where the whole model is finite, the non-finite tensors of the EMA become copies of the model's, in place. All ranks
    hold the same values here and do the same.
    """
    mine = floating_tensors(model)
    averages = floating_tensors(ema) if ema is not None else {}
    finite = all_finite([*mine.values(), *averages.values()])
    bad = tuple(name for name, good in zip(mine, finite, strict=False) if not good)
    sick = tuple(name for name, good in zip(averages, finite[len(mine) :], strict=True) if not good)
    if bad:
        return Verdict(bad=bad)
    for name in sick:
        averages[name].copy_(mine[name])
    return Verdict(healed=sick)


def floating_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point entries of the module's state_dict: the module's own memory, not copies."""
    return {
        name: value
        for name, value in module.state_dict().items()
        if value.is_floating_point() and value.numel()
    }


def all_finite(tensors: list[Tensor]) -> list[bool]:
    """Of each tensor, whether all of it is finite."""
    # The sum of squares is the one reduction that is fused over tensors everywhere. It may overflow where no element
    # does, so what it suspects is looked at again.
    finite = torch.stack(torch._foreach_norm(tensors)).isfinite().tolist()
    return [good or bool(tensor.isfinite().all()) for good, tensor in zip(finite, tensors, strict=True)]


def named(tensors: Sequence[str]) -> str:
    """Some tensors, in few words."""
    more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
    return f"{tensors[0]}{more}"
