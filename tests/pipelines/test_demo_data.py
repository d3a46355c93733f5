"""Demo data that cannot be made is an error of one line; demo:jpegs has ImageNet's mixture."""

import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, JpegImagePlugin

from pipelines.files.demo_images import KINDS, demo_folder, mixed_jpegs
from pipelines.spec import DataError


def kind_of(encoded: bytes) -> str:
    image = Image.open(io.BytesIO(encoded))
    assert (image.format, image.size) == ("JPEG", (500, 375))
    if image.mode != "RGB":
        return {"L": "grey", "CMYK": "CMYK"}[image.mode]
    if image.info.get("progressive"):
        return "progressive"
    return {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}[JpegImagePlugin.get_sampling(image)]


def test_a_cache_that_cannot_be_written_is_named():
    with pytest.raises(
        DataError, match=r"^/proc/cache: cannot be written: .*; set data.cache_dir to another$"
    ):
        demo_folder("digits", Path("/proc/cache"))


def test_mixed_jpegs_have_the_kinds_and_the_size_of_imagenets():
    made = list(mixed_jpegs(200))
    assert Counter(map(kind_of, made)) == {name: 2 * KINDS[name][0] for name in KINDS}
    assert 100_000 < sum(map(len, made)) / len(made) < 120_000
    assert list(mixed_jpegs(200)) == made
    assert list(mixed_jpegs(3, seed=1)) != made[:3]


@pytest.mark.parametrize("count", [6, 32])
def test_a_small_batch_has_every_kind(count):
    assert set(map(kind_of, mixed_jpegs(count))) == set(KINDS)


def test_they_are_a_folder_of_two_splits(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.files.demo_images.mixed_jpegs", lambda count, seed: mixed_jpegs(8, seed))
    folder = demo_folder("jpegs", tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
    assert [kind_of(path.read_bytes()) for path in sorted(folder.glob("val/*/*.jpg"))]
