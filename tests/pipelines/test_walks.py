"""A walk over folders reports what it skips, and trouble of the machine is no property of the data."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from helpers.hostile_images import encoded, png_bomb
from helpers.images import SIDE, plan_for, write_tree
from helpers.runs import HANG_SECONDS

from cmtrain.cli.main import main
from cmtrain.commands.data_check import check
from cmtrain.commands.data_pack import pack
from cmtrain.config.load import load_config
from cmtrain.training.loaders import open_val
from pipelines.checks import bad_list, decode_one, decode_pool
from pipelines.checks.decode_one import CheckResult, Fault, check_file
from pipelines.checks.decode_pool import DecodePool
from pipelines.files import demo_images
from pipelines.files.demo_images import demo_folder
from pipelines.files.manifest import Manifest
from pipelines.loader import eval_loader, eval_windows, train_loader
from pipelines.packing import encode
from pipelines.spec import AugmentSpec, DataError, EvalSpec, Placement, visible
from pipelines.stand_ins import StandIns

TROUBLE = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT]


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(decode_one, "WAIT_SECONDS", (0.0, 0.0, 0.0))


@pytest.fixture
def data(tmp_path) -> Path:
    root = write_tree(tmp_path / "data", 9, 3)
    for path in [root, *root.rglob("*")]:  # too old to be racy
        os.utime(path, (1e9, 1e9))
    return root


Break = Callable[[str, str, int, int], list[int]]


@pytest.fixture
def broken(monkeypatch) -> Break:
    """broken("open", "0003.jpg", errno, times): the call fails on paths that end so; returns what failed."""

    def install(name: str, ending: str, number: int, times: int) -> list[int]:
        module = "builtins" if name == "open" else "os"
        original, failed = getattr(sys.modules[module], name), []

        def call(path, *args, **kwargs):
            is_path = isinstance(path, str | bytes | Path)
            if is_path and os.fsdecode(path).endswith(ending) and len(failed) < times:
                failed.append(number)
                raise OSError(number, os.strerror(number), path)
            return original(path, *args, **kwargs)

        monkeypatch.setattr(f"{module}.{name}", call)
        return failed

    return install


# What a walk skips


def test_what_a_walk_skips_is_counted_by_kind_and_told_from_the_cache_too(data, tmp_path):
    cat = data / "train" / "class0"
    for name in ("a.TIF", "b.tif", "c.heic", "none", ".DS_Store", ".hidden.jpg"):
        (cat / name).write_bytes(encoded())
    (cat / "dead").symlink_to("nowhere")
    (cat / "loop").symlink_to("loop")
    (cat / "up").symlink_to(".")
    (cat / "__MACOSX").mkdir()
    (cat / "@eaDir").mkdir()
    os.mkfifo(cat / "pipe")
    (data / "train" / "__MACOSX").mkdir()
    (data / "train" / "loop").symlink_to("loop")
    (data / "train" / "notes.txt").touch()
    (data / "train" / "flat.jpg").write_bytes(encoded())
    (data / "train" / "bad_files.tsv").touch()
    expected = {
        ".tif": 2, ".heic": 1, "without extension": 1, "hidden": 2, "linked to nowhere": 3,
        "linked to a folder that is listed already": 1, "of the system (such as __MACOSX)": 3,
        "pipe or device": 1,
        "beside the class folders": 2,
    }  # fmt: skip
    for _ in range(2):
        manifest = Manifest.from_folder(data / "train", cache_dir=tmp_path / "cache")
        assert manifest.skipped == expected
        (note,) = manifest.notes
        assert note == (
            f"{data / 'train'}: ignored: 3 linked to nowhere, 3 of the system (such as __MACOSX), 2 .tif, "
            "2 beside the class folders, 2 hidden, 1 .heic, 1 linked to a folder that is listed already, "
            "1 pipe or device, 1 of other kinds"
        )
        assert len(manifest) == 9


def test_jpegs_of_other_extensions_are_used(data):
    for name in ("a.jfif", "b.JPE"):
        (data / "train" / "class0" / name).write_bytes(encoded())
    manifest = Manifest.from_folder(data / "train")
    assert {"class0/a.jfif", "class0/b.JPE"} <= set(manifest.paths)
    assert manifest.skipped == {}


def test_lines_of_a_list_that_begin_with_a_hash_are_counted(data):
    (data / "list.csv").write_text("# a comment\nclass0/0000.jpg,a\n#class0/0003.jpg,a\nclass1/0001.jpg,b\n")
    manifest = Manifest.from_folder(data / "train", image_list=data / "list.csv")
    assert manifest.skipped == {"on lines that begin with #": 2}
    assert "2 on lines that begin with #" in manifest.notes[0]


def test_an_empty_folder_of_a_mac_is_no_class(data):
    (data / "train" / "__MACOSX").mkdir()
    assert Manifest.from_folder(data / "train").class_names == ("class0", "class1", "class2")


def test_a_run_and_its_tools_report_what_is_not_used(make_job, data, capfd):
    (data / "train" / "class0" / "x.tif").write_bytes(b"II*")
    (data / "val" / "class0" / ".DS_Store").touch()
    job = make_job(data={"root": str(data)}, train={"global_batch_size": 8})
    job("--max-steps", "1")
    assert f"{data / 'train'}: ignored: 1 .tif\n" in job.stderr.read_text()
    assert f"{data / 'val'}: ignored: 1 hidden\n" in job.stderr.read_text()
    assert check(str(data), processes=1, out=None) == 0
    assert "  ignored: 1 .tif\n" in capfd.readouterr().out
    packed = str(data.parent / "packed")
    pack(str(data), packed, shard_mib=1, processes=1, resize_shorter=None, quality=90)
    assert f"{data / 'train'}: ignored: 1 .tif\n" in capfd.readouterr().err


def test_a_path_of_a_thousand_folders(tmp_path):
    deep = tmp_path / "in" / "a"
    deep.mkdir(parents=True)
    (deep / "1.jpg").write_bytes(encoded())
    here = os.open(deep, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert len(Manifest.from_folder(tmp_path / "in")) == 1
    subprocess.run(["rm", "-rf", deep], check=True)  # too deep for pytest and shutil


# OSErrors of a walk


@pytest.mark.parametrize("number", [*TROUBLE, errno.ENOENT])
def test_a_folder_that_cannot_be_listed_is_one_line(data, broken, number):
    broken("scandir", "class1", number, 99)
    for look in (
        lambda: Manifest.from_folder(data / "train"),
        lambda: check(str(data), processes=1, out=None),
    ):
        with pytest.raises(DataError, match=rf"train/class1: {os.strerror(number)}; ") as error:
            look()
        assert "\n" not in str(error.value)
    assert not (data / "bad_files.tsv").exists()


@pytest.mark.parametrize("verb", ["train", "data stats", "data preview", "data check", "data pack"])
def test_a_folder_of_another_user_ends_every_verb_with_one_line(make_job, data, broken, capfd, verb):
    job = make_job(data={"root": str(data)}, train={"global_batch_size": 8})
    own = {"data check": [str(data)], "data pack": [str(data), str(job.folder / "packed")]}
    broken("scandir", "class1", errno.EACCES, 99)
    assert main([*verb.split(), *own.get(verb, ["--config", str(job.config)])]) == 3
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{data}/train/class1: Permission denied; ")


def test_an_evaluated_folder_of_another_user_is_one_line(data, broken):
    broken("scandir", "class1", errno.EACCES, 99)
    config = load_config("configs/demo.yaml", []).config
    with pytest.raises(DataError, match="val/class1: Permission denied"):
        open_val(config, ["class0", "class1", "class2"], str(data / "val"))


# Trouble of the machine is no verdict on a file


@pytest.mark.parametrize(
    ("call", "number"), [("stat", errno.EIO), ("open", errno.EMFILE), ("open", errno.EACCES)]
)
def test_trouble_that_passes_changes_nothing(data, broken, call, number):
    expected = Manifest.from_folder(data / "train").fingerprint
    failed = broken(call, "class0/0003.jpg", number, 2)
    manifest = Manifest.from_folder(data / "train", refresh=True)
    assert failed == [number] * 2
    assert manifest.fingerprint == expected
    assert manifest.bad == ()


@pytest.mark.parametrize("call", ["stat", "open"])
@pytest.mark.parametrize("number", TROUBLE)
def test_trouble_that_stays_ends_the_start_and_nothing_is_cached(
    data, tmp_path, broken, monkeypatch, call, number
):
    with monkeypatch.context() as patch:
        failed = broken(call, "class0/0003.jpg", number, 99)
        with pytest.raises(DataError, match=rf"class0/0003.jpg: {os.strerror(number)}; "):
            Manifest.from_folder(data / "train", cache_dir=tmp_path / "cache", max_bad_fraction=1.0)
        assert len(failed) == 4
        assert not list((tmp_path / "cache").glob("*.npz"))
        patch.undo()
        monkeypatch.undo()
    assert Manifest.from_folder(data / "train", cache_dir=tmp_path / "cache").bad == ()


def test_a_file_that_is_gone_is_a_verdict(data, broken):
    broken("stat", "class0/0003.jpg", errno.ENOENT, 99)
    (bad,) = Manifest.from_folder(data / "train", max_bad_fraction=0.2).bad
    assert bad[1:] == ("missing", "cannot be opened: No such file or directory")


def program(tmp_path: Path, monkeypatch, body: str) -> None:
    """Replace what the decoding processes answer to a path by what `body` prints."""
    path = tmp_path / "decode_one.py"
    ready = f"print(json.dumps({decode_one.READY!r}), flush=True)"
    path.write_text(
        f"import json, os, signal, sys\n{ready}\n"
        f"for line in sys.stdin:\n    path = json.loads(line)\n    {body}\n"
    )
    monkeypatch.setattr(decode_pool, "_PROGRAM", path)


def test_a_decoding_process_asks_again_and_then_reports_trouble(tmp_path, monkeypatch):
    """A real one: the file is a FIFO's place where stat fails, by a folder without rights for its user."""
    answer = "print(json.dumps([5, 'Input/output error']), flush=True)"
    program(tmp_path, monkeypatch, answer)
    pool = DecodePool(1)
    with pytest.raises(DataError, match=r"a.jpg: Input/output error; the machine is at fault, not the file"):
        list(pool.check(["a.jpg"]))
    pool.close()


