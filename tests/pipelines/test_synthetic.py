"""The synthetic loader keeps the plan's order, and its images can be learnt; see also test_loader.py."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pipelines.plan import Plan
from pipelines.preview import contact_sheet
from pipelines.spec import IMAGENET_MEAN, IMAGENET_STD, Placement
from pipelines.synthetic import SyntheticLoader

PLAN = Plan(seed=0, num_samples=500, global_batch_size=24, micro_batch_size=4)


def samples(world: int, start: int = 0) -> dict[int, tuple[int, float]]:
    found = {}
    for rank in range(world):
        loader = SyntheticLoader(PLAN, 16, 10, Placement(rank, world), fp16=False)
        for batch in loader.epoch(1, start):
            sums = batch.images.double().sum((1, 2, 3)).tolist()
            found |= dict(
                zip(batch.indices.tolist(), zip(batch.labels.tolist(), sums, strict=True), strict=True)
            )
        loader.close()
    return found


def test_samples_do_not_depend_on_the_number_of_ranks():
    alone = samples(1)
    assert len(alone) == 480
    assert samples(3) == alone
    tail = samples(2, start=240)
    assert len(tail) == 240
    assert tail == {index: alone[index] for index in tail}


def test_images_of_one_class_are_equal_and_of_two_classes_are_not():
    by_label: dict[int, set[float]] = {}
    for label, value in samples(1).values():
        by_label.setdefault(label, set()).add(value)
    assert sorted(by_label) == list(range(10))
    assert all(len(values) == 1 for values in by_label.values())
    assert len(set.union(*by_label.values())) == 10


def test_a_contact_sheet_shows_the_images_as_they_were(tmp_path):
    levels = torch.arange(5 * 3 * 8 * 8, dtype=torch.float32).reshape(5, 3, 8, 8) % 256
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    contact_sheet((levels / 255 - mean) / std, IMAGENET_MEAN, IMAGENET_STD, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (24, 16)
        shown = np.asarray(sheet)
    for index in range(5):
        top, left = index // 3 * 8, index % 3 * 8
        expected = levels[index].permute(1, 2, 0).numpy()
        assert np.array_equal(shown[top : top + 8, left : left + 8], expected)
    assert not shown[8:, 16:].any()


def test_a_contact_sheet_shows_at_most_what_was_asked(tmp_path):
    contact_sheet(torch.zeros(70, 3, 4, 4), IMAGENET_MEAN, IMAGENET_STD, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (32, 32)
