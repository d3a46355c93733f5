"""A folder becomes lists: every image once, each class with its share, nothing alike on two sides."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cmtrain.cli.main import main
from cmtrain.commands.data_split import divide
from cmtrain.config.load import load_config
from cmtrain.training import loaders
from pipelines.files.lists import read_list
from pipelines.spec import DataError

SIZES = {"cat": 40, "old dog": 20, "Ünïcode, fish": 10, "few": 2, "one": 1}


def photograph(seed, height, width):
    """A blurred picture that is like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One folder per class; patient 0 to 4 in the names; no two images alike."""
    root = tmp_path_factory.mktemp("pictures")
    for label, (name, number) in enumerate(SIZES.items()):
        (root / name / "inner").mkdir(parents=True)
        for index in range(number):
            folder = root / name / ("inner" if index % 2 else "")
            photograph(100 * label + index, 40, 48).save(folder / f"p{index % 5} {index}.jpg")
    return root


def lists(folder, root=None):
    """The lists in `folder`, by name: {(path, label), ...}."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        rows = [row[1:] for row in read_list(path, root or folder)]
        assert len(set(rows)) == len(rows)
        found[path.stem] = set(rows)
    return found


def split(root, out, *options):
    assert main(["data", "split", str(root), "--out", str(out), *options]) == 0
    return lists(out, root)


def test_every_image_is_once_on_a_list_and_each_class_has_its_share(pictures, tmp_path, capsys):
    found = split(pictures, tmp_path / "a", "--val", "0.2", "--test", "0.1")
    assert list(found) == ["test", "train", "val"]
    paths = Counter(path for rows in found.values() for path, _ in rows)
    assert paths == Counter(str(path.relative_to(pictures)) for path in pictures.rglob("*.jpg"))
    assert all(path.split("/")[0] == label for rows in found.values() for path, label in rows)
    counts = {name: Counter(label for _, label in rows) for name, rows in found.items()}
    for label, size in SIZES.items():
        wanted = {"val": max(0.2 * size, min(size - 1, 1)), "test": 0.1 * size}
        for name, number in wanted.items():
            assert abs(counts[name][label] - number) < 1, (label, name)
        assert counts["train"][label] >= 1
    assert "it has none of one: too few groups of images" in capsys.readouterr().out
    assert split(pictures, tmp_path / "b", "--val", "0.2", "--test", "0.1") == found
    assert split(pictures, tmp_path / "c", "--val", "0.2", "--test", "0.1", "--seed", "1") != found


def test_copies_at_other_sizes_and_qualities_stay_with_their_original(tmp_path):
    root = tmp_path / "root"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    for index in range(30):
        noise = np.random.default_rng(index).normal(
            0, 60, (113, 150, 3)
        )  # as fine as in a photograph of grass
        pixels = np.asarray(photograph(index, 113, 150)) / 2 + 64 + noise
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(root / "ab"[index % 2] / f"{index}.jpg", quality=95)
        image.resize((75, 57), Image.Resampling.BICUBIC).save(root / "a" / f"{index} small.jpg", quality=40)
    found = split(root, tmp_path / "lists")
    sides = {side: {int(re.search(r"\d+", path)[0]) for path, _ in rows} for side, rows in found.items()}
    assert sides["train"] & sides["val"] == set()
    assert sides["train"] | sides["val"] == set(range(30))
    apart = split(root, tmp_path / "apart", "--no-compare")
    sides = {side: {int(re.search(r"\d+", path)[0]) for path, _ in rows} for side, rows in apart.items()}
    assert sides["train"] & sides["val"]


def test_what_a_pattern_finds_stays_together(pictures, tmp_path):
    found = split(pictures, tmp_path / "lists", "--val", "0.25", "--group-by", r"/p(\d) ")
    patients = {side: {re.search(r"/p(\d) ", path)[1] for path, _ in rows} for side, rows in found.items()}
    assert patients["train"] & patients["val"] == set()
    assert len(found["val"]) == pytest.approx(0.25 * sum(SIZES.values()), abs=8)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_never_divided_and_shares_are_met(seed):
    random = np.random.default_rng(seed)
    labels, groups = (
        random.integers(0, 4, 2000),
        np.unique(random.integers(0, 600, 2000), return_inverse=True)[1],
    )
    shares = [0.7, 0.2, 0.1]
    sides = divide(labels, groups, shares, seed)
    assert all(len(set(sides[groups == group])) == 1 for group in range(groups.max() + 1))
    for label in range(4):
        counts = np.bincount(sides[labels == label], minlength=3)
        np.testing.assert_allclose(counts / counts.sum(), shares, atol=0.02)


