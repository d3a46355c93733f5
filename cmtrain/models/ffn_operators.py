"""Launch the kernels of the feed-forward network, as operators for autograd, torch.compile and fake tensors.

fused_ffn.py has the algebra. Letters: M = B * H * W rows, C channels, h hidden channels, p = padded(h).

Hidden tensors are (M, p): rows begin at multiples of 32 bytes, so that loads are vectors whatever h is
(CMT-Ti's are 165, 331, 662 and 1324). Their last p - h columns are zero, because weights are read as zero
there. Parameters and their gradients are never padded. With TRITON_INTERPRET=1 everything runs on a CPU.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import cmtrain.models.ffn_kernels as kernels

PITCH = 16
ROWS = 64  # rows of a tile
GEMM_COLUMNS, GEMM_INNER = 64, 32  # columns and inner size of a tile of a matrix product
GEMM_CHANNELS = 128  # most columns of a tile that has the network's input or output for columns
MAP_COLUMNS = 32  # columns of every other tile: 64 bytes in half precision, two sectors
GRAD_ROWS = 32  # rows of a tile of depthwise_grad, which keeps twelve sums for each of its places
# Consecutive tiles of rows per program: fewer partial sums to add, but programs enough for a large GPU.
MAX_TILES, MIN_PROGRAMS = 64, 1024
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}  # two programs fit a multiprocessor of sm_80 or sm_90
# A product whose left side is made in registers: with more warps, two of them would make each row's.
PRODUCT_LAUNCH = LAUNCH | {"num_warps": 4}

Function = TypeVar("Function", bound=Callable)


def operator(function: Function) -> Function:
    """Register `function` with torch, also for fake tensors, where its launches do nothing."""
    registered = torch.library.custom_op(f"cmtrain::{function.__name__}", mutates_args=())(function)
    registered.register_fake(function)
    return registered  # type: ignore[return-value]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if not isinstance(arguments[0], FakeTensor):
        kernel[grid](*arguments, **constants)


def cdiv(total: int, size: int) -> int:  # triton.cdiv takes 5 us, and a step would call it a thousand times
    return -(-total // size)


def padded(hidden: int) -> int:
    return cdiv(hidden, PITCH) * PITCH


def count_tiles(rows: int, pitch: int) -> int:
    return max(1, min(MAX_TILES, cdiv(rows, ROWS) * cdiv(pitch, MAP_COLUMNS) // MIN_PROGRAMS))


def count_parts(rows: int, pitch: int) -> int:
    return cdiv(rows, ROWS * count_tiles(rows, pitch))


def _limited(launch: dict[str, int], z: Tensor) -> dict[str, int]:
    return launch | {"maxnreg": 128} if z.itemsize == 2 else launch  # in fp32 that would spill too much


def channel_columns(channels: int, dtype: torch.dtype) -> int:
    most = GEMM_CHANNELS if dtype.itemsize < 4 else GEMM_COLUMNS  # fp32 has no registers for more
    return max(16, min(most, triton.next_power_of_2(channels)))  # a product has 16 columns or more


def precision(x: Tensor) -> str:
    # Not allow_tf32, which raises where only fp32_precision was set.
    is_tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "ieee"


def empty(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=x.device, dtype=dtype)


@operator
def expand(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(x @ weight.T + bias): (M, C), (h, C), (h,) -> before GELU (M, p), after it (M, p), its moments.

    In training the moments are means and squared deviations of equal parts of the rows, (parts, 2, p). In
    evaluation they and the tensor before GELU are empty.
    """
    (rows, channels), hidden = x.shape, weight.shape[0]
    pitch = padded(hidden)
    parts = count_parts(rows, pitch)
    z = empty(x, rows if training else 0, pitch, dtype=x.dtype)
    a, moments = empty(x, rows, pitch, dtype=x.dtype), empty(x, parts if training else 0, 2, pitch)
    # With few channels the writes bound it, with many the repeated reads of x.
    columns = MAP_COLUMNS if channels <= GEMM_COLUMNS else GEMM_COLUMNS
    launch(
        kernels.expand_kernel, (cdiv(pitch, columns), parts), x, weight, bias, z, a, moments, rows,
        C=channels, H=hidden, P=pitch, TRAINING=training, PRECISION=precision(x),
        ROWS=ROWS, COLUMNS=columns, INNER=GEMM_INNER, TILES=count_tiles(rows, pitch), **LAUNCH,
    )  # fmt: skip
    return z, a, moments


