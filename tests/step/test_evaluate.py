"""Accuracy, accuracy by class, confusion and the kept answers come from one choice among the logits."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import nn

from cmtrain.step import evaluate as scores
from cmtrain.step.evaluate import evaluate
from pipelines.spec import UNREADABLE

NUM_CLASSES, NUM_IMAGES = 7, 64


class Tied(nn.Module):
    """Logits of few values, so that the largest one stands at several classes of most images."""

    def forward(self, images):
        generator = torch.Generator().manual_seed(int(images[0, 0]))
        return torch.randint(0, 3, (len(images), NUM_CLASSES), generator=generator).half()


@pytest.mark.parametrize("has_matrix", [True, False])
def test_tied_logits_count_the_same_everywhere(monkeypatch, has_matrix):
    if not has_matrix:
        monkeypatch.setattr(scores, "MAX_CONFUSION_CLASSES", NUM_CLASSES - 1)
    labels = torch.randint(0, NUM_CLASSES, (NUM_IMAGES,), generator=torch.Generator().manual_seed(0))
    batches = [
        (torch.full((16, 1), first), labels[first : first + 16], torch.arange(first, first + 16))
        for first in range(0, NUM_IMAGES, 16)
    ]
    result = evaluate(Tied(), batches, Accelerator(cpu=True), NUM_IMAGES, NUM_CLASSES)
    right = round(result.top1 * NUM_IMAGES)
    assert 0 < right < NUM_IMAGES
    assert sum(result.class_correct) == right
    assert int((result.ranked[:, 0] == labels).sum()) == right
    ranked = result.ranked[:, 0].tolist()
    assert result.balanced == pytest.approx(balanced_accuracy_score(labels.tolist(), ranked))
    assert result.f1 == pytest.approx(f1_score(labels.tolist(), ranked, average="macro"))
    if has_matrix:
        assert sum(row[index] for index, row in enumerate(result.confusion)) == right


def test_the_calibration_error_is_that_of_its_formula():
    generator = np.random.default_rng(0)
    confidence = np.append(generator.random(500), [0.0, 1.0, 1 / 15]).astype(np.float32)
    is_right = generator.random(503) < 0.7
    expected = 0.0
    for low in range(15):
        chosen = (confidence * np.float32(15)).astype(int).clip(max=14) == low
        gap = abs(is_right[chosen].mean() - confidence[chosen].mean(dtype=float)) if chosen.any() else 0.0
        expected += gap * chosen.sum() / 503
    assert scores.calibration_error(is_right, confidence) == pytest.approx(expected)
    assert scores.calibration_error(np.ones(8, bool), np.ones(8, np.float32)) == 0
    assert scores.calibration_error(np.zeros(8, bool), np.full(8, 0.75, np.float32)) == 0.75
    assert scores.calibration_error(np.zeros(0, bool), np.zeros(0, np.float32)) == 0


def test_classes_without_images_and_unreadable_images_are_no_part_of_the_balanced_accuracy():
    labels = torch.tensor([0, 0, 0, 0, 2, UNREADABLE])

    class Zero(nn.Module):
        def forward(self, images):
            return torch.tensor([[3.0, 1.0, 2.0]]).expand(len(images), 3)

    batch = torch.zeros(6, 1), labels, torch.arange(6)
    result = evaluate(Zero(), [batch], Accelerator(cpu=True), 6, 3)
    counts = result.class_images, result.class_correct, result.class_predicted
    assert counts == ([4, 0, 1], [4, 0, 0], [5, 0, 0])
    assert result.balanced == 0.5
    assert result.f1 == pytest.approx((8 / 9 + 0) / 2)
    scores = {measure: result.score(measure) for measure in ("top1", "balanced", "f1", "loss")}
    assert scores == {"top1": result.top1, "balanced": 0.5, "f1": result.f1, "loss": -result.loss}
    assert dataclasses.replace(result, loss=math.nan).score("loss") == -math.inf
