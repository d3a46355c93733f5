"""The manifest holds exactly the usable images, in one order, and names what it left out."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.photographs import write_folder
from helpers.runs import ROOT
from PIL import Image

from pipelines.files import scan_cache
from pipelines.files.listing import Paths
from pipelines.files.manifest import Manifest
from pipelines.spec import DataError


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def jpeg(height: int = 24, width: int = 32, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def put(root: Path, name: str, content: bytes | None = None) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg() if content is None else content)
    return path


def bomb(height: int, width: int) -> bytes:
    """A small JPEG whose header promises height x width pixels."""
    data = bytearray(jpeg())
    struct.pack_into(">HH", data, data.find(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def names(manifest: Manifest) -> list[str]:
    return [manifest.paths[index] for index in range(len(manifest))]


def test_a_folder_is_read_by_class_in_a_fixed_order(tmp_path, cache):
    for name in ("b/z.jpg", "b/a.JPEG", "a/2.png", "a/10.jpg", "a/deep/er/1.webp", "a/x.BMP"):
        put(tmp_path / "in", name, jpeg(height=11, width=7))
    put(tmp_path / "in", "a/notes.txt")
    put(tmp_path / "in", "top.jpg")
    manifest = Manifest.from_folder(tmp_path / "in", cache_dir=cache)
    assert names(manifest) == ["a/10.jpg", "a/2.png", "a/deep/er/1.webp", "a/x.BMP", "b/a.JPEG", "b/z.jpg"]
    assert manifest.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert manifest.class_names == ("a", "b")
    assert set(manifest.heights) == {11}
    assert set(manifest.widths) == {7}
    assert manifest.labels.dtype == np.int64
    assert manifest.heights.dtype == np.int32
    assert manifest.file(0) == str(tmp_path / "in" / "a" / "10.jpg")


def test_hidden_folders_take_no_label_and_hidden_files_no_place(tmp_path, cache):
    for name in (".ipynb_checkpoints/x.jpg", "cat/.x.jpg", "cat/.hidden/x.jpg", "cat/1.jpg", "dog/1.jpg"):
        put(tmp_path / "in", name)
    manifest = Manifest.from_folder(tmp_path / "in", cache_dir=cache)
    assert manifest.class_names == ("cat", "dog")
    assert names(manifest) == ["cat/1.jpg", "dog/1.jpg"]


def test_links_are_followed_once(tmp_path, cache):
    put(tmp_path / "in", "cat/1.jpg")
    put(tmp_path / "elsewhere", "2.jpg")
    (tmp_path / "in/cat/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/cat/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/cat/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/cat/3.jpg").symlink_to(tmp_path / "in/cat/1.jpg")
    manifest = Manifest.from_folder(tmp_path / "in", cache_dir=cache)
    assert names(manifest) == ["cat/1.jpg", "cat/3.jpg", "cat/again/2.jpg"]


def test_what_cannot_be_decoded_is_left_out_and_named(tmp_path, cache):
    root = tmp_path / "in"
    put(root, "cat/good.jpg")
    put(root, "cat/empty.jpg", b"")
    put(root, "cat/text.jpg", b"not a picture\n" * 9)
    put(root, "cat/cut.jpg", jpeg()[:20])
    put(root, "cat/bomb.jpg", bomb(8001, 8001))
    put(root, "cat/huge.jpg", bomb(65500, 65500))
    put(root, "cat/no_rows.jpg", bomb(0, 500))
    gif = io.BytesIO()
    Image.new("P", (9, 9)).save(gif, "GIF")
    put(root, "cat/gif.jpg", gif.getvalue())
    (root / "cat/folder.jpg").mkdir()
    (root / "cat/dangling.jpg").symlink_to(tmp_path / "nowhere")
    for again in range(2):  # the second time from the cache
        manifest = Manifest.from_folder(root, cache_dir=cache, max_bad_fraction=0.95)
        assert names(manifest) == ["cat/good.jpg"], again
        reasons = {os.path.basename(file.path): file.reason for file in manifest.bad}
        assert reasons["empty.jpg"] == "empty file"
        assert reasons["text.jpg"] == "not a JPEG, PNG, BMP or WebP image"
        assert reasons["gif.jpg"] == "not a JPEG, PNG, BMP or WebP image"
        assert reasons["folder.jpg"] == "not a file"
        assert reasons["dangling.jpg"] == "cannot be opened: No such file or directory"
        assert "million" in reasons["bomb.jpg"]
        assert "million" in reasons["huge.jpg"]
        assert {"cut.jpg", "no_rows.jpg"} <= reasons.keys()
        assert len(reasons) == 9
    with pytest.raises(DataError, match=r"9 of 10 images cannot be used.*bomb\.jpg"):
        Manifest.from_folder(root, cache_dir=cache)


def test_sizes_are_those_of_the_stored_image_not_of_the_rotated_one(tmp_path, cache):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "in", "cat/1.jpg", jpeg(height=10, width=30, exif=exif))
    manifest = Manifest.from_folder(tmp_path / "in", cache_dir=cache)
    assert (manifest.heights[0], manifest.widths[0]) == (10, 30)


def test_the_second_scan_opens_no_file_and_a_changed_file_is_scanned_again(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(scan_cache, "TICK_NS", 0)  # these files are no older than a tick
    root = write_folder(tmp_path / "in", 12)
    first = Manifest.from_folder(root, cache_dir=cache)
    opened = []
    check = scan_cache.check_file
    monkeypatch.setattr(
        scan_cache, "check_file", lambda path, decode: opened.append(path) or check(path, decode)
    )
    second = Manifest.from_folder(root, cache_dir=cache)
    assert opened == []
    assert second.fingerprint == first.fingerprint
    for height in (5, 6):  # the second time only the time of change differs
        changed = put(root, "c0/000.jpg", bomb(height, 9))
        os.utime(changed, ns=(height, height))
        third = Manifest.from_folder(root, cache_dir=cache)
        assert (third.heights[0], third.widths[0]) == (height, 9)
        assert third.fingerprint != first.fingerprint
    assert len(opened) == 2


def test_a_cache_that_cannot_be_written_costs_a_line(tmp_path, capsys):
    root = write_folder(tmp_path / "in", 6)
    (tmp_path / "file").write_text("in the way")
    assert len(Manifest.from_folder(root, cache_dir=tmp_path / "file")) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"not cached.*data\.cache_dir", line)


def test_the_cache_is_the_users_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    Manifest.from_folder(write_folder(tmp_path / "in", 3))
    assert len(list((tmp_path / "xdg" / "cmtrain").glob("files-*.npz"))) == 1


@pytest.mark.parametrize("make", ["missing", "empty", "only files", "empty class"])
def test_a_folder_without_classes_is_one_clear_line(tmp_path, cache, make):
    root = tmp_path / "in"
    if make != "missing":
        root.mkdir()
    if make == "only files":
        put(root, "1.jpg")
    if make == "empty class":
        put(root, "cat/1.jpg")
        (root / "dog").mkdir()
    expected = {
        "missing": f"{root}: no such folder; data.root must hold train/<class>/",
        "empty": f"{root}: no class folders; data.root must hold train/<class>/",
        "only files": f"{root}: no class folders",
        "empty class": f"{root / 'dog'}: no images in this class folder",
    }[make]
    with pytest.raises(DataError) as caught:
        Manifest.from_folder(root, cache_dir=cache)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_validation_takes_the_labels_of_training(tmp_path, cache):
    for name in ("b/1.jpg", "d/1.jpg"):
        put(tmp_path / "val", name)
    manifest = Manifest.from_folder(tmp_path / "val", class_names=("a", "b", "c", "d"), cache_dir=cache)
    assert manifest.labels.tolist() == [1, 3]
    assert manifest.class_names == ("a", "b", "c", "d")
    with pytest.raises(DataError, match="val/d: not one of the 2 training classes"):
        Manifest.from_folder(tmp_path / "val", class_names=("a", "b"), cache_dir=cache)


@pytest.mark.parametrize("separator", [",", " ", ", ", "\t"])
def test_lists_of_numbers_and_of_names(tmp_path, cache, separator):
    for name in ("x/1.jpg", "with space/2.JPG", "k\u00e4se,z.png"):
        put(tmp_path / "in", name)
    lines = ["x/1.jpg{}2", "with space/2.JPG{}0", "k\u00e4se,z.png{}2"]
    text = "\ufeff# a comment\n\n" + "\n".join(lines).replace("{}", separator)
    (tmp_path / "list.txt").write_text(text, "utf-8")
    manifest = Manifest.from_list(tmp_path / "list.txt", tmp_path / "in", cache_dir=cache)
    assert names(manifest) == ["x/1.jpg", "with space/2.JPG", "k\u00e4se,z.png"]
    assert manifest.labels.tolist() == [2, 0, 2]
    assert manifest.class_names == ("0", "1", "2")
    (tmp_path / "list.txt").write_text(f"x/1.jpg{separator}tabby cat\nwith space/2.JPG{separator}dog\n")
    manifest = Manifest.from_folder(tmp_path / "in", image_list=tmp_path / "list.txt", cache_dir=cache)
    assert manifest.class_names == ("dog", "tabby cat")
    assert manifest.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,0\nb.jpg\n", r"list.txt:2: expected 'path,label'"),
        ("a.jpg,0\n\n# x\na.jpg,7\n", r"list.txt:4: label '7' is not one of the 3 training classes"),
        ("a.jpg,wolf\n", r"list.txt:1: label 'wolf'"),
        ("# nothing\n", r"list.txt: names no images"),
        (
            "a.jpg,0\n../../etc/a.jpg,0\n",
            r"list.txt:2: must be below data.root: not absolute, without .. and NUL$",
        ),
        ("/etc/a.jpg,0\n", r"list.txt:1: must be below data.root"),
        ("x/../../a.jpg 0\n", r"list.txt:1: must be below data.root"),
        ("x\0/a.jpg,0\n", r"list.txt:1: must be below data.root"),
        ("x" * 100_000 + "\n", r"list.txt:1: expected 'path,label' or 'path label', found '.{100}'$"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, cache, text, message):
    put(tmp_path / "in", "a.jpg")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        Manifest.from_folder(
            tmp_path / "in", image_list=tmp_path / "list.txt", class_names=("x", "y", "z"), cache_dir=cache
        )


def test_listed_files_that_are_missing_are_named(tmp_path, cache):
    put(tmp_path / "in", "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg,0\nb.jpg,1\n")
    with pytest.raises(DataError, match=r"1 of 2 images.*b\.jpg: cannot be opened: No such file"):
        Manifest.from_folder(tmp_path / "in", image_list=tmp_path / "list.txt", cache_dir=cache)
    with pytest.raises(DataError, match=r"nowhere\.txt: cannot read the list"):
        Manifest.from_folder(tmp_path / "in", image_list=tmp_path / "nowhere.txt", cache_dir=cache)


def test_a_fraction_is_balanced_fixed_and_seeded(tmp_path, cache):
    for label, count in (("a", 40), ("b", 10), ("c", 2)):
        for index in range(count):
            put(tmp_path / "in", f"{label}/{index:02d}.jpg", jpeg(8 + index, 8))
    whole = Manifest.from_folder(tmp_path / "in", cache_dir=cache)
    fifth = whole.fraction(0.2, seed=1)
    assert np.bincount(fifth.labels).tolist() == [8, 2, 1]
    assert names(fifth) == names(whole.fraction(0.2, seed=1))
    assert names(fifth) != names(whole.fraction(0.2, seed=2))
    assert set(names(fifth)) <= set(names(whole.fraction(0.5, seed=1)))
    heights = dict(zip(names(whole), whole.heights, strict=True))
    assert all(heights[name] == height for name, height in zip(names(fifth), fifth.heights, strict=True))
    assert names(whole.fraction(1.0, seed=1)) == names(whole)
    with pytest.raises(ValueError, match="fraction 0"):
        whole.fraction(0, seed=1)


def test_paths_survive_being_encoded():
    texts = ["a/1.jpg", "\u732b/\u00e9t\u00e9.png", os.fsdecode(b"not utf-8 \xff.jpg"), "b"]
    paths = Paths.of(texts)
    assert [paths[index] for index in range(len(paths))] == texts
    assert list(Paths(paths.encoded[[2, 0, 2]])) == [texts[2], texts[0], texts[2]]
    buffer, offsets = paths.joined()
    assert buffer.tobytes() == b"".join(map(os.fsencode, texts))
    assert offsets.tolist() == [0, *np.cumsum([len(os.fsencode(text)) for text in texts])]
    assert list(Paths.split(buffer, offsets)) == texts
    assert list(Paths.split(*Paths.of(["", "a"]).joined())) == ["", "a"]


SCALE = """
import resource, sys, time
from pipelines.files import scan_cache
from pipelines.files.manifest import Manifest