def test_the_program_answers_trouble_with_its_errno(tmp_path, monkeypatch, capsys):
    def refuse(path, decode, limit_seconds):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(decode_one, "check_file", refuse)
    monkeypatch.setattr(sys, "stdin", ['"a.jpg"\n'])
    for name in ("resource.setrlimit", "signal.signal", "warnings.simplefilter"):
        monkeypatch.setattr(f"pipelines.checks.decode_one.{name}", lambda *args: None)
    decode_one._answer_requests()
    assert capsys.readouterr().out == '"ready"\n[5, "Input/output error"]\n'


def test_reading_is_not_timed_and_decoding_is(tmp_path, monkeypatch):
    """A file server that takes a minute says nothing about a file."""
    (tmp_path / "a.jpg").write_bytes(encoded())
    seen = []
    original = decode_one.Image.open
    monkeypatch.setattr(decode_one.signal, "alarm", lambda seconds: seen.append(seconds))
    monkeypatch.setattr(
        decode_one.Image,
        "open",
        lambda source, **options: seen.append(type(source).__name__) or original(source, **options),
    )
    assert check_file(str(tmp_path / "a.jpg"), decode=True, limit_seconds=9) == CheckResult(375, 500, None)
    assert seen == [9, "BytesIO", 0]


@pytest.mark.parametrize("times", [1, 9])
def test_a_decoder_that_something_killed_condemns_no_file(tmp_path, monkeypatch, times):
    """By the kernel for want of memory, or by the signal that stops a run."""
    (tmp_path / "kills").write_text("x" * times)
    kill = "text = open('kills').read(); open('kills', 'w').write(text[1:])"
    body = f"{kill}; text and os.kill(os.getpid(), signal.SIGKILL); print('[1, 2, null]', flush=True)"
    monkeypatch.chdir(tmp_path)
    program(tmp_path, monkeypatch, body)
    pool = DecodePool(1)
    if times == 1:
        assert list(pool.check(["a.jpg"])) == [CheckResult(1, 2, None)]
    else:
        with pytest.raises(DataError, match=r"a.jpg: its decoder was killed 3 times \(SIGKILL\)"):
            list(pool.check(["a.jpg"]))
    pool.close()


