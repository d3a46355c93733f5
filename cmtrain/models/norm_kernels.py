"""Compute LayerNorm, and BatchNorm with the operations around it, in few passes over memory.

torch's LayerNorm on CUDA spends a block of 512 threads on a row whose width is no multiple of 4, such as the
46 channels of CMT-Ti's first stage, and a block of 128 on others: instructions bound it, not bytes.

Letters: M = B * H * W rows, C channels. As in ffn_kernels.py sums over rows have a fixed order and no
atomics: each place of a tile keeps its own, programs write theirs, and torch adds those of programs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import cmtrain.models.ffn_operators as ops
from cmtrain.models.ffn_kernels import gelu_and_slope, over_rows, welford

PLACES = 16  # of a thread in a tile; in the backward pass it keeps two sums for each
TILE = 128 * PLACES
MIN_COLUMNS = 16  # of a chunk: 32 bytes in half precision, a sector
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
MIN_PROGRAMS = 512  # of the backward pass, one wave on a large GPU: each writes 2 C sums


@triton.jit
def _over_channels(value):  # [CHUNKS, ROWS, COLUMNS] -> [1, ROWS, 1]
    return tl.sum(tl.sum(value, 0), 1)[None, :, None]


@triton.jit
def _normal(x, at, row, column, rows, eps, C: tl.constexpr):
    """Return a tile of x, normalised, and 1 / deviation of its rows."""
    value = tl.load(x + at, mask=(row < rows) & (column < C), other=0.0).to(tl.float32)
    mean = _over_channels(value) * (1.0 / C)
    away = tl.where(column < C, value - mean, 0.0)
    inverse = tl.rsqrt(_over_channels(away * away) * (1.0 / C) + eps)
    return away * inverse, inverse


@triton.jit
def norm_kernel(
    x, weight, bias, out, rows, eps,
    C: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * ROWS
    place = tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, CHUNKS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    row, at = start + place, start.to(tl.int64) * C + (place * C + column)
    normal, _ = _normal(x, at, row, column, rows, eps, C)
    w = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out + at, (normal * w + b).to(out.dtype.element_ty), mask=(row < rows) & (column < C))


@triton.jit
def norm_grad_kernel(
    dy, skip, x, weight, dx, sums, rows, eps,
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
        normal, inverse = _normal(x, at, row, column, rows, eps, C)
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


@ops.operator
def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the norm of x (M, C)."""
    out, tile = torch.empty_like(x), _tile(x)
    ops.launch(
        norm_kernel, (ops.cdiv(len(x), tile["ROWS"]),), x, weight, bias, out, len(x), eps,
        C=x.shape[1], **tile, **LAUNCH,
    )  # fmt: skip
    return out


@ops.operator
def norm_grad(
    dy: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, eps: float
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
        norm_grad_kernel, (len(sums),), dy, dy if skip is None else skip, x, weight, dx, sums, rows, eps,
        C=channels, SKIP=skip is not None, **tile, TILES=tiles, **LAUNCH,
    )  # fmt: skip
    return dx, sums


class _LayerNorm(torch.autograd.Function):
    """Rows (M, C) -> themselves and their norm, both (M, C)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return x.view_as(x), norm(x, weight, bias, eps)

    @staticmethod
    def backward(ctx, skip, dy):
        x, weight = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dx, sums = norm_grad(dy, None if skip is None else skip.contiguous(), x, weight, ctx.eps)
        return dx, *sums.sum(0).to(weight.dtype), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x (..., C) and its LayerNorm over the last side, in its dtype.
    Other uses of x take the former: one pass adds both gradients, where torch would read them again.
    """
    x_again, out = _LayerNorm.apply(x.reshape(-1, x.shape[-1]), weight, bias, eps)
    return x_again.view(x.shape), out.view(x.shape)


# ---- BatchNorm of f(z) = z, or of f(z) = gelu(z + bias), which is computed again in every pass


