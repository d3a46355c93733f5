"""Do the fused feed-forward kernels compute on this GPU what torch computes? Asked before they train anything."""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmtrain.models.blocks import FeedForward

# Small, with a hidden width that is no multiple of anything and a map that is no multiple of a tile.
DIM, HIDDEN, SIDE, BATCH = 24, 37, 7, 3
TOLERANCES = {torch.float32: 1e-2, torch.float16: 5e-2}  # TF32 has ten bits, as fp16 has


def use_fused_where_it_agrees(model: nn.Module) -> None:
    """Leave "auto" feed-forward networks of `model` to the kernels only if those agree with torch where it lies.

    A compiler or a driver that gets them wrong then costs speed, and a warning says so, not a run.
    """
    networks = [m for m in model.modules() if isinstance(m, FeedForward) and m.kernel == "auto"]
    device = _device_of(model)
    if device.type != "cuda" or not networks:
        return
    try:
        seed = not networks[0].residual_before_norm
        errors = {dtype: worst_error(device, dtype, seed=seed) for dtype in TOLERANCES}
        wrong = [f"{dtype}: {error:.1e}" for dtype, error in errors.items() if not error <= TOLERANCES[dtype]]
        trouble = f"differ from torch's results by {', '.join(wrong)}" if wrong else ""
    except Exception as error:  # whatever Triton, its compiler or the driver raise: there is another way
        trouble = f"do not run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if trouble:
        warnings.warn(f"model.ffn_kernel: the fused kernels {trouble}; computing operation by operation", stacklevel=2)
        for network in networks:
            network.kernel = "eager"


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def worst_error(device: torch.device, dtype: torch.dtype, kernel: str = "auto", *, seed: bool = False) -> float:
    """Largest difference in the output, in a gradient and in a statistic, each relative to the largest value there.

    Relative to the largest of all gradients, because those of shifts before the last BatchNorm are rounding errors.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        eager = FeedForward(DIM, HIDDEN, seed=seed, drop=0.0, kernel="eager")
        for parameter in eager.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(BATCH, DIM, SIDE, SIDE)
        weight = torch.randn(BATCH, DIM, SIDE, SIDE)
    eager, x, weight = eager.to(device), x.to(device), weight.to(device)
    fused = copy.deepcopy(eager)
    fused.kernel = kernel  # type: ignore[assignment]
    results = []
    for network in (eager, fused):
        taken = x.to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = network(taken)
        gradients = torch.autograd.grad((out.float() * weight).sum(), [taken, *network.parameters()])
        statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        results.append(([out], gradients, statistics))
    return max(_difference(expected, found) for expected, found in zip(*results, strict=True))


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    scale = max(tensor.abs().max().item() for tensor in expected)
    worst = [(one.float() - other.float()).abs().max() for one, other in zip(expected, found, strict=True)]
    return torch.stack(worst).nan_to_num(nan=torch.inf).max().item() / scale
