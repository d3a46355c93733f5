"""SGD and AdamW as this project uses them: decay and no-decay groups, fused, and safe to skip a step on the device."""

import copy
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


def make_optimizer(
    model: nn.Module,
    *,
    opt: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    betas: tuple[float, float],
    eps: float,
) -> Optimizer:
    """Build the optimizer of `model`'s parameters.

    Vectors (biases, norms) and whatever `model.no_weight_decay()` names (position tables) are not decayed.

    Only fused optimizers are offered: they alone read `found_inf` on the device, so that a bad step is skipped without
    a host synchronisation.
    """
    keep: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, weight_decay=weight_decay, no_weight_decay_list=keep)
    if opt == "adamw":
        return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    optimizer = SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:
        # torch allocates these at the first step with empty_like, and if that step is skipped the next one reads
        # uninitialised memory as momentum. Zeros are the same mathematics without the hole.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """ema += (1 - decay) * (model - ema), over parameters and floating-point buffers.

    timm's ModelEmaV3 and torch's AveragedModel take in whatever the model holds, so one NaN in a BatchNorm buffer stays
    in the average for ever (ultralytics pull requests 24731 and 24986). Here a step that the guard refused adds exactly
    zero, and that costs no host synchronisation.

    Args:
        model: the unwrapped model; it is copied.
        decay: 0 < decay < 1, per optimizer step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.average, self.source = _places(self.module), _places(model)

    @torch.no_grad()
    def update(self, ok: Tensor) -> None:
        """Move towards the model where `ok` (bool scalar on the device), else stay exactly where it is."""
        average, average_counts = _split(self.average)
        source, source_counts = _split(self.source)
        # The model is finite here, refused step or not, so 0 * difference is 0 and x + 0 is x, bit for bit.
        difference = torch._foreach_sub(source, average)
        torch._foreach_mul_(difference, (1 - self.decay) * ok)
        torch._foreach_add_(average, difference)
        if source_counts:
            torch._foreach_copy_(average_counts, source_counts)


def _places(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where `model` keeps its state: the dict and the key, not the tensor, which DDP and .to() replace."""
    places: list[tuple[dict[str, Any], str]] = []
    for module in model.modules():
        places += [
            (module._parameters, name) for name, value in module._parameters.items() if value is not None
        ]
        unsaved = module._non_persistent_buffers_set
        places += [
            (module._buffers, n)
            for n, value in module._buffers.items()
            if value is not None and n not in unsaved
        ]
    return places


def _split(places: list[tuple[dict[str, Any], str]]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors at `places`: floating point, and the rest."""
    tensors = [holder[name] for holder, name in places]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
