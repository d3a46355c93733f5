"""Compute LayerNorm with the addition in front of it, and BatchNorm with what is around it, in few passes.

torch's LayerNorm on CUDA spends a block of 512 threads on a row whose width is no multiple of 4, such as
the 46 channels of CMT-Ti's first stage, and a block of 128 on others. Its time is then instructions, not
bytes.

Letters: M = B * H * W rows, C channels. As in ffn_kernels.py sums over rows have a fixed order and no
atomics: each place of a tile keeps its own, programs write theirs, and torch adds those of programs.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import cmtrain.models.ffn_operators as ops
from cmtrain.models.ffn_kernels import gelu, gelu_and_slope, over_rows, welford

PLACES = 16  # of a thread in a tile; in the backward pass it keeps two sums for each
TILE = 128 * PLACES
MIN_COLUMNS = 16  # of a chunk: 32 bytes in half precision, a sector
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
MIN_PROGRAMS = 512  # of the backward pass, one wave on a large GPU: each writes 2 C sums


@triton.jit
def _over_channels(value):  # [CHUNKS, ROWS, COLUMNS] -> [1, ROWS, 1]
    return tl.sum(tl.sum(value, 0), 1)[None, :, None]


@triton.jit
def norm_kernel(
    x, weight, bias, out, stats, rows, eps,
    C: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * ROWS
    place = tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, CHUNKS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    row, at = start + place, start.to(tl.int64) * C + (place * C + column)
    inside = (row < rows) & (column < C)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean = _over_channels(value) * (1.0 / C)
    away = tl.where(column < C, value - mean, 0.0)
    inverse = tl.rsqrt(_over_channels(away * away) * (1.0 / C) + eps)
    tl.store(stats + row, mean, mask=row < rows)
    tl.store(stats + rows + row, inverse, mask=row < rows)
    w = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out + at, (away * inverse * w + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_grad_kernel(
    dy, skip, x, weight, stats, dx, sums, rows,
    C: tl.constexpr, SKIP: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    place = tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, CHUNKS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    w = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    d_weight = tl.zeros([CHUNKS, ROWS, COLUMNS], tl.float32)
    d_bias = tl.zeros([CHUNKS, ROWS, COLUMNS], tl.float32)
    for i in range(TILES):
        start = (part * TILES + i) * ROWS
        row, at = start + place, start.to(tl.int64) * C + (place * C + column)
        inside = (row < rows) & (column < C)
        mean = tl.load(stats + row, mask=row < rows, other=0.0)
        inverse = tl.load(stats + rows + row, mask=row < rows, other=0.0)
        normal = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean) * inverse
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)  # 0 outside, and so all sums
        d_weight += gradient * normal
        d_bias += gradient
        gradient *= w
        shift = _over_channels(gradient) * (1.0 / C)
        slope = _over_channels(gradient * normal) * (1.0 / C)
        gradient = (gradient - shift - normal * slope) * inverse
        if SKIP:
            gradient += tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
    to = sums + part * 2 * C + column
    tl.store(to, tl.sum(d_weight, 1)[:, None, :], mask=column < C)
    tl.store(to + C, tl.sum(d_bias, 1)[:, None, :], mask=column < C)


def _tile(x: Tensor) -> dict[str, int]:
    """Return the sides of a tile. A thread reads a vector of each of a row's chunks.

    So a row has few threads, which exchange its sums five times if they are 32, and three if they are 8.
    """
    channels = x.shape[1]
    width = triton.next_power_of_2(channels)
    vector = math.gcd(channels, 16 // x.itemsize)
    columns = min(width, max(MIN_COLUMNS, width // PLACES * vector))
    return {"CHUNKS": width // columns, "ROWS": max(1, TILE // width), "COLUMNS": columns}


def _kept(kept: Tensor | None, x: Tensor) -> dict[str, Any]:
    return {"KEPT": kept is not None, "PIXELS": 1 if kept is None else len(x) // len(kept)}


@ops.operator
def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x (M, C), and mean and 1 / deviation of its rows (2, M) fp32."""
    out, stats, tile = torch.empty_like(x), ops.empty(x, 2, len(x)), _tile(x)
    ops.launch(
        norm_kernel, (ops.cdiv(len(x), tile["ROWS"]),),
        x, weight, bias, out, stats, len(x), eps, C=x.shape[1], **tile, **LAUNCH,
    )  # fmt: skip
    return out, stats


