"""torch.compile changes how a step is computed, and none of the promises about it."""

import math

import pytest
import timm
import torch
from helpers.mini import (
    POISON,
    HalfAccelerator,
    Mini,
    accuracy,
    assert_same,
    batch,
    make_learner,
    snapshot,
    step,
)
from helpers.runs import ROOT
from torch import nn

from cmtrain.config.load import load_config
from cmtrain.errors import ConfigError
from cmtrain.storage.checkpoint import load_newest
from cmtrain.training import build
from cmtrain.training.recovery import find_overflow

COMPILED = str(ROOT / "tests" / "helpers" / "compiled_train.py")


def compiled_learner(**options):
    torch.manual_seed(0)
    model = Mini()
    model.compile(backend="aot_eager")
    return make_learner(model=model, accelerator=HalfAccelerator(precision="bf16"), **options)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_poisoned_batch_is_a_batch_that_never_was(opt):
    poisoned, without = compiled_learner(opt=opt), compiled_learner(opt=opt)
    for number in range(5):
        step(poisoned, number, poison=POISON["bf16"] if number == 2 else 1.0)
        if number != 2:
            step(without, number)
    assert_same(snapshot(poisoned), snapshot(without))
    for module in poisoned.weights.values():
        assert math.isfinite(accuracy(poisoned, module)[1])
    assert poisoned.model.state_dict().keys() == Mini().state_dict().keys()


def test_without_the_guard_it_is_the_end():
    learner = compiled_learner(protect=False)
    step(learner, 0, poison=POISON["bf16"])
    assert math.isnan(accuracy(learner, learner.model)[1])


def test_the_layer_that_overflowed_is_named():
    learner = compiled_learner()
    step(learner, 0)
    images, labels, indices = batch(1)
    images[3] *= POISON["bf16"]
    learner.step(iter([type(batch(1))(images, labels, indices)]), 1, 0.05)
    found = find_overflow(learner)
    assert found.cause.startswith("stem: not finite in 1 of 16 images")
    assert found.suspects == (16 + 3,)


GRAPHS = [
    ("train.compile", "true"),
    ("train.compile_mode", "reduce-overhead"),
    ("train.global_batch_size", "64"),
]


def test_the_mode_is_torchs(monkeypatch):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: modes.append(mode))
    for options in (GRAPHS, GRAPHS[:1], []):
        build.compile_model(load_config("configs/demo.yaml", options).config, Mini())
    assert modes == ["reduce-overhead", "default"]


def test_cuda_graphs_do_not_accumulate():
    def accumulation(*options):
        config = load_config("configs/demo.yaml", [*GRAPHS, *options]).config
        return build.plan_steps(config, num_samples=1000, num_processes=2).accumulation

    assert accumulation() == 1
    with pytest.raises(
        ConfigError, match=r"cannot add up the gradients of 4 micro-batches; use default, or a .* of 32 "
    ):
        accumulation(("train.max_batch_per_gpu", "8"))
    assert accumulation(("train.max_batch_per_gpu", "8"), ("train.compile_mode", "default")) == 4


@pytest.mark.parametrize("program", [COMPILED, pytest.param("cmtrain", marks=pytest.mark.slow)])
def test_a_whole_run(make_job, program):
    """Trained, evaluated, saved, stopped, resumed; a model that was not compiled can load its checkpoint."""
    job = make_job(model={"name": "test_resnet"}, train={"compile": True})
    job("--max-steps", "4", module=program)
    result = job("--max-steps", "8", module=program)
    assert job.status()["resume_from"].endswith("000000008")
    assert [event["step"] for event in job.events() if event["event"] == "resumed"] == [4]
    assert math.isfinite(result["loss"])
    assert math.isfinite(result["ema_loss"])
    state = load_newest(job.run / "checkpoints").state
    plain = timm.create_model("test_resnet", num_classes=3)
    plain.load_state_dict(state["model"])
    plain.load_state_dict(state["ema"])
