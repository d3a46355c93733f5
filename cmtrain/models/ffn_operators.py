"""The fused feed-forward network's kernels as operators, which autograd, torch.compile and fake tensors can meet.

What they compute adds up to the network as fused_ffn.py tells. Letters: M = B * H * W rows, C channels, h hidden
channels, p = h rounded up to PITCH.

Hidden tensors are (M, p): rows begin at multiples of 32 bytes, so that loads are vectors whatever h is (CMT-Ti's are
165, 331, 662 and 1324). The last p - h columns are zero in all of them, forward and backward, because weights are read
as zero there. Parameters and their gradients are never padded.

All of it runs on a CPU, slowly, in processes that have TRITON_INTERPRET=1.
"""

import torch
import triton
from torch import Tensor

from cmtrain.models.ffn_kernels import (
    depthwise_grad_kernel,
    depthwise_kernel,
    expand_grad_kernel,
    expand_kernel,
    normalise_grad_kernel,
    normalise_kernel,
    project_grad_kernel,
    project_kernel,
    project_weight_grad_kernel,
)

PITCH = 16
ROWS = 64  # of a tile
GEMM_COLUMNS, GEMM_INNER = 64, 32  # of a tile of a matrix product
GEMM_CHANNELS = 128  # of one that has the network's input or output for columns, at most
MAP_COLUMNS = 32  # of a tile of everything else: 64 bytes in half precision, two sectors
GRAD_ROWS = 32  # of a tile of depthwise_grad, which keeps twelve sums for each of its places
# Consecutive tiles of rows that a program works on: fewer partial sums to add up, but programs enough for a large GPU.
MAX_TILES, MIN_PROGRAMS = 16, 1024
SUMS = 12  # that depthwise_grad takes: nine taps, bias, shift, scale
# So that two or more programs fit a multiprocessor of sm_80 or sm_90.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}
# A product whose left side is made in registers: with more warps, each row's would be made by two of them.
PRODUCT_LAUNCH = LAUNCH | {"num_warps": 4}


