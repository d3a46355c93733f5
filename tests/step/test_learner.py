"""Test a step in half precision, on the CPU: a bad batch costs one update and nothing else."""

import copy
import itertools
import math
from collections import Counter
from contextlib import nullcontext

import pytest
import timm
import torch
from helpers.half import HalfAccelerator
from helpers.mini import POISON, Mini, accuracy, assert_same, batch, make_learner, snapshot, step
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import cmtrain.models  # noqa: F401
from cmtrain.step.learner import MIN_LOSS_SCALE

NUM_STEPS = 5
POSITIONS = {"first": 0, "middle": 2, "last before evaluation": NUM_STEPS - 1}
CASES = list(itertools.product(["sgd", "adamw"], [1, 4], ["fp16", "bf16"]))
faults: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _print_faults():
    yield
    print("\nfaults in single steps:", ", ".join(f"{count} {what}" for what, count in faults.items()))


def learner_of(opt, accumulation, precision, **options):
    accelerator = HalfAccelerator(2.0**10, precision)
    return make_learner(opt, accumulation=accumulation, accelerator=accelerator, **options)


@pytest.mark.parametrize(("opt", "accumulation", "precision"), CASES)
@pytest.mark.parametrize("position", POSITIONS)
def test_a_poisoned_batch_leaves_no_trace(opt, accumulation, precision, position):
    """Model, BatchNorm, EMA and optimizer end bit for bit where a run without that step ends."""
    poisoned, without = (learner_of(opt, accumulation, precision) for _ in range(2))
    bad_step = POSITIONS[position]
    for number in range(NUM_STEPS):
        head = poisoned.model.head.weight.clone()
        step(poisoned, number, poison=POISON[precision] if number == bad_step else 1.0)
        faults["good updates lost"] += number != bad_step and torch.equal(head, poisoned.model.head.weight)
        if number != bad_step:
            step(without, number)
        elif scaler := without.accelerator.scaler:
            scaler.scale(torch.zeros(()))  # the first call creates the scale
            scaler.update(2.0**9)  # an overflow halves the scale, and the scale decides the rounding
    faults["injected"] += 1
    for name, module in poisoned.weights.items():
        assert math.isfinite(accuracy(poisoned, module)[1]), name
    assert_same(snapshot(poisoned), snapshot(without))
    report = poisoned.report(NUM_STEPS, 0, 0.05, reset=True)
    assert (report.bad_steps, report.restores) == (1, 1)
    if precision == "fp16":
        assert report.loss_scale == 2.0**9
    faults["survived"] += 1
    assert not faults["good updates lost"]


@pytest.mark.parametrize(("opt", "accumulation", "precision"), CASES)
@pytest.mark.parametrize("position", POSITIONS)
def test_without_the_guard_the_same_batch_makes_evaluation_nan(opt, accumulation, precision, position):
    """Training looks fine, evaluation is NaN: the re-implementation's section 4.3, pytorch issue 88474."""
    learner = learner_of(opt, accumulation, precision, protect=False)
    for number in range(NUM_STEPS):
        step(learner, number, poison=POISON[precision] if number == POSITIONS[position] else 1.0)
    for module in learner.weights.values():
        assert math.isnan(accuracy(learner, module)[1])
    if precision == "fp16":  # the loss scaler kept the weights
        assert all(torch.isfinite(p).all() for p in learner.model.parameters())


@pytest.mark.parametrize(("opt", "accumulation", "precision"), CASES)
def test_the_guard_changes_no_bit_of_a_healthy_run(opt, accumulation, precision):
    guarded, plain = (learner_of(opt, accumulation, precision, protect=protect) for protect in (True, False))
    for number in range(NUM_STEPS):
        step(guarded, number)
        step(plain, number)
    assert_same(snapshot(guarded), snapshot(plain))


