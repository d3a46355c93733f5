"""The step in fp16 with a loss scaler, as it runs on a GPU, here on the CPU."""

import copy
import itertools
import math

import pytest
import timm
import torch
from half import HalfAccelerator

import cmtrain.models  # noqa: F401
from cmtrain.evaluate import evaluate
from cmtrain.learner import MIN_LOSS_SCALE, Learner
from cmtrain.mixing import MixSpec
from cmtrain.optim import make_optimizer
from pipelines.spec import Batch


def make_learner(opt="sgd", protect=True, accumulation=1, init_scale=2.0**10, **options):
    torch.manual_seed(0)
    model = timm.create_model("cmt_micro", num_classes=4, img_size=32, **options)
    optimizer = make_optimizer(
        model, opt=opt, lr=0.05, weight_decay=1e-4, momentum=0.9, nesterov=True, betas=(0.9, 0.999), eps=1e-8
    )
    return Learner(
        model, optimizer, HalfAccelerator(init_scale),
        ema_decay=0.9, protect=protect, mixing=MixSpec(4), accumulation=accumulation, clip_grad=None, seed=0,
    )  # fmt: skip


def batch(number, poison=1.0):
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 4, (16,), generator=generator)
    images = torch.randn(16, 3, 32, 32, generator=generator) * 0.3 + labels[:, None, None, None] - 1.5
    return Batch(images * poison, labels, torch.arange(16))


def snapshot(learner):
    state = {f"model.{k}": v.clone() for k, v in learner.model.state_dict().items()}
    state |= {f"ema.{k}": v.clone() for k, v in learner.ema.module.state_dict().items()}
    for i, slots in enumerate(learner.optimizer.state_dict()["state"].values()):
        state |= {f"optimizer.{i}.{k}": v.clone() for k, v in slots.items()}
    return state


def accuracy(learner, module):
    batches = [batch(1000), batch(1001)]
    result = evaluate(
        module, batches, autocast=learner.accelerator.autocast(), device=torch.device("cpu"), num_images=32
    )
    return result.top1, result.loss


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("bad_step", [0, 3])
def test_an_fp16_overflow_changes_nothing_but_the_loss_scale(opt, accumulation, bad_step):
    learner = make_learner(opt, accumulation=accumulation)
    numbers = itertools.count()
    for step in range(6):
        before, scale = snapshot(learner), learner.accelerator.scaler.get_scale()
        poison = 3e6 if step == bad_step else 1.0  # overflows fp16 inside the model, not in the input
        learner.step((batch(next(numbers), poison) for _ in itertools.count()), step, 0.05)
        after = snapshot(learner)
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        if step == bad_step:
            assert not changed
            assert learner.accelerator.scaler.get_scale() == scale / 2
        else:
            assert changed
    report = learner.report(6, 0, 0.05, reset=True)
    assert (report.bad_steps, report.bad_steps_in_a_row) == (1, 0)
    assert math.isfinite(report.loss)
    assert all(math.isfinite(accuracy(learner, module)[1]) for module in learner.weights.values())


def test_without_the_guard_training_looks_fine_and_evaluation_is_nan():
    """The seed's failure (section 4.3), and pytorch issue 88474: nothing saves the statistics."""
    learner = make_learner(protect=False)
    for step in range(8):
        learner.step(iter([batch(step, 3e6 if step == 4 else 1.0)]), step, 0.05)
    report = learner.report(8, 0, 0.05, reset=True)
    assert report.loss < 10
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())
    for module in learner.weights.values():
        assert math.isnan(accuracy(learner, module)[1])


def test_the_loss_scale_has_a_floor():
    """200 overflows would halve any scale to 0, and the next good step would divide by it."""
    learner = make_learner()
    for step in range(30):
        learner.step(iter([batch(step, 3e6)]), step, 0.05)
    assert learner.accelerator.scaler.get_scale() == MIN_LOSS_SCALE
    before = snapshot(learner)
    learner.step(iter([batch(40)]), 30, 0.05)
    after = snapshot(learner)
    assert all(torch.isfinite(v).all() for v in after.values())
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_state_round_trips_with_the_scaler():
    learner, other = make_learner("adamw"), make_learner("adamw", init_scale=4.0)
    for step in range(3):
        learner.step(iter([batch(step)]), step, 0.01)
    # Copied as a file copies: torch's optimizers keep the tensors that they are given.
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for step in range(3, 6):
        for one in (learner, other):
            one.step(iter([batch(step)]), step, 0.01)
    a, b = snapshot(learner), snapshot(other)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert learner.report(6, 0, 0.01, reset=True) == other.report(6, 0, 0.01, reset=True)


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    def losses(first_seed):
        learner = make_learner(drop_rate=0.5, drop_path_rate=0.5)
        torch.manual_seed(first_seed)
        found = []
        for step in range(3):
            learner.step(iter([batch(7)]), step, 0.0)
            found.append(learner.report(step, 0, 0.0, reset=True).loss)
        return found

    a, b = losses(1), losses(2)
    assert a == b
    assert len(set(a)) == 3