def test_trouble_during_a_run_replaces_no_sample(data, tmp_path, monkeypatch):
    manifest = Manifest.from_folder(data / "train")
    program(tmp_path, monkeypatch, "print(json.dumps([116, 'Stale file handle']), flush=True)")
    stand_ins = StandIns(manifest, 1.0, 1)
    with pytest.raises(DataError, match="Stale file handle"):
        stand_ins.check([0, 1])
    assert stand_ins.take_new() == []
    stand_ins.close()


def test_trouble_leaves_the_list_of_bad_files_as_it_was(data, tmp_path, monkeypatch):
    (data / "bad_files.tsv").write_text("train/class0/0000.jpg\tother\tas before\n")
    program(tmp_path, monkeypatch, "print(json.dumps([5, 'Input/output error']), flush=True)")
    with pytest.raises(DataError, match="Input/output error"):
        check(str(data), processes=1, out=None)
    assert "as before" in (data / "bad_files.tsv").read_text()


def test_packing_leaves_out_no_file_that_the_machine_cannot_read(data, monkeypatch):
    path = str(data / "train" / "class0" / "0000.jpg")

    def refuse(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=f"{path}: Input/output error"):
        encode.encode(path, None, 90)


def test_a_list_that_cannot_be_read_is_not_taken_for_an_empty_one(data, monkeypatch):
    (data / "bad_files.tsv").write_text("train/class0/0000.jpg\tother\tas before\n")
    read_text, failed = Path.read_text, []

    def refuse(self, *args, **kwargs):
        if self.name == "bad_files.tsv" and len(failed) < 9:
            failed.append(self)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(DataError, match=r"bad_files\.tsv: Input/output error"):
        Manifest.from_folder(data / "train", max_bad_fraction=0.2)


