"""Multiply the rows of maps by matrices: linear layers, and convolutions whose stride is their kernel.

cuBLAS and cuDNN are fast where a row is a multiple of 16 bytes; the 46 and 92 channels of CMT-Ti's first
stages are not. These kernels also do what would be passes of their own: casts of weights, padding of heads,
the gradient of a bias, dropout, and the addition behind a product or to its gradient.

Letters: M rows, N outputs and K inputs of a product, C channels of a map. A patch of r x r pixels is a row
of K = r * r * C numbers, in the order of a channels-last weight; it is read where it lies in the map.
The stem's first convolution has patches that overlap: r is 3, its stride 2, and one pixel pads the map.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import cmtrain.models.ffn_operators as ops
from cmtrain.models.ffn_kernels import gelu

PART_ROWS = 2048  # at least, of a part of the weight's gradient: parts are written and then added
NUM_PROGRAMS = 264  # that parts are made for: two for each multiprocessor of an H100


@triton.jit
def _places(
    row, number, inside, C: tl.constexpr, PATCH: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr
):
    """Return where in a map of WIDTH patches a line the numbers of a patch are, and which are `inside`.
    HEIGHT: lines of patches where they overlap, else 0.
    """
    stride: tl.constexpr = PATCH - (HEIGHT > 0)
    if PATCH == 1:
        return row.to(tl.int64) * C + number, inside
    corner = (row // WIDTH * (WIDTH * stride) + row % WIDTH) * stride
    at = corner.to(tl.int64) * C + number // (PATCH * C) * (WIDTH * stride * C) + number % (PATCH * C)
    if HEIGHT > 0:  # one pixel above and to the left of the map
        at -= (WIDTH * stride + 1) * C
        inside &= (row // WIDTH % HEIGHT > 0) | (number >= PATCH * C)
        inside &= (row % WIDTH > 0) | (number % (PATCH * C) >= C)
    return at, inside


@triton.jit
def _dropped(value, kept, factor, row, at, inside, rows, PIXELS: tl.constexpr):
    """Multiply by 0 or `factor`: of each number if PIXELS is -1, else of each image; 0 drops none."""
    if PIXELS == 0:
        return value
    if PIXELS > 0:
        share = tl.load(kept + row // PIXELS, mask=row < rows, other=0.0)
    else:
        share = tl.load(kept + at, mask=inside, other=0)
    return (value.to(tl.float32) * (share.to(tl.float32) * factor)).to(value.dtype)


@triton.jit
def linear_kernel(
    x, weight, bias, skip, kept, out, rows, factor,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    PATCH: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
    OUT_HEAD: tl.constexpr, OUT_PADDED: tl.constexpr, IN_HEAD: tl.constexpr, IN_PADDED: tl.constexpr,
    DEPTHWISE: tl.constexpr, BACKWARD: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
    PIXELS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = tl.cdiv(K if BACKWARD else N, COLUMNS)
    row = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, N if BACKWARD else K, INNER):
        inner, across_inner = k + tl.arange(0, INNER)[None, :], k + tl.arange(0, INNER)[:, None]
        if BACKWARD:
            output, number = across_inner, column
            at, inside = row.to(tl.int64) * N + inner, (row < rows) & (inner < N)
            left = tl.load(x + at, mask=inside, other=0.0)
            left = _dropped(left, kept, factor, row, at, inside, rows, PIXELS)
        else:
            output, number = column, across_inner
            at, inside = _places(row, inner, (row < rows) & (inner < K), C, PATCH, WIDTH, HEIGHT)
            left = tl.load(x + at, mask=inside, other=0.0)
        # Weights of padding are 0, and those off the diagonals of a depth-wise convolution.
        real = (
            (output < N) & (output % OUT_PADDED < OUT_HEAD) & (number < K) & (number % IN_PADDED < IN_HEAD)
        )
        if DEPTHWISE:
            at, real = output * PATCH * PATCH + number // C, real & (number % C == output)
        else:
            at = (output // OUT_PADDED * OUT_HEAD + output % OUT_PADDED) * (K // IN_PADDED * IN_HEAD)
            at += number // IN_PADDED * IN_HEAD + number % IN_PADDED
        right = tl.load(weight + at, mask=real, other=0.0).to(left.dtype)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    if BACKWARD:
        at, inside = _places(row, column, (row < rows) & (column < K), C, PATCH, WIDTH, HEIGHT)
    else:
        at, inside = row.to(tl.int64) * N + column, (row < rows) & (column < N)
        if BIAS:
            place = column // OUT_PADDED * OUT_HEAD + column % OUT_PADDED
            real = (column < N) & (column % OUT_PADDED < OUT_HEAD)
            product += tl.load(bias + place, mask=real, other=0.0).to(tl.float32)
        product = _dropped(product, kept, factor, row, at, inside, rows, PIXELS)
    if SKIP:
        product += tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weight_grad_kernel(
    dy, x, kept, sums, rows, part_rows, pitch, factor,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    PATCH: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
    OUT_HEAD: tl.constexpr, OUT_PADDED: tl.constexpr, IN_HEAD: tl.constexpr, IN_PADDED: tl.constexpr,
    DEPTHWISE: tl.constexpr, GELU: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(2)
    output = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    number = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    product, taken = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, INNER], tl.float32)
    end = tl.minimum((part + 1) * part_rows, rows)
    for first in range(part * part_rows, end, INNER):
        row, place = first + tl.arange(0, INNER)[None, :], first + tl.arange(0, INNER)[:, None]
        at, inside = row.to(tl.int64) * N + output, (row < end) & (output < N)
        left = tl.load(dy + at, mask=inside, other=0.0)
        left = _dropped(left, kept, factor, row, at, inside, rows, PIXELS)
        at, inside = _places(place, number, (place < end) & (number < K), C, PATCH, WIDTH, HEIGHT)
        right = tl.load(x + at, mask=inside, other=0.0)
        if GELU:
            right = gelu(right.to(tl.float32)).to(x.dtype.element_ty)
        product = tl.dot(left, right, product, input_precision=PRECISION)
        taken += left.to(tl.float32)
    # Without padding: all of the weight's gradient, then the bias'.
    to = sums + part.to(tl.int64) * pitch
    inside = (output < N) & (output % OUT_PADDED < OUT_HEAD) & (number < K) & (number % IN_PADDED < IN_HEAD)
    place = output // OUT_PADDED * OUT_HEAD + output % OUT_PADDED
    if DEPTHWISE:  # of the dense matrix its diagonals
        at, inside = place * PATCH * PATCH + number // C, inside & (number % C == output)
    else:
        at = place * (K // IN_PADDED * IN_HEAD) + number // IN_PADDED * IN_HEAD + number % IN_PADDED
    tl.store(to + at, product, mask=inside)
    line = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) == 0:
        to += pitch - N // OUT_PADDED * OUT_HEAD
        at_line = line // OUT_PADDED * OUT_HEAD + line % OUT_PADDED
        tl.store(to + at_line, tl.sum(taken, 1), mask=(line < N) & (line % OUT_PADDED < OUT_HEAD))


# The constants of a layer: N outputs and K inputs, padding included; PATCH x PATCH pixels of C channels are
# an input, WIDTH of them a line of the map and, where they overlap, HEIGHT its lines, else 0; heads of HEAD
# numbers are padded to PADDED, or all four are 1.
SHAPE = (
    "N", "K", "C", "PATCH", "WIDTH", "HEIGHT", "OUT_HEAD", "OUT_PADDED", "IN_HEAD", "IN_PADDED", "DEPTHWISE"
)  # fmt: skip


def layer_shape(
    outputs: int, inputs: int, *, out_heads: tuple[int, int] = (1, 1), in_heads: tuple[int, int] = (1, 1)
) -> tuple[int, ...]:
    """Return the constants of a linear layer of tokens; heads: their width, and that with padding."""
    return outputs, inputs, inputs, 1, 1, 0, *out_heads, *in_heads, 0


def _pixels(kept: Tensor | None, rows: int) -> int:
    if kept is None:
        return 0
    return rows // len(kept) if kept.ndim == 1 else -1


@ops.operator
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, kept: Tensor | None, factor: float,
    shape: Sequence[int], backward: bool,
) -> Tensor:  # fmt: skip
    """Return skip + factor * kept * (x @ weight.T + bias), (M, N), or the gradient of x in its shape.

    x: rows of a map of C channels, whose patches are the M rows. shape: of SHAPE. weight: without padding.
    skip (M, N). kept: (B,) of images, (M, N) of numbers, or None. backward: x is the gradient of the result,
    (M, N), and skip another gradient of x. kept and factor then belong to the former; there is no bias, and
    patches do not overlap.
    """
    outputs, inputs, channels, patch, _, height, *_ = shape
    rows = len(x) if backward else len(x) // (patch - (height > 0)) ** 2
    out = ops.empty(x, *((rows * patch**2, channels) if backward else (rows, outputs)), dtype=x.dtype)
    columns = ops.channel_columns(inputs if backward else outputs, x.dtype)
    grid = (ops.cdiv(rows, ops.ROWS) * ops.cdiv(inputs if backward else outputs, columns),)
    ops.launch(
        linear_kernel, grid, x, weight, x if bias is None else bias, x if skip is None else skip,
        x if kept is None else kept, out, rows, factor,
        BACKWARD=backward, BIAS=bias is not None, SKIP=skip is not None, PIXELS=_pixels(kept, rows),
        PRECISION=ops.precision(x), ROWS=ops.ROWS, COLUMNS=columns, INNER=ops.GEMM_INNER,
        **dict(zip(SHAPE, shape, strict=True)), **ops.PRODUCT_LAUNCH,
    )  # fmt: skip
    return out


@ops.operator
def weight_grad(
    dy: Tensor, x: Tensor, kept: Tensor | None, factor: float, shape: Sequence[int], is_gelu: bool
) -> Tensor:
    """Return the gradients of a layer's weight and bias, without padding, in parts: (parts, n * k + n) fp32.

    They are (factor * kept * dy).T @ x or, with is_gelu, gelu(x), and sums over rows; see `unpacked`.
    dy (M, N), x: rows of a map, (M * patch^2, C). kept, shape: as in `linear`.
    """
    outputs, inputs, _, patch, _, _, out_head, out_padded, in_head, in_padded, is_depthwise = shape
    rows, tile_rows = len(dy), ops.channel_columns(outputs, x.dtype)
    columns = min(ops.GEMM_COLUMNS, ops.channel_columns(inputs, x.dtype))
    tiles = ops.cdiv(inputs, columns), ops.cdiv(outputs, tile_rows)
    parts = max(1, min(ops.cdiv(NUM_PROGRAMS, tiles[0] * tiles[1]), rows // PART_ROWS))
    real = outputs // out_padded * out_head
    pitch = real * ((patch**2 if is_depthwise else inputs // in_padded * in_head) + 1)
    sums = ops.empty(x, parts, pitch)
    ops.launch(
        weight_grad_kernel, (*tiles, parts), dy, x, dy if kept is None else kept, sums, rows,
        ops.cdiv(rows, parts), pitch, factor, **dict(zip(SHAPE, shape, strict=True)),
        GELU=is_gelu, PIXELS=_pixels(kept, rows), PRECISION=ops.precision(x),
        ROWS=tile_rows, COLUMNS=columns, INNER=ops.GEMM_INNER, **ops.LAUNCH,
    )  # fmt: skip
    return sums


def unpacked(parts: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Add the parts of `weight_grad`, in one kernel -> the gradients of weight (n, k) and bias (n,)."""
    total = parts.sum(0)
    return total[:-outputs].view(outputs, -1), total[-outputs:]


