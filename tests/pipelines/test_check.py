"""`cmtrain data check` finds exactly the bad files and survives them; training leaves out what it found."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.hostile_images import PHOTO, encoded, write_bad, write_good
from helpers.images import write_tree
from helpers.runs import ROOT

from cmtrain.commands.data_check import check
from pipelines.checks import decode_one, decode_pool
from pipelines.checks.bad_list import NAME, read_lists
from pipelines.checks.decode_one import CheckResult, Fault
from pipelines.checks.decode_pool import DecodePool
from pipelines.files import scan_cache
from pipelines.files.manifest import Manifest
from pipelines.spec import DataError


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cmtrain"


@pytest.fixture
def data(tmp_path) -> Path:
    """train/ and val/ of two classes: good files only."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            write_good(folder)
    return tmp_path / "data"


def listed(path: Path) -> dict[str, tuple[str, str]]:
    """Kind and reason by path."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: (kind, reason) for name, kind, reason in (line.split("\t") for line in lines)}


def paths_of(manifest: Manifest) -> set[str]:
    return {manifest.paths[index] for index in range(len(manifest))}


def test_finds_exactly_the_bad_files_in_little_memory(data):
    """Twenty kinds of file, in a process that may have 2 GB of addresses and whose workers may have 1."""
    kinds = write_bad(data / "train" / "b")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from cmtrain.commands.data_check import check\n"
        "code = check(sys.argv[1], processes=2, out=None)\n"
        # Its own peak from /proc: getrusage's would include what pytest held when it started this process.
        "lines = open('/proc/self/status')\n"
        "own = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(data)], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 3, done.stderr
    *report, peak_bytes = done.stdout.splitlines()
    assert int(peak_bytes) < 1e9
    found = listed(data / NAME)
    assert {path: kind for path, (kind, _) in found.items()} == {
        f"train/b/{name}": kind for name, kind in kinds.items()
    }
    text = "\n".join(report)
    assert f"{data}/train: {16 + len(kinds)} files, 16 good, {len(kinds)} bad (" in text
    assert re.search(r"cut short.*not an image.*|not an image.*cut short", text)
    assert f"{data}/val: 16 files, 16 good, 0 bad" in text
    assert "2 classes of 8 (a) to 8 good images, median 8" in text
    assert all(f"{path}: {reason}" in text for path, (_, reason) in found.items())


def test_good_data_leaves_no_list(data, capsys):
    (data / NAME).write_text("train/a/good.jpg\tother\tof an earlier check\n")
    assert check(str(data), processes=2, out=None) == 0
    assert not (data / NAME).exists()
    assert "bad files" not in capsys.readouterr().out


def test_training_leaves_out_what_the_check_found(data):
    """Truncated files have good headers: the check is the only thing that finds them beforehand."""
    content = encoded()
    (data / "train" / "a" / "cut.jpg").write_bytes(content[: len(content) // 2])
    before = Manifest.from_folder(data / "train")
    assert "a/cut.jpg" in paths_of(before)
    assert check(str(data), processes=1, out=None) == 0
    manifest = Manifest.from_folder(data / "train", max_bad_fraction=0.1)
    assert paths_of(manifest) == paths_of(before) - {"a/cut.jpg"}
    (bad,) = manifest.bad
    assert bad.path == str(data / "train" / "a" / "cut.jpg")
    assert "truncated" in bad.reason
    assert NAME in bad.reason
    with pytest.raises(DataError, match=r"1 of 17 images cannot be used"):
        Manifest.from_folder(data / "train", max_bad_fraction=0.001)
    (data / NAME).write_text("")
    assert paths_of(Manifest.from_folder(data / "train")) == paths_of(before)


def test_the_check_looks_at_everything_and_renews_the_cache_of_runs(data, tmp_path, monkeypatch):
    """A file is overwritten in place, which runs see in a sample of the files only."""
    monkeypatch.setattr(scan_cache, "TICK_NS", 0)
    monkeypatch.setattr(scan_cache, "NUM_SAMPLED", 1)
    path, runs = data / "train" / "b" / "good.jpg", tmp_path / "runs"

    def size_of() -> tuple[int, int]:
        time.sleep(0.02)
        manifest = Manifest.from_folder(data / "train", cache_dir=runs)
        place = list(manifest.paths).index("b/good.jpg")
        return manifest.heights[place], manifest.widths[place]

    assert size_of() == (375, 500)
    info = path.stat()
    path.write_bytes(encoded(PHOTO.resize((20, 10))).ljust(info.st_size, b"\0"))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert size_of() == (375, 500)
    assert check(str(data), processes=1, out=None, cache_dir=str(runs)) == 0
    assert size_of() == (10, 20)


def test_a_class_tree_of_its_own(data):
    (data / "train" / "a" / "empty.jpg").touch()
    (data / "train").rename(data / "photos")
    assert check(str(data / "photos"), processes=1, out=None) == 0
    assert listed(data / "photos" / NAME) == {"a/empty.jpg": ("truncated", "empty file")}
    assert "a/empty.jpg" in read_lists(data / "photos")
    assert not (data / NAME).exists()


def test_data_that_cannot_be_written_has_its_list_in_the_cache(data, user_cache, monkeypatch):
    (data / "train" / "a" / "cut.jpg").write_bytes(encoded()[:-20])
    replace = Path.replace

    def read_only(self, target):
        if Path(target).is_relative_to(data):
            raise PermissionError(13, "Permission denied", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", read_only)  # a read-only folder does not stop root
    assert check(str(data), processes=1, out=None) == 0
    assert [path.name for path in data.iterdir() if path.is_file()] == []
    assert len(list(user_cache.glob("bad-files-*.tsv"))) == 1
    assert "a/cut.jpg" not in paths_of(Manifest.from_folder(data / "train", max_bad_fraction=0.1))


def test_a_folder_of_bad_files_only_is_described(tmp_path, capsys):
    (tmp_path / "data" / "a").mkdir(parents=True)
    kinds = write_bad(tmp_path / "data" / "a")
    assert check(str(tmp_path / "data"), processes=1, out=None) == 3
    assert f"{len(kinds)} files, 0 good, {len(kinds)} bad" in capsys.readouterr().out


def test_what_is_no_data_set_is_refused(data, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        check(str(tmp_path / "nowhere"), processes=1, out=None)
    (data / "val" / "unknown").mkdir()
    with pytest.raises(DataError, match="unknown: not one of the 2 training classes"):
        check(str(data), processes=1, out=None)


def program(tmp_path: Path, monkeypatch, body: str) -> None:
    """Replace what the decoding processes do with a path by `body`."""
    path = tmp_path / "decode_one.py"
    path.write_text(
        f"import json, os, signal, sys, time\nprint(json.dumps({decode_one.READY!r}), flush=True)\n"
        f"for line in sys.stdin:\n    path = json.loads(line)\n    {body}\n"
        f"    print('[1, 2, null]', flush=True)\n"
    )
    monkeypatch.setattr(decode_pool, "_PROGRAM", path)


def test_the_kind_is_carried_and_never_read_from_the_reason(data, tmp_path, monkeypatch, capsys):
    """From the decoding process over the list on the disk to the manifest."""
    (data / "train" / "a" / "odd.jpg").write_bytes(encoded())
    answer = json.dumps([0, 0, ["missing", "truncated, empty file, not a JPEG"]])
    program(tmp_path, monkeypatch, f"if 'odd' in path: print({answer!r}, flush=True); continue")
    assert check(str(data), processes=1, out=None) == 0
    assert "1 bad (1 cannot be opened)" in capsys.readouterr().out
    (bad,) = Manifest.from_folder(data / "train", max_bad_fraction=0.1).bad
    assert bad.kind == "missing"
    assert bad.reason == f"truncated, empty file, not a JPEG (listed in {NAME})"


def test_a_list_needs_no_first_line_but_a_kind_in_each(data):
    (data / NAME).write_text("train/a/tab\\there.jpg\ttruncated\tempty file\n")
    fault = Fault("truncated", f"empty file (listed in {NAME})")
    assert read_lists(data / "train") == {"a/tab\there.jpg": fault}
    (data / NAME).write_text("train/a/cut.jpg\tempty file\n")
    with pytest.raises(DataError, match=r"bad_files.tsv:1: expected path, tab, kind, tab, reason"):
        read_lists(data / "train")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("'bad' in path and os.kill(os.getpid(), signal.SIGSEGV)", "kills the decoder (SIGSEGV)"),
        ("'bad' in path and os._exit(7)", "ends the decoder (exit code 7)"),
        ("'bad' in path and (signal.alarm(1), time.sleep(9))", "takes more than 60 seconds to decode"),
    ],
)
def test_a_file_that_kills_the_decoder_is_bad_and_no_other(tmp_path, monkeypatch, body, reason):
    program(tmp_path, monkeypatch, body)
    pool = DecodePool(2)
    paths = [f"{'bad' if index % 5 == 3 else 'good'}{index}.jpg" for index in range(12)]
    results = list(pool.check(paths))
    pool.close()
    good, bad = CheckResult(1, 2, None), CheckResult(0, 0, Fault("other", reason))
    assert results == [bad if "bad" in path else good for path in paths]


def test_a_decoder_that_cannot_start_condemns_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_pool, "_PROGRAM", tmp_path / "nowhere.py")
    with pytest.raises(DataError, match=r"nowhere\.py: cannot be started"):
        list(DecodePool(1).check(["a.jpg"]))


def test_memory_and_time_of_a_decoder_are_limited():
    process = subprocess.Popen(
        [sys.executable, "-P", decode_one.__file__, "decode"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert json.loads(process.stdout.readline()) == decode_one.READY
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert re.search(
        rf"Max address space +{decode_one.MAX_MEMORY_BYTES} +{decode_one.MAX_MEMORY_BYTES} ", limits
    )
    os.kill(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group; who asked ends the decoders
    process.stdin.write(json.dumps("nowhere.jpg") + "\n")
    process.stdin.flush()
    assert "No such file" in process.stdout.readline()
    process.communicate(timeout=600)
    assert process.returncode == 0


@pytest.mark.timeout(300)
def test_a_pipe_blocks_no_decoder(tmp_path):
    """One that took the place of an image after the folder was listed."""
    os.mkfifo(tmp_path / "pipe.jpg")
    assert decode_one.check_file(str(tmp_path / "pipe.jpg"), decode=True) == CheckResult(
        0, 0, Fault("not_an_image", "not a file")
    )


def test_odd_names_arrive_and_return(tmp_path):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    names = [
        "na\u00efve \u732b.jpg",
        "tab\tin the middle.jpg",
        os.fsdecode(b"latin-1 \xe9.jpg"),
        "#1.jpg",
        'quo"te.jpg',
    ]
    for name in names:
        (folder / name).write_bytes(encoded()[:-20])
    (folder / "good.jpg").write_bytes(encoded())
    assert check(str(tmp_path / "data"), processes=1, out=None) == 3
    manifest = Manifest.from_folder(tmp_path / "data", max_bad_fraction=0.9)
    assert paths_of(manifest) == {"a/good.jpg"}
    assert {os.path.basename(file.path) for file in manifest.bad} == set(names)


def test_a_run_logs_what_the_check_found(make_job, tmp_path):
    root = write_tree(tmp_path / "data", 40, 12)
    cut = sorted((root / "train").rglob("*.jpg"))[::8]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-200])
    assert check(str(root), processes=2, out=None) == 3
    job = make_job(data={"root": str(root), "max_bad_fraction": 0.2})
    job("--max-steps", "1")
    logged = [event for event in job.events() if event["event"] == "bad_file"]
    assert sorted(event["path"] for event in logged) == sorted(map(str, cut))
    assert {event["kind"] for event in logged} == {"truncated"}
    assert f"{len(cut)} bad files are left out, see {root / NAME}\n" in job.stderr.read_text()


@pytest.mark.parametrize("fails", ["beside", "everywhere"])
def test_the_list_of_before_is_there_until_there_is_a_new_one(data, user_cache, monkeypatch, fails):
    (data / "train" / "a" / "cut.jpg").write_bytes(encoded()[:-20])
    assert check(str(data), processes=1, out=None) == 0
    before = (data / NAME).read_text()
    open_file, removed = open, []

    def full_disk(path, *args, **kwargs):
        is_list = isinstance(path, Path) and path.name.endswith(".tmp") and "bad" in path.name
        if is_list and (fails == "everywhere" or data in path.parents):
            raise OSError(28, "No space left on device", str(path))
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full_disk)
    if fails == "everywhere":
        with pytest.raises(DataError, match=r"the list of bad files cannot be written: .*No space left"):
            check(str(data), processes=1, out=None)
        assert (data / NAME).read_text() == before
    else:
        unlink = Path.unlink

        def removing(self, *args, **kwargs):
            removed.append((self.name, len(list(user_cache.glob("bad-files-*.tsv")))))
            unlink(self, *args, **kwargs)

        monkeypatch.setattr(Path, "unlink", removing)
        assert check(str(data), processes=1, out=None) == 0
        assert dict(removed)[NAME] == 1  # the new one is in the cache by then
    assert "a/cut.jpg" in read_lists(data / "train")


def test_a_split_has_no_list_of_its_own(data):
    """Its part of the list beside it is replaced."""
    for split in ("train", "val"):
        (data / split / "a" / "cut.jpg").write_bytes(encoded()[:-20])
    assert check(str(data), processes=1, out=None) == 0
    (data / "train" / "a" / "cut.jpg").unlink()
    (data / "train" / "b" / "new.jpg").write_bytes(encoded()[:-20])
    assert check(str(data / "train"), processes=1, out=None) == 0
    assert set(listed(data / NAME)) == {"train/b/new.jpg", "val/a/cut.jpg"}
    assert not (data / "train" / NAME).exists()


def test_exit_code_and_report(data, tmp_path, capsys):
    """0 where training leaves out what was found, 3 where it refuses the data or meets the files."""
    (data / "train" / "a" / "cut.jpg").write_bytes(encoded()[:-20])
    assert check(str(data), processes=1, out=None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  train/a/cut.jpg: image file is truncated")
    assert lines[1] == f"{data}/train: 17 files, 16 good, 1 bad (1 cut short)"
    assert lines[2] == "  2 ask to be turned (EXIF); images are used as they are stored"
    assert lines[-2:] == [f"the list of bad files is {data / NAME}", "training leaves them out"]
    assert check(str(data), processes=1, out=None, max_bad_fraction=0.05) == 3
    assert f"training will refuse {data}/train: more than 0.05 of it is bad\n" in capsys.readouterr().out
    assert check(str(data), processes=1, out=str(tmp_path / "list.tsv")) == 3
    assert "training does not read it" in capsys.readouterr().out


def test_packed_data_is_not_checked_but_verified(data, tmp_path):
    (data / "train" / "index.npz").touch()
    with pytest.raises(DataError, match=r"train: is packed: the same `cmtrain data pack` again verifies it"):
        check(str(data), processes=1, out=None)


def test_a_user_without_a_home_has_no_cache_and_needs_none(data, monkeypatch, capfd):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    mkdir = Path.mkdir

    def refuse(self, *args, **kwargs):
        if self.parts[1] == "nonexistent":
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert len(Manifest.from_folder(data / "train")) == 16
    assert "the list of images is not cached" in capfd.readouterr().err
