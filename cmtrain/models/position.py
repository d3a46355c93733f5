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

Variant = Literal["paper", "reimpl"]  # the authors' released network, or FlyEgle/CMT-pytorch's
AttentionBiasKind = Literal["none", "relative", "pairwise"]


def resize_grid(grid: Tensor, side: int) -> Tensor:
    """Resample square grids bicubically, antialiased as in timm: (..., m, m) -> (..., side, side).

    Half precision is resampled in fp32. A grid of that side already is returned untouched, bit for bit.
    """
    if grid.shape[-1] == side:
        return grid
    planes = grid.to(torch.promote_types(grid.dtype, torch.float32)).reshape(1, -1, *grid.shape[-2:])
    resized = F.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)
    return resized.reshape(*grid.shape[:-2], side, side).to(grid.dtype)


def _side(count: int) -> int:
    """Return the side of a square of `count` cells, or 0 when `count` is not a square."""
    side = math.isqrt(count)
    return side if side * side == count else 0


def _require(fits: bool, table: Tensor, wanted: Tensor) -> None:
    if not fits:
        raise ValueError(f"a table of shape {tuple(table.shape)} cannot be resized to {tuple(wanted.shape)}")


class PairwiseBias(nn.Module):
    """The paper's `relative_pos_*`: a number per (head, query, reduced key), drawn from N(0, 1).

    heads None: the re-implementation's "no distance" table, (N, N) for all heads, of deviation 0.2. Key j
    reads column j. Its checkpoints hold more than K columns; the others have no effect and a gradient of 0.
    """

    def __init__(self, heads: int | None, queries_per_side: int, reduction: int):
        super().__init__()
        self.queries_per_side, self.reduction = queries_per_side, reduction
        num_queries = queries_per_side**2
        if heads is None:
            self.table = nn.Parameter(torch.empty(num_queries, num_queries))
            nn.init.trunc_normal_(self.table, std=0.2)
        else:
            self.table = nn.Parameter(torch.empty(heads, num_queries, num_queries // reduction**2))
            nn.init.normal_(self.table)

    def forward(self) -> Tensor:  # -> (h or 1, N, K)
        return self._used(self.table)

    def _used(self, table: Tensor) -> Tensor:
        pairs = table[..., : table.shape[-2] // self.reduction**2]
        return pairs if pairs.ndim == 3 else pairs[None]

    def resized(self, table: Tensor) -> Tensor:
        """Resample the query grid, then the key grid."""
        m = _side(table.shape[-2]) if table.ndim == self.table.ndim else 0
        k, rest = divmod(m, self.reduction)
        shape = (*self.table.shape[:-2], m**2, m**2 if table.ndim == 2 else k**2)
        _require(k > 0 and rest == 0 and table.shape == shape, table, self.table)
        n, keys_per_side = self.queries_per_side, self.queries_per_side // self.reduction
        per_key = resize_grid(self._used(table).mT.unflatten(2, (m, m)), n).flatten(2)  # (h, L, N)
        pairs = resize_grid(per_key.mT.unflatten(2, (k, k)), keys_per_side).flatten(2)  # (h, N, K)
        return F.pad(pairs, (0, self.table.shape[-1] - pairs.shape[2])).view(self.table.shape)


class RelativeBias(nn.Module):
    """One learned number per (head, 2-D offset from a query to the origin of a reduced key's cell).

    The paper's section 3.3 read literally; its release has a pairwise table. 2n - r offsets per axis, in
    query pixels. Drawn (deviation 0.2) like the re-implementation's table, which has published accuracies.

    heads None: that table, of 2n - 1 offsets per axis for all heads. Its key j is the j-th pixel of the
    unreduced map in reading order. So with a reduction the offsets point to the map's top rows, not to the
    reduced cell. It stays, because the published accuracies have it.
    """

    def __init__(self, heads: int | None, queries_per_side: int, reduction: int):
        super().__init__()
        self.queries_per_side, self.num_keys = queries_per_side, (queries_per_side // reduction) ** 2
        self.step = 1 if heads is None else reduction
        offsets = 2 * queries_per_side - self.step
        shape = (offsets, offsets) if heads is None else (heads, offsets, offsets)
        self.table = nn.Parameter(torch.empty(shape))
        nn.init.trunc_normal_(self.table, std=0.2)

    def forward(self) -> Tensor:  # -> (h or 1, N, K)
        n = self.queries_per_side
        key_rows = -(-self.num_keys // (n // self.step))  # only those that hold the first K keys
        table = self.table[..., : n + (key_rows - 1) * self.step, :]
        # Query (y, x) and the key at pixel (i * step, j * step) share row i * step - y + n - 1, the column
        # alike. Views and a flip: no index buffer, no atomics of index_put's backward.
        windows = table.unfold(-2, n, self.step).unfold(-2, n, self.step)  # (..., i, j, n, n), reversed
        windows = windows.flip(-2, -1).movedim((-2, -1), (-4, -3))  # (..., n, n, key_rows, n / step)
        return windows.reshape(-1, n * n, windows.shape[-2:].numel())[..., : self.num_keys]

    def resized(self, table: Tensor) -> Tensor:
        *heads, side, _ = self.table.shape
        old_side = table.shape[-1:].numel()
        fits = table.shape == (*heads, old_side, old_side) and (old_side - side) % 2 == 0
        _require(fits, table, self.table)
        return resize_grid(table, side)


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
        return resize_grid(table.mT.unflatten(2, (side, side)), self.table_side).flatten(2).mT  # (1, m m, C)


POSITION_MODULES = (PairwiseBias, RelativeBias, AbsolutePosition)


def make_attention_bias(
    kind: AttentionBiasKind, variant: Variant, heads: int, queries_per_side: int, reduction: int
) -> nn.Module | None:
    """Build the bias of one stage or block, whose forward() returns (h or 1, N, K); None for kind "none"."""
    if kind == "none":
        return None
    own_heads = heads if variant == "paper" else None
    return {"relative": RelativeBias, "pairwise": PairwiseBias}[kind](own_heads, queries_per_side, reduction)


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
    backends = nn.attention.SDPBackend
    with nn.attention.sdpa_kernel([backends.EFFICIENT_ATTENTION, backends.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
