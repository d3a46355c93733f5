"""Triton kernels of the fused feed-forward network, each an operator of its own: `torch.ops.cmtrain.ffn_*`.

What they compute, and why it adds up to the network, is told in fused_ffn.py. Letters: M = B * H * W rows, C channels,
h hidden channels, p = h rounded up to PITCH.

Hidden tensors are (M, p): rows begin at multiples of 32 bytes, so that loads are vectors whatever h is (CMT-Ti's are
165, 331, 662 and 1324). The last p - h columns are zero in all of them, forward and backward, because weights are read
as zero there. Parameters and their gradients are never padded.

Sums over rows are taken in fp32, tile by tile and always in the same order: no atomics, so equal inputs, equal bits.
All of it runs on a CPU, slowly, in processes that have TRITON_INTERPRET=1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PITCH = 16
ROWS = 64  # of a tile
GEMM_COLUMNS, GEMM_INNER = 64, 32  # of a tile of a matrix product
MAP_COLUMNS = 32  # of a tile of everything else: 64 bytes in half precision, two sectors
# Consecutive tiles of rows that a program works on: fewer partial sums to add up, but programs enough for a large GPU.
MAX_TILES, MIN_PROGRAMS = 16, 512
SUMS = 12  # that depthwise_grad takes: nine taps, bias, shift, scale
SUMS_PADDED = 16
# With 8 warps no kernel spills in half precision on sm_80 or sm_90, and two or more programs fit a multiprocessor.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


def padded(hidden: int) -> int:
    return triton.cdiv(hidden, PITCH) * PITCH


def _tiles(rows: int) -> int:
    return max(1, min(MAX_TILES, rows // (ROWS * MIN_PROGRAMS)))


def _num_partials(rows: int) -> int:
    return triton.cdiv(rows, ROWS * _tiles(rows))


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _like(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=x.device, dtype=dtype)


# ---- device functions


@triton.jit
def _normal(z):
    """The normal distribution's integral up to z, and exp(-z * z / 2), which GELU's derivative needs too.

    Abramowitz and Stegun 7.1.26: the error of erf is at most 1.5e-7, as large as fp32's rounding of it.
    """
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(z))  # 0.3275911 / sqrt(2)
    bell = tl.exp(-0.5 * z * z)
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * t * series * bell
    return tl.where(z >= 0, 1.0 - tail, tail), bell


@triton.jit
def _gelu(z):
    integral, _ = _normal(z)
    return z * integral


@triton.jit
def _gelu_and_slope(z):
    integral, bell = _normal(z)
    return z * integral, integral + z * bell * 0.3989422804014327


@triton.jit
def _merge(tile, inside, start, rows, count, mean, m2, ROWS: tl.constexpr):
    """Count, mean and squared deviations with one more tile of rows, added as Chan et al. do: nothing cancels."""
    coming = tl.minimum(tl.maximum(rows - start, 0), ROWS).to(tl.float32)
    total = tl.maximum(count + coming, 1.0)
    tile_mean = tl.sum(tl.where(inside, tile, 0.0), 0) / tl.maximum(coming, 1.0)
    away = tl.where(inside, tile - tile_mean[None, :], 0.0)
    step = tile_mean - mean
    m2 += tl.sum(away * away, 0) + step * step * (count * coming / total)
    return count + coming, mean + step * (coming / total), m2


# ---- forward


@triton.jit
def _expand(
    x, weight, bias, z, a, means, m2s, rows,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, TRAINING: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + column, mask=column < H, other=0.0)
    count, mean, m2 = 0.0, tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for i in range(TILES):
        start = (part * TILES + i) * ROWS
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < P)[None, :]
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, C, INNER):
            inner = k + tl.arange(0, INNER)
            left_inside = (row < rows)[:, None] & (inner < C)[None, :]
            left = tl.load(x + row[:, None] * C + inner[None, :], mask=left_inside, other=0.0)
            right_inside = (inner < C)[:, None] & (column < H)[None, :]
            right = tl.load(weight + column[None, :] * C + inner[:, None], mask=right_inside, other=0.0)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        at = row[:, None] * P + column[None, :]
        hidden = (product + b[None, :]).to(a.dtype.element_ty)
        active = _gelu(hidden.to(tl.float32)).to(a.dtype.element_ty)
        tl.store(a + at, active, mask=inside)
        if TRAINING:
            tl.store(z + at, hidden, mask=inside)
            count, mean, m2 = _merge(active.to(tl.float32), inside, start, rows, count, mean, m2, ROWS)
    if TRAINING:
        tl.store(means + part * P + column, mean, mask=column < P)
        tl.store(m2s + part * P + column, m2, mask=column < P)


@triton.jit
def _normalise(
    means, m2s, gamma, beta, out, rows, eps, parts, rows_a_part,
    H: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mean = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (column < P)[None, :]
        count = tl.minimum(rows - part * rows_a_part, rows_a_part).to(tl.float32)
        some = tl.load(means + part[:, None] * P + column[None, :], mask=inside, other=0.0)
        mean += tl.sum(tl.where(inside, some * (count / rows)[:, None], 0.0), 0)
    variance = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (column < P)[None, :]
        count = tl.minimum(rows - part * rows_a_part, rows_a_part).to(tl.float32)
        away = tl.load(means + part[:, None] * P + column[None, :], mask=inside, other=0.0) - mean[None, :]
        m2 = tl.load(m2s + part[:, None] * P + column[None, :], mask=inside, other=0.0)
        variance += tl.sum(tl.where(inside, (m2 + away * away * count[:, None]) / rows, 0.0), 0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(gamma + column, mask=column < H, other=0.0) * inverse
    shift = tl.load(beta + column, mask=column < H, other=0.0) - mean * scale
    inside = column < P
    tl.store(out + column, mean, mask=inside)
    tl.store(out + P + column, variance * (rows / (rows - 1)), mask=inside)
    tl.store(out + 2 * P + column, inverse, mask=inside)
    tl.store(out + 3 * P + column, scale, mask=inside)
    tl.store(out + 4 * P + column, shift, mask=inside)


@triton.jit
def _depthwise(
    a, scale, shift, weight, bias, z, means, m2s, rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, P: tl.constexpr, TRAINING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.load(scale + column, mask=column < P, other=0.0)[None, :]
    t = tl.load(shift + column, mask=column < P, other=0.0)[None, :]
    b = tl.load(bias + column, mask=column < H, other=0.0)[None, :]
    count, mean, m2 = 0.0, tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for i in range(TILES):
        start = (part * TILES + i) * ROWS
        row = start + tl.arange(0, ROWS)
        pixel = row % (HEIGHT * WIDTH)
        y, x = pixel // WIDTH, pixel % WIDTH
        at = row.to(tl.int64)[:, None] * P + column[None, :]
        inside = (row < rows)[:, None] & (column < P)[None, :]
        total = tl.load(a + at, mask=inside, other=0.0).to(tl.float32) * s + t + b
        for tap in range(9):
            dy, dx = tap // 3 - 1, tap % 3 - 1
            on_map = (y + dy >= 0) & (y + dy < HEIGHT) & (x + dx >= 0) & (x + dx < WIDTH)
            near = tl.load(a + at + (dy * WIDTH + dx) * P, mask=inside & on_map[:, None], other=0.0).to(tl.float32)
            near = tl.where(on_map[:, None], near * s + t, 0.0)  # padding is zero after normalisation, not before
            total += near * tl.load(weight + column * 9 + tap, mask=column < H, other=0.0)[None, :]
        hidden = total.to(z.dtype.element_ty)
        tl.store(z + at, hidden, mask=inside)
        if TRAINING:
            active = _gelu(hidden.to(tl.float32)).to(z.dtype.element_ty).to(tl.float32)
            count, mean, m2 = _merge(active, inside, start, rows, count, mean, m2, ROWS)
    if TRAINING:
        tl.store(means + part * P + column, mean, mask=column < P)
        tl.store(m2s + part * P + column, m2, mask=column < P)


@triton.jit
def _project(
    z, weight, bias, out, rows,
    C: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, P, INNER):
        inner = k + tl.arange(0, INNER)
        left_inside = (row < rows)[:, None] & (inner < P)[None, :]
        left = tl.load(z + row[:, None] * P + inner[None, :], mask=left_inside, other=0.0)
        left = _gelu(left.to(tl.float32)).to(z.dtype.element_ty)
        right_inside = (inner < P)[:, None] & (column < C)[None, :]
        right = tl.load(weight + column[None, :] * P + inner[:, None], mask=right_inside, other=0.0)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    product += tl.load(bias + column, mask=column < C, other=0.0)[None, :]
    inside = (row < rows)[:, None] & (column < C)[None, :]
    tl.store(out + row[:, None] * C + column[None, :], product.to(out.dtype.element_ty), mask=inside)


# ---- backward


@triton.jit
def _project_weight_grad(
    dy, z, out, rows, rows_a_part,
    C: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    channel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    end = tl.minimum((part + 1) * rows_a_part, rows)
    for first in range(part * rows_a_part, end, INNER):
        row = (first + tl.arange(0, INNER)).to(tl.int64)
        left_inside = (channel < C)[:, None] & (row < end)[None, :]
        left = tl.load(dy + row[None, :] * C + channel[:, None], mask=left_inside, other=0.0)
        right_inside = (row < end)[:, None] & (column < P)[None, :]
        right = tl.load(z + row[:, None] * P + column[None, :], mask=right_inside, other=0.0)
        right = _gelu(right.to(tl.float32)).to(z.dtype.element_ty)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    at = part * C * P + channel[:, None] * P + column[None, :]
    tl.store(out + at, product, mask=(channel < C)[:, None] & (column < P)[None, :])


@triton.jit
def _project_grad(
    dy, weight, z, slope, offset, dz, rows,
    C: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, C, INNER):
        inner = k + tl.arange(0, INNER)
        left_inside = (row < rows)[:, None] & (inner < C)[None, :]
        left = tl.load(dy + row[:, None] * C + inner[None, :], mask=left_inside, other=0.0)
        right_inside = (inner < C)[:, None] & (column < P)[None, :]
        right = tl.load(weight + inner[:, None] * P + column[None, :], mask=right_inside, other=0.0)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    k1 = tl.load(slope + column, mask=column < P, other=0.0)
    k0 = tl.load(offset + column, mask=column < P, other=0.0)
    inside = (row < rows)[:, None] & (column < P)[None, :]
    at = row[:, None] * P + column[None, :]
    active, gelu_slope = _gelu_and_slope(tl.load(z + at, mask=inside, other=0.0).to(tl.float32))
    gradient = (product + k1[None, :] * active + k0[None, :]) * gelu_slope
    tl.store(dz + at, gradient.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _depthwise_grad(
    dz, z, scale, shift, weight, dn, sums, rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    SUMS: tl.constexpr, SUMS_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.load(scale + column, mask=column < P, other=0.0)[None, :]
    t = tl.load(shift + column, mask=column < P, other=0.0)[None, :]
    kind = tl.arange(0, SUMS_PADDED)[:, None]
    taken = tl.zeros([SUMS_PADDED, COLUMNS], tl.float32)
    for i in range(TILES):
        row = (part * TILES + i) * ROWS + tl.arange(0, ROWS)
        pixel = row % (HEIGHT * WIDTH)
        y, x = pixel // WIDTH, pixel % WIDTH
        at = row.to(tl.int64)[:, None] * P + column[None, :]
        inside = (row < rows)[:, None] & (column < P)[None, :]
        active = _gelu(tl.load(z + at, mask=inside, other=0.0).to(tl.float32)).to(z.dtype.element_ty).to(tl.float32)
        normal = tl.where(inside, active * s + t, 0.0)
        total = tl.load(dz + at, mask=inside, other=0.0).to(tl.float32)
        taken += tl.where(kind == 9, tl.sum(total, 0)[None, :], 0.0)
        for tap in range(9):
            # This row was read through the tap by the row on the tap's other side.
            dy, dx = 1 - tap // 3, 1 - tap % 3
            on_map = (y + dy >= 0) & (y + dy < HEIGHT) & (x + dx >= 0) & (x + dx < WIDTH)
            near = tl.load(dz + at + (dy * WIDTH + dx) * P, mask=inside & on_map[:, None], other=0.0).to(tl.float32)
            total += near * tl.load(weight + column * 9 + tap, mask=column < H, other=0.0)[None, :]
            taken += tl.where(kind == tap, tl.sum(near * normal, 0)[None, :], 0.0)
        gradient = total.to(dn.dtype.element_ty)
        tl.store(dn + at, gradient, mask=inside)
        total = gradient.to(tl.float32)
        taken += tl.where(kind == 10, tl.sum(total, 0)[None, :], 0.0)
        taken += tl.where(kind == 11, tl.sum(total * active, 0)[None, :], 0.0)
    at = (part * SUMS + kind) * P + column[None, :]
    tl.store(sums + at, taken, mask=(kind < SUMS) & (column < P)[None, :])


@triton.jit
def _normalise_grad(
    d, e, mean, inverse, scale, out, rows, P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < P
    mean_of = tl.load(mean + column, mask=inside, other=0.0)
    inverse_of = tl.load(inverse + column, mask=inside, other=0.0)
    s = tl.load(scale + column, mask=inside, other=0.0)
    sum_dn = tl.load(e + column, mask=inside, other=0.0)
    dgamma = (tl.load(d + column, mask=inside, other=0.0) - mean_of * sum_dn) * inverse_of
    slope = -s * inverse_of * dgamma / rows
    tl.store(out + column, dgamma, mask=inside)
    tl.store(out + P + column, slope, mask=inside)
    tl.store(out + 2 * P + column, -s * sum_dn / rows - slope * mean_of, mask=inside)


@triton.jit
def _expand_grad(
    dn, z, scale, slope, offset, dz, sums, rows,
    P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.load(scale + column, mask=column < P, other=0.0)[None, :]
    k1 = tl.load(slope + column, mask=column < P, other=0.0)[None, :]
    k0 = tl.load(offset + column, mask=column < P, other=0.0)[None, :]
    taken = tl.zeros([COLUMNS], tl.float32)
    for i in range(TILES):
        row = ((part * TILES + i) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * P + column[None, :]
        inside = (row < rows)[:, None] & (column < P)[None, :]
        active, gelu_slope = _gelu_and_slope(tl.load(z + at, mask=inside, other=0.0).to(tl.float32))
        gradient = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32) * s
        gradient = ((gradient + k1 * active + k0) * gelu_slope).to(dz.dtype.element_ty)
        tl.store(dz + at, gradient, mask=inside)
        taken += tl.sum(tl.where(inside, gradient.to(tl.float32), 0.0), 0)
    tl.store(sums + part * P + column, taken, mask=column < P)


# ---- operators


@torch.library.custom_op("cmtrain::ffn_expand", mutates_args=())
def expand(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gelu(x @ weight.T + bias): (M, C), (h, C), (h,) -> before GELU (M, p), after it (M, p), and sums of that.

    In training, the sums are (parts, p) means and squared deviations of equal parts of the rows. Else they and what is
    before GELU are empty.
    """
    z, a, means, m2s = _expand_fake(x, weight, bias, training)
    (rows, channels), hidden = x.shape, weight.shape[0]
    _expand[(_num_partials(rows), triton.cdiv(a.shape[1], GEMM_COLUMNS))](
        x, weight, bias, z, a, means, m2s, rows,
        C=channels, H=hidden, P=a.shape[1], TRAINING=training, PRECISION=_precision(x),
        ROWS=ROWS, COLUMNS=GEMM_COLUMNS, INNER=GEMM_INNER, TILES=_tiles(rows), **LAUNCH,
    )  # fmt: skip
    return z, a, means, m2s


