"""Build SGD and AdamW so that the device can skip a step, freeze parameters, average the weights (EMA)."""

import copy
import math
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from cmtrain.errors import ConfigError


def make_optimizer(
    model: nn.Module, *, opt: str, lr: float, weight_decay: float,
    momentum: float, nesterov: bool, betas: tuple[float, float] | None = None, eps: float | None = None,
    layer_decay: float = 1, lr_factors: Sequence[str] = (),
) -> Optimizer:  # fmt: skip
    """Build the optimizer of `model`'s parameters. Raises ConfigError: as lr_scales; values `opt` refuses.
    Vectors (biases, norms) and the names in `model.no_weight_decay()` (position tables) are not decayed.
    Only torch's fused SGD and AdamW read `found_inf` on the device and so skip a bad step without waiting.
    """
    # As timm.optim's param_groups_weight_decay and _layer_decay; to import timm.optim takes longer than to
    # import torch. One group for each weight decay and factor on the learning rate.
    keep: set[str] = getattr(model, "no_weight_decay", set)()  # names or patterns
    scales = lr_scales(model, layer_decay, lr_factors)
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {(0.0, 1.0): [], (weight_decay, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_kept = parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch(name, k) for k in keep)
            kinds.setdefault((0.0 if is_kept else weight_decay, scales[name]), []).append(parameter)
    groups = [{"params": p, "weight_decay": w, "lr_scale": s} for (w, s), p in kinds.items() if p]
    given: dict[str, Any] = {k: v for k, v in {"betas": betas, "eps": eps}.items() if v is not None}
    if opt == "adamw":
        return AdamW(groups, lr=lr, fused=True, **given)
    if opt != "sgd":
        from timm.optim import create_optimizer_v2

        try:
            return create_optimizer_v2(groups, opt, lr=lr, momentum=momentum, **given)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optim.opt: {opt}: {error}") from error
    optimizer = SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:
        # torch allocates these at the first step with empty_like. If that step is skipped, the next one
        # reads uninitialised memory as momentum. Zeros are the same mathematics without the hole.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_scales(model: nn.Module, layer_decay: float, factors: Sequence[str] = ()) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter: `layer_decay` to its distance from the head,
    times those `factors`, such as "head.*=10", whose pattern its name matches.

    The layers are those of the model's `group_matcher`, as in timm.optim.param_groups_layer_decay.
    Raises ConfigError: the model has none, or a factor that is no number or matches no parameter.
    """
    scales = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    if layer_decay < 1:
        from timm.models import group_parameters

        matcher: Any = getattr(model, "group_matcher", None)
        if matcher is None:
            what = f"{type(model).__name__} has no group_matcher(), which defines the layers"
            raise ConfigError(f"optim.layer_decay: {what}; leave it out")
        layers = group_parameters(model, matcher(coarse=False), reverse=True)
        last = max(layers.values())
        scales = {name: layer_decay ** (last - layers.get(name, last)) for name in scales}
    for factor in factors:
        pattern, _, number = factor.rpartition("=")
        names = [name for name in scales if fnmatch(name, pattern)]
        try:
            times = float(number)
        except ValueError:
            times = -1.0
        if not (names and 0 <= times < math.inf):
            wanted = "must be PATTERN=FACTOR, 0 or more, for parameters of the model, such as"
            raise ConfigError(f"optim.lr_factors: {factor}: {wanted} {next(iter(scales))}=0.1")
        scales |= {name: scales[name] * times for name in names}
    return scales


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


def set_frozen(model: nn.Module, names: Collection[str], *, frozen: bool = True) -> None:
    """Freeze the parameters and BatchNorm statistics of these `names`, or train them, if not `frozen`."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(not frozen)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" in names:
            module.is_frozen = frozen  # type: ignore[assignment]  # torch does not know it
            module.training = not frozen


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add `gradients` to each .grad in a few kernels, where autograd takes one a parameter; keep none."""
    jobs: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            operation: Any = torch._foreach_add_
            if parameter.grad is None:
                operation, parameter.grad = torch._foreach_copy_, torch.empty_like(parameter)
            # One kernel each for all of a list, if one pair's layouts differ
            job = jobs.setdefault((operation, parameter.stride() == gradient.stride()), ([], []))
            job[0].append(parameter.grad)
            job[1].append(gradient)
    for (operation, _), job in jobs.items():
        operation(*job)


class Ema:
    """Exponential moving average (EMA) of parameters and buffers: ema += (1 - decay) * (model - ema).

    In timm's ModelEmaV3 and torch's AveragedModel one NaN in a BatchNorm buffer stays for ever (ultralytics
    pull requests 24731 and 24986). Here a step that the guard refused adds exactly zero, without a host
    synchronisation. Integer buffers are copied. `model` is unwrapped, 0 < `decay` < 1 is per step.
    `warmup`: as timm's, less at first.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.average, self.source = _places(self.module), _places(model)

    @torch.no_grad()
    def update(self, ok: Tensor, step: int) -> None:
        """Move towards the model where `ok` (bool scalar on the device), else keep every bit."""
        average, average_counts = _split(self.average)
        source, source_counts = _split(self.source)
        # The model is finite here, refused step or not, so 0 * difference is 0 and x + 0 is x, bit for bit.
        difference = torch._foreach_sub(source, average)
        rest = 1 - self.decay
        torch._foreach_mul_(difference, (max(rest, (1 + step) ** (-2 / 3)) if self.warmup else rest) * ok)
        torch._foreach_add_(average, difference)
        if source_counts:
            torch._foreach_copy_(average_counts, source_counts)


def _places(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return where `model` keeps its state: dict and key, not the tensor, which DDP and .to() replace."""
    places: list[tuple[dict[str, Any], str]] = []
    for module in model.modules():
        saved = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        places += [(module._parameters, name) for name in module._parameters]
        places += [(module._buffers, name) for name in saved]
    return [(holder, name) for holder, name in places if holder[name] is not None]


def _split(places: list[tuple[dict[str, Any], str]]) -> tuple[list[Tensor], list[Tensor]]:
    tensors = [holder[name] for holder, name in places]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