@ops.operator
def norm_grad(
    dy: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `norm`'s x (M, C), and sums (parts, 2, C) fp32: gradients of weight and bias.

    skip (M, C): the gradient that reached x past the norm.
    """
    rows, channels = x.shape
    tile = _tile(x)
    num_tiles = ops.cdiv(rows, tile["ROWS"])
    tiles = max(1, min(ops.MAX_TILES, num_tiles // MIN_PROGRAMS))
    dx, sums = torch.empty_like(x), ops.empty(x, ops.cdiv(num_tiles, tiles), 2, channels)
    ops.launch(
        norm_grad_kernel, (len(sums),),
        dy, dy if skip is None else skip, x, weight, stats, dx, sums, rows,
        C=channels, SKIP=skip is not None, **tile, TILES=tiles, **LAUNCH,
    )  # fmt: skip
    return dx, sums


class _LayerNorm(torch.autograd.Function):
    """Rows (M, C) -> themselves and their norm, both (M, C)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        out, stats = norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, stats)
        ctx.set_materialize_grads(False)
        return x.view_as(x), out

    @staticmethod
    def backward(ctx, skip, dy):
        x, weight, stats = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dx, sums = norm_grad(dy, None if skip is None else skip.contiguous(), x, weight, stats)
        return dx, *sums.sum(0).to(weight.dtype), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x (..., C) and its LayerNorm over the last side, in its dtype.

    Other uses of x take the former: its gradient and the norm's become one in the backward pass, for which
    torch would read both again.
    """
    x_again, out = _LayerNorm.apply(x.reshape(-1, x.shape[-1]), weight, bias, eps)
    return x_again.view(x.shape), out.view(x.shape)


# ---- BatchNorm of f(z) = z, or of f(z) = gelu(z + bias), which is computed again in every pass


@triton.jit
def _places(tile, rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, row.to(tl.int64) * C + column, (row < rows) & (column < C)


@triton.jit
def _biased(z, bias, at, column, inside, C: tl.constexpr, GELU: tl.constexpr):
    value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    return value


@triton.jit
def moments_kernel(
    z, bias, means, m2s, rows,
    C: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    mean, m2 = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(TILES):
        row, column, at, inside = _places(part * TILES + i, rows, C, ROWS, COLUMNS)
        value = _biased(z, bias, at, column, inside, C, GELU)
        mean, m2 = welford(gelu(value) if GELU else value, row < rows, i, mean, m2)
    mean, m2 = over_rows(mean, m2, part, rows, ROWS, TILES)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(means + part * C + column, mean, mask=column < C)
    tl.store(m2s + part * C + column, m2, mask=column < C)


@triton.jit
def batch_norm_kernel(
    z, bias, scale, shift, skip, kept, out, rows,
    C: tl.constexpr, PIXELS: tl.constexpr, GELU: tl.constexpr, SKIP: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    for i in range(TILES):
        row, column, at, inside = _places(tl.program_id(1) * TILES + i, rows, C, ROWS, COLUMNS)
        value = _biased(z, bias, at, column, inside, C, GELU)
        value = gelu(value) if GELU else value
        value *= tl.load(scale + column, mask=column < C, other=0.0)
        value += tl.load(shift + column, mask=column < C, other=0.0)
        if KEPT:
            value *= tl.load(kept + row // PIXELS, mask=row < rows, other=0.0).to(tl.float32)
        if SKIP:
            value += tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def batch_norm_sums_kernel(
    dn, z, bias, kept, sums, rows,
    C: tl.constexpr, PIXELS: tl.constexpr, GELU: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    e, d = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(TILES):
        row, column, at, inside = _places(part * TILES + i, rows, C, ROWS, COLUMNS)
        gradient = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        if KEPT:
            gradient *= tl.load(kept + row // PIXELS, mask=row < rows, other=0.0).to(tl.float32)
        value = _biased(z, bias, at, column, inside, C, GELU)
        e += gradient
        d += gradient * (gelu(value) if GELU else value)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + part * 2 * C + column, tl.sum(d, 0), mask=column < C)
    tl.store(sums + part * 2 * C + C + column, tl.sum(e, 0), mask=column < C)


@triton.jit
def batch_norm_grad_kernel(
    dn, z, bias, kept, scale, slope, offset, dz, sums, rows,
    C: tl.constexpr, PIXELS: tl.constexpr, GELU: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    taken = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(TILES):
        row, column, at, inside = _places(part * TILES + i, rows, C, ROWS, COLUMNS)
        gradient = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        if KEPT:
            gradient *= tl.load(kept + row // PIXELS, mask=row < rows, other=0.0).to(tl.float32)
        value = _biased(z, bias, at, column, inside, C, GELU)
        gelu_slope = 1.0
        if GELU:
            value, gelu_slope = gelu_and_slope(value)
        gradient *= tl.load(scale + column, mask=column < C, other=0.0)
        gradient += value * tl.load(slope + column, mask=column < C, other=0.0)
        gradient += tl.load(offset + column, mask=column < C, other=0.0)
        gradient = (gradient * gelu_slope).to(dz.dtype.element_ty)
        tl.store(dz + at, gradient, mask=inside)
        if GELU:
            taken += tl.where(inside, gradient.to(tl.float32), 0.0)
    if GELU:
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(sums + part * C + column, tl.sum(taken, 0), mask=column < C)


def _kept(kept: Tensor | None, x: Tensor) -> dict[str, Any]:
    return {"KEPT": kept is not None, "PIXELS": 1 if kept is None else len(x) // len(kept)}


def _tiled(z: Tensor, bias: Tensor | None, kept: Tensor | None = None) -> tuple[int, dict[str, Any]]:
    """Return the parts of the rows, each with its program, and the constants of a launch."""
    (rows, channels), columns = z.shape, min(ops.MAP_COLUMNS, triton.next_power_of_2(z.shape[1]))
    constants = {"C": channels, "GELU": bias is not None, **_kept(kept, z)}
    tile = {"ROWS": ops.ROWS, "COLUMNS": columns, "TILES": ops.count_tiles(rows, channels)}
    return ops.count_parts(rows, channels), constants | tile | LAUNCH


@ops.operator
def moments(z: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return means and squared deviations of f(z) (M, C) in parts of the rows, (parts, C); bias (C,)."""
    parts, constants = _tiled(z, bias)
    means, m2s = (ops.empty(z, parts, z.shape[1]) for _ in range(2))
    del constants["KEPT"], constants["PIXELS"]
    ops.launch(
        moments_kernel, (ops.cdiv(z.shape[1], constants["COLUMNS"]), parts),
        z, z if bias is None else bias, means, m2s, len(z), **constants,
    )  # fmt: skip
    return means, m2s


