"""Tell apart the passes and the operations of a model whose traffic is counted."""

from collections import Counter
from unittest import mock

import torch
from torch import nn

from cmtrain.models.cost import Traffic, count


def count_forward(model: nn.Module, **options) -> Traffic:
    """Count the forward pass alone, in training as well."""
    with mock.patch.object(torch.Tensor, "backward"):
        return count(model, **options)


def bytes_by_op(model: nn.Module, *, image_px: int, batch: int = 256) -> Counter[str]:
    """Return the bytes per image that each operation of a pass moves."""
    moved = Counter[str]()
    for call in count(model, image_px=image_px, batch=batch).calls:
        moved[call.name] += call.bytes / batch
    return moved
