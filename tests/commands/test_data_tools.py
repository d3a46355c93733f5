"""Pack, preview and measure images, and train from shards (the `cmtrain data` verbs)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.photographs import write_folder
from PIL import Image

from cmtrain.commands.data_pack import pack
from cmtrain.commands.data_preview import preview, stats
from cmtrain.config.load import load_config
from pipelines import progress
from pipelines.files.manifest import Manifest
from pipelines.preview import TILE_PX
from pipelines.spec import DataError

SIDE = 32


def config_of(job):
    return load_config(str(job.config), []).config


def cells(path, rows: int, columns: int) -> np.ndarray:
    """(rows, columns, SIDE, SIDE, 3) of a grid of enlarged images with captions."""
    pixels = np.asarray(Image.open(path))
    height = len(pixels) // rows
    assert pixels.shape == (rows * height, columns * TILE_PX, 3)
    pixels = pixels.reshape(rows, height, columns, TILE_PX, 3).swapaxes(1, 2)
    captions = pixels[:, :, TILE_PX:]
    assert (captions == captions[:, :1]).all()
    assert (captions.min(axis=(2, 3, 4)) < 99).all(), "no name of a class"
    scale = TILE_PX // SIDE
    return pixels[:, :, :TILE_PX:scale, ::scale]


def test_a_row_of_the_preview_is_one_image_in_successive_epochs(make_job, tmp_path):
    plain = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "color_jitter": None, "repeats": 3}
    mixing = {"mixup": 0.0, "cutmix": 0.0, "reprob": 0.0}
    out = tmp_path / "grid.png"
    preview(config_of(make_job("a", augment=plain, mixing=mixing)), out=str(out), rows=5, columns=3)
    grid = cells(out, 5, 3)
    assert (grid == grid[:, :1]).all()
    assert len({row[0].tobytes() for row in grid}) == 5
    colours = grid[:, 0].reshape(5, -1, 3).mean(axis=1).argmax(axis=1)
    assert set(colours) == {0, 1, 2}, "the rows are not spread over the classes"
    assert not (tmp_path / "grid-mixed.png").exists()

    flips = plain | {"hflip": 0.5}
    preview(config_of(make_job("b", augment=flips, mixing=mixing)), out=str(out), rows=5, columns=6, epoch=4)
    grid = cells(out, 5, 6)
    mirrored = (grid == grid[:, :1, :, ::-1]).all(axis=(2, 3, 4))
    assert ((grid == grid[:, :1]).all(axis=(2, 3, 4)) ^ mirrored).all()
    assert mirrored.any()


def test_the_mixed_grid_shows_the_same_rows_mixed(make_job, tmp_path):
    plain = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "color_jitter": None}
    mixing = {"mixup": 0.0, "cutmix": 1.0, "mixup_prob": 1.0, "reprob": 0.0}
    preview(
        config_of(make_job(augment=plain, mixing=mixing)), out=str(tmp_path / "g.png"), rows=4, columns=4
    )
    before, after = cells(tmp_path / "g.png", 4, 4), cells(tmp_path / "g-mixed.png", 4, 4)
    same = (before == after).all(axis=-1).mean(axis=(2, 3))  # share of an image's pixels that are its own
    assert (same > 0).any(axis=0).all()
    assert (same < 1).any()


def test_a_preview_that_cannot_be_written_is_one_line(make_job, tmp_path):
    with pytest.raises(DataError, match=r"grid\.png: cannot be written: No such file"):
        preview(config_of(make_job()), out=str(tmp_path / "nowhere" / "grid.png"), rows=2, columns=1)


def test_stats_count_and_measure(make_job, tmp_path, capsys):
    root = tmp_path / "in"
    write_folder(root / "train", 20, num_classes=4)
    folder = Manifest.from_folder(root / "train", cache_dir=tmp_path / "cache")
    colours = {"0.png": (255, 0, 51), "1.png": (0, 0, 51)}
    for name, colour in colours.items():
        (root / "val" / "c1").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(root / "val" / "c1" / name)
    cut = (root / "train" / "c0" / "000.jpg").read_bytes()
    (root / "val" / "c2").mkdir()
    (root / "val" / "c2" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    stats(config_of(make_job(data={"root": str(root), "image_px": 128, "eval_resize_px": 128})))
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    train, val = report["train"], report["val"]
    assert (train["images"], train["classes"], train["left_out"]) == (20, 4, 0)
    assert train["images_per_class"] == {"min": 5, "median": 5, "max": 5}
    assert train["height_px"]["max"] == folder.heights.max()
    assert train["width_px"]["median"] == np.median(folder.widths)
    assert train["smaller_than_crop"] == pytest.approx(
        np.mean(np.minimum(folder.heights, folder.widths) < 128)
    )
    assert train["bytes"] == sum(path.stat().st_size for path in (root / "train").rglob("*.jpg"))
    assert val["images_per_class"] == {"min": 0, "median": 0.5, "max": 2}
    assert val["mean"] == [0.5, 0.0, 0.2]
    assert val["std"] == [0.5, 0.0, 0.0]
    assert (val["decoded"], val["undecodable"]) == (3, 1)
    assert f"cannot be decoded: {root / 'val/c2/cut.jpg'}: image file is truncated" in captured.err
    assert "smaller_than_crop" in captured.err


def test_progress_is_silent_while_it_is_quick_and_then_a_line_now_and_then(monkeypatch, capsys):
    assert list(progress.tracked(range(5), "looking", 5)) == list(range(5))
    assert capsys.readouterr().err == ""
    seconds = iter(range(0, 100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    list(progress.tracked(range(15), "looking", 30, per_step=2))
    assert capsys.readouterr().err.splitlines() == ["looking: 4 of 30, 2 s", "looking: 24 of 30, 12 s"]


def test_a_run_from_shards_is_the_run_from_the_folder(make_job, images, tmp_path):
    pack(
        str(images),
        str(tmp_path / "packed"),
        resize_shorter=None,
        quality=90,
        shard_mib=1,
        processes=1,
        cache_dir=str(tmp_path / "cache"),
    )
    folder, shards = make_job("folder"), make_job("shards", data={"root": str(tmp_path / "packed")})
    result = folder()
    assert shards(nproc=2)["top1"] == result["top1"]
    losses = [[record["loss"] for record in job.log() if "loss" in record] for job in (folder, shards)]
    assert losses[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