@ops.operator
def batch_norm(
    z: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, skip: Tensor | None, kept: Tensor | None
) -> Tensor:
    """skip + kept * (scale * f(z) + shift) -> (M, C). z, skip (M, C), scale, shift (C,), kept (B,)."""
    parts, constants = _tiled(z, bias, kept)
    dtype = z.dtype if skip is None else torch.promote_types(z.dtype, skip.dtype)
    out = ops.empty(z, *z.shape, dtype=dtype)
    ops.launch(
        batch_norm_kernel, (ops.cdiv(z.shape[1], constants["COLUMNS"]), parts),
        z, z if bias is None else bias, scale, shift, z if skip is None else skip, z if kept is None else kept,
        out, len(z), SKIP=skip is not None, **constants,
    )  # fmt: skip
    return out


@ops.operator
def batch_norm_sums(dn: Tensor, z: Tensor, bias: Tensor | None, kept: Tensor | None) -> Tensor:
    """Return the sums of kept * dn * f(z) and of kept * dn in parts of the rows, (parts, 2, C)."""
    parts, constants = _tiled(z, bias, kept)
    sums = ops.empty(z, parts, 2, z.shape[1])
    ops.launch(
        batch_norm_sums_kernel, (ops.cdiv(z.shape[1], constants["COLUMNS"]), parts),
        dn, z, z if bias is None else bias, z if kept is None else kept, sums, len(z), **constants,
    )  # fmt: skip
    return sums


