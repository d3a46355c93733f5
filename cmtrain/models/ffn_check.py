"""Do the Triton kernels of a CMT compute on this GPU what torch computes? Asked before they train anything."""

import copy
import warnings

import torch
from torch import Tensor, nn

from cmtrain.models.blocks import FeedForward, FfnKernel, ResidualDepthwiseConv

# Small, with a hidden width that is no multiple of anything and a map that is no multiple of a tile.
DIM, HIDDEN, SIDE, BATCH = 24, 37, 7, 3
TOLERANCES = {torch.float32: 2e-2, torch.float16: 5e-2}  # TF32 has ten bits, as fp16 has


def use_fused_where_it_agrees(model: nn.Module) -> None:
    """Leave what is "auto" in `model` to the kernels only if those agree with torch where it lies.

    A compiler or a driver that gets them wrong then costs speed, and a warning says so, not a run.
    """
    parts = _undecided(model)
    device = _device_of(model)
    if device.type != "cuda" or not parts:
        return
    try:
        reimpl = any(isinstance(part, FeedForward) and not part.residual_before_norm for part in parts)
        errors = {dtype: worst_error(device, dtype, reimpl=reimpl) for dtype in TOLERANCES}
        wrong = [
            f"{dtype}: {error:.1e}" for dtype, error in errors.items() if not error <= TOLERANCES[dtype]
        ]
        trouble = f"differ from torch's results by {', '.join(wrong)}" if wrong else ""
    except Exception as error:  # whatever Triton, its compiler or the driver raise: there is another way
        trouble = f"do not run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if trouble:
        warnings.warn(
            f"model.ffn_kernel: the fused kernels {trouble}; computing operation by operation", stacklevel=2
        )
        for part in parts:
            part.kernel = "eager"


def _undecided(model: nn.Module) -> list[FeedForward | ResidualDepthwiseConv]:
    parts = [m for m in model.modules() if isinstance(m, FeedForward | ResidualDepthwiseConv)]
    return [part for part in parts if part.kernel == "auto"]


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def worst_error(
    device: torch.device, dtype: torch.dtype, kernel: FfnKernel = "auto", *, reimpl: bool = False
) -> float:
    """Of a perception unit and of a feed-forward network the larger difference from what torch computes; see _error."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        parts = ResidualDepthwiseConv(DIM), FeedForward(DIM, HIDDEN, reimpl=reimpl, drop=0.0)
        return max(_error(part, device, dtype, kernel) for part in parts)


def _error(
    part: FeedForward | ResidualDepthwiseConv, device: torch.device, dtype: torch.dtype, kernel: FfnKernel
) -> float:
    """Largest difference in a tensor, of the output, the gradients and the statistics, relative to its norm."""
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    if isinstance(part, FeedForward):
        part.project_norm.eval()  # on batch statistics it would let no gradient through to the shifts before it
    x, weight = torch.randn(2, BATCH, DIM, SIDE, SIDE).to(device)
    eager = part.to(device)
    fused = copy.deepcopy(eager)
    eager.kernel, fused.kernel = "eager", kernel
    results = []
    for network in (eager, fused):
        taken = x.to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = network(taken)
        gradients = torch.autograd.grad((out.float() * weight).sum(), [taken, *network.parameters()])
        statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        results.append([out, *gradients, *statistics])
    return max(_difference(expected, found) for expected, found in zip(*results, strict=True))


def _difference(expected: Tensor, found: Tensor) -> float:
    error = (expected.float() - found.float()).norm() / expected.float().norm().clamp(min=1e-6)
    return error.nan_to_num(nan=torch.inf).item()
