"""Build CMTs ("Convolutional Neural Networks Meet Vision Transformers") and register them with timm.

Letters: B batch, C channels, H x W map, px image side in pixels.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cmtrain.models.position as position
from cmtrain.models.blocks import Block, BlockOptions, FfnKernel, PointwiseConv, Stage, Stem
from cmtrain.models.position import AbsolutePosition, AttentionBiasKind, Variant

BiasScope = Literal["stage", "block"]

REDUCTIONS = (8, 4, 2, 1)  # of keys and values, per stage (paper, table 1)
HEADS = (1, 2, 4, 8)


class Size(NamedTuple):
    """One column of the paper's table 1. The re-implementation's FFN of XS is a little wider."""

    image_px: int
    stem_channels: int
    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    ffn_ratio: float
    reimpl_ffn_ratio: float
    head_width: int = 1280


# Behind a size: parameters and multiply-adds (paper's variant, 1000 classes). cmt_micro is ours, for CPUs.
SIZES = {
    "cmt_micro": Size(32, 16, (16, 32, 64, 128), (1, 1, 2, 1), 2.0, 2.0, head_width=256),
    "cmt_ti": Size(160, 16, (46, 92, 184, 368), (2, 2, 10, 2), 3.6, 3.6),  # 9.49 M, 0.64 G
    "cmt_xs": Size(192, 16, (52, 104, 208, 416), (3, 3, 12, 3), 3.77, 3.8),  # 15.25 M, 1.55 G
    "cmt_s": Size(224, 32, (64, 128, 256, 512), (3, 3, 16, 3), 4.0, 4.0),  # 26.26 M, 4.03 G
    "cmt_b": Size(256, 38, (76, 152, 304, 608), (4, 4, 20, 4), 4.0, 4.0),  # 45.72 M, 9.32 G
}


def _choose(name: str, value: str, legal: Sequence[str]) -> None:
    if value not in legal:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, legal))}")


def _square_px(img_size: int | tuple[int, int]) -> int:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height != width or height < 32 or height % 32:
        what = "must be a square of a multiple of 32 pixels, such as 160 or 224"
        raise ValueError(f"img_size={img_size} {what}")
    return height


def init_weights(module: nn.Module) -> None:
    """Initialise a layer as the references do.

    Linear layers: normal with standard deviation 0.02, as in DeiT. Convolutions: He's normal over fan-out;
    that of depth-wise ones counts all channels, so they start near zero, and the skip connections carry the
    signal. Biases: zero (the re-implementation keeps torch's for convolutions).
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d | PointwiseConv):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


