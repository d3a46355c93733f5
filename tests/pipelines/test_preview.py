"""A contact sheet shows what the model is fed."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pipelines.preview import contact_sheet
from pipelines.spec import IMAGENET_MEAN, IMAGENET_STD


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
