"""Labels such as cat;dog are sets of classes, the same ones in training and validation."""

import shutil

import pytest
from helpers.images import write_tree

from cmtrain.commands.data_pack import pack
from cmtrain.training.loaders import label_sets
from pipelines.files.doubts import split_doubts
from pipelines.files.manifest import Manifest
from pipelines.spec import DataError


@pytest.fixture
def opened(tmp_path):
    """opened(labels, classes=None) -> Manifest of a list with a line for each of these labels."""
    root = write_tree(tmp_path / "data", 9, 3)
    names = sorted(path.relative_to(root) for path in root.rglob("train/*/*.jpg"))

    def manifest(labels, classes=None):
        path = tmp_path / "list.csv"
        rows = zip(names, labels, strict=False)
        path.write_text("".join(f"{name},{label}\n" for name, label in rows), "utf-8")
        options = {"cache_dir": tmp_path / "cache", "multi_label": True}
        return Manifest.from_folder(root, image_list=path, class_names=classes, **options)

    return manifest


def sets_of(manifest):
    return [manifest.label_name(label) for label in manifest.labels]


def test_the_classes_are_those_that_any_label_names(opened):
    train = opened(["cat;dog", "owl", "dog; cat", "-", "cat", "dog;owl"])
    assert train.class_names == ("cat", "dog", "owl")
    assert sets_of(train) == ["cat;dog", "owl", "cat;dog", "-", "cat", "dog;owl"]
    assert train.class_counts().tolist() == [3, 3, 2]
    assert not split_doubts(train, "training")
    table = label_sets(train, 5, "cpu")
    assert table[train.labels].tolist()[:2] == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]


def test_other_sets_of_the_same_classes_are_validated_on(opened):
    train = opened(["cat;dog", "owl"])
    val = opened(["owl;cat", "dog", "-"], train.class_names)
    assert val.class_names == train.class_names
    assert sets_of(val) == ["cat;owl", "dog", "-"]


def test_numbers_are_names_in_the_order_of_their_size(opened):
    train = opened(["10;2", "2", "7"])
    assert train.class_names == ("2", "7", "10")
    assert not train.notes


@pytest.mark.parametrize(
    ("label", "classes", "message"),
    [
        ("cat;wolf", ("cat", "dog"), "list.csv:2: label 'cat;wolf' is no list of classes: it names 'wolf'"),
        ("cat;;dog", None, "list.csv:2: label 'cat;;dog' is no list of classes: it names an empty one"),
        ("cat;", None, "list.csv:2: label 'cat;' is no list of classes: it names an empty one"),
        ("cat;-", None, "list.csv:2: label 'cat;-' is no list of classes: it names '-'"),
    ],
)
def test_a_mistake_is_named_with_its_line(opened, label, classes, message):
    with pytest.raises(DataError, match=message):
        opened(["dog", label], classes)


def test_a_list_without_any_class_is_refused(opened):
    with pytest.raises(DataError, match=r"list\.csv: no label names a class"):
        opened(["-", "-"])


def test_a_share_is_of_the_images_and_not_of_each_set(opened):
    train = opened(["a;b", "a;c", "b;c", "a", "b", "c", "-", "a;b;c"])
    assert len(train.fraction(0.5, 0)) == 4


def test_a_forgotten_key_is_a_likely_mistake(opened, tmp_path):
    opened(["cat;dog", "dog", "cat"])
    path, root = tmp_path / "list.csv", tmp_path / "data"
    manifest = Manifest.from_folder(root, image_list=path, cache_dir=tmp_path / "cache")
    (line,) = split_doubts(manifest, "training")
    assert line == "training: 'cat;dog' is a class of its own without data.multi_label"


def test_the_same_sets_are_the_same_data_and_others_are_not(opened):
    prints = [opened(labels).fingerprint for labels in (["a;b", "b"], ["b;a", "b"], ["a;b", "a"])]
    assert prints[0] == prints[1] != prints[2]


def test_a_file_on_two_lines_is_a_likely_mistake(opened, tmp_path):
    opened(["cat", "dog"])
    path = tmp_path / "list.csv"
    first = path.read_text().splitlines()[0].rpartition(",")[0]
    path.write_text(f"{first},cat\n{first},dog\n")
    root, options = tmp_path / "data", {"cache_dir": tmp_path / "cache", "multi_label": True}
    (line,) = split_doubts(Manifest.from_folder(root, image_list=path, **options), "training")
    assert "all labels of an image go into one line, as cat;dog" in line


def test_packed_sets_are_those_of_the_lists(opened, tmp_path):
    """Also numbers, of which some have no image: they are names, not positions."""
    train = opened(["0;3", "3", "07", "-", "0"])
    shutil.rmtree(tmp_path / "data" / "val")
    how = {"train_list": "../list.csv", "multi_label": True, "resize_shorter": None, "quality": 90}
    pack(str(tmp_path / "data"), str(tmp_path / "packed"), shard_mib=1, processes=1, **how)
    packed = Manifest.from_shards(tmp_path / "packed" / "train", multi_label=True)
    assert (packed.class_names, sets_of(packed)) == (train.class_names, sets_of(train))
    assert packed.class_names == ("0", "3", "07")


def test_class_folders_may_be_sets_and_images_are_found_by_class(tmp_path):
    root = write_tree(tmp_path / "data", 9, 3)
    (root / "train" / "class0").rename(root / "train" / "class1;class2")
    train = Manifest.from_folder(root / "train", cache_dir=tmp_path / "cache", multi_label=True)
    assert train.class_names == ("class1", "class2")
    assert train.class_counts().tolist() == [6, 6]
    first, beyond = train.labels * 0, train.labels * 0 + 2  # an output of the model without a class
    assert train.are_of(first).tolist() == ["class1" in path for path in train.paths]
    assert not train.are_of(beyond).any()
