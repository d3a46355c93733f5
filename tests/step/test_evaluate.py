"""Accuracy, accuracy by class, confusion and the kept answers come from one choice among the logits."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cmtrain.step import evaluate as module
from cmtrain.step.evaluate import evaluate

NUM_CLASSES, NUM_IMAGES = 7, 64


class Tied(nn.Module):
    """Logits of few values, so that the largest one stands at several classes of most images."""

    def forward(self, images):
        generator = torch.Generator().manual_seed(int(images[0, 0]))
        return torch.randint(0, 3, (len(images), NUM_CLASSES), generator=generator).half()


@pytest.mark.parametrize("has_matrix", [True, False])
def test_tied_logits_count_the_same_everywhere(monkeypatch, has_matrix):
    if not has_matrix:
        monkeypatch.setattr(module, "MAX_CONFUSION_CLASSES", NUM_CLASSES - 1)
    labels = torch.randint(0, NUM_CLASSES, (NUM_IMAGES,), generator=torch.Generator().manual_seed(0))
    batches = [
        (torch.full((16, 1), first), labels[first : first + 16], torch.arange(first, first + 16))
        for first in range(0, NUM_IMAGES, 16)
    ]
    result = evaluate(Tied(), batches, Accelerator(cpu=True), NUM_IMAGES, NUM_CLASSES, keeps_ranked=True)
    right = round(result.top1 * NUM_IMAGES)
    assert 0 < right < NUM_IMAGES
    assert sum(result.class_correct) == right
    assert int((result.ranked[:, 0] == labels).sum()) == right
    if has_matrix:
        assert sum(row[index] for index, row in enumerate(result.confusion)) == right
