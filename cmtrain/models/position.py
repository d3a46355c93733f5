"""Learn positions: the attention bias in its four forms, attention with it, and the absolute embedding.

Letters: h heads, n queries per side of the map, N = n * n queries, r reduction, k = n / r keys per side,
K = k * k keys (m, M, L: the same of a table from another image size).

Every class has one parameter, `table`. `forward` returns the bias of the scores (or the map with the
embedding added). `resized` returns another image size's table at this one's; ValueError: another kind's.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Variant = Literal["paper", "reimpl"]  # the authors' released network, or FlyEgle/CMT-pytorch's
AttentionBiasKind = Literal["none", "relative", "pairwise"]


def resize_grid(grid: Tensor, side: int) -> Tensor:
    """Resample square grids bicubically, antialiased as in timm: (..., m, m) -> (..., side, side).

    Half precision is resampled in fp32. A grid of that side already is returned untouched, bit for bit.
    """
    if grid.shape[-1] == side:
        return grid
    wide = grid.to(torch.promote_types(grid.dtype, torch.float32))
    planes = wide.reshape(1, -1, *grid.shape[-2:])
    resized = F.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)
    return resized.reshape(*grid.shape[:-2], side, side).to(grid.dtype)


def relative_windows(table: Tensor, queries_per_side: int, step: int) -> Tensor:
    """Read a table of 2-D offsets as a bias: (..., a, b) -> (..., n, n, i, j), with i = (a - n) / step + 1.

    Entry [y, x, i, j] is table[i * step - y + n - 1, j * step - x + n - 1], of query (y, x) and the key at
    pixel (i * step, j * step). Views and a flip: no index buffer, no atomics of index_put's backward.
    """
    n = queries_per_side
    windows = table.unfold(-2, n, step).unfold(-2, n, step)  # (..., i, j, n, n), query coordinates reversed
    return windows.flip(-2, -1).movedim((-2, -1), (-4, -3))


def _side(count: int) -> int:
    """Return the side of a square of `count` cells, or 0 when `count` is not a square."""
    side = math.isqrt(count)
    return side if side * side == count else 0


def _resize_pairs(pairs: Tensor, queries_per_side: int, keys_per_side: int) -> Tensor:
    """Resample the query grid, then the key grid: (h, M, L) -> (h, N, K), M and L being squares."""
    heads, old_queries, old_keys = pairs.shape
    m, k = _side(old_queries), _side(old_keys)
    per_key = resize_grid(pairs.mT.reshape(heads, old_keys, m, m), queries_per_side).flatten(2)  # (h, L, N)
    return resize_grid(per_key.mT.unflatten(2, (k, k)), keys_per_side).flatten(2)


def _require(fits: bool, table: Tensor, wanted: Tensor) -> None:
    if not fits:
        raise ValueError(f"a table of shape {tuple(table.shape)} cannot be resized to {tuple(wanted.shape)}")


class PairwiseBias(nn.Module):
    """The paper's `relative_pos_*`: a number per (head, query, reduced key), drawn from N(0, 1)."""

    def __init__(self, heads: int, queries_per_side: int, reduction: int):
        super().__init__()
        self.queries_per_side, self.keys_per_side = queries_per_side, queries_per_side // reduction
        self.table = nn.Parameter(torch.empty(heads, self.queries_per_side**2, self.keys_per_side**2))
        nn.init.normal_(self.table)

    def forward(self) -> Tensor:  # -> (h, N, K)
        return self.table

    def resized(self, table: Tensor) -> Tensor:
        is_pairs = table.ndim == 3 and len(table) == len(self.table) and all(map(_side, table.shape[1:]))
        _require(is_pairs, table, self.table)
        return _resize_pairs(table, self.queries_per_side, self.keys_per_side)


class RelativeBias(nn.Module):
    """One learned number per (head, 2-D offset from a query to the origin of a reduced key's cell).

    The paper's section 3.3 read literally; its release has a pairwise table. 2n - r offsets per axis, in
    query pixels. Drawn (deviation 0.2) like the re-implementation's table, which has published accuracies.
    """

    def __init__(self, heads: int, queries_per_side: int, reduction: int):
        super().__init__()
        self.queries_per_side, self.reduction = queries_per_side, reduction
        offsets = 2 * queries_per_side - reduction
        self.table = nn.Parameter(torch.empty(heads, offsets, offsets))
        nn.init.trunc_normal_(self.table, std=0.2)

    def forward(self) -> Tensor:  # -> (h, N, K)
        windows = relative_windows(self.table, self.queries_per_side, self.reduction)  # (h, n, n, k, k)
        return windows.flatten(3, 4).flatten(1, 2)

    def resized(self, table: Tensor) -> Tensor:
        is_offsets = table.ndim == 3 and table.shape == (self.table.shape[0], table.shape[1], table.shape[1])
        _require(is_offsets, table, self.table)
        return resize_grid(table, self.table.shape[-1])