@pytest.mark.parametrize(
    "name", ['a "quoted".jpg', "#1.jpg", "a,b\tc.jpg", " blank .jpg", "10%.jpg", "-x;y.jpg"]
)
def test_names_of_any_kind_are_read_back(tmp_path, name):
    root = tmp_path / "root"
    for label in ('x, "y"', "007 3", "#z", "a.jpg"):
        (root / label).mkdir(parents=True)
        for index in range(3):
            photograph(index, 32, 32).save(root / label / f"{index}{name}")
    found = split(root, tmp_path / "lists", "--no-compare")
    assert {label for rows in found.values() for _, label in rows} == {path.name for path in root.iterdir()}
    assert sum(map(len, found.values())) == 12


def test_a_run_finds_the_lists(pictures, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for folder in pictures.iterdir():
        (root / folder.name).symlink_to(folder)
    config = load_config("configs/small.yaml", [("data.root", str(root))]).config
    with pytest.raises(DataError, match="and the lists of `cmtrain data split`"):
        loaders.check_places(config)
    assert main(["data", "split", str(root)]) == 0
    loaders.check_places(config)
    data = loaders.open_data(config)
    assert data.train.class_names == data.val.class_names == tuple(sorted(SIZES))
    for name, manifest in (("train", data.train), ("val", data.val)):
        rows = {(manifest.paths[i], manifest.class_names[manifest.labels[i]]) for i in range(len(manifest))}
        assert rows == lists(root)[name]
    other = load_config("configs/small.yaml", [
        ("data.root", str(root)), ("data.train_list", str(root / "val.csv")), ("data.val_list", "val.csv"),
    ]).config  # fmt: skip
    assert len(loaders.open_data(other).train) == len(data.val)


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--val", "0"], 2, "--val 0, --test 0: val must be above 0"),
        (["--val", "0.6", "--test", "0.4"], 2, "--val 0.6, --test 0.4: .*both together below 1"),
        (["--val", "1.5"], 2, "--val: must be a share 0..1"),
        (["--group-by", "("], 2, r"--group-by \(: is no regular expression"),
        (["--group-by", "patient"], 2, "--group-by patient: finds nothing in paths such as "),
        (["--group-by", "p(.)"], 0, ""),
        (["--group-by", "jpg"], 2, "--group-by jpg: finds only 'jpg'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(pictures, tmp_path, capsys, options, code, line):
    assert main(["data", "split", str(pictures), "--out", str(tmp_path / "lists"), *options]) == code
    if code:
        assert re.match(line, capsys.readouterr().err.splitlines()[-1])
        assert not (tmp_path / "lists").exists()


def test_lists_that_are_there_and_folders_that_are_split_are_refused(pictures, tmp_path, capsys):
    out = tmp_path / "lists"
    before = split(pictures, out)
    assert split(pictures, out) == before
    assert main(["data", "split", str(pictures), "--out", str(out), "--val", "0.5"]) == 3
    assert "holds something else already; remove it" in capsys.readouterr().err
    assert lists(out, pictures) == before
    (tmp_path / "photos" / "train" / "a").mkdir(parents=True)
    assert main(["data", "split", str(tmp_path / "photos")]) == 3
    assert "train: is a split already" in capsys.readouterr().err


def test_a_folder_of_copies_has_nothing_to_validate_on(tmp_path, capsys):
    root = tmp_path / "root"
    for label in "ab":
        (root / label).mkdir(parents=True)
        for index in range(10):
            photograph(ord(label), 40, 40).save(root / label / f"{index}.jpg", quality=50 + index)
    assert main(["data", "split", str(root), "--out", str(tmp_path / "lists")]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert "no images for val: its 20 images are 2 groups" in line
    assert "--no-compare" in line
    assert not (tmp_path / "lists").exists()
