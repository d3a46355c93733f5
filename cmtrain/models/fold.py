"""Fold BatchNorm into the layers around it for inference, where that is exact.

In evaluation a BatchNorm is scale * x + shift, which the linear layer before or behind it can absorb. A
convolution behind it that pads with zeros cannot: the border would lack the shift. So the norms in front of
the stem's second and third convolution and of every depth-wise 3x3 stay.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cmtrain.models.cmt import CMT


def folded(model: CMT) -> CMT:
    """Return a copy of `model` for inference: the same logits up to rounding, fewer passes, no gradients.

    An nn.Identity replaces an absorbed norm. Of CMT-Ti's 66 BatchNorms 18 are left in the paper's form, 34
    of 51 in the re-implementation's, where the depth-wise branch is added after its norm.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    stages: Any = model.stages
    model.stem.norm3 = _into_next(model.stem.norm3, stages[0].embed)
    for stage in stages:
        for block in stage.blocks:
            if isinstance(getattr(block.attn, "reduce_norm", None), nn.BatchNorm2d):
                block.attn.reduce_norm = _into_previous(block.attn.reduce, block.attn.reduce_norm)
            ffn = block.ffn
            if ffn.variant == "paper":
                ffn.depthwise_norm = _into_next(ffn.depthwise_norm, ffn.project)
            ffn.project_norm = _into_previous(ffn.project, ffn.project_norm)
    if isinstance(model.fc_norm, nn.BatchNorm2d):
        model.fc_norm = _into_previous(model.fc, model.fc_norm)
    return model


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:  # (C,), (C,), in float64: two roundings become one
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _into_previous(layer: Any, norm: nn.Module) -> Any:
    """Make layer(x) what norm(layer(x)) was, for a weight (C, ...); return the norm's replacement."""
    scale, shift = _scale_and_shift(norm)
    rows = scale.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.copy_(layer.weight.double() * rows)
    layer.bias.copy_(layer.bias.double() * scale + shift)
    return nn.Identity()


def _into_next(norm: nn.Module, layer: Any) -> Any:
    """Make layer(x) what layer(norm(x)) was, for a weight (out, C, ...) and no padding; as above."""
    scale, shift = _scale_and_shift(norm)
    columns = [1, -1] + [1] * (layer.weight.ndim - 2)
    weight = layer.weight.double()
    layer.bias.add_((weight * shift.view(columns)).flatten(1).sum(1))
    layer.weight.copy_(weight * scale.view(columns))
    return nn.Identity()
