"""Layer-wise learning rates are timm's."""

import copy

import pytest
import timm
import torch
from helpers.half import HalfAccelerator
from helpers.mini import Mini, batch
from timm.optim import param_groups_layer_decay

import cmtrain.models  # noqa: F401
from cmtrain.errors import ConfigError
from cmtrain.step.finetune import lr_scales
from cmtrain.step.learner import Learner
from cmtrain.step.mixing import MixSpec
from cmtrain.step.optimizer import make_optimizer

ADAMW = {"opt": "adamw", "lr": 0.1, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8}
HOW = ADAMW | {"momentum": 0.9, "nesterov": True}


def learner_of(model, **options):
    optimizer = make_optimizer(model, **HOW, **options)
    return Learner(
        model, optimizer, HalfAccelerator(1.0, "bf16"), ema_decay=0.9, protect=True, spike_sigma=6.0,
        mixing=MixSpec(4), accumulation=1, clip_grad=None, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["cmt_micro", "resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_learning_rates_of_every_parameter_are_timms_at_three_steps(name):
    size = {"img_size": 32} if name.startswith(("cmt", "vit")) else {}
    model = timm.create_model(name, num_classes=4, **size)
    learner = learner_of(model, layer_decay=0.7)
    kept = getattr(model, "no_weight_decay", set)()
    theirs = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(model, 0.05, kept, layer_decay=0.7)
        for parameter in group["params"]
    }
    assert len({scale for scale, _ in theirs.values()}) > 3
    for number, lr in enumerate((0.1, 0.05, 1e-6)):
        learner.step(iter([batch(number, side=32)]), number, lr)
        ours = {
            id(parameter): (group["lr"], group["weight_decay"])
            for group in learner.optimizer.param_groups
            for parameter in group["params"]
        }
        assert ours == {key: (lr * scale, decay) for key, (scale, decay) in theirs.items()}


def test_one_group_of_each_kind_without_it():
    optimizer = make_optimizer(Mini(), **HOW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]
    model = timm.create_model("resnet18")
    assert set(lr_scales(model, 1.0).values()) == {1.0}


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match=r"optim.layer_decay: Mini has no group_matcher"):
        make_optimizer(Mini(), **HOW, layer_decay=0.7)


def test_the_factors_survive_a_checkpoint():
    model, again = (timm.create_model("cmt_micro", num_classes=4, img_size=32) for _ in range(2))
    learner, other = learner_of(model, layer_decay=0.5), learner_of(again, layer_decay=0.5)
    learner.step(iter([batch(0, side=32)]), 0, 0.1)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for one in (learner, other):
        one.step(iter([batch(1, side=32)]), 1, 0.1)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