class _Linear(torch.autograd.Function):
    """Rows of a map, a matrix, a bias, rows to add, and what is kept -> rows (M, N), and the map itself.
    The gradient of the latter is added to the product's in the pass that writes it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, skip, kept, factor, shape):
        ctx.save_for_backward(x, weight, kept)
        ctx.factor, ctx.shape, ctx.needs = factor, shape, (bias is not None, skip is not None)
        ctx.set_materialize_grads(False)
        return linear(x, weight, bias, skip, kept, factor, shape, False), x.view_as(x)

    @staticmethod
    def backward(ctx, dy, skip):
        x, weight, kept = ctx.saved_tensors
        has_bias, has_skip = ctx.needs
        dy, skip = dy.contiguous(), None if skip is None else skip.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear(dy, weight, None, skip, kept, ctx.factor, ctx.shape, True)
        dw, db = unpacked(weight_grad(dy, x, kept, ctx.factor, ctx.shape, False), len(weight))
        dw = dw.view(weight.shape)
        return dx, dw, db if has_bias else None, dy if has_skip else None, None, None, None


def project(
    tokens: Tensor, layer: nn.Linear, *, out_head: int = 0, in_head: int = 0,
    residual: Tensor | None = None, kept: Tensor | None = None, factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return residual + factor * kept * layer(tokens), and the tokens for other uses, (..., C) -> (..., N).

    out_head, in_head: width of heads that are, or have been, padded with zeros to a multiple of 8.
    kept: one number per image, (B, ...), or per number of the result, (..., N). Without it none is dropped.
    """
    rows = rows_of(tokens)
    out_heads, in_heads = ((head or 1, -(-head // 8) * 8 or 1) for head in (out_head, in_head))
    outputs = layer.out_features // out_heads[0] * out_heads[1]
    shape = layer_shape(outputs, rows.shape[1], out_heads=out_heads, in_heads=in_heads)
    added = None if residual is None else residual.reshape(-1, outputs)
    if kept is not None:
        kept = kept.flatten() if kept.numel() == len(kept) else kept.reshape(-1, outputs)
    out, rows = _Linear.apply(rows, layer.weight, layer.bias, added, kept, factor, shape)
    return out.view(*tokens.shape[:-1], outputs), rows.view(tokens.shape)


def patch_conv(x: Tensor, conv: nn.Conv2d, bias: Tensor | None) -> Tensor:
    """Return conv(x), with this bias, of a convolution, dense or depth-wise, whose stride is its kernel.
    Or the stem's first: a kernel of 3, a stride of 2, padded by 1, of images that need no gradient.
    """
    (batch, channels, height, width), patch, stride = x.shape, conv.kernel_size[0], conv.stride[0]
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    height, width = height // stride, width // stride
    map_of_patches = patch, width, height if patch > stride else 0
    heads, is_depthwise = (1, 1, 1, 1), int(conv.groups > 1)
    shape = (len(weight), patch**2 * channels, channels, *map_of_patches, *heads, is_depthwise)
    rows = rows_of(x.permute(0, 2, 3, 1))
    out, _ = _Linear.apply(rows, weight, bias, None, None, 1.0, shape)
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def rows_of(tokens: Tensor) -> Tensor:  # (..., C) -> (M, C) in autocast's dtype
    if torch.is_autocast_enabled(tokens.device.type):
        tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
    return tokens.reshape(-1, tokens.shape[-1])
