"""Say which parameters of a model stay as they are, and how fast each of the others moves."""

from collections.abc import Collection
from fnmatch import fnmatch
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmtrain.errors import ConfigError


def lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter: `layer_decay` to its distance from the head.

    The layers are those of the model's `group_matcher`, as in timm.optim.param_groups_layer_decay.
    Raises ConfigError: the model has none.
    """
    from timm.models import group_parameters

    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        what = f"{type(model).__name__} has no group_matcher(), which says what a layer is"
        raise ConfigError(f"optim.layer_decay: {what}; leave it out")
    layers = group_parameters(model, matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: layer_decay ** (last - layers.get(name, last)) for name, _ in model.named_parameters()}


def frozen_names(model: nn.Module, freeze: str | Collection[str]) -> frozenset[str]:
    """Return the parameters and buffers of `freeze`: `backbone` (all but the classifier) or patterns.
    Raises ConfigError: a pattern that matches none, or one that leaves nothing to train.
    """
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    names = [name for name in model.state_dict() if name not in fixed]
    if freeze == "backbone":
        head = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
        heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
        frozen = frozenset(name for name in names if not name.startswith(heads))
    else:
        for pattern in freeze:
            if not any(fnmatch(name, pattern) for name in names):
                raise ConfigError(f"model.freeze: {pattern} matches no parameter; one is {names[0]}")
        frozen = frozenset(name for name in names if any(fnmatch(name, pattern) for pattern in freeze))
    if all(name in frozen or name in fixed for name, _ in model.named_parameters()):
        raise ConfigError("model.freeze: nothing is left to train; freeze less")
    return frozen


def hold(model: nn.Module, frozen: Collection[str], *, still: bool = True) -> None:
    """Give `frozen` parameters no gradient, and keep BatchNorm's statistics; not `still`: undo it."""
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(not still)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and f"{name}.running_mean" in frozen:
            module.is_frozen = still  # type: ignore[assignment]  # torch does not know it
            module.training = not still
