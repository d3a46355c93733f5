"""Test that a folded model computes what its original does, with fewer passes over its maps."""

import copy

import pytest
import timm
import torch
from torch import nn

from cmtrain.models.cost import count
from cmtrain.models.fold import folded


def with_statistics(variant: str, px: int = 64, name: str = "cmt_micro") -> nn.Module:
    """Build a model whose BatchNorms have random statistics, scales and shifts."""
    torch.manual_seed(0)
    model = timm.create_model(name, variant=variant, img_size=px, num_classes=10, ffn_kernel="eager").eval()
    for norm in batch_norms(model):
        for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
            tensor.normal_(tensor.mean(), 0.2)
        norm.running_var.uniform_(0.5, 2)
    return model


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("variant", ["paper", "reimpl"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_logits_are_the_same(variant, dtype, tolerance):
    model = with_statistics(variant).to(dtype)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        expected, logits = model(x), folded(model)(x)
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("variant", "left"), [("paper", 18), ("reimpl", 34)])
def test_only_norms_before_a_convolution_that_pads_are_left(variant, left):
    with torch.device("meta"):
        model = timm.create_model("cmt_ti", variant=variant)
    assert len(batch_norms(folded(model))) == left
    assert not any(parameter.requires_grad for parameter in folded(model).parameters())


def test_it_moves_fewer_bytes():
    model = with_statistics("paper", px=160, name="cmt_ti")
    plain, fewer = (count(m, image_px=160) for m in (model, folded(model)))
    assert fewer.total_bytes < 0.85 * plain.total_bytes
    assert len(fewer.calls) <= len(plain.calls) - 48
