"""Test optimizers, losses, clipping, EMA and erasing against timm's own, on fixed weights and gradients."""

import copy
import typing
from functools import partial

import numpy as np
import pytest
import timm.optim
import torch
from helpers.half import HalfAccelerator
from helpers.mini import NUM_CLASSES, POISON, Mini, batch, make_learner, step
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.task.distillation import LogitDistillationTask
from timm.utils import ModelEmaV3, dispatch_clip_grad
from timm.utils.clip_grad import adaptive_clip_grad
from torch import nn

from cmtrain.config import sections
from cmtrain.errors import ConfigError
from cmtrain.step.mixing import MixSpec, erase, loss_of, mix, taught
from cmtrain.step.optimizer import Ema, make_optimizer
from cmtrain.storage.state_file import read_state, write_state

OPTIMIZERS = typing.get_args(sections.Optimizer)
NUM_STEPS = 20


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def optimizer_of(model, opt, **options):
    defaults = {"lr": 1e-2, "weight_decay": 0.05, "momentum": 0.9, "nesterov": True}
    return make_optimizer(model, opt=opt, **(defaults | options))


def flat(state):
    """Every number and tensor of an optimizer's state_dict, by its place, but the learning rate."""
    groups = {i: {k: v for k, v in g.items() if k != "lr"} for i, g in enumerate(state["param_groups"])}
    return dict(walk({"state": state["state"], "groups": groups}))


def walk(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, f"{path}.{key}")
    else:
        yield path, value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("given", [{}, {"betas": (0.8, 0.97), "eps": 1e-5}], ids=["own", "given"])
def test_twenty_steps_are_those_of_timms_optimizer(opt, given):
    if given and opt in ("adan", "lars", "rmsproptf"):
        given = {"eps": 1e-5}
    ours, theirs = (seeded(Mini) for _ in range(2))
    a = optimizer_of(ours, opt, **given)
    b = timm.optim.create_optimizer_v2(theirs, opt, lr=1e-2, weight_decay=0.05, momentum=0.9, **given)
    before = [p.clone() for p in ours.parameters()]
    for number in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(number)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in (a, b):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - number / NUM_STEPS)
            optimizer.step()
    for p, q, old in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert not torch.equal(p, old)


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("bad_step", [0, 3])
def test_a_bad_step_changes_neither_weights_nor_state(opt, bad_step):
    learner = make_learner(opt, accelerator=HalfAccelerator(2.0**10), accumulation=2)
    for number in range(bad_step):
        step(learner, number)
    weights = copy.deepcopy(learner.model.state_dict())
    before = flat(learner.optimizer.state_dict())
    step(learner, bad_step, poison=POISON["fp16"])
    assert all(torch.equal(value, weights[name]) for name, value in learner.model.state_dict().items())
    after = flat(learner.optimizer.state_dict())
    assert {path: after.pop(path) for path in before} == before
    # torch's own make their state at a skipped first step, too: of zeros.
    assert all(torch.tensor(value).eq(0).all() for value in after.values())
    assert not after or (bad_step == 0 and opt == "adamw")
    for number in (1, 2):  # adopt only looks at its first step
        step(learner, bad_step + number)
    assert not torch.equal(learner.model.head.weight, weights["head.weight"])


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_checkpoint_continues_bit_for_bit(opt, tmp_path):
    whole = make_learner(opt)
    for number in range(4):
        if number == 2:
            digest = write_state(tmp_path / "state", whole.state_dict())
        step(whole, number)
    resumed = make_learner(opt)
    resumed.load_state_dict(read_state(tmp_path / "state", digest))
    for number in (2, 3):
        step(resumed, number)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert flat(whole.optimizer.state_dict()) == flat(resumed.optimizer.state_dict())


def test_an_optimizer_that_refuses_a_value_says_so():
    with pytest.raises(ConfigError, match=r"optim.opt: lamb: "):
        optimizer_of(Mini(), "lamb", lr=-1.0)


# ---- losses

LOGITS = torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize("loss", ["bce", "bce_sum"])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_binary_cross_entropy_is_timms(loss, threshold, smoothing, weights):
    spec = MixSpec(NUM_CLASSES, mixup=0.8, smoothing=smoothing, loss=loss, target_threshold=threshold)
    images = torch.zeros(6, 3, 8, 8)
    _, targets = mix(images, torch.arange(6) % NUM_CLASSES, spec, (0, 1, 2))
    assert 0 < targets[0].max() < 1  # mixed
    theirs = BinaryCrossEntropy(
        target_threshold=threshold, weight=weights, sum_classes=loss == "bce_sum", smoothing=0.3
    )
    torch.testing.assert_close(
        loss_of(LOGITS, targets, spec, weights), theirs(LOGITS, targets), rtol=1e-6, atol=1e-6
    )


def test_cross_entropy_is_timms():
    targets = torch.softmax(torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(1)), 1)
    ours = loss_of(LOGITS, targets, MixSpec(NUM_CLASSES))
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(LOGITS, targets), rtol=1e-6, atol=1e-6)