def _cdiv(total: int, size: int) -> int:  # triton.cdiv takes 5 us, and a step would call it a thousand times
    return -(-total // size)


def padded(hidden: int) -> int:
    return _cdiv(hidden, PITCH) * PITCH


def _tiles(rows: int, pitch: int) -> int:
    programs = _cdiv(rows, ROWS) * _cdiv(pitch, MAP_COLUMNS)
    return max(1, min(MAX_TILES, programs // MIN_PROGRAMS))


def _num_partials(rows: int, pitch: int) -> int:
    return _cdiv(rows, ROWS * _tiles(rows, pitch))


def _grad_tiles(rows: int, pitch: int) -> int:
    return _tiles(rows, pitch) * (ROWS // GRAD_ROWS)


def _depthwise_launch(z: Tensor) -> dict[str, int]:
    return LAUNCH | {"maxnreg": 128} if z.itemsize == 2 else LAUNCH  # in fp32 that would spill too much


def _channel_columns(channels: int, dtype: torch.dtype) -> int:
    most = GEMM_CHANNELS if dtype.itemsize < 4 else GEMM_COLUMNS  # fp32 has no registers for more
    return max(GEMM_COLUMNS, min(most, triton.next_power_of_2(channels)))


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _like(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=x.device, dtype=dtype)


@torch.library.custom_op("cmtrain::ffn_expand", mutates_args=())
def expand(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gelu(x @ weight.T + bias): (M, C), (h, C), (h,) -> before GELU (M, p), after it (M, p), and sums of that.

    In training, the sums are (parts, p) means and squared deviations of equal parts of the rows. Else they and what is
    before GELU are empty.
    """
    z, a, means, m2s = _expand_fake(x, weight, bias, training)
    (rows, channels), hidden, pitch = x.shape, weight.shape[0], a.shape[1]
    # Bound by what it writes where there are few channels, by reading x again and again where there are many.
    columns = MAP_COLUMNS if channels <= GEMM_COLUMNS else GEMM_COLUMNS
    expand_kernel[(_cdiv(pitch, columns), _num_partials(rows, pitch))](
        x, weight, bias, z, a, means, m2s, rows,
        C=channels, H=hidden, P=pitch, TRAINING=training, PRECISION=_precision(x),
        ROWS=ROWS, COLUMNS=columns, INNER=GEMM_INNER, TILES=_tiles(rows, pitch), **LAUNCH,
    )  # fmt: skip
    return z, a, means, m2s


@expand.register_fake
def _expand_fake(
    x: Tensor, weight: Tensor, bias: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, pitch = x.shape[0], padded(weight.shape[0])
    kept, parts = (rows, _num_partials(rows, pitch)) if training else (0, 0)
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
    normalise_kernel[(_cdiv(pitch, MAP_COLUMNS),)](
        means, m2s, gamma, beta, out, rows, eps, parts, ROWS * _tiles(rows, pitch),
        H=gamma.shape[0], P=pitch, COLUMNS=MAP_COLUMNS, PARTS=ROWS, **LAUNCH,
    )  # fmt: skip
    return out


@normalise.register_fake
def _normalise_fake(
    means: Tensor, m2s: Tensor, gamma: Tensor, beta: Tensor, rows: int, eps: float
) -> Tensor:
    return _like(means, 5, means.shape[1])


@torch.library.custom_op("cmtrain::ffn_depthwise", mutates_args=())
def depthwise(
    a: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor,
    height: int, width: int, residual: bool, training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """conv3x3(n), with `residual` n + conv3x3(n), of n = scale * a + shift: (M, p), (p,), (p,), (10, p) -> (M, p).

    weight holds the nine taps and the bias. Without scale and shift n is a. And sums of its GELU, as expand's.
    """
    z, means, m2s = _depthwise_fake(a, scale, shift, weight, height, width, residual, training)
    rows, pitch = a.shape
    depthwise_kernel[(_cdiv(pitch, MAP_COLUMNS), _num_partials(rows, pitch))](
        a, scale, shift, weight, z, means, m2s, rows,
        HEIGHT=height, WIDTH=width, P=pitch, RESIDUAL=residual, PLAIN=scale is None, TRAINING=training,
        ROWS=ROWS, COLUMNS=MAP_COLUMNS, TILES=_tiles(rows, pitch), **_depthwise_launch(z),
    )  # fmt: skip
    return z, means, m2s


@depthwise.register_fake
def _depthwise_fake(
    a: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor,
    height: int, width: int, residual: bool, training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = _num_partials(*a.shape) if training else 0
    return torch.empty_like(a), _like(a, parts, a.shape[1]), _like(a, parts, a.shape[1])


@torch.library.custom_op("cmtrain::ffn_project", mutates_args=())
def project(
    z: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None, skip_scale: Tensor | None
) -> Tensor:
    """(scale * gelu(z) + skip_scale * skip) @ weight.T + bias: (M, p), (p,), (C, p), (C,), (M, p), (p,) -> (M, C)."""
    out = _project_fake(z, scale, weight, bias, skip, skip_scale)
    (rows, pitch), channels = z.shape, weight.shape[0]
    columns = _channel_columns(channels, z.dtype)
    project_kernel[(_cdiv(rows, ROWS) * _cdiv(channels, columns),)](
        z, scale, weight, bias, z if skip is None else skip, scale if skip_scale is None else skip_scale, out, rows,
        C=channels, P=pitch, SKIP=skip is not None, PRECISION=_precision(z),
        ROWS=ROWS, COLUMNS=columns, INNER=GEMM_INNER, **PRODUCT_LAUNCH,
    )  # fmt: skip
    return out


@project.register_fake
def _project_fake(
    z: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None, skip_scale: Tensor | None
) -> Tensor:
    return _like(z, z.shape[0], weight.shape[0], dtype=z.dtype)


@torch.library.custom_op("cmtrain::ffn_project_weight_grad", mutates_args=())
def project_weight_grad(dy: Tensor, z: Tensor) -> Tensor:
    """dy.T @ gelu(z), in parts of the rows: (M, C), (M, p) -> (parts, C, p) fp32."""
    out = _project_weight_grad_fake(dy, z)
    (rows, channels), pitch, parts = dy.shape, z.shape[1], out.shape[0]
    channel_rows = _channel_columns(channels, z.dtype)
    grid = _cdiv(pitch, GEMM_COLUMNS), _cdiv(channels, channel_rows), parts
    project_weight_grad_kernel[grid](
        dy, z, out, rows, _cdiv(rows, parts),
        C=channels, P=pitch, PRECISION=_precision(z),
        ROWS=channel_rows, COLUMNS=GEMM_COLUMNS, INNER=GEMM_INNER, **LAUNCH,
    )  # fmt: skip
    return out


@project_weight_grad.register_fake
def _project_weight_grad_fake(dy: Tensor, z: Tensor) -> Tensor:
    (rows, channels), pitch = dy.shape, z.shape[1]
    tiles = _cdiv(channels, _channel_columns(channels, z.dtype)) * _cdiv(pitch, GEMM_COLUMNS)
    parts = max(1, min(MIN_PROGRAMS // tiles, rows // (ROWS * MAX_TILES)))
    return _like(z, parts, channels, pitch)


@torch.library.custom_op("cmtrain::ffn_project_grad", mutates_args=())
def project_grad(
    dy: Tensor, weight: Tensor, z: Tensor, scale: Tensor, slope: Tensor, offset: Tensor, skip: bool
) -> tuple[Tensor, Tensor]:
    """(scale * dn + slope * gelu(z) + offset) * gelu'(z), dn = dy @ weight: (M, C), (C, p), (M, p), 3 x (p,) -> (M, p).

    And dn (M, p), for what skips z's normalisation; empty without `skip`.
    """
    dz, dn = _project_grad_fake(dy, weight, z, scale, slope, offset, skip)
    (rows, channels), pitch = dy.shape, z.shape[1]
    project_grad_kernel[(_cdiv(rows, ROWS) * _cdiv(pitch, GEMM_COLUMNS),)](
        dy, weight, z, scale, slope, offset, dz, dn, rows,
        C=channels, P=pitch, SKIP=skip, PRECISION=_precision(z),
        ROWS=ROWS, COLUMNS=GEMM_COLUMNS, INNER=GEMM_INNER, **LAUNCH,
    )  # fmt: skip
    return dz, dn


@project_grad.register_fake
def _project_grad_fake(
    dy: Tensor, weight: Tensor, z: Tensor, scale: Tensor, slope: Tensor, offset: Tensor, skip: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), _like(z, len(z) if skip else 0, z.shape[1], dtype=z.dtype)


@torch.library.custom_op("cmtrain::ffn_depthwise_grad", mutates_args=())
def depthwise_grad(
    dz: Tensor, skip: Tensor | None, z: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor,
    height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of `depthwise` with a = gelu(z): (M, p), (M, p), ... -> that of n (M, p), and sums (parts, SUMS, p).

    skip (M, p) is what reached n past the convolution; None says that n was added to it: dz itself. Without scale and
    shift, n is z.

    The first ten sums are the gradient of the weight (10, p), the last two, zero where n is z, that of n and of n
    times a over all rows.
    """
    dn, sums = _depthwise_grad_fake(dz, skip, z, scale, shift, weight, height, width)
    rows, pitch = z.shape
    tiles = _grad_tiles(rows, pitch)
    depthwise_grad_kernel[(_cdiv(pitch, MAP_COLUMNS), sums.shape[0])](
        dz, dz if skip is None else skip, z, scale, shift, weight, dn, sums, rows,
        HEIGHT=height, WIDTH=width, P=pitch, SKIP=skip is not None, PLAIN=scale is None, SUMS=SUMS,
        ROWS=GRAD_ROWS, COLUMNS=MAP_COLUMNS, TILES=tiles, **_depthwise_launch(z),
    )  # fmt: skip
    return dn, sums


@depthwise_grad.register_fake
def _depthwise_grad_fake(
    dz: Tensor, skip: Tensor | None, z: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor,
    height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, pitch = z.shape
    parts = _cdiv(rows, GRAD_ROWS * _grad_tiles(rows, pitch))
    return torch.empty_like(z), _like(z, parts, SUMS, pitch)


@torch.library.custom_op("cmtrain::ffn_normalise_grad", mutates_args=())
def normalise_grad(d: Tensor, e: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor, rows: int) -> Tensor:
    """Gradient through a BatchNorm and its statistics: five (p,) -> (3, p), d gamma, slope and offset.

    d and e are the sums over rows of dn * a and of dn; scale * dn + slope * a + offset is the gradient of a.
    """
    out = _normalise_grad_fake(d, e, mean, inverse, scale, rows)
    pitch = len(d)
    normalise_grad_kernel[(_cdiv(pitch, MAP_COLUMNS),)](
        d, e, mean, inverse, scale, out, rows, P=pitch, COLUMNS=MAP_COLUMNS, **LAUNCH
    )
    return out


@normalise_grad.register_fake
def _normalise_grad_fake(
    d: Tensor, e: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor, rows: int
) -> Tensor:
    return _like(d, 3, len(d))


@torch.library.custom_op("cmtrain::ffn_expand_grad", mutates_args=())
def expand_grad(
    dn: Tensor, z: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """(scale * dn + slope * gelu(z) + offset) * gelu'(z): (M, p), (M, p), 3 x (p,) -> (M, p), and sums (parts, p)."""
    dz, sums = _expand_grad_fake(dn, z, scale, slope, offset)
    rows, pitch = z.shape
    expand_grad_kernel[(_cdiv(pitch, MAP_COLUMNS), _num_partials(rows, pitch))](
        dn, z, scale, slope, offset, dz, sums, rows,
        P=pitch, ROWS=ROWS, COLUMNS=MAP_COLUMNS, TILES=_tiles(rows, pitch), **LAUNCH,
    )  # fmt: skip
    return dz, sums


@expand_grad.register_fake
def _expand_grad_fake(
    dn: Tensor, z: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), _like(z, _num_partials(*z.shape), z.shape[1])
