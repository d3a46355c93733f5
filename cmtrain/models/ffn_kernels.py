"""Compute the feed-forward network in Triton kernels. ffn_operators.py launches and documents them.

Letters: M = B * H * W rows, C channels, h (here H) hidden channels, p (here P) = h rounded up.

Programs of the same rows start one after another (the grid's first axis is columns). So the device's memory
delivers their common input once, and then its L2 cache does. The counted bytes (cost.py) rely on it.

Sums over rows are fp32, always in the same order and without atomics: equal inputs give equal bits. Each
place of a tile keeps its own sum; they are added once per program, because threads exchange them for that.
An H100 issues some 10 instructions while it moves a byte, so tests/helpers/cross_compile.py counts them.
"""

import triton
import triton.language as tl


@triton.jit
def _upper_tail(z):
    """Return the normal distribution's integral from |z| on, and exp(-z * z / 2) for GELU's derivative.

    Abramowitz and Stegun 7.1.26: the error of erf is at most 1.5e-7, as large as fp32's rounding of it.
    rsqrt and exp2 are one instruction each, where a division is seven and exp five.
    """
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(z))  # 0.3275911 / sqrt(2)
    t = root * root
    bell = tl.exp2(-0.72134752 * z * z)  # 0.5 / ln 2
    series = t * (
        0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    )
    return series * bell, bell


@triton.jit
def gelu(z):
    tail, _ = _upper_tail(z)
    return tl.maximum(z, 0.0) - tl.abs(z) * tail


@triton.jit
def gelu_and_slope(z):
    tail, bell = _upper_tail(z)
    integral = tl.where(z >= 0, 1.0 - tail, tail)
    return z * integral, integral + z * bell * 0.3989422804014327


@triton.jit
def welford(tile, inside, i, mean, m2):
    """Add the i-th tile to mean and squared deviations at each of its places, without cancellation.
    Places outside keep theirs. Only the last tiles have such places: every other place has counted i tiles.
    """
    away = tl.where(inside, tile - mean, 0.0)
    mean += away * (1.0 / (i + 1))
    return mean, m2 + away * (tile - mean)