class ReimplPairwiseBias(nn.Module):
    """The re-implementation's "no distance" table: (N, N) for all heads; it reads the first K columns.

    Key j reads column j. Its checkpoints hold the others, of no effect and with a gradient of exactly 0.
    """

    def __init__(self, queries_per_side: int, reduction: int):
        super().__init__()
        self.queries_per_side, self.reduction = queries_per_side, reduction
        self.table = nn.Parameter(torch.empty(queries_per_side**2, queries_per_side**2))
        nn.init.trunc_normal_(self.table, std=0.2)

    def forward(self) -> Tensor:  # -> (1, N, K)
        return self.table[None, :, : self.table.shape[0] // self.reduction**2]

    def resized(self, table: Tensor) -> Tensor:
        is_pairs = table.ndim == 2 and len(table) == table.shape[1] and len(table) % self.reduction**2 == 0
        _require(is_pairs and _side(len(table)) > 0, table, self.table)
        used = table[None, :, : len(table) // self.reduction**2]
        pairs = _resize_pairs(used, self.queries_per_side, self.queries_per_side // self.reduction)
        return F.pad(pairs[0], (0, self.table.shape[1] - pairs.shape[2]))


class ReimplRelativeBias(nn.Module):
    """The re-implementation's relative table: (2n - 1, 2n - 1) for all heads, sliced to the first K keys.

    Its key j is the j-th pixel of the unreduced map in reading order. So with a reduction the offsets point
    to the map's top rows, not to the reduced cell. It stays, because the published accuracies have it.
    """

    def __init__(self, queries_per_side: int, reduction: int):
        super().__init__()
        self.queries_per_side, self.reduction = queries_per_side, reduction
        self.table = nn.Parameter(torch.empty(2 * queries_per_side - 1, 2 * queries_per_side - 1))
        nn.init.trunc_normal_(self.table, std=0.2)

    def forward(self) -> Tensor:  # -> (1, N, K)
        n = self.queries_per_side
        num_keys = (n // self.reduction) ** 2
        key_rows = -(-num_keys // n)  # only the rows of pixels that hold the first K of them
        windows = relative_windows(self.table[: n - 1 + key_rows], n, step=1)  # (n, n, key_rows, n)
        return windows.flatten(2).flatten(0, 1)[None, :, :num_keys]

    def resized(self, table: Tensor) -> Tensor:
        is_offsets = table.ndim == 2 and len(table) == table.shape[1] and len(table) % 2 == 1
        _require(is_offsets, table, self.table)
        return resize_grid(table, self.table.shape[-1])


class AbsolutePosition(nn.Module):
    """One learned vector per pixel, added to the map; drawn like the re-implementation's embedding.
    A table of another side than the map's is resampled to it in every forward pass.
    """

    def __init__(self, dim: int, side: int, table_side: int | None = None):
        super().__init__()
        self.side, self.table_side = side, table_side or side
        self.table = nn.Parameter(torch.empty(1, self.table_side**2, dim))
        nn.init.trunc_normal_(self.table, std=0.2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        embedding = self.table.unflatten(1, (self.table_side, self.table_side)).permute(0, 3, 1, 2)
        return x + resize_grid(embedding, self.side).to(x.dtype)  # (1, C, H, W)

    def resized(self, table: Tensor) -> Tensor:
        side = _side(table.shape[1]) if table.ndim == 3 else 0
        _require(side > 0 and table.shape[::2] == self.table.shape[::2], table, self.table)
        planes = table.mT.unflatten(2, (side, side))  # (1, C, m, m)
        return resize_grid(planes, self.table_side).flatten(2).mT


POSITION_MODULES = (PairwiseBias, RelativeBias, ReimplPairwiseBias, ReimplRelativeBias, AbsolutePosition)


def make_attention_bias(
    kind: AttentionBiasKind, variant: Variant, heads: int, queries_per_side: int, reduction: int
) -> nn.Module | None:
    """Build the bias of one stage or block, whose forward() returns (h or 1, N, K); None for kind "none"."""
    if kind == "none":
        return None
    if variant == "paper":
        return {"relative": RelativeBias, "pairwise": PairwiseBias}[kind](heads, queries_per_side, reduction)
    reimpl = {"relative": ReimplRelativeBias, "pairwise": ReimplPairwiseBias}
    return reimpl[kind](queries_per_side, reduction)


# ---- attention with a bias


def is_eager_on_cpu(x: Tensor) -> bool:
    return not x.is_cuda and not torch.compiler.is_compiling()  # what a CPU exports runs elsewhere


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, scale: float) -> Tensor:
    """Attend with a bias: q (B, h, N, d), k and v (B, h, K, d), bias (h or 1, N, K) -> (B, h, N, d).

    On CUDA a bias goes to the memory-efficient backend, the only fused one that returns its gradient; d must
    be a multiple of 8. float64 gets the plain formula, and so does a CPU, where it is fastest as K is small.
    """
    if is_eager_on_cpu(q):
        scores = q @ (k * scale).transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return F.dropout(weights, dropout).to(v.dtype) @ v
    mask = None
    if bias is not None:
        # Some fused kernels are silently wrong if the mask's dtype is not q's. Most refuse a mask that
        # requires a gradient, even where none is taken.
        mask = (bias if torch.is_grad_enabled() else bias.detach()).to(q.dtype)[None]
    if mask is None or not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
