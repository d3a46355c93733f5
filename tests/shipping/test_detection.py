"""Train CMT's pyramid inside torchvision's RetinaNet (examples/detection.py)."""

import runpy

import pytest
import torch
from helpers.runs import ROOT

EXAMPLE = runpy.run_path(str(ROOT / "examples" / "detection.py"))


def test_five_steps_train_every_part():
    torch.manual_seed(0)
    detector = EXAMPLE["make_detector"]()
    before = {name: tensor.clone() for name, tensor in detector.named_parameters()}
    losses = EXAMPLE["train"](detector, steps=5, batch_size=2)
    assert all(torch.isfinite(torch.tensor(losses)))
    unchanged = [name for name, tensor in detector.named_parameters() if torch.equal(tensor, before[name])]
    assert unchanged == []  # the position tables among them
    assert any(name.endswith("bias.table") for name in before)
    (found,) = detector.eval()([torch.rand(3, 128, 128)])
    assert {"boxes", "labels", "scores"} <= found.keys()


def test_boxes_lie_around_what_was_drawn():
    images, targets = next(EXAMPLE["made_up_batches"](8, 128, seed=1))
    for image, target in zip(images, targets, strict=True):
        assert image.shape == (3, 128, 128)
        inside = torch.zeros(128, 128, dtype=torch.bool)
        for x0, y0, x1, y1 in target["boxes"].int().tolist():
            inside[y0:y1, x0:x1] = True
        assert image[:, ~inside].max() <= 0.3
        assert image[:, inside].max() >= 0.6


@pytest.mark.slow
def test_the_loss_falls():
    torch.manual_seed(0)
    losses = EXAMPLE["train"](EXAMPLE["make_detector"](), steps=120)
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])