scan_cache.TICK_NS = 0  # the files are no older than a tick

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

seconds, before = [], peak_mb()
for _ in range(2):
    begin = time.perf_counter()
    manifest = Manifest.from_folder(sys.argv[1], cache_dir=sys.argv[2])
    seconds.append(time.perf_counter() - begin)
begin = time.perf_counter()
for index in range(0, len(manifest), 10):
    with open(manifest.file(index), "rb") as file:
        file.read(4096)
plain = 10 * (time.perf_counter() - begin)
print(len(manifest), *seconds, peak_mb() - before, plain)
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("num_classes", "files_per_class"), [(20, 1000), pytest.param(1000, 1281, marks=pytest.mark.slow)]
)
def test_a_million_files_take_seconds_and_little_memory(tmp_path, cache, num_classes, files_per_class):
    originals = [put(tmp_path, f"{number}.jpg") for number in range(40)]  # a file may have 65,000 links
    for label in range(num_classes):
        folder = tmp_path / "in" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(files_per_class):
            os.link(originals[(label + number) % 40], folder / f"n{label:08d}_{number}.JPEG")
    command = [sys.executable, "-c", SCALE, str(tmp_path / "in"), str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    num_files, first, second, memory_mb, plain = map(float, done.stdout.split())
    assert num_files == num_classes * files_per_class
    # Ceilings in proportion to 300 MB for 1.28 million files, and to a plain loop that opens and reads them.
    share = num_files / 1_281_000
    assert memory_mb < 10 + 300 * share
    if share > 0.5:  # nightly; alone on two cores 3.6 and 1/60
        assert first < 2 + 20 * plain
        assert second < first / 10