def test_a_learner_takes_the_loss_of_its_recipe():
    losses = {}
    for loss in ("cross_entropy", "bce", "bce_sum"):
        learner = make_learner(
            mixing=MixSpec(NUM_CLASSES, loss=loss), accelerator=HalfAccelerator(precision="bf16")
        )
        step(learner, 0)
        losses[loss] = learner.report(1, 0, 0.05, reset=True).loss
    assert losses["bce_sum"] == pytest.approx(NUM_CLASSES * losses["bce"], rel=1e-5)
    assert losses["bce"] < losses["cross_entropy"] < losses["bce_sum"]


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.9, 3.0)])
def test_distillation_is_timms(kind, weight, temperature):
    make = partial(timm.create_model, "test_resnet", num_classes=NUM_CLASSES)
    student, teacher = seeded(make, 0), seeded(make, 1).eval()
    x, targets = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 4
    spec = MixSpec(NUM_CLASSES, teaching=kind, teacher_weight=weight, temperature=temperature)
    loss = nn.functional.cross_entropy(student(x), targets)
    ours = taught(loss, student(x), teacher(x), spec)
    task = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), task_loss_weight=1 - weight, temperature=temperature
    )
    theirs = task(x, targets)["loss"]
    if kind == "hard":  # of DeiT, which timm's logits do not have
        theirs = (1 - weight) * loss + weight * nn.functional.cross_entropy(student(x), teacher(x).argmax(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_student_sees_what_the_teacher_sees_and_the_teacher_stays():
    teacher = seeded(Mini, 7).eval().requires_grad_(False)
    seen, before = [], copy.deepcopy(teacher.state_dict())
    teacher.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    spec = MixSpec(NUM_CLASSES, mixup=0.8, reprob=0.5, teacher_weight=0.7)
    plain, learner = make_learner(mixing=spec), make_learner(mixing=spec, teacher=teacher, accumulation=1)
    learner.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for each in (plain, learner):
        step(each, 0)
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not torch.equal(plain.model.head.weight, learner.model.head.weight)


# ---- clipping


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
@pytest.mark.parametrize("limit", [0.01, 0.1])
def test_clipped_gradients_are_timms(mode, limit, monkeypatch):
    learner, plain = (
        make_learner(
            clip_grad=limit if mode == how else None,
            clip_mode=how,
            accelerator=HalfAccelerator(precision="bf16"),
        )
        for how in (mode, "none")
    )
    seen = {}
    for each in (learner, plain):
        monkeypatch.setattr(
            each.optimizer,
            "step",
            lambda each=each: seen.update({each: [p.grad.clone() for p in each.parameters]}),
        )
        step(each, 0)
    theirs = copy.deepcopy(plain.parameters)
    for parameter, gradient in zip(theirs, seen[plain], strict=True):
        parameter.grad = gradient.clone()
    if mode == "agc":  # timm's trainer leaves the classifier out
        adaptive_clip_grad(theirs[:-2], limit)
    else:
        dispatch_clip_grad(theirs, limit, mode=mode)
    assert any(not torch.equal(p.grad, g) for p, g in zip(theirs, seen[plain], strict=True))
    for parameter, gradient in zip(theirs, seen[learner], strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


def test_adaptive_clipping_leaves_out_the_classifier_although_it_is_frozen():
    learner = make_learner(clip_grad=1e-6, clip_mode="agc", accelerator=HalfAccelerator(precision="bf16"))
    frozen = [p for name, p in learner.model.named_parameters() if name.startswith("head")]
    for parameter in frozen:
        parameter.requires_grad_(False)
    learner.parameters = [p for p in learner.parameters if p.requires_grad]
    step(learner, 0)
    norms = [float(p.grad.norm() / p.detach().norm().clamp(min=1e-3)) for p in learner.parameters]
    assert len(norms) == 8
    assert max(norms) < 1e-5  # the last block's, too


# ---- the average of the weights


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms(warmup):
    model = seeded(lambda: nn.Linear(3, 3))
    ours = Ema(model, 0.95, warmup=warmup)
    theirs = ModelEmaV3(model, decay=0.95, use_warmup=warmup)
    for number in range(60):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 3, generator=torch.Generator().manual_seed(number)))
        if number == 0 and not warmup:  # timm copies the first one
            theirs.module.load_state_dict(ours.module.state_dict())
            continue
        ours.update(torch.tensor(True), number)
        theirs.update(model, number + 1)
    torch.testing.assert_close(ours.module.weight, theirs.module.weight, rtol=1e-5, atol=1e-5)
    kept = ours.module.weight.clone()
    ours.update(torch.tensor(False), 60)
    assert torch.equal(ours.module.weight, kept)


# ---- mixing until an epoch, and erasing


def test_mixing_ends_at_its_step_and_smoothing_stays():
    spec = MixSpec(NUM_CLASSES, mixup=0.8, cutmix=1.0, smoothing=0.1, until_step=10)
    images, labels, _ = batch(0)
    for number in (0, 9, 10, 11):
        found, targets = mix(images, labels, spec, (0, number, 0))
        assert torch.equal(found, images) == (number >= 10), number
        assert targets.max(1).values.allclose(torch.tensor(0.925)) == (number >= 10)


def test_erased_boxes_hold_noise_or_one_colour_or_the_mean():
    images = torch.full((16, 3, 64, 64), 7.0)
    found = {
        mode: erase(images, MixSpec(NUM_CLASSES, reprob=1.0, remode=mode), np.random.default_rng(0))
        for mode in ("pixel", "rand", "const")
    }
    erased = {mode: (picture != 7).any(1) for mode, picture in found.items()}
    assert torch.equal(erased["pixel"], erased["const"])
    assert torch.equal(erased["pixel"], erased["rand"])
    assert erased["pixel"].flatten(1).any(1).all()
    for mode, colours in (("pixel", None), ("rand", 1), ("const", 1)):
        for picture, where in zip(found[mode], erased[mode], strict=True):
            values = torch.unique(picture[:, where], dim=1)
            assert values.shape[1] == (colours or int(where.sum()))
            assert mode != "const" or not values.any()
    assert len(torch.unique(found["rand"][:, 0])) > 8  # each image has its own
