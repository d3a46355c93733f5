"""Build the layers of a CMT (arXiv 2107.06263), in the paper's and in the re-implementation's form.

Letters: B batch, C channels, H x W map, N = H * W queries, K reduced keys, h heads, d = C / h, r reduction.
Maps (B, C, H, W) are in channels-last memory throughout, so that tokens (B, H, W, C) are views of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from cmtrain.models.position import AbsolutePosition, Variant, attend, is_eager_on_cpu

try:
    import cmtrain.models.fused_ffn as fused_ffn
    import cmtrain.models.linear_kernels as linear_kernels
    import cmtrain.models.norm_kernels as norm_kernels
except ModuleNotFoundError:  # torch's builds for machines without a GPU bring no Triton
    fused_ffn = None  # type: ignore[assignment]

FfnKernel = Literal["auto", "fused", "eager"]
NONE_DROPPED = DropPath()

# ---- maps and tokens


def _tokens(x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, H, W, C), a view
    return x.permute(0, 2, 3, 1)


def _map(tokens: Tensor) -> Tensor:  # (B, H, W, C) -> (B, C, H, W), a view
    return tokens.permute(0, 3, 1, 2)


@torch.compiler.assume_constant_result
def _runs_triton(cuda_index: int) -> bool:
    # Tensors claim to be on CUDA where bytes are counted (cost.py), and there may be no GPU.
    return torch.cuda.is_available() and torch.cuda.get_device_capability(cuda_index) >= (8, 0)


def _takes_kernel(kernel: FfnKernel, x: Tensor) -> bool:
    if kernel != "auto":
        return kernel == "fused"
    return fused_ffn is not None and x.is_cuda and x.dtype != torch.float64 and _runs_triton(x.device.index)


def _has_kernel(part: Any, x: Tensor) -> bool:
    """Return whether a part with layers is fused: hooks see them all; evaluation has no backward there."""
    if any(layer._forward_hooks for layer in part.children()):  # such as those of the search for an overflow
        return False
    norms = [layer for layer in part.children() if isinstance(layer, nn.BatchNorm2d)]
    is_training = part.training and all(norm.training for norm in norms[:2])  # an FFN's third may be frozen
    return (is_training or not torch.is_grad_enabled()) and _takes_kernel(part.kernel, x)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply every pixel by the same matrix: (B, C, H, W), (out, C), (out,) -> (B, out, H, W)."""
    if x.is_cuda:
        return _map(F.linear(_tokens(x), weight, bias))
    return F.conv2d(x, weight[:, :, None, None], bias)  # on a CPU 1.1 to 1.8 times as fast as F.linear


def gelu(x: Tensor) -> Tensor:
    """GELU of a map. On a CPU of its tokens: oneDNN's kernel, 1.4 times as fast, wants them contiguous."""
    return _map(F.gelu(_tokens(x))) if is_eager_on_cpu(x) else F.gelu(x)


# ---- convolutions and norms


class PointwiseConv(nn.Module):
    """1x1 convolution whose weight is a matrix: (B, C, H, W) -> (B, out, H, W).
    A matrix has one memory layout, so its gradient and DDP's bucket cannot disagree about strides.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class TokenLinear(nn.Linear):
    """Linear layer of the tokens of a map: (B, H, W, C) -> (B, H, W, out)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return _tokens(pointwise(_map(tokens), self.weight, self.bias))