@operator
def normalise(moments: Tensor, gamma: Tensor, beta: Tensor, rows: int, eps: float) -> Tensor:
    """Merge the moments of parts -> (5, p): mean, unbiased variance, 1 / deviation, scale, shift.
    scale * a + shift is BatchNorm, which divides by the biased deviation; gamma and beta (h,) are its own.
    """
    parts, _, pitch = moments.shape
    out = empty(moments, 5, pitch)
    launch(
        kernels.normalise_kernel, (cdiv(pitch, MAP_COLUMNS),),
        moments, gamma, beta, out, rows, eps, parts, ROWS * count_tiles(rows, pitch),
        H=gamma.shape[0], P=pitch, COLUMNS=MAP_COLUMNS, PARTS=ROWS, **LAUNCH,
    )  # fmt: skip
    return out


@operator
def depthwise(
    a: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor,
    height: int, width: int, residual: bool, training: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """conv3x3(n), plus n with `residual`, of n = scale * a + shift: (M, p), (p,), (p,), (10, p) -> (M, p).
    weight: nine taps and the bias. Without scale and shift n is a. Also returns moments, like expand.
    """
    rows, pitch = a.shape
    parts = count_parts(rows, pitch)
    z, moments = torch.empty_like(a), empty(a, parts if training else 0, 2, pitch)
    launch(
        kernels.depthwise_kernel, (cdiv(pitch, MAP_COLUMNS), parts),
        a, scale, shift, weight, z, moments, rows,
        HEIGHT=height, WIDTH=width, P=pitch, RESIDUAL=residual, PLAIN=scale is None, TRAINING=training,
        ROWS=ROWS, COLUMNS=MAP_COLUMNS, TILES=count_tiles(rows, pitch), **_limited(LAUNCH, z),
    )  # fmt: skip
    return z, moments


@operator
def project(
    z: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None, skip_scale: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale * gelu(z) + skip_scale * skip) @ weight.T + bias -> (M, C), and moments, like expand.
    z, skip (M, p), scale, skip_scale (p,), weight (C, p), bias (C,).
    """
    (rows, pitch), channels = z.shape, len(weight)
    parts, columns = count_parts(rows, channels), channel_columns(channels, z.dtype)
    out, moments = empty(z, rows, channels, dtype=z.dtype), empty(z, parts if training else 0, 2, channels)
    # With 128 columns a limit would spill 500 bytes a thread (compiled for sm_80 and sm_90, not timed).
    how = PRODUCT_LAUNCH if columns > GEMM_COLUMNS else _limited(PRODUCT_LAUNCH, z)
    launch(
        kernels.project_kernel, (cdiv(channels, columns), parts), z, scale, weight, bias,
        z if skip is None else skip, scale if skip_scale is None else skip_scale, out, moments, rows,
        C=channels, P=pitch, SKIP=skip is not None, TRAINING=training, PRECISION=precision(z),
        ROWS=ROWS, COLUMNS=columns, INNER=GEMM_INNER, TILES=count_tiles(rows, channels), **how,
    )  # fmt: skip
    return out, moments


@operator
def project_grad(
    dy: Tensor, weight: Tensor, z: Tensor, scale: Tensor, slope: Tensor, offset: Tensor, skip: bool
) -> tuple[Tensor, Tensor]:
    """(scale * dn + slope * gelu(z) + offset) * gelu'(z) with dn = dy @ weight -> (M, p).

    dy (M, C), weight (C, p), z (M, p), the others (p,). With `skip` also returns dn (M, p), for the branch
    that skips z's normalisation; else an empty tensor.
    """
    (rows, channels), pitch = dy.shape, z.shape[1]
    dz, dn = torch.empty_like(z), empty(z, rows if skip else 0, pitch, dtype=z.dtype)
    launch(
        kernels.project_grad_kernel, (cdiv(rows, ROWS) * cdiv(pitch, GEMM_COLUMNS),),
        dy, weight, z, scale, slope, offset, dz, dn, rows,
        C=channels, P=pitch, SKIP=skip, PRECISION=precision(z),
        ROWS=ROWS, COLUMNS=GEMM_COLUMNS, INNER=GEMM_INNER, **LAUNCH,
    )  # fmt: skip
    return dz, dn


@operator
def project_weight_grad(
    g: Tensor, weight: Tensor, db: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return g * scale + db * shift', (C, h), and sums over rows, (2, h): of weight * g and of weight * db.
    g, weight (C, h), db (C,); scale, shift (p,): of the BatchNorm in front of the product.
    """
    (channels, hidden), dw, sums = weight.shape, torch.empty_like(g), empty(g, 2, weight.shape[1])
    launch(
        kernels.project_weight_grad_kernel, (cdiv(hidden, PITCH),), g, weight, db, scale, shift, dw, sums,
        C=channels, H=hidden, ROWS=ROWS, COLUMNS=PITCH, **PRODUCT_LAUNCH,
    )  # fmt: skip
    return dw, sums


@operator
def depthwise_grad(
    dz: Tensor, skip: Tensor | None, z: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor,
    hidden: int, height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dn (M, p), the gradient of `depthwise`'s n, a being gelu(z), and sums (parts, 10 h + 2 p).

    dz, z (M, p). skip (M, p): the gradient that reached n past the convolution; None where `depthwise` added
    n, whose gradient is dz itself. Without scale and shift, n is z. The sums, one behind the other:
    gradients of the taps (h, 9) and bias (h,); sums of dn and of dn * a, (p,) each, zero where n is z.
    """
    rows, pitch = z.shape
    tiles = count_tiles(rows, pitch) * (ROWS // GRAD_ROWS)
    dn, sums = torch.empty_like(z), empty(z, cdiv(rows, GRAD_ROWS * tiles), 10 * hidden + 2 * pitch)
    launch(
        kernels.depthwise_grad_kernel, (cdiv(pitch, MAP_COLUMNS), len(sums)),
        dz, dz if skip is None else skip, z, scale, shift, weight, dn, sums, rows,
        HEIGHT=height, WIDTH=width, H=hidden, P=pitch, SKIP=skip is not None, PLAIN=scale is None,
        ROWS=GRAD_ROWS, COLUMNS=MAP_COLUMNS, TILES=tiles, **_limited(LAUNCH, z),
    )  # fmt: skip
    return dn, sums


@operator
def normalise_grad(d: Tensor, e: Tensor, statistics: Tensor, rows: int) -> Tensor:
    """Return d gamma, slope and offset (3, p) of a BatchNorm: da = scale * dn + slope * a + offset.
    d, e: sums over rows of dn * a and of dn, (p,) or without padding. statistics: of `normalise`, (5, p).
    """
    pitch = statistics.shape[1]
    out = empty(d, 3, pitch)
    launch(
        kernels.normalise_grad_kernel, (cdiv(pitch, MAP_COLUMNS),), d, e, statistics, out, rows,
        H=len(d), P=pitch, COLUMNS=MAP_COLUMNS, **LAUNCH,
    )  # fmt: skip
    return out


@operator
def expand_grad(
    dn: Tensor, z: Tensor, scale: Tensor, slope: Tensor, offset: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """dz = (scale * dn + slope * gelu(z) + offset) * gelu'(z) -> (M, p), and dz @ weight (M, C).
    dn, z (M, p), weight (h, C), the others (p,).
    """
    (rows, pitch), (hidden, channels) = z.shape, weight.shape
    dz, dx = torch.empty_like(z), empty(z, rows, channels, dtype=z.dtype)
    columns = channel_columns(channels, z.dtype)
    how = PRODUCT_LAUNCH if z.itemsize == 2 else LAUNCH  # in fp32 four warps have too few registers
    launch(
        kernels.expand_grad_kernel, (cdiv(rows, ROWS) * cdiv(channels, columns),),
        dn, z, scale, slope, offset, weight, dz, dx, rows,
        C=channels, H=hidden, P=pitch, PRECISION=precision(z),
        ROWS=ROWS, COLUMNS=columns, INNER=GEMM_INNER, **how,
    )  # fmt: skip
    return dz, dx
