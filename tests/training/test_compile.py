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
from helpers.replays import Replays
from helpers.runs import ROOT
from torch import nn

from cmtrain.config.load import load_config
from cmtrain.step.learner import Learner
from cmtrain.storage.checkpoint import load_newest
from cmtrain.training import build
from cmtrain.training.recovery import find_overflow

COMPILED = str(ROOT / "tests" / "helpers" / "compiled_train.py")


def compiled_learner(backend="aot_eager", precision="bf16", **options):
    torch.manual_seed(0)
    model = Mini()
    if backend is not None:
        model.compile(backend=backend)
    return make_learner(model=model, accelerator=HalfAccelerator(2.0**10, precision), **options)


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


def test_the_mode_is_torchs(monkeypatch):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: modes.append(mode))
    compiled = ("train.compile", "true")
    for options in ([compiled, ("train.compile_mode", "reduce-overhead")], [compiled], []):
        build.compile_model(load_config("configs/demo.yaml", options).config, Mini())
    assert modes == ["reduce-overhead", "default"]


@pytest.mark.parametrize(("precision", "accumulation"), [("bf16", 1), ("fp16", 3)])
def test_micro_batches_add_up_where_graphs_leave_their_results(precision, accumulation):
    """Bit for bit, with a bad micro-batch, evaluation and the search for an overflow in between."""
    torch._dynamo.reset()  # or the tests before use up its recompile_limit
    graphs = Replays()
    replayed, plain = (
        compiled_learner(backend, precision, accumulation=accumulation, clip_grad=1.0)
        for backend in (graphs.backend, "aot_eager")
    )
    for learner in (replayed, plain):
        for number in range(5):
            step(learner, number, poison=POISON[precision] if number == 2 else 1.0)
            if number == 3:
                accuracy(learner, learner.model)
                learner.replay()
    assert_same(snapshot(replayed), snapshot(plain))
    report = replayed.report(5, 0, 0.05, reset=True)
    assert report == plain.report(5, 0, 0.05, reset=True)
    assert (report.bad_steps, report.restores) == (1, 1)
    assert graphs.log.count("backward") == 5 * accumulation


def test_gradients_that_autograd_adds_up_are_overwritten(monkeypatch):
    """Prove the test above: autograd makes the first gradients .grad, and the second ones count twice."""
    monkeypatch.setattr(Learner, "_backward", lambda self, loss, last: self.accelerator.backward(loss))
    torch._dynamo.reset()
    replayed, plain = (
        compiled_learner(backend, accumulation=2) for backend in (Replays().backend, "aot_eager")
    )
    for learner in (replayed, plain):
        step(learner, 0)
    one, other = (learner.model.stem.weight.grad for learner in (replayed, plain))
    assert (one - other).norm() > 0.1 * other.norm()


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
