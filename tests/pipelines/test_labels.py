"""Labels become classes once for a whole list or folder; a file is known by what it is, however spelled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from helpers.images import write_tree
from helpers.runs import ROOT

from cmtrain.storage.records import replace_file
from cmtrain.training import loaders
from pipelines.atomic import replacing
from pipelines.checks.bad_list import _places, user_cache, write_list
from pipelines.checks.decode_one import Fault
from pipelines.files.doubts import pair_doubts, split_doubts
from pipelines.files.manifest import Manifest
from pipelines.loader import eval_loader, train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, DataError, EvalSpec, Placement

ANIMALS = ("cat", "dog", "owl")
CAFE = {form: unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")}


@pytest.fixture
def root(tmp_path) -> Path:
    """Three classes of two training and one validation image each."""
    root = write_tree(tmp_path / "data", 6, 3)
    for split in ("train", "val"):
        for number, name in enumerate(ANIMALS):
            (root / split / f"class{number}").rename(root / split / name)
    return root


@pytest.fixture
def opened(root, tmp_path):
    """opened(lines, names=None) -> Manifest of a list with these lines."""

    def manifest(lines, names=None, **options) -> Manifest:
        path = tmp_path / "list.csv"
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return Manifest.from_folder(
            root, image_list=path, class_names=names, cache_dir=tmp_path / "cache", **options
        )

    return manifest


def images(*labels: str) -> list[str]:
    return [f"train/cat/0000.jpg,{label}" for label in labels]


def classes(manifest: Manifest) -> list[str]:
    return [manifest.class_names[label] for label in manifest.labels]


TEXT_ORDER = tuple(sorted(map(str, range(1, 13))))  # 1, 10, 11, 12, 2, ...
PADDED = tuple(f"{number:03d}" for number in range(1, 13))


@pytest.mark.parametrize(
    ("names", "labels", "truth"),
    [
        (("0", "1", "10", "2"), ["10", "2"], ["10", "2"]),  # a name of a class is that class
        (PADDED, ["1", "2", "11"], ["001", "002", "011"]),
        (("0", "1", "2"), ["001", "002"], ["1", "2"]),
        (ANIMALS, ["2", "0", "2"], ["owl", "cat", "owl"]),  # names that are no numbers have positions
        (("7", "cat"), ["cat", "7"], ["cat", "7"]),
    ],
)
def test_labels_of_a_list_that_fit(opened, names, labels, truth):
    manifest = opened(images(*labels), names)
    assert classes(manifest) == truth
    assert manifest.class_names == names


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (tuple("012346789"), "456", r":2: label '5' is not one of the 9 .*; 2 of 3 labels are \(4, 6\)"),
        (TEXT_ORDER, "012", r":1: label '0' .* a number is never a position"),
        (("12", "4000", "20500"), "012", r":1: label '0' .* a number is never a position"),
        (PADDED, ["1", "01"], "label '1' is not one"),
        (("1", "01", "2"), ["002"], "label '002' is not one"),
        (("7", "cat"), "01", "label '0' is not one"),
        (ANIMALS, ["0", "3"], r":2: label '3' .* as positions they would go from 0 to 2"),
        (ANIMALS, ["0", "cat"], r":1: label '0' is not .*; 1 of 2 labels are \(cat\)"),
        (ANIMALS, ["Cat"], "cat looks alike in another .* case"),
        ((CAFE["NFC"], "dog"), [CAFE["NFD"]], "Unicode normal form"),
    ],
)
def test_labels_of_a_list_that_do_not_fit_are_one_line(opened, names, labels, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(images(*labels), names)
    assert "\n" not in str(caught.value)


def test_numbers_with_gaps_are_names_and_take_no_memory(opened):
    manifest = opened(images("4000", "12", "20240131", "12"))
    assert manifest.class_names == ("12", "4000", "20240131")
    assert manifest.labels.tolist() == [1, 0, 2, 0]
    assert "names of 3 classes, 12 to 20240131" in manifest.notes[0]
    assert opened(images("12"), manifest.class_names).labels.tolist() == [0]
    few = opened(images("0", "2", "3"))
    assert few.class_names == ("0", "1", "2", "3")
    assert any("1 of 4 classes have no usable image: 1" in line for line in split_doubts(few, "x"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["1", "01"], "':?'?01' is the number of '1', too"), (["0", "-1"], ":2: label '-1' is negative")],
)
def test_numbers_that_are_no_classes_are_refused(opened, labels, message):
    with pytest.raises(DataError, match=message):
        opened(images(*labels))


def test_numbers_among_names_are_names_with_a_note(opened):
    manifest = opened(images("7", "cat", "0"))
    assert classes(manifest) == ["7", "cat", "0"]
    assert "2 labels are numbers and others, as 'cat', are not" in manifest.notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("path,label", r"list.csv:1: .* a header line\? Remove it"),
        ("file name;label", "a header line"),
        ("train/cat/0000.jpg,cat,5", "two columns"),
        ("train/cat/0000.jpg\tcat\t5", "two columns"),
        ("train/cat/0000.jpg 3 1", "two columns"),
        ("train/cat/0000.jpg,train/dog/0001.jpg", "two columns"),
        ("train/cat/0000.jpg;cat", "a comma, not ';'"),
        ("train/cat/0000.jpg|cat", r"a comma, not '\|'"),
        ("train/cat/0000.jpg", "the label is missing"),
        ("train/cat/0000.jpg,", "the label is missing"),
        ("cat,train/cat/0000.jpg", "it comes after the path"),
        ("train/cat/0000.gif,cat", r"\.gif is not among"),
        ("train\\cat\\0000.jpg,cat", "folders are separated by /"),
    ],
)
def test_a_line_of_another_form_is_explained(opened, line, message):
    with pytest.raises(DataError, match=message) as caught:
        opened([line])
    assert "\n" not in str(caught.value)


def test_quotes_keep_a_comma(opened):
    manifest = opened(['train/cat/0000.jpg,"tench, Tinca"', '"train/dog/0001.jpg",dog'])
    assert classes(manifest) == ["tench, Tinca", "dog"]


def test_a_list_in_utf_16_is_named(root, tmp_path):
    (tmp_path / "list.csv").write_text("train/cat/0000.jpg,cat\n", "utf-16")
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 0xff\); save it as UTF-8"):
        Manifest.from_folder(root, image_list=tmp_path / "list.csv", cache_dir=tmp_path / "cache")


def test_files_of_a_list_that_are_elsewhere_are_explained(opened):
    with pytest.raises(DataError, match=r"paths in a list are relative to data\.root$"):
        opened(["data/train/cat/0000.jpg,cat"])


def test_folders_match_by_name_or_number(root, tmp_path):
    for split, spelled in (("train", "00{}"), ("val", "{}")):
        for number, name in enumerate(ANIMALS):
            (root / split / name).rename(root / split / spelled.format(number))
    options = {"class_names": ("000", "001", "002"), "cache_dir": tmp_path / "cache"}
    assert Manifest.from_folder(root / "val", **options).labels.tolist() == [0, 1, 2]
    options["class_names"] = ANIMALS
    with pytest.raises(DataError, match="val/0: not one of the 3 training classes"):
        Manifest.from_folder(root / "val", **options)
    assert Manifest.from_folder(root / "val", positions=True, **options).labels.tolist() == [0, 1, 2]


def test_two_class_folders_that_are_one_are_named(root, tmp_path):
    (root / "train" / "kitty").symlink_to("cat")
    with pytest.raises(DataError, match="train/kitty: the same folder as cat, by a link"):
        Manifest.from_folder(root / "train", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("spelled", ["{}", "./{}", "train//{}", "{root}/train/{}", "{link}/train/{}"])
def test_paths_of_a_list_are_the_same_however_spelled(opened, root, tmp_path, spelled):
    plain = opened(images("x", "y"))
    (tmp_path / "link").symlink_to(root)
    name = "cat/0000.jpg" if "train" in spelled else "train/cat/0000.jpg"
    name = spelled.format(name, root=root, link=tmp_path / "link")
    path = tmp_path / "spelled.csv"
    path.write_text(f"{name},x\n{name},y\n")
    base = tmp_path / "link" if "link" in spelled else root
    assert (
        Manifest.from_folder(base, image_list=path, cache_dir=tmp_path / "cache").fingerprint
        == plain.fingerprint
    )


@pytest.mark.parametrize("checked", ["data", "data/val", "link", "link/val", "data/../data"])
@pytest.mark.parametrize("opened_as", ["data/val", "link/val", "data/val/../val", "list", "hard link"])
@pytest.mark.parametrize("where", ["beside", "cache"])
def test_what_a_check_listed_is_left_out_however_spelled(
    root, tmp_path, monkeypatch, checked, opened_as, where
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "other" / "x").mkdir(parents=True)
    os.link(root / "val" / "cat" / "0000.jpg", root / "val" / "cat" / "again.jpg")
    (tmp_path / "list.csv").write_text("val/cat/0000.jpg,x\nval/dog/0001.jpg,y\n")
    folder = tmp_path / checked
    if where == "cache":  # as where the data cannot be written
        monkeypatch.setattr(
            "pipelines.checks.bad_list._places", lambda of, real=_places: (tmp_path / "no", real(of)[1])
        )
    name = "cat/0000.jpg" if checked.endswith("val") else "val/cat/0000.jpg"
    write_list(folder, {name: Fault("truncated", "cut")})
    options = {"cache_dir": tmp_path / "cache", "max_bad_fraction": 0.9}
    if opened_as == "list":
        manifest = Manifest.from_folder(root, image_list=tmp_path / "list.csv", **options)
    else:
        manifest = Manifest.from_folder(tmp_path / opened_as.replace("hard link", "data/val"), **options)
    left = {Path(path).name for path in manifest.paths}
    assert left == ({"0001.jpg"} if opened_as == "list" else {"0001.jpg", "0002.jpg"})


def test_a_cache_folder_that_no_shell_expanded_is_not_made(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert "~" not in str(user_cache())


# Legal, but likely a mistake.


def test_good_data_raises_no_doubt(root, tmp_path):
    train = Manifest.from_folder(root / "train", cache_dir=tmp_path / "cache")
    val = Manifest.from_folder(root / "val", class_names=train.class_names, cache_dir=tmp_path / "cache")
    assert [*split_doubts(train, "t"), *split_doubts(val, "v"), *pair_doubts(train, val)] == []


def test_a_file_twice_is_counted_with_its_labels(opened, root):
    os.link(root / "train" / "dog" / "0001.jpg", root / "train" / "dog" / "other.jpg")
    lines = ["train/cat/0000.jpg,x", "train/cat/0000.jpg,y", "train/dog/0001.jpg,x", "train/dog/other.jpg,x"]
    (line,) = split_doubts(opened(lines), "training")
    assert line.startswith("training: 2 images are there twice, 1 of them under two labels: ")


@pytest.mark.parametrize("how", ["same folder", "link", "list", "copies"])
def test_validation_on_training_images_is_reported(root, tmp_path, opened, how):
    train = Manifest.from_folder(root / "train", cache_dir=tmp_path / "cache")
    if how == "list":
        val = opened([f"train/{path},{Path(path).parent}" for path in train.paths], train.class_names)
    else:
        if how == "link":
            (tmp_path / "val").symlink_to(root / "train")
        if how == "copies":
            shutil.copytree(root / "train", tmp_path / "val", copy_function=shutil.copy)
        folder = root / "train" if how == "same folder" else tmp_path / "val"
        val = Manifest.from_folder(folder, class_names=train.class_names, cache_dir=tmp_path / "cache")
    (line,) = pair_doubts(train, val)
    assert "also in training" in line


def test_classes_without_an_image_one_class_and_look_alikes_are_reported(root, tmp_path):
    for path in (root / "val" / "owl").glob("*.jpg"):
        path.write_bytes(b"no image")
    options = {"cache_dir": tmp_path / "cache", "max_bad_fraction": 0.9}
    val = Manifest.from_folder(root / "val", class_names=("cat", "dog", "emu", "owl"), **options)
    assert split_doubts(val, "validation") == ["validation: 2 of 4 classes have no usable image: emu, owl"]
    shutil.rmtree(root / "train" / "owl")
    shutil.rmtree(root / "train" / "dog")
    (line,) = split_doubts(Manifest.from_folder(root / "train", **options), "training")
    assert "only one class, cat" in line
    for name in CAFE.values():
        shutil.copytree(root / "train" / "cat", root / "train" / name)
    doubts = split_doubts(Manifest.from_folder(root / "train", **options), "training")
    assert any("differ only in case, blanks or Unicode form" in line for line in doubts)


@pytest.mark.parametrize(
    ("mean", "std", "word"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "0..255"),
        ((0.485, 0.456, 0.406), (58.395, 57.12, 57.375), "0..255"),
        ((-0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "0..255"),
        ((0.485, 0.456, 0.406), (0.01712, 0.0175, 0.0174), "inverse"),
        ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406), "swapped"),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ""),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), ""),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ""),
    ],
)
def test_a_mean_and_std_of_another_scale_are_reported(mean, std, word):
    lines = loaders.scale_doubts(mean, std)
    assert len(lines) == bool(word)
    assert all(word in line for line in lines)


# The library, without the trainer.


def test_loaders_take_the_fields_of_a_placement(root, tmp_path):
    manifest = Manifest.from_folder(root / "train", cache_dir=tmp_path / "cache")
    spec = EvalSpec(32, 32)
    loader = eval_loader(manifest, spec, batch_size=4, rank=1, world=2, device="cpu", prefetch_batches=1)
    assert [batch.indices.tolist() for batch in loader.epoch(0)] == [[1, 3, 5]]
    loader.close()
    with pytest.raises(TypeError, match="unexpected keyword argument 'thread'"):
        eval_loader(manifest, spec, batch_size=4, thread=1)
    plan = Plan(0, 6, 2, 1)
    second = train_loader(manifest, plan, AugmentSpec(32), Placement(world=2), rank=1)
    assert [batch.indices.item() for batch in second.epoch(0)] == plan.order(0)[1::2].tolist()
    second.close()


@pytest.mark.parametrize("start", [["-m", "cmtrain", "--version"], ["-c", "import cmtrain.config.load"]])
def test_another_package_called_pipelines_is_one_clear_line(tmp_path, start):
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, *start], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert (
        f"{tmp_path / 'pipelines'} hides cmtrain's own package `pipelines`" in done.stderr.splitlines()[-1]
    )
    if "-m" in start:
        assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)


def test_numbers_of_a_data_frame_are_numbers_and_never_positions_of_their_own_text(opened):
    names = opened([f"train/cat/0000.jpg,{number}.0" for number in range(12)]).class_names
    assert names == tuple(map(str, range(12)))
    assert opened(images("2", "10"), names).labels.tolist() == [2, 10]  # as text, 10.0 comes before 2.0


def test_a_comment_behind_a_label_is_no_part_of_it(opened):
    with pytest.raises(DataError, match="two columns"):
        opened(images("cat  # blurred", "dog"))


@pytest.mark.parametrize("content", ["pipe", b"train/cat/0000.jpg\n", b"\0\0\t\0"])
def test_a_list_of_bad_files_that_cannot_be_read_is_one_line(root, tmp_path, content):
    """It would let the bad files back in, and a pipe would wait for ever."""
    if content == "pipe":
        os.mkfifo(root / "bad_files.tsv")
    else:
        (root / "bad_files.tsv").write_bytes(content)
    with pytest.raises(DataError, match=r"bad_files.tsv.*(not a file|expected path)"):
        Manifest.from_folder(root / "train", cache_dir=tmp_path / "cache")


def test_a_list_that_is_a_pipe_is_refused(root, tmp_path):
    os.mkfifo(tmp_path / "list")
    with pytest.raises(DataError, match="not a file"):
        Manifest.from_folder(root, image_list=tmp_path / "list", cache_dir=tmp_path / "cache")


def test_a_device_is_written_to_and_never_replaced(tmp_path):
    """As root a rename would put a file in the place of /dev/stdout."""
    reader, writer = os.pipe()
    path = Path(f"/proc/self/fd/{writer}")
    with replacing(path) as file:
        file.write(b"one ")
    replace_file(path, "two")
    assert os.read(reader, 99) == b"one two"
    os.close(reader), os.close(writer)