# What a killed writer left


def test_leftovers_of_killed_writers_are_removed_by_the_next_start(data, tmp_path):
    cache = tmp_path / "cache"
    Manifest.from_folder(data / "train", cache_dir=cache)
    (kept,) = cache.glob("files-*.npz")
    leftover = cache / f".{kept.name}.4000000.tmp"
    leftover.touch()
    options = {"cache_dir": cache, "refresh": True}
    start = threading.Thread(target=Manifest.from_folder, args=(data / "train",), kwargs=options)
    with FileLock(kept.with_suffix(".lock"), fallback_to_soft=False):  # its writer is alive
        start.start()
        start.join(0.5)
        assert start.is_alive()
        assert leftover.exists()
    start.join(HANG_SECONDS)
    assert not start.is_alive()
    assert not leftover.exists()


def test_leftovers_of_killed_demos_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_images, "_digits", lambda: iter([("train/0/0.jpg", encoded())]))
    for name in (".demo-digits.123", ".demo-digits.123.tmp"):  # the second one beside finished images
        (tmp_path / name / "train").mkdir(parents=True)
        assert (demo_folder("digits", tmp_path) / "train/0/0.jpg").exists()
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["demo-digits"]


# Pictures of extreme shape


def test_no_shape_makes_a_huge_image_in_evaluation():
    heights, widths = np.array([1, 60_000, 400, 100], np.int32), np.array([60_000, 2, 300, 10_000], np.int32)
    sizes, offsets = eval_windows(heights, widths, 184, 160)
    assert sizes.tolist() == [[184, 18_400], [18_400, 184], [245, 184], [184, 18_400]]
    assert (offsets + 160 <= sizes).all()


def test_extreme_shapes_are_trained_on_and_evaluated(tmp_path):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    for height, width in ((1, 60_000), (30_000, 1), (3, 20_000), (1, 1)):
        (folder / f"{height}x{width}.png").write_bytes(png_bomb(height, width))
    manifest = Manifest.from_folder(tmp_path / "in")
    assert len(manifest) == 4
    plan = plan_for(manifest, global_batch_size=4, micro_batch_size=2)
    loaders = (
        train_loader(manifest, plan, AugmentSpec(SIDE), Placement()),
        eval_loader(manifest, EvalSpec(SIDE, 56), Placement(), batch_size=2),
    )
    for loader in loaders:
        assert [batch.images.shape for batch in loader.epoch(0)] == [(2, 3, SIDE, SIDE)] * 2
        assert loader.take_bad_files() == []
        loader.close()


def test_a_shape_that_no_jpeg_can_have_is_left_out_of_shards(tmp_path):
    path = tmp_path / "long.png"
    path.write_bytes(png_bomb(2, 70_000))
    assert encode.encode(str(path), None, 90).fault == Fault(
        "too_large", "2x70000 pixels; a JPEG has at most 65,500 a side"
    )


def test_more_pixels_than_allowed_are_refused_by_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_one, "MAX_PIXELS", 5_000)
    path = tmp_path / "a.png"
    path.write_bytes(png_bomb(51, 100))
    for decode in (False, True):
        result = check_file(str(path), decode)
        assert result.fault == Fault("too_large", "51x100 pixels, more than 64 million pixels")


# Names from outside


def test_names_with_escapes_take_one_line_each(tmp_path, capsys):
    folder = tmp_path / "data" / "#a"
    folder.mkdir(parents=True)
    names = [
        "x\x1b]52;c;ZQ==\x07\nfinished.jpg", "\u202egpj.exe.jpg", r"back\x41slash\\.jpg", "tab\t.jpg",
        "\r.jpg", os.fsdecode(b"latin \xe9.jpg"), "\U000e0001.jpg",
    ]  # fmt: skip
    for name in names:
        (folder / name).write_bytes(b"no image")
    (folder / "good.jpg").write_bytes(encoded())
    assert check(str(tmp_path / "data"), processes=1, out=None) == 3
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert r"x\x1b]52;c;ZQ==\x07\nfinished.jpg: not a JPEG" in out
    text = (tmp_path / "data" / "bad_files.tsv").read_text()
    assert len(text.splitlines()) == 1 + len(names)
    assert all(cell.isprintable() for line in text.splitlines() for cell in line.split("\t"))
    assert set(bad_list.read_lists(tmp_path / "data")) == {f"#a/{name}" for name in names}


def test_visible_leaves_what_is_printable():
    assert visible("na\u00efve \u732b \U0001f408 \u05d0") == "na\u00efve \u732b \U0001f408 \u05d0"
    assert visible("a\tb\u2028\udce9\x85") == r"a\tb\u2028\udce9\x85"
