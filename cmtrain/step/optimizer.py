"""SGD and AdamW as this project uses them: decay and no-decay groups, fused, and safe to skip a step on the device."""

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
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
