"""Test that mixing does what timm does, and depends on its key alone."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

from cmtrain.step.mixing import MixSpec, draw_boxes, draw_mix, erase, mix

IMAGES = torch.randn(8, 3, 32, 48, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5


def rng(seed=0):
    return np.random.default_rng(seed)


def timm_mix(lam, box, smoothing):
    """Mix with timm, its draw replaced by ours."""
    mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=5)
    images = IMAGES.clone()
    mixup._params_per_batch = lambda: (lam, box is not None)
    if box:
        import timm.data.mixup as module

        original = module.cutmix_bbox_and_lam
        module.cutmix_bbox_and_lam = lambda *args, **kwargs: (box, lam)
        try:
            return mixup(images, LABELS)
        finally:
            module.cutmix_bbox_and_lam = original
    return mixup(images, LABELS)


def key_where(spec, wanted):
    for number in range(200):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((number,))))
        draw = draw_mix(spec, 32, 48, rng)
        if wanted(*draw):
            return (number,), draw
    raise AssertionError("never drawn")


@pytest.mark.parametrize("cutmix", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_same_pixels_and_targets_as_timm(cutmix, smoothing):
    spec = MixSpec(5, mixup=0.8, cutmix=1.0, smoothing=smoothing)
    key, (lam, box) = key_where(spec, lambda lam, box: lam < 0.9 and (box is not None) == cutmix)
    images, targets = mix(IMAGES, LABELS, spec, key)
    timm_images, timm_targets = timm_mix(lam, box, smoothing)
    torch.testing.assert_close(images, timm_images)
    torch.testing.assert_close(targets, timm_targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_draws_are_a_function_of_the_key_alone():
    spec = MixSpec(5, mixup=0.8, cutmix=1.0, reprob=0.5)

    def run(key, seed):
        torch.manual_seed(seed)
        return mix(IMAGES, LABELS, spec, key)[1]

    torch.manual_seed(3)
    assert torch.equal(run((1, 2, 3), 0), run((1, 2, 3), 1))
    assert not torch.equal(run((1, 2, 3), 0), run((1, 2, 4), 0))


def test_switches_are_probabilities():
    def share(spec, what):
        generator = rng()
        return np.mean([what(*draw_mix(spec, 32, 48, generator)) for _ in range(2000)])

    mixed = lambda lam, box: lam < 1  # noqa: E731
    cut = lambda lam, box: box is not None  # noqa: E731
    assert share(MixSpec(5), mixed) == 0
    assert share(MixSpec(5, mixup=0.8), cut) == 0
    assert share(MixSpec(5, cutmix=1.0), cut) == 1
    assert abs(share(MixSpec(5, mixup=0.8, mixup_prob=0.3), mixed) - 0.3) < 0.04
    assert abs(share(MixSpec(5, mixup=0.8, cutmix=1, mixup_switch_prob=0.25), cut) - 0.25) < 0.04


def test_cutmix_boxes_weigh_what_was_pasted():
    generator = rng()
    for _ in range(200):
        lam, (y0, y1, x0, x1) = draw_mix(MixSpec(5, cutmix=1.0), 32, 48, generator)
        assert 0 <= y0 <= y1 <= 32
        assert 0 <= x0 <= x1 <= 48
        assert lam == pytest.approx(1 - (y1 - y0) * (x1 - x0) / (32 * 48))


def test_no_mixing_leaves_images_alone():
    images, targets = mix(IMAGES, LABELS, MixSpec(5), (0,))
    assert images is IMAGES
    assert torch.equal(targets, torch.nn.functional.one_hot(LABELS, 5).float())


def test_erasing_replaces_boxes_by_noise_in_the_stated_share():
    torch.manual_seed(0)
    images = torch.full((400, 3, 32, 48), 7.0)
    erased = erase(images, MixSpec(5, reprob=0.25), rng())
    changed = (erased != 7).any(1)  # (B, H, W)
    assert 0.18 < changed.flatten(1).any(1).float().mean() < 0.32
    for mask in changed[changed.flatten(1).any(1)]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()  # one full rectangle
        assert 0.01 < mask.float().mean() < 0.36
    noise = erased[(erased != 7)]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_boxes_have_timms_distribution():
    """Areas uniform in [0.02, 1/3] and aspects log-uniform in [0.3, 1/0.3], where they fit."""
    top, left, height, width = draw_boxes(20000, 224, 224, 1, rng())
    area = height * width / 224**2
    assert 0.015 < area.min() < 0.03
    assert 0.31 < area.max() < 0.345
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.01
    assert abs(np.log(height / width).mean()) < 0.02
    assert (top + height <= 224).all()
    assert (left + width <= 224).all()
    assert (top + height == 224).any()