def test_an_overflow_inside_a_cmt_changes_nothing_but_the_loss_scale():
    learner = make_learner(model=timm.create_model("cmt_micro", num_classes=4, img_size=32))
    learner.step(iter([batch(0, side=32)]), 0, 0.05)
    with torch.no_grad():
        learner.model.stages[1].embed.weight *= 1e6
    before = snapshot(learner)
    learner.step(iter([batch(1, side=32)]), 1, 0.05)
    assert_same(snapshot(learner), before)
    assert learner.accelerator.scaler.get_scale() == 2.0**9
    assert learner.report(2, 0, 0.05, reset=True).bad_steps == 1


def test_the_loss_scale_has_a_floor():
    """170 overflows would halve any scale to 0, and the next good step would divide by it."""
    learner = make_learner(accelerator=HalfAccelerator())
    for number in range(170):
        step(learner, number, poison=POISON["fp16"])
        assert learner.accelerator.scaler.get_scale() >= MIN_LOSS_SCALE
    assert learner.accelerator.scaler.get_scale() == MIN_LOSS_SCALE
    before = snapshot(learner)
    step(learner, 170)
    after = snapshot(learner)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_torch_alone_has_no_floor():
    """Prove the test above: torch's scaler reaches 0 after as many overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], 0.1)
    for _ in range(170):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor(math.inf)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 0


def test_state_round_trips_between_log_points():
    learner = make_learner("adamw")
    other = make_learner("adamw", accelerator=HalfAccelerator(4.0))
    for number in range(3):
        step(learner, number, lr=0.01)
    # Copied as a file copies: torch's optimizers keep the tensors that they are given.
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for number in range(3, 6):
        step(learner, number, lr=0.01)
        step(other, number, lr=0.01)
    assert_same(snapshot(learner), snapshot(other))
    assert learner.report(6, 0, 0.01, reset=True) == other.report(6, 0, 0.01, reset=True)


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    def losses(first_seed):
        learner = make_learner()
        torch.manual_seed(first_seed)
        for number in range(3):
            learner.step(iter([batch(7)]), number, 0.0)
        return [loss for loss, _ in learner.buffer.read()]

    a, b = losses(1), losses(2)
    assert a == b
    assert len(set(a)) == 3


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_never_reads_the_device(opt, precision, monkeypatch):
    """Under FakeTensorMode every .item() and bool() raises: no host synchronisation can hide."""
    # Fake tensors cannot be copied deeply.
    monkeypatch.setattr("cmtrain.step.optimizer.copy.deepcopy", lambda model: Mini())
    with FakeTensorMode():
        learner = learner_of(opt, 2, precision, clip_grad=1.0)
        step(learner, 0)
        step(learner, 1)


def test_reading_the_device_fails_the_test_above(monkeypatch):
    """A loss scaler reads the device if the optimizer is not fused, and so does a log point."""
    monkeypatch.setattr("cmtrain.step.optimizer.copy.deepcopy", lambda model: Mini())
    with FakeTensorMode():
        learner = learner_of("adamw", 1, "fp16")
        step(learner, 0)
        with pytest.raises(DataDependentOutputException):
            learner.report(1, 0, 0.05, reset=True)
        for fused in (True, False):
            optimizer, scaler = (
                torch.optim.AdamW(Mini().parameters(), fused=fused),
                torch.amp.GradScaler("cpu"),
            )
            scaler.scale(sum(p.sum() for p in optimizer.param_groups[0]["params"])).backward()
            with nullcontext() if fused else pytest.raises(DataDependentOutputException):
                scaler.step(optimizer)


def test_the_loss_of_an_image_has_the_weight_of_its_class():
    learner, (images, labels, _) = make_learner(class_weights=torch.tensor([0.0, 0.0, 3.0, 0.0])), batch(0)
    learner.model.drop.p = 0.0
    with torch.no_grad(), learner.accelerator.autocast():
        logits = copy.deepcopy(learner.model)(images).float()
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    step(learner, 0)
    expected = 3 * each[labels == 2].sum().item() / len(labels)
    assert expected > 0
    assert learner.report(1, 0, 0.05, reset=True).loss == pytest.approx(expected, rel=1e-2)