@triton.jit
def over_rows(mean, m2, part, rows, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Merge welford's results over the rows of a tile, as Chan et al. do."""
    left = rows - part * TILES * ROWS - tl.arange(0, ROWS)
    count = tl.minimum(tl.maximum((left + ROWS - 1) // ROWS, 0), TILES).to(tl.float32)[:, None]
    total = tl.sum(mean * count, 0) / tl.maximum(tl.sum(count), 1.0)
    away = mean - total[None, :]
    return total, tl.sum(m2 + away * away * count, 0)


@triton.jit
def _on_map(x, y, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    return ((y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH))[:, None]


@triton.jit
def expand_kernel(
    x, weight, bias, z, a, moments, rows,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, TRAINING: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + column, mask=column < H, other=0.0)
    mean, m2 = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
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
            product = tl.dot(left, right.to(left.dtype), product, input_precision=PRECISION)
        at = row[:, None] * P + column[None, :]
        hidden = (product + b[None, :]).to(a.dtype.element_ty)
        active = gelu(hidden.to(tl.float32)).to(a.dtype.element_ty)
        tl.store(a + at, active, mask=inside)
        if TRAINING:
            tl.store(z + at, hidden, mask=inside)
            mean, m2 = welford(active.to(tl.float32), (row < rows)[:, None], i, mean, m2)
    if TRAINING:
        mean, m2 = over_rows(mean, m2, part, rows, ROWS, TILES)
        tl.store(moments + part * 2 * P + column, mean, mask=column < P)
        tl.store(moments + part * 2 * P + P + column, m2, mask=column < P)


@triton.jit
def normalise_kernel(
    moments, gamma, beta, out, rows, eps, parts, rows_a_part,
    H: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mean = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (column < P)[None, :]
        count = tl.minimum(rows - part * rows_a_part, rows_a_part).to(tl.float32)
        some = tl.load(moments + part[:, None] * 2 * P + column[None, :], mask=inside, other=0.0)
        mean += tl.sum(tl.where(inside, some * (count / rows)[:, None], 0.0), 0)
    variance = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (column < P)[None, :]
        count = tl.minimum(rows - part * rows_a_part, rows_a_part).to(tl.float32)
        at = moments + part[:, None] * 2 * P + column[None, :]
        away = tl.load(at, mask=inside, other=0.0) - mean[None, :]
        m2 = tl.load(at + P, mask=inside, other=0.0)
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
def depthwise_kernel(
    a, scale, shift, weight, z, moments, rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    RESIDUAL: tl.constexpr, PLAIN: tl.constexpr, TRAINING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mean, m2 = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(TILES):
        row = (part * TILES + i) * ROWS + tl.arange(0, ROWS)
        pixel = row % (HEIGHT * WIDTH)
        y, x = pixel // WIDTH, pixel % WIDTH
        at = row.to(tl.int64)[:, None] * P + column[None, :]
        inside = (row < rows)[:, None] & (column < P)[None, :]
        # Read again for every tile: registers do not hold it that long.
        bias = tl.load(weight + 9 * P + column, mask=column < P, other=0.0)
        total = tl.zeros([ROWS, COLUMNS], tl.float32) + bias[None, :]
        if not PLAIN:
            s = tl.load(scale + column, mask=column < P, other=0.0)[None, :]
            t = tl.load(shift + column, mask=column < P, other=0.0)[None, :]
        for tap in tl.static_range(9):
            dy, dx = tap // 3 - 1, tap % 3 - 1
            on_map = _on_map(x + dx, y + dy, HEIGHT, WIDTH)
            near = tl.load(a + at + (dy * WIDTH + dx) * P, mask=inside & on_map, other=0.0).to(tl.float32)
            if not PLAIN:
                near = tl.where(on_map, near * s + t, 0.0)  # padding is zero after normalisation, not before
            total += near * tl.load(weight + tap * P + column, mask=column < P, other=0.0)[None, :]
            if RESIDUAL and tap == 4:
                total += near
        hidden = total.to(z.dtype.element_ty)
        tl.store(z + at, hidden, mask=inside)
        if TRAINING:
            active = gelu(hidden.to(tl.float32)).to(z.dtype.element_ty).to(tl.float32)
            mean, m2 = welford(active, (row < rows)[:, None], i, mean, m2)
    if TRAINING:
        mean, m2 = over_rows(mean, m2, part, rows, ROWS, TILES)
        tl.store(moments + part * 2 * P + column, mean, mask=column < P)
        tl.store(moments + part * 2 * P + P + column, m2, mask=column < P)


@triton.jit
def project_kernel(
    z, scale, weight, bias, skip, skip_scale, out, moments, rows,
    C: tl.constexpr, P: tl.constexpr, SKIP: tl.constexpr, TRAINING: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before, mean, m2 = 0.0, tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for i in range(TILES):
        row = ((part * TILES + i) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, P, INNER):
            inner = k + tl.arange(0, INNER)
            left_inside = (row < rows)[:, None] & (inner < P)[None, :]
            at = row[:, None] * P + inner[None, :]
            s = tl.load(scale + inner, mask=inner < P, other=0.0)[None, :]
            left = gelu(tl.load(z + at, mask=left_inside, other=0.0).to(tl.float32)) * s
            if SKIP:
                s = tl.load(skip_scale + inner, mask=inner < P, other=0.0)[None, :]
                left += tl.load(skip + at, mask=left_inside, other=0.0).to(tl.float32) * s
            right_inside = (inner < P)[:, None] & (column < C)[None, :]
            right = tl.load(weight + column[None, :] * P + inner[:, None], mask=right_inside, other=0.0)
            product = tl.dot(left.to(z.dtype.element_ty), right, product, input_precision=PRECISION)
        product += tl.load(bias + column, mask=column < C, other=0.0)[None, :]
        inside = (row < rows)[:, None] & (column < C)[None, :]
        rounded = product.to(out.dtype.element_ty)
        tl.store(out + row[:, None] * C + column[None, :], rounded, mask=inside)
        if TRAINING:  # a tile's moments are merged at once: registers hold no sums of every place here
            count = tl.minimum(tl.maximum(rows - (part * TILES + i) * ROWS, 0), ROWS).to(tl.float32)
            value = tl.where(inside, rounded.to(tl.float32), 0.0)
            away = tl.sum(value, 0) / tl.maximum(count, 1.0)
            value = tl.where(inside, value - away[None, :], 0.0)
            away -= mean
            share = count / tl.maximum(before + count, 1.0)
            mean += away * share
            m2 += tl.sum(value * value, 0) + away * away * before * share
            before += count
    if TRAINING:
        tl.store(moments + part * 2 * C + column, mean, mask=column < C)
        tl.store(moments + part * 2 * C + C + column, m2, mask=column < C)


@triton.jit
def project_grad_kernel(
    dy, weight, z, scale, slope, offset, dz, dn, rows,
    C: tl.constexpr, P: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = tl.cdiv(P, COLUMNS)  # a second axis ends at 65,535, which rows can exceed
    row = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, C, INNER):
        inner = k + tl.arange(0, INNER)
        left_inside = (row < rows)[:, None] & (inner < C)[None, :]
        left = tl.load(dy + row[:, None] * C + inner[None, :], mask=left_inside, other=0.0)
        right_inside = (inner < C)[:, None] & (column < P)[None, :]
        right = tl.load(weight + inner[:, None] * P + column[None, :], mask=right_inside, other=0.0)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    s = tl.load(scale + column, mask=column < P, other=0.0)[None, :]
    k1 = tl.load(slope + column, mask=column < P, other=0.0)[None, :]
    k0 = tl.load(offset + column, mask=column < P, other=0.0)[None, :]
    inside = (row < rows)[:, None] & (column < P)[None, :]
    at = row[:, None] * P + column[None, :]
    active, gelu_slope = gelu_and_slope(tl.load(z + at, mask=inside, other=0.0).to(tl.float32))
    gradient = (product * s + k1 * active + k0) * gelu_slope
    tl.store(dz + at, gradient.to(dz.dtype.element_ty), mask=inside)
    if SKIP:
        tl.store(dn + at, product.to(dn.dtype.element_ty), mask=inside)


@triton.jit
def depthwise_grad_kernel(
    dz, skip, z, scale, shift, weight, dn, sums, rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    SKIP: tl.constexpr, PLAIN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    none = tl.zeros([ROWS, COLUMNS], tl.float32)
    taps, d_bias, d_shift, d_scale = (none,) * 9, none, none, none
    for i in range(TILES):
        row = (part * TILES + i) * ROWS + tl.arange(0, ROWS)
        pixel = row % (HEIGHT * WIDTH)
        y, x = pixel // WIDTH, pixel % WIDTH
        at = row.to(tl.int64)[:, None] * P + column[None, :]
        inside = (row < rows)[:, None] & (column < P)[None, :]
        active = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        normal = active
        if not PLAIN:
            active = gelu(active).to(z.dtype.element_ty).to(tl.float32)
            s = tl.load(scale + column, mask=column < P, other=0.0)[None, :]
            t = tl.load(shift + column, mask=column < P, other=0.0)[None, :]
            normal = tl.where(inside, active * s + t, 0.0)
        total = tl.load(dz + at, mask=inside, other=0.0).to(tl.float32)
        d_bias += total
        if SKIP:
            total = tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
        for tap in tl.static_range(9):  # what comes back through it, from the row on its other side
            dy, dx = 1 - tap // 3, 1 - tap % 3
            on_map = _on_map(x + dx, y + dy, HEIGHT, WIDTH)
            near = tl.load(dz + at + (dy * WIDTH + dx) * P, mask=inside & on_map, other=0.0).to(tl.float32)
            total += near * tl.load(weight + tap * P + column, mask=column < P, other=0.0)[None, :]
            taps = taps[:tap] + (taps[tap] + near * normal,) + taps[tap + 1 :]  # noqa: RUF005 - Triton has no star
        gradient = total.to(dn.dtype.element_ty)
        tl.store(dn + at, gradient, mask=inside)
        if not PLAIN:
            total = gradient.to(tl.float32)
            d_shift += total
            d_scale += total * active
    # As autograd wants them, without padding: taps (H, 9), bias (H,); then two of (P,), 0 where n is z.
    to, real = sums + part * (10 * H + 2 * P), column < H
    for tap in tl.static_range(9):
        tl.store(to + 9 * column + tap, tl.sum(taps[tap], 0), mask=real)
    tl.store(to + 9 * H + column, tl.sum(d_bias, 0), mask=real)
    tl.store(to + 10 * H + column, tl.sum(d_shift, 0), mask=column < P)
    tl.store(to + 10 * H + P + column, tl.sum(d_scale, 0), mask=column < P)


@triton.jit
def project_weight_grad_kernel(
    g, weight, db, scale, shift, dw, sums,
    C: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.load(scale + column, mask=column < H, other=0.0)[None, :]
    t = tl.load(shift + column, mask=column < H, other=0.0)[None, :]
    d, e = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in range(0, C, ROWS):
        row = first + tl.arange(0, ROWS)
        at, inside = row[:, None] * H + column[None, :], (row < C)[:, None] & (column < H)[None, :]
        gradient = tl.load(g + at, mask=inside, other=0.0)
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(db + row, mask=row < C, other=0.0)[:, None]
        tl.store(dw + at, gradient * s + b * t, mask=inside)
        d += tl.sum(gradient * w, 0)
        e += tl.sum(b * w, 0)
    tl.store(sums + column, d, mask=column < H)
    tl.store(sums + H + column, e, mask=column < H)


@triton.jit
def normalise_grad_kernel(
    d, e, statistics, out, rows, H: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < P
    mean = tl.load(statistics + column, mask=inside, other=0.0)
    inverse = tl.load(statistics + 2 * P + column, mask=inside, other=0.0)
    s = tl.load(statistics + 3 * P + column, mask=inside, other=0.0)
    sum_dn = tl.load(e + column, mask=column < H, other=0.0)
    dgamma = (tl.load(d + column, mask=column < H, other=0.0) - mean * sum_dn) * inverse
    slope = -s * inverse * dgamma / rows
    tl.store(out + column, dgamma, mask=inside)
    tl.store(out + P + column, slope, mask=inside)
    tl.store(out + 2 * P + column, -s * sum_dn / rows - slope * mean, mask=inside)


@triton.jit
def expand_grad_kernel(
    dn, z, scale, slope, offset, weight, dz, dx, rows,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = tl.cdiv(C, COLUMNS)
    row = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, P, INNER):
        inner = k + tl.arange(0, INNER)
        at = row[:, None] * P + inner[None, :]
        inside = (row < rows)[:, None] & (inner < P)[None, :]
        active, gelu_slope = gelu_and_slope(tl.load(z + at, mask=inside, other=0.0).to(tl.float32))
        gradient = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        gradient *= tl.load(scale + inner, mask=inner < P, other=0.0)[None, :]
        gradient += active * tl.load(slope + inner, mask=inner < P, other=0.0)[None, :]
        gradient += tl.load(offset + inner, mask=inner < P, other=0.0)[None, :]
        left = (gradient * gelu_slope).to(dz.dtype.element_ty)
        if tl.program_id(0) % across == 0:
            tl.store(dz + at, left, mask=inside)
        right_inside = (inner < H)[:, None] & (column < C)[None, :]
        right = tl.load(weight + inner[:, None] * C + column[None, :], mask=right_inside, other=0.0)
        product = tl.dot(left, right.to(left.dtype), product, input_precision=PRECISION)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    tl.store(dx + row[:, None] * C + column[None, :], product.to(dx.dtype.element_ty), mask=inside)