@triton.jit
def batch_norm_kernel(
    z, bias, other, kept, a, b, c, out, sums, rows,
    C: tl.constexpr, PIXELS: tl.constexpr, STEP: tl.constexpr, GELU: tl.constexpr, OTHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    is_column = column < C
    first, second = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(TILES):
        row = (part * TILES + i) * ROWS + tl.arange(0, ROWS)[:, None]
        at, inside = row.to(tl.int64) * C + column, (row < rows) & is_column
        value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        slope = 1.0
        if GELU:
            value += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
            value, slope = gelu_and_slope(value)
        if OTHER:
            added = tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        factor = 1.0
        if PIXELS:
            factor = tl.load(kept + row // PIXELS, mask=row < rows, other=0.0).to(tl.float32)
        if STEP == "moments":
            first, second = welford(value, row < rows, i, first, second)
        elif STEP == "sums":
            first += added * factor * value
            second += added * factor
        else:
            result = value * tl.load(a + column, mask=is_column, other=0.0)
            result += tl.load(b + column, mask=is_column, other=0.0)
            if STEP == "normal":
                result *= factor
                if OTHER:
                    result += added
            else:
                result += added * factor * tl.load(c + column, mask=is_column, other=0.0)
                result = (result * slope).to(out.dtype.element_ty).to(tl.float32)
                first += tl.where(inside, result, 0.0)
            tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    if STEP != "normal":
        if STEP == "moments":
            first, second = over_rows(first, second, part, rows, ROWS, TILES)
        else:
            first, second = tl.sum(first, 0), tl.sum(second, 0)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(sums + part * 2 * C + column, first, mask=column < C)
        tl.store(sums + part * 2 * C + C + column, second, mask=column < C)


@ops.operator
def batch_norm(
    step: str, z: Tensor, bias: Tensor | None, other: Tensor | None = None, kept: Tensor | None = None,
    a: Tensor | None = None, b: Tensor | None = None, c: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Take one of four passes over z (M, C) -> rows (M, C), and two sums over rows, in parts (parts, 2, C).

    "moments": no rows; means and squared deviations of f(z).
    "normal": other + kept * (a * f(z) + b); no sums. a, b (C,), kept (B,) or None for ones.
    "sums": no rows; those of kept * other * f(z) and of kept * other, which is the gradient of "normal".
    "gradient": (a * f(z) + b + c * kept * other) * f'(z); its sum, and zeros.
    """
    (rows, channels), columns = z.shape, min(ops.MAP_COLUMNS, triton.next_power_of_2(z.shape[1]))
    parts, has_rows = ops.count_parts(rows, channels), step in ("normal", "gradient")
    dtype = z.dtype if other is None or step != "normal" else torch.promote_types(z.dtype, other.dtype)
    out = ops.empty(z, rows if has_rows else 0, channels, dtype=dtype)
    sums = ops.empty(z, 0 if step == "normal" else parts, 2, channels)
    ops.launch(
        batch_norm_kernel, (ops.cdiv(channels, columns), parts),
        z, *(z if each is None else each for each in (bias, other, kept, a, b, c)), out, sums, rows,
        C=channels, PIXELS=0 if kept is None else rows // len(kept), STEP=step, GELU=bias is not None,
        OTHER=other is not None, ROWS=ops.ROWS, COLUMNS=columns, TILES=ops.count_tiles(rows, channels),
        **LAUNCH,
    )  # fmt: skip
    return out, sums


def batch_norm_grad(
    dn: Tensor, z: Tensor, bias: Tensor | None, kept: Tensor | None, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of z (M, C), bias, gamma, beta (C,); statistics: of `ops.normalise`, (5, C)."""
    _, _, _, scale, _ = statistics
    d, e = batch_norm("sums", z, bias, dn, kept)[1].sum(0)
    d_gamma, slope, offset = ops.normalise_grad(d, e, statistics, len(z))
    dz, sums = batch_norm("gradient", z, bias, dn, kept, slope, offset, scale)
    return dz, sums[:, 0].sum(0), d_gamma, e


class _GeluBatchNorm(torch.autograd.Function):
    """Rows (M, C) -> (M, C), and the statistics of `ops.normalise`, without gradients."""

    @staticmethod
    def forward(ctx, z, bias, gamma, beta, eps):
        statistics = ops.normalise(batch_norm("moments", z, bias)[1], gamma, beta, len(z), eps)
        ctx.save_for_backward(z, bias, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return batch_norm("normal", z, bias, None, None, *statistics[3:])[0], statistics

    @staticmethod
    def backward(ctx, dn, _):
        z, bias, statistics = ctx.saved_tensors
        return *batch_norm_grad(dn.contiguous(), z, bias, None, statistics), None


def gelu_batch_norm(z: Tensor, bias: Any, norm: Any) -> Tensor:
    """Return norm(gelu(z + bias)), (..., C), of a norm in training or, without gradients, in evaluation."""
    rows = z.reshape(-1, z.shape[-1])
    if norm.training and not isinstance(norm, nn.Identity):
        out, statistics = _GeluBatchNorm.apply(rows, bias, norm.weight, norm.bias, norm.eps)
        track([norm], [statistics])
    else:
        out, _ = batch_norm("normal", rows, bias, None, None, *evaluation(norm, bias))
    return out.view(z.shape)


@torch.no_grad()
def track(norms: Sequence[Any], statistics: Sequence[Tensor]) -> None:
    """Update the running statistics of BatchNorms, in one kernel, as torch's batch_norm does."""
    for momentum in {norm.momentum for norm in norms}:
        moved, found = [], []
        for norm, (mean, variance, *_) in zip(norms, statistics, strict=True):
            if norm.momentum == momentum:
                width = len(norm.running_mean)
                moved += [norm.running_mean, norm.running_var]
                found += [mean[:width], variance[:width]]
                if norm.num_batches_tracked is not None:  # the guard counts them, once per step
                    norm.num_batches_tracked.add_(1)
        torch._foreach_lerp_(moved, found, momentum)


def evaluation(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift (C,) of a BatchNorm in evaluation, or of the Identity that folding left."""
    if isinstance(norm, nn.Identity):
        return torch.ones_like(like), torch.zeros_like(like)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale
