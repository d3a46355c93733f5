"""A contact sheet shows what the model is fed."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pipelines.preview import LINE_PX, TILE_PX, contact_sheet
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


def test_captions_are_below_their_images_and_stay_there(tmp_path):
    images = torch.arange(3)[:, None, None, None].expand(3, 3, 32, 32) / 2
    how = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), tmp_path / "sheet.png"
    contact_sheet(images, *how, captions=[["one", "line"], ["W" * 99, ""], ["\x1b", "\u5bb6"]])
    with Image.open(tmp_path / "sheet.png") as sheet:
        shown = np.asarray(sheet)
    height, width = TILE_PX + 2 * LINE_PX + 3, TILE_PX
    assert shown.shape == (2 * height, 2 * width, 3)
    tiles = shown.reshape(2, height, 2, width, 3).swapaxes(1, 2).reshape(4, height, width, 3)
    for number, level in enumerate((0, 128, 255)):
        assert (tiles[number, :TILE_PX] == level).all()
        assert tiles[number, TILE_PX : TILE_PX + LINE_PX].min() < 99
    assert tiles[0, TILE_PX + LINE_PX :].min() < 99
    assert (tiles[1, TILE_PX + LINE_PX + 3 :] == 255).all()
    assert not tiles[3].any()