def depthwise_conv(channels: int) -> nn.Conv2d:
    """Depth-wise 3x3 convolution. Weight and gradient have the same strides, channels-last, as DDP wants."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels).to(memory_format=torch.channels_last)


class ResidualDepthwiseConv(nn.Conv2d):
    """x plus its depth-wise 3x3 convolution: (B, C, H, W) -> (B, C, H, W).

    On a GPU it is one Triton kernel (`kernel`: see FeedForward). On a CPU the addition is a 1 in the centre
    of every kernel, which saves passes over x, but not in half precision, which would round the weight.
    """

    def __init__(self, channels: int, kernel: FfnKernel = "auto"):
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        self.kernel = kernel
        self.to(memory_format=torch.channels_last)  # as depthwise_conv's

    def forward(self, x: Tensor) -> Tensor:
        if _takes_kernel(self.kernel, x):
            return fused_ffn.residual_depthwise(x, self)
        if not is_eager_on_cpu(x) or self.weight.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu"):
            return x + super().forward(x)
        centre = F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return self._conv_forward(x, self.weight + centre, self.bias)


class PatchConv(nn.Conv2d):
    """Convolution whose stride is its kernel, dense or depth-wise: (B, C, r H, r W) -> (B, out, H, W)."""

    def __init__(self, channels: int, out: int, patch: int, *, groups: int = 1, kernel: FfnKernel = "auto"):
        super().__init__(channels, out, patch, patch, groups=groups)
        self.kernel: FfnKernel = kernel
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if _takes_kernel(self.kernel, x):
            return linear_kernels.patch_conv(x, self, self.bias)
        return super().forward(x)


def _kept(x: Tensor, drop_path: DropPath) -> Tensor | None:
    """Draw 0 or 1 / (share kept) for every image, (B, 1, 1, 1); None where no path is dropped."""
    if not (drop_path.training and drop_path.drop_prob):
        return None
    keep = 1 - drop_path.drop_prob
    return x.new_empty(len(x), 1, 1, 1).bernoulli_(keep).div_(keep)


def add_branch(x: Tensor, branch: Tensor, drop_path: DropPath) -> Tensor:
    """Return x + drop_path(branch), all (B, C, H, W), in one pass over the maps where DropPath takes two."""
    kept = _kept(x, drop_path)
    return x + branch if kept is None else torch.addcmul(x, kept, branch)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, in its dtype: (B, C, H, W) -> (B, C, H, W).

    Autocast would return fp32, and so would every residual addition after it: twice the bytes.
    The statistics are fp32 anyway. On a GPU it is a Triton kernel (`kernel`: see FeedForward).
    """

    def __init__(self, channels: int, eps: float, kernel: FfnKernel = "auto"):
        super().__init__(channels, eps=eps)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        if _takes_kernel(self.kernel, x):
            return _map(norm_kernels.layer_norm(_tokens(x), self.weight, self.bias, self.eps)[1])
        tokens = _tokens(x)
        if x.dtype == self.weight.dtype:
            return _map(super().forward(tokens))
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return _map(F.layer_norm(tokens, self.normalized_shape, weight, bias, self.eps))

    def with_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x, for what else uses it, and its norm: on a GPU their gradients are added in one pass."""
        if not _takes_kernel(self.kernel, x) or self._forward_hooks:  # hooks: as in _has_kernel
            return x, self(x)
        tokens, normed = norm_kernels.layer_norm(_tokens(x), self.weight, self.bias, self.eps)
        return _map(tokens), _map(normed)


# ---- blocks


class BlockOptions(NamedTuple):
    """Options that all blocks of a model share; see CMT."""

    variant: Variant
    qkv_bias: bool
    attn_drop: float
    proj_drop: float
    ffn_kernel: FfnKernel


class Stem(nn.Module):
    """Three 3x3 convolutions, the first with stride 2, each followed by GELU and BatchNorm in that order."""

    def __init__(self, in_chans: int, channels: int, kernel: FfnKernel = "auto"):
        super().__init__()
        self.kernel: FfnKernel = kernel
        self.conv1 = nn.Conv2d(in_chans, channels, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, H/2, W/2)
        x = self._layer(self.conv1, self.norm1, x)
        x = self._layer(self.conv2, self.norm2, x)
        return self._layer(self.conv3, self.norm3, x)

    def _layer(self, conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
        if not _has_kernel(self, x) or (torch.is_grad_enabled() and not norm.training):
            return norm(gelu(conv(x)))
        if conv is self.conv1 and not (x.requires_grad or x.shape[2] % 2 or x.shape[3] % 2):
            z = linear_kernels.patch_conv(x, conv, None)
        else:
            z = conv._conv_forward(x, conv.weight, None)
        return _map(norm_kernels.gelu_batch_norm(_tokens(z), conv.bias, norm))


class Attention(nn.Module):
    """Multi-head self-attention (section 3.2): keys and values come from a map reduced r times per side.

    The paper reduces by a depth-wise convolution and BatchNorm, the re-implementation by a full convolution
    and LayerNorm. Projections of the same tokens are one matrix, rows ordered q, k, v, then head, channel.
    Fused attention on CUDA refuses heads whose channels are no multiple of 8. So every forward pass pads
    them there (46 to 48 in CMT-Ti) with zeros: rows of the matrices of q, k and v, columns of the result's.
    """

    def __init__(self, dim: int, heads: int, reduction: int, options: BlockOptions):
        super().__init__()
        self.heads, self.reduction, self.attn_drop = heads, reduction, options.attn_drop
        self.kernel: FfnKernel = options.ffn_kernel
        if reduction == 1:
            self.qkv = TokenLinear(dim, 3 * dim, bias=options.qkv_bias)
        else:
            self.q = TokenLinear(dim, dim, bias=options.qkv_bias)
            self.kv = TokenLinear(dim, 2 * dim, bias=options.qkv_bias)
            is_paper = options.variant == "paper"
            self.reduce = PatchConv(dim, dim, reduction, groups=dim if is_paper else 1, kernel=self.kernel)
            self.reduce_norm = nn.BatchNorm2d(dim) if is_paper else ChannelNorm(dim, 1e-5, self.kernel)
        self.proj = TokenLinear(dim, dim)
        self.proj_drop = nn.Dropout(options.proj_drop)

    def forward(self, tokens: Tensor, bias: Tensor | None, residual: Tensor, drop_path: DropPath) -> Tensor:
        """Return residual + drop_path(attention), (B, H, W, C); bias (h or 1, N, K)."""
        batch, height, width, dim = tokens.shape
        is_fused, head_dim = _has_kernel(self, tokens), dim // self.heads
        padding = -head_dim % 8 if tokens.is_cuda or is_fused else 0
        heads = (self.heads, head_dim + padding)

        def into_heads(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
            if is_fused:
                return linear_kernels.project(x, linear, out_head=head_dim)
            return self._padded(linear, x, padding, into_heads=True), x

        if self.reduction > 1:
            q, tokens = into_heads(self.q, tokens)
            reduced = self.reduce_norm(self.reduce(_map(tokens)))  # (B, C, H/r, W/r)
            kv, _ = into_heads(self.kv, _tokens(reduced))
            q = q.view(batch, height * width, *heads)
            # Each (B, K, h, d). The backward pass stacks their gradients.
            k, v = kv.view(batch, -1, 2, *heads).unbind(2)
        else:
            qkv, _ = into_heads(self.qkv, tokens)
            q, k, v = qkv.view(batch, height * width, 3, *heads).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, h, N, d), (B, h, K, d)
        mixed = attend(q, k, v, bias, self.attn_drop if self.training else 0.0, head_dim**-0.5)
        mixed = mixed.transpose(1, 2).reshape(batch, height, width, -1)
        if not is_fused:
            branch = self.proj_drop(self._padded(self.proj, mixed, padding, into_heads=False))
            return _tokens(add_branch(_map(residual), _map(branch), drop_path))
        # One mask for dropout and dropped paths, or numbers for paths alone
        kept, rate, factor = _kept(tokens, drop_path), self.proj_drop.p if self.training else 0.0, 1.0
        if rate:
            mask = torch.empty_like(residual, dtype=torch.bool).bernoulli_(1 - rate)
            factor = 1 / (1 - rate) / (1.0 if kept is None else 1 - drop_path.drop_prob)
            kept = mask if kept is None else mask & (kept > 0)
        added: Any = {"residual": residual, "kept": kept, "factor": factor}
        return linear_kernels.project(mixed, self.proj, in_head=head_dim, **added)[0]

    def _padded(self, linear: nn.Linear, x: Tensor, padding: int, *, into_heads: bool) -> Tensor:
        """Apply a layer into or out of heads, each with this much padding."""
        if not padding:
            return linear(x)
        weight: Tensor = linear.weight
        bias: Tensor | None = linear.bias
        if not into_heads:
            return F.linear(x, F.pad(weight.unflatten(1, (self.heads, -1)), (0, padding)).flatten(1), bias)
        head_dim = linear.in_features // self.heads
        weight = F.pad(weight.unflatten(0, (-1, head_dim)), (0, 0, 0, padding)).flatten(0, 1)
        if bias is not None:
            bias = F.pad(bias.view(-1, head_dim), (0, padding)).flatten()
        return F.linear(x, weight, bias)


class FeedForward(nn.Module):
    """Inverted residual feed-forward network (section 3.2): widen, mix 3x3 per channel, narrow.

    The paper adds the depth-wise branch before GELU and BatchNorm, the re-implementation after them.
    kernel: "eager" computes as written below, "fused" in Triton kernels (fused_ffn.py), without a backward
    pass of evaluation. "auto" is fused where it can be, on GPUs of compute capability 8.0 or more.
    """

    def __init__(self, dim: int, hidden: int, *, variant: Variant, drop: float, kernel: FfnKernel = "auto"):
        super().__init__()
        if kernel == "fused" and (fused_ffn is None or drop):
            raise ValueError("ffn_kernel='fused' needs Triton and, in variant='paper', proj_drop_rate=0")
        self.kernel: FfnKernel = kernel
        self.variant: Variant = variant
        is_paper = variant == "paper"
        self.expand = PointwiseConv(dim, hidden)
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.depthwise = ResidualDepthwiseConv(hidden, "eager") if is_paper else depthwise_conv(hidden)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.project = PointwiseConv(hidden, dim)
        self.project_norm = nn.BatchNorm2d(dim)
        self.drop = nn.Dropout(drop)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, drop_path: DropPath = NONE_DROPPED
    ) -> Tensor:
        """Return the network's result, or residual + drop_path(result); all (B, C, H, W)."""
        if self.drop.p == 0 and _has_kernel(self, x):
            return fused_ffn.feed_forward(x, self, residual, _kept(x, drop_path))
        x = self.drop(self.expand_norm(gelu(self.expand(x))))
        branch = self.depthwise_norm(gelu(self.depthwise(x)))
        x = branch if self.variant == "paper" else x + branch
        branch = self.drop(self.project_norm(self.project(x)))
        return branch if residual is None else add_branch(residual, branch, drop_path)