@dataclass
class _SpareStatistics:
    """While it is entered, the BatchNorms of `block` move copies of their statistics: a second forward pass
    would move them a second time.
    """

    block: Block

    def __enter__(self) -> None:
        parts = [part for part in self.block.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self.kept = [(part._buffers, {**part._buffers}) for part in parts]
        for buffers, kept in self.kept:
            buffers.update({name: None if value is None else value.clone() for name, value in kept.items()})

    def __exit__(self, *_: object) -> None:
        for buffers, kept in self.kept:
            buffers.update(kept)


def _recomputed(block: Block, x: Tensor, bias: Tensor | None) -> Tensor:
    contexts = nullcontext(), _SpareStatistics(block)
    return checkpoint(block, x, bias, use_reentrant=False, context_fn=lambda: contexts)


class CMT(nn.Module):
    """CMT classifier: (B, in_chans, img_size, img_size) -> (B, num_classes).

    variant: "paper" is the authors' released network, "reimpl" that of FlyEgle/CMT-pytorch.
    img_size: pixels per side, a multiple of 32 (five halvings; the first stage's keys are reduced 8-fold).
    attention_bias, attention_bias_scope: the kind of table added to the scores, and whether a stage's blocks
    share it; None is the variant's own (pairwise per stage; reimpl: relative per block).
    absolute_position: adds a learned vector per pixel before the first blocks (the re-implementation's ape).
    absolute_position_px: image side of its table, a multiple of 4; resampled to img_size, the default.
    drop_rate, attn_drop_rate: dropout before the classifier, of attention weights. proj_drop_rate: after the
    attention's projection and, in the paper's variant only, twice in the FFN.
    drop_path_rate: rate of the last block, growing linearly from 0; reimpl: on the FFN's branch only.
    ffn_kernel: "fused" computes most layers in Triton kernels, "eager" operation by operation, "auto" is
    fused on a GPU that can and eager elsewhere. All compute the same.
    global_pool: "avg", or "" for the unpooled map, which needs num_classes=0.
    Raises ValueError for an illegal option, an illegal size, and an input of another size than img_size.
    """

    def __init__(
        self, size: Size, *, img_size: int | tuple[int, int] | None = None, in_chans: int = 3,
        num_classes: int = 1000, global_pool: str = "avg", variant: Variant = "paper", qkv_bias: bool = True,
        attention_bias: AttentionBiasKind | None = None, attention_bias_scope: BiasScope | None = None,
        absolute_position: bool = False, absolute_position_px: int | None = None,
        drop_rate: float = 0.0, attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0, ffn_kernel: FfnKernel = "auto",
    ):  # fmt: skip
        super().__init__()
        is_paper = variant == "paper"
        bias_kind = attention_bias or ("pairwise" if is_paper else "relative")
        bias_scope = attention_bias_scope or ("stage" if is_paper else "block")
        _choose("ffn_kernel", ffn_kernel, get_args(FfnKernel))
        _choose("variant", variant, get_args(Variant))
        _choose("attention_bias", bias_kind, get_args(AttentionBiasKind))
        _choose("attention_bias_scope", bias_scope, get_args(BiasScope))

        self.variant, self.attention_bias, self.attention_bias_scope = variant, bias_kind, bias_scope
        self.img_size = _square_px(size.image_px if img_size is None else img_size)
        self.drop_rate, self.global_pool = drop_rate, global_pool
        self.num_features, self.head_hidden_size = size.dims[-1], size.head_width
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"} for i, dim in enumerate(size.dims)
        ]

        options = BlockOptions(variant, qkv_bias, attn_drop_rate, proj_drop_rate, ffn_kernel)
        ffn_ratio = size.ffn_ratio if is_paper else size.reimpl_ffn_ratio
        num_blocks = sum(size.depths)
        drop_path_probs = iter([drop_path_rate * i / (num_blocks - 1) for i in range(num_blocks)])
        self.stem = Stem(in_chans, size.stem_channels, ffn_kernel)
        self.stages = nn.ModuleList()
        in_channels = size.stem_channels
        stages = zip(size.dims, size.depths, HEADS, REDUCTIONS, strict=True)
        for i, (dim, depth, heads, reduction) in enumerate(stages):
            side, hidden = self.img_size // 4 >> i, int(dim * ffn_ratio)
            make_bias = partial(position.make_attention_bias, bias_kind, variant, heads, side, reduction)
            blocks = []
            for drop_path_prob in islice(drop_path_probs, depth):
                bias = make_bias() if bias_scope == "block" else None
                blocks.append(Block(dim, hidden, heads, reduction, bias, drop_path_prob, options))
            table_side = absolute_position_px // 4 if absolute_position_px else side
            absolute = AbsolutePosition(dim, side, table_side) if absolute_position and i == 0 else None
            stage_bias = make_bias() if bias_scope == "stage" else None
            self.stages.append(Stage(in_channels, dim, variant, ffn_kernel, absolute, stage_bias, blocks))
            in_channels = dim

        self.fc: nn.Module = PointwiseConv(in_channels, size.head_width)
        self.fc_norm = nn.BatchNorm2d(size.head_width) if is_paper else None
        self.head: nn.Module = nn.Identity()
        self.apply(init_weights)
        if not is_paper:  # a linear layer on the pooled vector in the re-implementation, so it starts as one
            nn.init.trunc_normal_(self.fc.weight, std=0.02)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` (0: none), and optionally the pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        _choose("global_pool", pool, ("avg", ""))
        if num_classes and not pool:
            raise ValueError("global_pool='' gives a map and needs num_classes=0")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Identity()
        if num_classes:
            like = next(self.fc.parameters())
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            init_weights(self.head)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another side from now on; attention biases are resampled to it.
        Raises ValueError: an illegal side.
        """
        self.img_size = _square_px(img_size)
        stages: Any = self.stages
        for i, stage in enumerate(stages):
            side = self.img_size // 4 >> i
            if isinstance(stage.absolute, AbsolutePosition):
                stage.absolute.side = side  # its table is resampled in every forward pass
            for holder in (stage, *stage.blocks):
                if holder.bias is not None:
                    old = holder.bias.table
                    size = HEADS[i], side, REDUCTIONS[i]
                    holder.bias = position.make_attention_bias(self.attention_bias, self.variant, *size)
                    table = holder.bias.resized(old.detach())
                    holder.bias.table = nn.Parameter(table, requires_grad=old.requires_grad)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, which runs the block again: less memory,
        about a third more arithmetic, the same numbers.
        """
        stages: Any = self.stages
        for stage in stages:
            stage.call_block = _recomputed if enable else Block.__call__

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Return the position tables: decay would pull them towards "no position", no simpler function."""
        parts = self.named_modules()
        return {f"{name}.table" for name, part in parts if isinstance(part, position.POSITION_MODULES)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth, a stage or a block, for timm's layer-wise learning-rate decay."""
        by_block = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Return stage outputs (B, C, H, W) at strides 4 to 32. `norm` has no effect: there is none here."""
        _choose("output_fmt", output_fmt, ("NCHW",))
        take, last = feature_take_indices(len(self.stages), indices)
        x = self._enter(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers behind the stages in `indices`, so that a backbone has no unused parameter."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
            self.fc, self.fc_norm = nn.Identity(), None
        return take

    def _enter(self, x: Tensor) -> Tensor:  # (B, in_chans, px, px) -> (B, C, px/2, px/2)
        if x.shape[-2:] != (self.img_size, self.img_size):
            given = f"{x.shape[-2]}x{x.shape[-1]}"
            raise ValueError(f"input is {given} px, the model was built for img_size={self.img_size}")
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def forward_features(self, x: Tensor) -> Tensor:  # (B, in_chans, px, px) -> (B, C, px/32, px/32)
        x = self._enter(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # (B, C, H, W) -> (B, classes)
        if self.fc_norm is not None:  # paper: convolution, BatchNorm, Swish, then the average
            x = F.silu(self.fc_norm(self.fc(x)))
        x = x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None] if self.global_pool else x  # keeps strides
        if self.fc_norm is None:  # reimpl: the average first, and no activation before the classifier
            x = self.fc(x)
        x = F.dropout(x.flatten(1) if self.global_pool else x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# The rest is timm's default: ImageNet's mean and std, bicubic, and the paper's crop_pct of 224 / 256.
default_cfgs = generate_default_cfgs({
    name: {
        "input_size": (3, size.image_px, size.image_px), "pool_size": (size.image_px // 32,) * 2,
        "fixed_input_size": True, "first_conv": "stem.conv1", "classifier": "head",
    } for name, size in SIZES.items()
})  # fmt: skip


def _register(name: str) -> None:
    def create(pretrained: bool = False, *, variant: Variant = "paper", **kwargs: Any) -> nn.Module:
        # `variant` is bound here because timm's builder has an argument of that name.
        build = partial(CMT, SIZES[name], variant=variant)
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(build, name, pretrained, feature_cfg=features, **kwargs)

    create.__name__ = name
    register_model(create)


for _name in SIZES:
    _register(_name)
