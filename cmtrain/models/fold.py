"""Fold BatchNorm into the layers around it for inference, where that is exact.

In evaluation a BatchNorm is scale * x + shift, which the linear layer before or behind it can absorb. A
convolution behind it that pads with zeros cannot: the border would lack the shift. So the norms in front of
the stem's second and third convolution and of every depth-wise 3x3 stay.
"""

import copy
from typing import Any

import torch
from torch import nn

from cmtrain.models.cmt import CMT


def folded(model: CMT) -> CMT:
    """Return a copy of `model` for inference: the same logits up to rounding, fewer passes, no gradients.

    An nn.Identity replaces an absorbed norm. Of CMT-Ti's 66 BatchNorms 18 are left in the paper's form, 34
    of 51 in the re-implementation's, where the depth-wise branch is added after its norm.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    stages: Any = model.stages
    model.stem.norm3 = _absorb(stages[0].embed, model.stem.norm3, norm_first=True)
    for stage in stages:
        for block in stage.blocks:
            if isinstance(getattr(block.attn, "reduce_norm", None), nn.BatchNorm2d):
                block.attn.reduce_norm = _absorb(block.attn.reduce, block.attn.reduce_norm)
            ffn = block.ffn
            if ffn.variant == "paper":
                ffn.depthwise_norm = _absorb(ffn.project, ffn.depthwise_norm, norm_first=True)
            ffn.project_norm = _absorb(ffn.project, ffn.project_norm)
    if isinstance(model.fc_norm, nn.BatchNorm2d):
        model.fc_norm = _absorb(model.fc, model.fc_norm)
    return model


def _absorb(layer: Any, norm: Any, *, norm_first: bool = False) -> Any:
    """Make layer(x) what norm(layer(x)) was or, with `norm_first`, layer(norm(x)), of a layer that does not
    pad, for a weight (out, C, ...); return the norm's replacement.
    """
    # In float64: two roundings become one
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    weight, bias, sides = layer.weight.double(), layer.bias.double(), [1] * (layer.weight.ndim - 1)
    sides.insert(int(norm_first), -1)  # the norm's channels are the weight's rows or columns
    if norm_first:
        layer.bias.copy_(bias + (weight * shift.view(sides)).flatten(1).sum(1))
    else:
        layer.bias.copy_(bias * scale + shift)
    layer.weight.copy_(weight * scale.view(sides))
    return nn.Identity()
