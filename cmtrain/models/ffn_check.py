"""Check before training that a CMT's Triton kernels compute on this GPU what torch computes."""

import copy
import warnings

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from cmtrain.models.blocks import ChannelNorm, FeedForward, FfnKernel, FusedPart, ResidualDepthwiseConv
from cmtrain.models.position import Variant

# Small, with a hidden width that is no multiple of anything and a map that is no multiple of a tile.
DIM, HIDDEN, SIDE, BATCH = 24, 37, 7, 3
# TF32 has ten bits, as fp16 has; bf16 has seven.
TOLERANCES = {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 2e-1}
BF16_CAPABILITY = (8, 0)  # of a GPU; older ones emulate it, if at all


def use_fused_where_it_agrees(model: nn.Module) -> None:
    """Make the "auto" parts of `model` "eager" unless the kernels agree with torch on its device.

    So a compiler or driver that gets the kernels wrong costs speed and a warning, not a run.
    """
    parts = [part for part in model.modules() if isinstance(part, FusedPart) and part.kernel == "auto"]
    device = _device_of(model)
    if device.type != "cuda" or not parts:
        return
    try:
        (variant,) = {part.variant for part in parts if isinstance(part, FeedForward)}
        has_bf16 = torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
        dtypes = [dtype for dtype in TOLERANCES if has_bf16 or dtype != torch.bfloat16]
        errors = {dtype: worst_error(device, dtype, variant=variant) for dtype in dtypes}
        wrong = [f"{each}: {error:.1e}" for each, error in errors.items() if not error <= TOLERANCES[each]]
        trouble = f"differ from torch's results by {', '.join(wrong)}" if wrong else ""
    except Exception as error:  # from Triton, its compiler or the driver: the model runs without them
        trouble = f"do not run: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if trouble:
        message = f"model.ffn_kernel: the fused kernels {trouble}; computing operation by operation"
        warnings.warn(message, stacklevel=2)
        for part in parts:
            part.kernel = "eager"


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def worst_error(
    device: torch.device, dtype: torch.dtype, kernel: FfnKernel = "auto", *, variant: Variant = "paper"
) -> float:
    """Return the largest difference from torch, of a perception unit, a norm and an FFN; see _error."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        ffn = FeedForward(DIM, HIDDEN, variant=variant, drop=0.0)
        parts = ResidualDepthwiseConv(DIM), ChannelNorm(DIM, 1e-6), ffn
        return max(_error(part, device, dtype, kernel) for part in parts)


def _output(part: FusedPart, images: Tensor) -> Tensor:
    if not isinstance(part, ChannelNorm):
        return part(images)
    torch.manual_seed(0)  # of the dropped paths
    return torch.add(*part.of_sum(part(images), images, DropPath(0.5)))


def _error(part: FusedPart, device: torch.device, dtype: torch.dtype, kernel: FfnKernel) -> float:
    """Return the largest difference in the output, a gradient or a statistic, relative to its norm."""
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    if isinstance(part, FeedForward):
        part.project_norm.eval()  # batch statistics would pass no gradient on to the shifts before it
    x, weight = torch.randn(2, BATCH, DIM, SIDE, SIDE).to(device)
    eager = part.to(device)
    fused = copy.deepcopy(eager)
    eager.kernel, fused.kernel = "eager", kernel
    results = []
    for network in (eager, fused):
        images = x.to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = _output(network, images)
        gradients = torch.autograd.grad((out.float() * weight).sum(), [images, *network.parameters()])
        statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        results.append([out, *gradients, *statistics])
    pairs = [(expected.float(), found.float()) for expected, found in zip(*results, strict=True)]
    errors = [(expected - found).norm() / expected.norm().clamp(min=1e-6) for expected, found in pairs]
    return torch.stack(errors).nan_to_num(nan=torch.inf).max().item()
