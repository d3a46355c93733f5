"""Images of several classes: targets, loss, mean average precision and thresholds."""

import copy
import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.mini import batch, make_learner, step
from helpers.runs import HANG_SECONDS
from sklearn.metrics import average_precision_score, f1_score, recall_score
from torch import nn

from cmtrain.step import evaluate as module
from cmtrain.step.evaluate import evaluate, rank
from cmtrain.step.mixing import MixSpec, soft_targets
from pipelines.spec import UNREADABLE

SETS = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]])
NUM_IMAGES = 60


class Fixed(nn.Module):
    """The logits of each image by its number, few enough to be tied."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randint(-3, 4, (NUM_IMAGES, 4), generator=generator) / 2

    def forward(self, images):
        return self.logits[images[:, 0].long()]


def batches(labels, part=slice(None)):
    numbers = torch.arange(NUM_IMAGES)[part]
    return [(some[:, None].float(), labels[some], some) for some in numbers.split(16)]


def drawn_labels():
    return torch.randint(0, len(SETS), (NUM_IMAGES,), generator=torch.Generator().manual_seed(1))


def test_the_figures_are_those_of_scikit_learn():
    labels, model = drawn_labels(), Fixed()
    result = evaluate(model, batches(labels), Accelerator(cpu=True), NUM_IMAGES, 4, label_sets=SETS)
    classes, probabilities = SETS[labels].numpy().astype(bool), model.logits.sigmoid().numpy()
    assert result.map == pytest.approx(average_precision_score(classes, probabilities), abs=1e-9)
    predicted = probabilities >= 0.5
    assert result.balanced == pytest.approx(recall_score(classes, predicted, average="macro"))
    assert result.f1 == pytest.approx(f1_score(classes, predicted, average="macro"))
    best = model.logits.topk(4).indices[:, 0].numpy()
    labelled = classes.any(1)
    right = classes[np.arange(NUM_IMAGES), best]
    assert result.top1 == pytest.approx(right[labelled].mean())
    assert result.top5 == 1
    loss = nn.functional.binary_cross_entropy_with_logits(model.logits, SETS[labels])
    assert result.loss == pytest.approx(loss.item())
    assert result.score("map") == result.map
    for place, threshold in enumerate(result.thresholds):
        f1 = [
            f1_score(classes[:, place], probabilities[:, place] >= other)
            for other in probabilities[:, place]
        ]
        assert f1_score(classes[:, place], probabilities[:, place] >= threshold) == pytest.approx(max(f1))


def evaluated_by_ranks(monkeypatch, labels, num_ranks, sets):
    """Return what each of `num_ranks` threads, which add up as ranks do, has of the evaluation."""
    barrier, given = threading.Barrier(num_ranks, timeout=HANG_SECONDS), []

    def all_reduce_sum(values):
        given.append(values.clone())
        barrier.wait()
        total = sum(given)
        if barrier.wait() == 0:
            given.clear()
        barrier.wait()
        values.copy_(total)

    def evaluate_share(rank):
        share = batches(labels, slice(rank, None, num_ranks))
        return evaluate(Fixed(), share, Accelerator(cpu=True), NUM_IMAGES, 4, sets)

    monkeypatch.setattr(module, "all_reduce_sum", all_reduce_sum)
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(evaluate_share, range(num_ranks)))


@pytest.mark.parametrize("sets", [SETS, None])
def test_shares_of_ranks_add_up_to_the_whole(monkeypatch, sets):
    labels, model = drawn_labels(), Fixed()
    if sets is None:
        labels %= 4
    labels[7] = UNREADABLE
    whole = evaluate(model, batches(labels), Accelerator(cpu=True), NUM_IMAGES, 4, sets)
    assert whole.num_unreadable == 1
    for result in evaluated_by_ranks(monkeypatch, labels, 3, sets):
        for field in dataclasses.fields(whole):
            mine, other = getattr(whole, field.name), getattr(result, field.name)
            assert (mine is None) == (other is None), field.name
            if mine is not None:
                torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(mine), msg=field.name)
    of_model = model.logits.softmax(1) if sets is None else model.logits.sigmoid()
    assert torch.equal(whole.confidence, of_model.amax(1))
    if sets is not None:
        read = labels != UNREADABLE
        classes, best = sets[labels[read]], model.logits[read].topk(4).indices[:, 0]
        right = classes[torch.arange(len(best)), best].sum().item()
        assert whole.top1 == pytest.approx(
            right / (classes.any(1).sum().item() + 1)
        )  # and the unreadable one


def test_outputs_that_are_not_finite_are_never_the_best():
    labels, model = drawn_labels(), Fixed()
    model.logits[3] = torch.nan
    result = evaluate(model, batches(labels), Accelerator(cpu=True), NUM_IMAGES, 4, label_sets=SETS)
    assert (result.map, result.score("map"), result.thresholds) == (0.0, -math.inf, [0.5] * 4)


def test_a_class_without_images_has_no_part_in_the_mean():
    probabilities = np.array([0.9, 0.8, 0.1])
    assert rank(np.zeros(3, bool), probabilities) == (None, 0.5)
    assert rank(np.array([False, True, False]), probabilities) == (0.5, pytest.approx(0.45))
    assert rank(np.array([False, False, True]), np.array([0.5, 0.5, 0.5]))[0] == pytest.approx(1 / 3)
    labels, model = torch.zeros(NUM_IMAGES, dtype=torch.int64), Fixed()  # all of class 0
    labels[::3] = 2  # and of none
    result = evaluate(model, batches(labels), Accelerator(cpu=True), NUM_IMAGES, 4, label_sets=SETS)
    assert result.map == pytest.approx(average_precision_score(labels == 0, model.logits[:, 0].sigmoid()))
    assert result.thresholds[1:] == [0.5] * 3


def test_targets_are_smoothed_towards_yes_and_no_and_mixed_with_the_flipped_batch():
    spec = MixSpec(4, smoothing=0.2, label_sets=SETS)
    plain = soft_targets(torch.tensor([1, 2, 4]), spec, 1.0)
    assert plain.tolist() == pytest.approx(
        [pytest.approx(row) for row in ([0.1, 0.9, 0.1, 0.9], [0.1] * 4, [0.9, 0.9, 0.1, 0.1])]
    )
    mixed = soft_targets(torch.tensor([1, 2, 4]), spec, 0.75)
    torch.testing.assert_close(mixed, 0.75 * plain + 0.25 * plain.flip(0))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 0.0]])
def test_the_loss_of_a_step_is_binary_cross_entropy(weights):
    given = None if weights is None else torch.tensor(weights)
    learner = make_learner(mixing=MixSpec(4, label_sets=SETS), class_weights=given)
    learner.model.drop.p = 0.0
    images, labels, _ = batch(0)
    with torch.no_grad(), learner.accelerator.autocast():
        logits = copy.deepcopy(learner.model)(images).float()
    step(learner, 0)
    targets, share = SETS[labels], torch.sigmoid(logits)
    each = -(targets * share.log() + (1 - targets) * (1 - share).log())
    expected = (each * (1 if given is None else given)).mean().item()
    assert math.isclose(learner.report(1, 0, 0.05, reset=True).loss, expected, rel_tol=1e-2)
