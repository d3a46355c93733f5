"""A messy folder of photographs becomes lists, a model, its accuracy and a prediction of a new picture."""

import csv
import json
import shutil

import pytest
from helpers.photographs import write_folder
from helpers.runs import Forked, after_start
from PIL import Image

CLASSES = ("Bär", "old dog", "家")


@pytest.fixture
def folder(tmp_path):
    """Three classes with 40, 40 and 4 images of several formats, a corrupt one, and other files."""
    write_folder(tmp_path / "pictures", 120)
    for number, name in enumerate(CLASSES):
        (tmp_path / "pictures" / f"c{number}").rename(tmp_path / "pictures" / name)
    rare = sorted((tmp_path / "pictures" / CLASSES[2]).iterdir())
    shutil.copy(rare[4], tmp_path / "new picture é.jpg")
    for path in rare[4:]:
        path.unlink()
    for number, path in enumerate(sorted((tmp_path / "pictures" / CLASSES[0]).iterdir())[:6]):
        suffix = (".png", ".webp", ".bmp", ".JPG", ".jpeg", ".jfif")[number]
        with Image.open(path) as image:
            image.save(
                path.with_name(f"Größe {number}{suffix}"), "JPEG" if "." + "j" in suffix.lower() else None
            )
        path.unlink()
    (tmp_path / "pictures" / CLASSES[1] / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photograph")
    (tmp_path / "pictures" / CLASSES[1] / "IMG 900.HEIC").write_bytes(b"another kind of file")
    return tmp_path


def test_from_a_folder_to_a_prediction(folder):
    def cmtrain(*arguments):
        process = Forked(["cmtrain", *arguments], folder, {}, 1)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out, after_start(err)

    cache = ("--data.cache_dir", "cache", "--metrics.enabled", "false")
    _, lines = cmtrain("data", "split", "pictures")
    assert any("broken.jpg" in line for line in lines)
    cmtrain("--config", "configs/small.yaml", "--data.root", "pictures", "--schedule.epochs", "3", *cache)
    out, _ = cmtrain("eval", "small", "--save-wrong", "wrong", *cache)
    (result,) = json.loads(out)["results"]
    assert result["num_images"] == 17
    wrong = list(csv.reader((folder / "wrong" / "mistakes.csv").read_text().splitlines()))[1:]
    assert len(wrong) == round(17 * (1 - result["top1"]))
    out, _ = cmtrain("predict", "small", "new picture é.jpg")
    (row,) = map(json.loads, out.splitlines())
    assert (row["path"], sorted(row["classes"])) == ("new picture é.jpg", sorted(CLASSES))
    out, _ = cmtrain("predict", "small", "pictures/val.csv")
    rows = list(map(json.loads, out.splitlines()))
    truth = dict(list(csv.reader((folder / "pictures" / "val.csv").read_text().splitlines()))[-17:])
    right = sum(row["classes"][0] == truth[row["path"].removeprefix("pictures/")] for row in rows)
    assert right == round(17 * result["top1"])