@expand.register_fake
def _expand_fake(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, pitch = x.shape[0], padded(weight.shape[0])
    kept, parts = (rows, _num_partials(rows)) if training else (0, 0)
    z, a = _like(x, kept, pitch, dtype=x.dtype), _like(x, rows, pitch, dtype=x.dtype)
    return z, a, _like(x, parts, pitch), _like(x, parts, pitch)


@torch.library.custom_op("cmtrain::ffn_normalise", mutates_args=())
def normalise(means: Tensor, m2s: Tensor, gamma: Tensor, beta: Tensor, rows: int, eps: float) -> Tensor:
    """Statistics of all rows from those of their parts -> (5, p): mean, unbiased variance, 1 / deviation, scale, shift.

    scale * a + shift is BatchNorm's answer to a (which divides by the biased deviation); gamma and beta are its weight
    and bias, (h,).
    """
    out = _normalise_fake(means, m2s, gamma, beta, rows, eps)
    parts, pitch = means.shape
    _normalise[(triton.cdiv(pitch, MAP_COLUMNS),)](
        means, m2s, gamma, beta, out, rows, eps, parts, ROWS * _tiles(rows),
        H=gamma.shape[0], P=pitch, COLUMNS=MAP_COLUMNS, PARTS=ROWS, **LAUNCH,
    )  # fmt: skip
    return out


@normalise.register_fake
def _normalise_fake(means: Tensor, m2s: Tensor, gamma: Tensor, beta: Tensor, rows: int, eps: float) -> Tensor:
    return _like(means, 5, means.shape[1])


@torch.library.custom_op("cmtrain::ffn_depthwise", mutates_args=())
def depthwise(
    a: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """n + conv3x3(n) with n = scale * a + shift: (M, p), (p,), (p,), (h, 9), (h,) -> (M, p), and sums of its GELU."""
    z, means, m2s = _depthwise_fake(a, scale, shift, weight, bias, height, width, training)
    rows, pitch = a.shape
    _depthwise[(_num_partials(rows), triton.cdiv(pitch, MAP_COLUMNS))](
        a, scale, shift, weight, bias, z, means, m2s, rows,
        HEIGHT=height, WIDTH=width, H=weight.shape[0], P=pitch, TRAINING=training,
        ROWS=ROWS, COLUMNS=MAP_COLUMNS, TILES=_tiles(rows), **LAUNCH,
    )  # fmt: skip
    return z, means, m2s


@depthwise.register_fake
def _depthwise_fake(
    a: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    parts = _num_partials(a.shape[0]) if training else 0
    return torch.empty_like(a), _like(a, parts, a.shape[1]), _like(a, parts, a.shape[1])


@torch.library.custom_op("cmtrain::ffn_project", mutates_args=())
def project(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(z) @ weight.T + bias: (M, p), (C, p), (C,) -> (M, C)."""
    out = _project_fake(z, weight, bias)
    (rows, pitch), channels = z.shape, weight.shape[0]
    _project[(triton.cdiv(rows, ROWS), triton.cdiv(channels, GEMM_COLUMNS))](
        z, weight, bias, out, rows,
        C=channels, P=pitch, PRECISION=_precision(z), ROWS=ROWS, COLUMNS=GEMM_COLUMNS, INNER=GEMM_INNER, **LAUNCH,
    )  # fmt: skip
    return out


@project.register_fake
def _project_fake(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _like(z, z.shape[0], weight.shape[0], dtype=z.dtype)


@torch.library.custom_op("cmtrain::ffn_project_weight_grad", mutates_args=())
def project_weight_grad(dy: Tensor, z: Tensor) -> Tensor:
    """dy.T @ gelu(z), in parts of the rows: (M, C), (M, p) -> (parts, C, p) fp32."""
    out = _project_weight_grad_fake(dy, z)
    (rows, channels), pitch, parts = dy.shape, z.shape[1], out.shape[0]
    grid = parts, triton.cdiv(channels, GEMM_COLUMNS), triton.cdiv(pitch, GEMM_COLUMNS)
    _project_weight_grad[grid](
        dy, z, out, rows, triton.cdiv(rows, parts),
        C=channels, P=pitch, PRECISION=_precision(z),
        ROWS=GEMM_COLUMNS, COLUMNS=GEMM_COLUMNS, INNER=GEMM_INNER, **LAUNCH,
    )  # fmt: skip
    return out


@project_weight_grad.register_fake
def _project_weight_grad_fake(dy: Tensor, z: Tensor) -> Tensor:
    (rows, channels), pitch = dy.shape, z.shape[1]
    tiles = triton.cdiv(channels, GEMM_COLUMNS) * triton.cdiv(pitch, GEMM_COLUMNS)
    parts = max(1, min(MIN_PROGRAMS // tiles, rows // (ROWS * MAX_TILES)))
    return _like(z, parts, channels, pitch)


@torch.library.custom_op("cmtrain::ffn_project_grad", mutates_args=())
def project_grad(dy: Tensor, weight: Tensor, z: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """(dy @ weight + slope * gelu(z) + offset) * gelu'(z): (M, C), (C, p), (M, p), (p,), (p,) -> (M, p)."""
    dz = _project_grad_fake(dy, weight, z, slope, offset)
    (rows, channels), pitch = dy.shape, z.shape[1]
    _project_grad[(triton.cdiv(rows, ROWS), triton.cdiv(pitch, GEMM_COLUMNS))](
        dy, weight, z, slope, offset, dz, rows,
        C=channels, P=pitch, PRECISION=_precision(z), ROWS=ROWS, COLUMNS=GEMM_COLUMNS, INNER=GEMM_INNER, **LAUNCH,
    )  # fmt: skip
    return dz


@project_grad.register_fake
def _project_grad_fake(dy: Tensor, weight: Tensor, z: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(z)


@torch.library.custom_op("cmtrain::ffn_depthwise_grad", mutates_args=())
def depthwise_grad(
    dz: Tensor, z: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Gradient of `depthwise` with a = gelu(z): (M, p), (M, p), ... -> that of n (M, p), and sums (parts, SUMS, p).

    The sums are the gradients of the nine taps and of the bias, and over all rows those of n and of n times a.
    """
    dn, sums = _depthwise_grad_fake(dz, z, scale, shift, weight, height, width)
    rows, pitch = z.shape
    _depthwise_grad[(_num_partials(rows), triton.cdiv(pitch, MAP_COLUMNS))](
        dz, z, scale, shift, weight, dn, sums, rows,
        HEIGHT=height, WIDTH=width, H=weight.shape[0], P=pitch, SUMS=SUMS, SUMS_PADDED=SUMS_PADDED,
        ROWS=ROWS, COLUMNS=MAP_COLUMNS, TILES=_tiles(rows), **LAUNCH,
    )  # fmt: skip
    return dn, sums


@depthwise_grad.register_fake
def _depthwise_grad_fake(
    dz: Tensor, z: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), _like(z, _num_partials(z.shape[0]), SUMS, z.shape[1])


@torch.library.custom_op("cmtrain::ffn_normalise_grad", mutates_args=())
def normalise_grad(d: Tensor, e: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor, rows: int) -> Tensor:
    """Gradient through a BatchNorm and its statistics: five (p,) -> (3, p), d gamma, slope and offset.

    d and e are the sums over rows of dn * a and of dn; scale * dn + slope * a + offset is the gradient of a.
    """
    out = _normalise_grad_fake(d, e, mean, inverse, scale, rows)
    pitch = len(d)
    _normalise_grad[(triton.cdiv(pitch, MAP_COLUMNS),)](
        d, e, mean, inverse, scale, out, rows, P=pitch, COLUMNS=MAP_COLUMNS, **LAUNCH
    )
    return out


@normalise_grad.register_fake
def _normalise_grad_fake(d: Tensor, e: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor, rows: int) -> Tensor:
    return _like(d, 3, len(d))


@torch.library.custom_op("cmtrain::ffn_expand_grad", mutates_args=())
def expand_grad(dn: Tensor, z: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(scale * dn + slope * gelu(z) + offset) * gelu'(z): (M, p), (M, p), 3 x (p,) -> (M, p), and sums (parts, p)."""
    dz, sums = _expand_grad_fake(dn, z, scale, slope, offset)
    rows, pitch = z.shape
    _expand_grad[(_num_partials(rows), triton.cdiv(pitch, MAP_COLUMNS))](
        dn, z, scale, slope, offset, dz, sums, rows,
        P=pitch, ROWS=ROWS, COLUMNS=MAP_COLUMNS, TILES=_tiles(rows), **LAUNCH,
    )  # fmt: skip
    return dz, sums


@expand_grad.register_fake
def _expand_grad_fake(dn: Tensor, z: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), _like(z, _num_partials(z.shape[0]), z.shape[1])
