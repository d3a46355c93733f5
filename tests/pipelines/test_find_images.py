"""Files, folders, patterns and lists name images, each once and in the order given."""

import pytest
from helpers.images import write_tree

from pipelines.files.lists import find_images
from pipelines.files.manifest import Manifest
from pipelines.spec import DataError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_tree(tmp_path / "in", 0, 6) / "val"
    (root / "class0" / "0000.jpg").rename(root / "class0" / "deep é.JPG")
    (root / "class0" / "notes.heic").touch()
    (root / "class0" / ".hidden.jpg").touch()
    (root / "empty").mkdir()
    return "in/val"


def test_each_kind_of_place(tree):
    first = [f"{tree}/class0/0003.jpg", f"{tree}/class0/deep é.JPG"]
    both = [*first, f"{tree}/class1/0001.jpg", f"{tree}/class1/0004.jpg"]
    assert find_images([f"{tree}/class0"]) == find_images([f"{tree}/class0/"]) == first
    assert find_images([f"{tree}/class1", f"{tree}/class0"]) == both[2:] + first
    assert find_images([f"{tree}/class0/*"]) == find_images([f"{tree}/class0/**"]) == first
    assert find_images([f"{tree}/class[01]"]) == both
    assert find_images([f"{tree}/**/*4.jpg"]) == [both[3]]
    assert find_images([f"{tree}/class0/notes.heic"]) == [f"{tree}/class0/notes.heic"]
    assert len(find_images([tree])) == 6


def test_a_file_that_is_named_twice_is_used_once(tree, capsys):
    places = [f"{tree}/class0/0003.jpg", tree, f"./{tree}/../val/class1/0001.jpg"]
    found = find_images(places)
    assert len(found) == 6
    assert found[0] == places[0]
    assert capsys.readouterr().err.splitlines() == [
        f"{tree}: ignored: 1 .heic, 1 hidden",
        "2 of 8 files were named twice; used once",
    ]


def test_a_list_names_images_relative_to_its_folder(tree, tmp_path):
    lines = ["# a comment", "class0/0003.jpg,class0", "class0/deep é.JPG", '"class1/a, b.jpg"']
    lines += ["../val/class2/0002.jpg", str(tmp_path / "x.png"), '"class1/0001.jpg",class1', ""]
    (tmp_path / tree / "some.csv").write_text("\n".join(lines))
    names = ["class0/0003.jpg", "class0/deep é.JPG", "class1/a, b.jpg", "../val/class2/0002.jpg"]
    expected = [f"{tree}/{name}" for name in names] + [str(tmp_path / "x.png"), f"{tree}/class1/0001.jpg"]
    assert find_images([f"{tree}/some.csv"]) == expected


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gone.jpg", "gone.jpg: no such file or folder"),
        ("gone/*.jpg", r"gone/\*.jpg: no images$"),
        ("in/val/empty", "in/val/empty: no images$"),
        ("in/other", "in/other: no images; ignored: 1 .heic"),
        ("in/none.txt", "in/none.txt: no images; ignored: 1 on lines that begin with #"),
        ("in/bad.txt", "in/bad.txt:2: expected 'path,label' or 'path label', found 'photo.heic'"),
        ("in/latin.csv", "in/latin.csv: cannot read the list of images: not UTF-8"),
    ],
)
def test_a_place_without_images_is_one_line(tree, tmp_path, place, message):
    (tmp_path / "in" / "other").mkdir()
    (tmp_path / tree / "class0" / "notes.heic").rename(tmp_path / "in" / "other" / "notes.heic")
    (tmp_path / "in" / "none.txt").write_text("# nothing\n")
    (tmp_path / "in" / "bad.txt").write_text("a.jpg\nphoto.heic\n")
    (tmp_path / "in" / "latin.csv").write_bytes("é.jpg\n".encode("latin-1"))
    with pytest.raises(DataError, match=message):
        find_images([tree, place])


def test_a_manifest_of_files_keeps_their_order_and_leaves_out_what_is_bad(tree, tmp_path):
    files = [f"{tree}/class1/0004.jpg", "gone.png", f"{tree}/class0/notes.heic", f"{tree}/class0/deep é.JPG"]
    manifest = Manifest.from_files(files)
    kept = [f"{tmp_path}/{files[0]}", f"{tmp_path}/{files[3]}"]
    assert [manifest.file(index) for index in range(len(manifest))] == kept
    assert (manifest.heights.tolist(), manifest.labels.tolist()) == ([48, 48], [0, 0])
    assert [(file.path, file.reason) for file in manifest.bad] == [
        (f"{tmp_path}/gone.png", "cannot be opened: No such file or directory"),
        (f"{tmp_path}/{files[2]}", "empty file"),
    ]
    assert len(Manifest.from_files(["gone.png"]).bad) == 1