@ops.operator
def batch_norm_grad(
    dn: Tensor, z: Tensor, bias: Tensor | None, kept: Tensor | None,
    scale: Tensor, slope: Tensor, offset: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale * kept * dn + slope * f(z) + offset) * f'(z) -> (M, C), and its sums (parts, C) with a bias."""
    parts, constants = _tiled(z, bias, kept)
    dz, sums = torch.empty_like(z), ops.empty(z, 0 if bias is None else parts, z.shape[1])
    ops.launch(
        batch_norm_grad_kernel, (ops.cdiv(z.shape[1], constants["COLUMNS"]), parts),
        dn, z, z if bias is None else bias, z if kept is None else kept, scale, slope, offset, dz, sums,
        len(z), **constants,
    )  # fmt: skip
    return dz, sums


def batch_norm_backward(
    dn: Tensor, z: Tensor, bias: Tensor | None, kept: Tensor | None,
    mean: Tensor, inverse: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of z (M, C), bias, gamma and beta (C,); that of bias is 0 without one."""
    d, e = batch_norm_sums(dn, z, bias, kept).sum(0)
    d_gamma, slope, offset = ops.normalise_grad(d, e, mean, inverse, scale, len(z)).unbind()
    dz, sums = batch_norm_grad(dn, z, bias, kept, scale, slope, offset)
    return dz, sums.sum(0), d_gamma, e


class _GeluBatchNorm(torch.autograd.Function):
    """Rows (M, C) -> (M, C), and batch mean and unbiased variance (C,), without gradients."""

    @staticmethod
    def forward(ctx, z, bias, gamma, beta, eps):
        mean, var, inverse, scale, shift = ops.normalise(*moments(z, bias), gamma, beta, len(z), eps).unbind()
        ctx.save_for_backward(z, bias, mean, inverse, scale)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return batch_norm(z, bias, scale, shift, None, None), mean, var

    @staticmethod
    def backward(ctx, dn, *_):
        z, bias, *statistics = ctx.saved_tensors
        return *batch_norm_backward(dn.contiguous(), z, bias, None, *statistics), None


def gelu_batch_norm(z: Tensor, bias: Tensor, norm: Any) -> Tensor:
    """Return norm(gelu(z + bias)), (..., C); like fused_ffn.feed_forward's norms in training and evaluation."""
    rows = z.reshape(-1, z.shape[-1])
    with torch.autocast(z.device.type, enabled=False):
        if norm.training:
            out, mean, var = _GeluBatchNorm.apply(rows, bias, norm.weight, norm.bias, norm.eps)
            track(norm, mean, var)
        else:
            out = batch_norm(rows, bias, *evaluation(norm, bias), None, None)
    return out.view(z.shape)


@torch.no_grad()
def track(norm: Any, mean: Tensor, var: Tensor) -> None:
    """Update the running statistics of a BatchNorm as torch's batch_norm does."""
    channels = len(norm.running_mean)
    norm.num_batches_tracked.add_(1)
    moved = [mean[:channels], var[:channels]]
    torch._foreach_lerp_([norm.running_mean, norm.running_var], moved, norm.momentum)


def evaluation(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift (C,) of a BatchNorm in evaluation, or of the Identity that folding left."""
    if isinstance(norm, nn.Identity):
        return torch.ones_like(like), torch.zeros_like(like)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale
