"""A cached scan gives the manifest that a new scan would give, or it is not used."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.images import SIDE, pixels, plan_for
from helpers.photographs import write_folder
from helpers.runs import HANG_SECONDS, ROOT
from PIL import Image

from pipelines import atomic
from pipelines.files import lists, manifest, scan_cache
from pipelines.files.listing import Paths
from pipelines.files.manifest import BadFile, Manifest
from pipelines.loader import eval_loader, train_loader
from pipelines.spec import AugmentSpec, DataError, EvalSpec, Placement

Opened = Callable[[Path], Manifest]


@pytest.fixture(autouse=True)
def no_tick(monkeypatch):
    """Files are a few milliseconds old here, and the clock of this file system is as exact as that."""
    monkeypatch.setattr(scan_cache, "TICK_NS", 0)


@pytest.fixture(params=["folder", "list"])
def opened(request, tmp_path) -> Opened:
    """opened(cache) -> Manifest of 30 images, of which one is unusable, as a folder and as a list."""
    root = write_folder(tmp_path / "in", 30)
    (root / "c1" / "bad.jpg").write_bytes(b"never an image")
    (tmp_path / "linked").mkdir()
    shutil.copy(root / "c0" / "000.jpg", tmp_path / "linked" / "behind.jpg")
    (root / "c0" / "link").symlink_to(tmp_path / "linked")
    names = [*sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg")), "c0/link/behind.jpg"]
    (tmp_path / "list.txt").write_text("".join(f"{name},{name[:2]}\n" for name in names))

    def manifest(cache: Path) -> Manifest:
        time.sleep(0.02)  # the kernel's clock ticks every 4 ms
        if request.param == "list":
            return Manifest.from_folder(root, image_list=tmp_path / "list.txt", cache_dir=cache)
        return Manifest.from_folder(root, cache_dir=cache)

    return manifest


def assert_same(ours: Manifest, theirs: Manifest) -> None:
    assert ours.fingerprint == theirs.fingerprint
    assert ours.bad == theirs.bad
    assert ours.root == theirs.root
    for name in ("labels", "heights", "widths"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype


@pytest.fixture
def looks(monkeypatch) -> list[str]:
    """Grow by "listed" for every listing and by a path for every header that is read."""
    seen: list[str] = []
    for module, name in ((manifest, "list_folder"), (lists, "list_file")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, original=original: seen.append("listed") or original(*args)
        )
    check = scan_cache.check_file
    monkeypatch.setattr(
        scan_cache, "check_file", lambda path, decode: seen.append(path) or check(path, decode)
    )
    return seen


def test_the_second_start_looks_at_folders_and_a_sample_only(opened, tmp_path, looks, monkeypatch):
    first = opened(tmp_path / "cache")
    assert len(looks) == 1 + 32
    looks.clear()
    monkeypatch.setattr(scan_cache, "NUM_SAMPLED", 5)
    states, original = [], scan_cache.file_state
    monkeypatch.setattr(scan_cache, "file_state", lambda path: states.append(path) or original(path))
    assert_same(opened(tmp_path / "cache"), first)
    assert looks == [str(tmp_path / "in" / "c1" / "bad.jpg")]  # whether it can be used by now
    assert len(states) == 5


def rewritten(path: Path, side: int = 61) -> None:
    Image.new("RGB", (side, side)).save(path)


def replaced(path: Path) -> None:
    """Replace as rsync and tar do, which set back the folder's and the file's time of modification."""
    file, folder = path.stat(), path.parent.stat()
    rewritten(path.with_suffix(".tmp.jpg"))
    path.with_suffix(".tmp.jpg").rename(path)
    os.utime(path, ns=(file.st_atime_ns, file.st_mtime_ns))
    os.utime(path.parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda root: rewritten(root / "c0" / "new.jpg"),
    "removed": lambda root: (root / "c0" / "003.jpg").unlink(),
    "renamed": lambda root: (root / "c0" / "003.jpg").rename(root / "c0" / "zzz.jpg"),
    "replaced": lambda root: replaced(root / "c0" / "003.jpg"),
    "swapped": lambda root: (
        shutil.move(root / "c0", root.parent / "away") and shutil.copytree(root / "c1", root / "c0")
    ),
    "class added": lambda root: (root / "c9").mkdir() or rewritten(root / "c9" / "new.jpg"),
    "folder added": lambda root: (
        (root / "c0" / "deep").mkdir() or rewritten(root / "c0" / "deep" / "new.jpg")
    ),
    "behind a link": lambda root: rewritten(root.parent / "linked" / "new.jpg"),
    "behind a link, removed": lambda root: (root.parent / "linked" / "behind.jpg").unlink(),
    "overwritten in place": lambda root: rewritten(root / "c0" / "000.jpg"),  # the one in the sample
    "repaired in place": lambda root: rewritten(root / "c1" / "bad.jpg"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(opened, tmp_path, monkeypatch, change):
    monkeypatch.setattr(scan_cache, "NUM_SAMPLED", 1)
    opened(tmp_path / "cache")
    CHANGES[change](tmp_path / "in")
    for again in range(2):
        try:
            expected = opened(tmp_path / f"fresh{again}")
        except DataError as error:  # too many of the list are gone
            with pytest.raises(DataError, match=str(error).split(":")[-1]):
                opened(tmp_path / "cache")
        else:
            assert_same(opened(tmp_path / "cache"), expected)


def test_a_change_costs_the_headers_of_the_changed_files(opened, tmp_path, looks):
    opened(tmp_path / "cache")
    looks.clear()
    rewritten(tmp_path / "in" / "c0" / "003.jpg")
    rewritten(tmp_path / "in" / "c2" / "005.jpg")
    opened(tmp_path / "cache")
    assert set(looks) == {"listed"} | {
        str(tmp_path / "in" / name) for name in ("c0/003.jpg", "c2/005.jpg", "c1/bad.jpg")
    }


def test_a_list_is_known_by_its_content(tmp_path, looks):
    root = write_folder(tmp_path / "in", 6)
    path, cache = tmp_path / "list.txt", tmp_path / "cache"
    path.write_text("c0/000.jpg,x\nc1/001.jpg,y\n")
    Manifest.from_folder(root, image_list=path, cache_dir=cache)
    info = path.stat()
    path.write_text("c0/000.jpg,y\nc1/001.jpg,x\n")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    looks.clear()
    time.sleep(0.02)
    assert Manifest.from_folder(root, image_list=path, cache_dir=cache).labels.tolist() == [1, 0]
    assert looks == ["listed"]


def test_one_scan_serves_all_class_names(tmp_path, looks):
    root = write_folder(tmp_path / "in", 6)
    assert Manifest.from_folder(root, cache_dir=tmp_path / "cache").labels.tolist() == [0, 0, 1, 1, 2, 2]
    looks.clear()
    time.sleep(0.02)
    names = ("c2", "other", "c0", "c1")
    manifest = Manifest.from_folder(root, class_names=names, cache_dir=tmp_path / "cache")
    assert manifest.labels.tolist() == [2, 2, 3, 3, 0, 0]
    assert manifest.class_names == names
    with pytest.raises(DataError, match="c2: not one of the 2 training classes"):
        Manifest.from_folder(root, class_names=("c0", "c1"), cache_dir=tmp_path / "cache")
    assert looks == []


def test_a_folder_that_changed_within_a_tick_of_the_look_is_not_trusted(tmp_path, monkeypatch):
    """On a file system that counts seconds, two changes within one look like the first of them."""
    monkeypatch.setattr(scan_cache, "TICK_NS", 3_000_000_000)
    root, cache, original = write_folder(tmp_path / "in", 6), tmp_path / "cache", scan_cache.folder_state

    def of_one_second(path: bytes) -> tuple[int, ...]:
        return (*original(path)[:2], now_ns, now_ns)

    for path in root.rglob("*.jpg"):
        os.utime(path, (10**9, 10**9))
    now_ns = time.time_ns() // 10**9 * 10**9
    monkeypatch.setattr("pipelines.files.listing.folder_state", of_one_second)
    monkeypatch.setattr(scan_cache, "folder_state", of_one_second)
    assert len(Manifest.from_folder(root, cache_dir=cache)) == 6
    shutil.copy2(root / "c0" / "003.jpg", root / "c0" / "new.jpg")
    assert len(Manifest.from_folder(root, cache_dir=cache)) == 7


def test_a_file_that_changed_within_a_tick_of_the_look_is_not_trusted(tmp_path, monkeypatch):
    """It is still being copied, for example: its folder has changed long ago."""
    monkeypatch.setattr(scan_cache, "TICK_NS", 3_000_000_000)
    monkeypatch.setattr("pipelines.files.listing.folder_state", lambda path: (1, 1, 1, 1))
    monkeypatch.setattr(scan_cache, "folder_state", lambda path: (1, 1, 1, 1))
    monkeypatch.setattr(scan_cache, "NUM_SAMPLED", 1)  # another one
    root, now_ns = write_folder(tmp_path / "in", 6), time.time_ns() // 10**9 * 10**9
    path = root / "c0" / "003.jpg"
    size_bytes = path.stat().st_size
    for side in (40, 50):
        rewritten(path, side)
        path.write_bytes(path.read_bytes().ljust(size_bytes, b"\0"))
        os.utime(path, ns=(now_ns, now_ns))
        manifest = Manifest.from_folder(root, cache_dir=tmp_path / "cache")
        assert (manifest.heights[1], manifest.widths[1]) == (side, side)


def test_a_time_far_ahead_is_no_change(tmp_path, monkeypatch, looks):
    monkeypatch.setattr(scan_cache, "TICK_NS", 0)
    root = write_folder(tmp_path / "in", 6)
    os.utime(root / "c0" / "003.jpg", (4e9, 4e9))
    for _ in range(2):
        time.sleep(0.02)
        Manifest.from_folder(root, cache_dir=tmp_path / "cache")
    assert looks.count("listed") == 1


def test_names_that_are_no_utf8_are_cached(tmp_path, looks):
    root = Path(os.fsdecode(bytes(tmp_path) + b"/in\xff"))
    (root / "a").mkdir(parents=True)
    shutil.copytree(write_folder(tmp_path / "in", 6) / "c0", root / os.fsdecode(b"b\xe9"))
    rewritten(root / "a" / os.fsdecode(b"\xfe.jpg"))
    time.sleep(0.02)
    first = Manifest.from_folder(root, cache_dir=tmp_path / "cache")
    assert_same(Manifest.from_folder(root, cache_dir=tmp_path / "cache"), first)
    assert (len(first), looks.count("listed")) == (3, 1)


def test_a_folder_without_a_time_is_not_trusted(tmp_path, monkeypatch, looks):
    root, cache = write_folder(tmp_path / "in", 6), tmp_path / "cache"
    monkeypatch.setattr("pipelines.files.listing.folder_state", lambda path: (1, 0, 0, 0))
    monkeypatch.setattr(scan_cache, "folder_state", lambda path: (1, 0, 0, 0))
    Manifest.from_folder(root, cache_dir=cache)
    rewritten(root / "c0" / "new.jpg")
    assert len(Manifest.from_folder(root, cache_dir=cache)) == 7


def test_a_damaged_cache_is_not_used_and_written_again(opened, tmp_path, looks):
    cache = tmp_path / "cache"
    first = opened(cache)
    (path,) = cache.glob("files-*.npz")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [
        b"",
        whole[:100],
        whole[:-30],
        whole + b"x" * 99,
        whole.replace(b"PK", b"XX"),
        b"\0" * len(whole),
    ]
    for place in rng.integers(0, len(whole), 40).tolist():
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        assert_same(opened(cache), first)
    path.write_bytes(b"")
    opened(cache)
    looks.clear()
    assert_same(opened(cache), first)
    assert "listed" not in looks


def test_another_version_is_not_used(opened, tmp_path, looks, monkeypatch):
    first = opened(tmp_path / "cache")
    monkeypatch.setattr(scan_cache, "_FORMAT", 99)
    looks.clear()
    assert_same(opened(tmp_path / "cache"), first)
    assert "listed" in looks


# A process of its own: it takes a second for its look, which it notes in a file.
LOOK = """
import sys, time
from pipelines.files import manifest, scan_cache

def slowly(folder, original=manifest.list_folder):
    with open(sys.argv[3], "a") as log:
        log.write("listed\\n")
    time.sleep(1)
    return original(folder)

scan_cache.TICK_NS, manifest.list_folder = 0, slowly
assert len(manifest.Manifest.from_folder(sys.argv[1], cache_dir=sys.argv[2])) == 12
"""


def started(root: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", LOOK, str(root), str(tmp_path / "cache"), str(tmp_path / "log")]
    return subprocess.Popen(command, cwd=ROOT)


def wait_for_look(tmp_path: Path) -> None:
    while not (tmp_path / "log").exists():
        time.sleep(0.01)


def test_of_several_processes_one_looks(tmp_path):
    root = write_folder(tmp_path / "in", 12)
    processes = [started(root, tmp_path) for _ in range(3)]
    assert [process.wait(HANG_SECONDS) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "listed\n"


def test_a_killed_process_holds_nobody_up(tmp_path):
    root = write_folder(tmp_path / "in", 12)
    process = started(root, tmp_path)
    wait_for_look(tmp_path)
    process.kill()
    process.wait(HANG_SECONDS)
    assert len(Manifest.from_folder(root, cache_dir=tmp_path / "cache")) == 12


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_holds_nobody_up(tmp_path, monkeypatch, looks, number):
    def no_locks(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    root = write_folder(tmp_path / "in", 6)
    for _ in range(2):
        time.sleep(0.02)
        assert len(Manifest.from_folder(root, cache_dir=tmp_path / "cache")) == 6
    assert looks.count("listed") == 1


def test_a_waiting_process_reports_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(atomic, "WAIT_LINE_SECONDS", 0.05)
    root = write_folder(tmp_path / "in", 12)
    process = started(root, tmp_path)
    wait_for_look(tmp_path)
    Manifest.from_folder(root, cache_dir=tmp_path / "cache")
    assert process.wait(HANG_SECONDS) == 0
    assert f"lists the images (it holds {tmp_path / 'cache' / 'files-'}" in capsys.readouterr().err


PLACE = 20


@pytest.fixture
def small_sample(tmp_path, monkeypatch) -> Manifest:
    """A manifest whose image PLACE is not in the sample."""
    monkeypatch.setattr(scan_cache, "NUM_SAMPLED", 2)
    return Manifest.from_folder(write_folder(tmp_path / "in", 53), cache_dir=tmp_path / "cache")


def overwrite(manifest: Manifest) -> None:
    time.sleep(0.02)
    Image.new("RGB", (20, 10)).save(manifest.file(PLACE))


def pixels_of(manifest: Manifest) -> tuple[list[list[tuple[int, str]]], list[BadFile]]:
    """(index, digest) of all samples in four epochs of each of two sizes of crops, and of an evaluation."""
    specs = AugmentSpec(SIDE), AugmentSpec(SIDE, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    plan = plan_for(manifest, global_batch_size=53)
    loaders = [train_loader(manifest, plan, spec, Placement()) for spec in specs]
    samples = [pixels(loader, epoch) for loader in loaders for epoch in range(4)]
    loaders.append(eval_loader(manifest, EvalSpec(SIDE, 56), Placement(), batch_size=7))
    samples.append(pixels(loaders[-1], 0))
    bad = [file for loader in loaders for file in loader.take_bad_files()]
    for loader in loaders:
        loader.close()
    return samples, bad


def test_an_image_overwritten_in_place_by_a_smaller_one_costs_no_other(small_sample, tmp_path):
    before, _ = pixels_of(small_sample)
    overwrite(small_sample)
    manifest = Manifest.from_folder(small_sample.root, cache_dir=tmp_path / "cache")
    assert_same(manifest, small_sample)  # the price of not looking
    after, bad = pixels_of(manifest)
    for then, now in zip(before, after, strict=True):
        changed = [index for (index, _), sample in zip(then, now, strict=True) if (index, _) != sample]
        assert changed == [PLACE]
    assert {file.path for file in bad} == {manifest.file(PLACE)}
    assert "is 10x20 now, was " in bad[0].reason


@pytest.mark.parametrize("how", ["touch", "refresh"])
def test_to_touch_a_folder_or_to_ask_shows_an_image_overwritten_in_place(small_sample, tmp_path, how):
    overwrite(small_sample)
    if how == "touch":
        os.utime(Path(small_sample.file(PLACE)).parent)
    for refresh in (how == "refresh", False):
        manifest = Manifest.from_folder(small_sample.root, cache_dir=tmp_path / "cache", refresh=refresh)
        assert (manifest.heights[PLACE], manifest.widths[PLACE]) == (10, 20)


def test_paths_find_paths():
    rng = np.random.default_rng(0)
    texts = [f"n{number:05d}/{'x' * int(rng.integers(0, 40))}{number}.jpg" for number in range(100)]
    paths = Paths.of(texts)
    wanted = [texts[99], "nowhere.jpg", texts[0], texts[0][:-1], texts[0] + "g", "", texts[50]]
    assert paths.find(Paths.of(wanted)).tolist() == [99, -1, 0, -1, -1, -1, 50]
    assert Paths.of(["", "a"]).find(Paths.of(["a", ""])).tolist() == [1, 0]
    assert paths.find(Paths(paths.encoded[::-1])).tolist() == list(range(100))[::-1]