class Block(nn.Module):
    """CMT block (section 3.2): local perception unit, attention and FFN, each added to its input."""

    def __init__(
        self, dim: int, hidden: int, heads: int, reduction: int,
        bias: nn.Module | None, drop_path_prob: float, options: BlockOptions,
    ):  # fmt: skip
        super().__init__()
        variant, kernel = options.variant, options.ffn_kernel
        is_paper = variant == "paper"
        eps = 1e-6 if is_paper else 1e-5
        self.lpu = ResidualDepthwiseConv(dim, kernel)
        self.norm1 = ChannelNorm(dim, eps, kernel)
        self.attn = Attention(dim, heads, reduction, options)
        self.bias = bias
        self.norm2 = ChannelNorm(dim, eps, kernel)
        # The re-implementation drops paths of the FFN branch only, and has no dropout inside the FFN.
        drop = options.proj_drop if is_paper else 0.0
        self.ffn = FeedForward(dim, hidden, variant=variant, drop=drop, kernel=kernel)
        self.attn_drop_path = DropPath(drop_path_prob if is_paper else 0.0)
        self.ffn_drop_path = DropPath(drop_path_prob)

    def forward(self, x: Tensor, stage_bias: Tensor | None) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        bias = stage_bias if self.bias is None else self.bias()
        x, normed = self.norm1.with_input(self.lpu(x))
        x = _map(self.attn(_tokens(normed), bias, _tokens(x), self.attn_drop_path))
        x, normed = self.norm2.with_input(x)
        return self.ffn(normed, x, self.ffn_drop_path)


class Stage(nn.Module):
    """Patch aggregation (2x2 convolution, stride 2; the paper adds LayerNorm), then blocks of one size."""

    def __init__(
        self, in_channels: int, dim: int, variant: Variant, kernel: FfnKernel,
        absolute: AbsolutePosition | None, bias: nn.Module | None, blocks: Sequence[Block],
    ):  # fmt: skip
        super().__init__()
        self.embed = PatchConv(in_channels, dim, 2, kernel=kernel)
        self.norm = ChannelNorm(dim, 1e-5, kernel) if variant == "paper" else nn.Identity()
        self.absolute = absolute or nn.Identity()
        self.bias = bias
        self.blocks = nn.ModuleList(blocks)
        self.call_block: Callable[..., Tensor] = Block.__call__  # see CMT.set_grad_checkpointing

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, 2H, 2W) -> (B, C, H, W)
        x = self.absolute(self.norm(self.embed(x)))
        bias = None if self.bias is None else self.bias()
        for block in self.blocks:
            x = self.call_block(block, x, bias)
        return x


# On a GPU all or most of each is Triton kernels; `kernel`: see FeedForward.
FusedPart = Attention | FeedForward | ResidualDepthwiseConv | PatchConv | ChannelNorm | Stem
