"""Check before training that a CMT's Triton kernels compute on this GPU what torch computes."""

import copy
import warnings

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from cmtrain.models import blocks
from cmtrain.models.blocks import FeedForward, FfnKernel, FusedPart
from cmtrain.models.position import Variant

DIM, HIDDEN, SIDE, BATCH = 24, 37, 6, 3  # small; hidden width and map are no multiples of a tile's sides
# TF32 has ten bits, as fp16 has; bf16 has seven.
TOLERANCES = {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def use_fused_where_it_agrees(model: nn.Module) -> None:
    """Make the "auto" parts of `model` "eager" unless the kernels agree with torch on its device.

    So a compiler or driver that gets the kernels wrong costs speed and a warning, not a run.
    """
    parts = [part for part in model.modules() if isinstance(part, FusedPart) and part.kernel == "auto"]
    device = next(model.parameters()).device
    if device.type != "cuda" or not parts:
        return
    try:
        (variant,) = {part.variant for part in parts if isinstance(part, FeedForward)}
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it, if at all
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


def worst_error(
    device: torch.device, dtype: torch.dtype, kernel: FfnKernel = "auto", *, variant: Variant = "paper"
) -> float:
    """Return the largest difference from torch, of all parts that have kernels; see _error."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return max(_error(part, device, dtype, kernel) for part in _parts(variant))


def _parts(variant: Variant) -> list[FusedPart]:
    ffn, frozen = (FeedForward(DIM, HIDDEN, variant=variant, drop=0.0) for _ in range(2))
    frozen.project_norm.eval()  # batch statistics would pass no gradient on to the shifts before it
    attention = blocks.Attention(DIM, 2, 2, blocks.BlockOptions(variant, True, 0.0, 0.0, "auto"))
    norm, patches = blocks.ChannelNorm(DIM, 1e-6), blocks.PatchConv(DIM, DIM, 2)
    return [blocks.ResidualDepthwiseConv(DIM), norm, patches, blocks.Stem(DIM, 16), attention, ffn, frozen]


def _output(part: FusedPart, x: Tensor) -> Tensor:
    torch.manual_seed(0)  # of the dropped paths
    little = 0.1 * x  # what is only added must not hide an error in what is computed
    if isinstance(part, blocks.ChannelNorm):
        again, normed = part.with_input(x)
        return normed + 0.1 * again
    if isinstance(part, blocks.Attention):
        return part(x.permute(0, 2, 3, 1), None, little.permute(0, 2, 3, 1), DropPath(0.5))
    return part(x, little, DropPath(0.5)) if isinstance(part, FeedForward) else part(x)


def _error(part: FusedPart, device: torch.device, dtype: torch.dtype, kernel: FfnKernel) -> float:
    """Return the largest difference in the output, a gradient or a statistic, relative to its norm.
    A gradient's norm counts as a tenth of the largest at least: rounding alone makes what should be 0, such
    as that of a bias in front of a BatchNorm.
    """
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(BATCH, DIM, SIDE, SIDE, device=device).to(memory_format=torch.channels_last)
    eager = part.to(device)
    results = []
    sides: list[tuple[FusedPart, FfnKernel]] = [(eager, "eager"), (copy.deepcopy(eager), kernel)]
    for network, choice in sides:
        for module in network.modules():
            if isinstance(module, FusedPart):
                module.kernel = choice
        images = x.detach().requires_grad_()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = _output(network, images)
        loss = (out.float().flatten() * torch.arange(out.numel(), device=device).sin()).sum()
        statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        results.append([[out, *statistics], torch.autograd.grad(loss, [images, *network.parameters()])])
    worst = []
    for share, *pairs in zip((1e-6, 0.1), *results, strict=True):
        norms = torch.stack([expected.float().norm() for expected in pairs[0]])
        errors = [(expected.float() - found.float()).norm() for expected, found in zip(*pairs, strict=True)]
        worst.append((torch.stack(errors) / norms.clamp(min=share * norms.max())).nan_to_num(nan=torch.inf))
    return torch.cat(worst).max().item()
