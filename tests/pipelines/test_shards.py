"""A packed data set gives the samples and pixels of the folder it was packed from, whole or not at all."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import SPEC, pixels
from helpers.photographs import photographs, write_folder
from helpers.runs import HANG_SECONDS, ROOT
from PIL import Image

from cmtrain.commands.data_pack import pack
from pipelines.checks.bad_list import BadFile
from pipelines.dali import graphs
from pipelines.files.manifest import Manifest
from pipelines.files.shards import SliceReader, damage, is_packed
from pipelines.loader import eval_loader, train_loader
from pipelines.plan import Plan
from pipelines.spec import UNREADABLE, DataError, EvalSpec, Placement

OPTIONS = {"resize_shorter": None, "quality": 90, "shard_mib": 1, "processes": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Photographs of many sizes, 230 for training and 31 for validation: 2 MB, so three shards and one."""
    root = tmp_path_factory.mktemp("source")
    write_folder(root / "train", 230)
    write_folder(root / "val", 31)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def packed(source, cache, tmp_path_factory) -> Path:
    """`source`, packed without a change."""
    destination = tmp_path_factory.mktemp("packed")
    pack(str(source), str(destination), **OPTIONS, cache_dir=str(cache))
    return destination


def start(
    source: Path, destination: Path, cache: Path, largest_file_bytes: int = -1
) -> subprocess.Popen[str]:
    """`pack` in a process of its own, which may write no larger file than this."""
    script = (
        "import sys; from cmtrain.commands.data_pack import pack; from pipelines.spec import DataError\n"
    )
    script += f"try: pack({str(source)!r}, {str(destination)!r}, **{OPTIONS!r}, cache_dir={str(cache)!r})\n"
    script += "except DataError as error: sys.exit(str(error))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))

    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sequential(shards: list[Path]) -> Iterator[dict[str, bytes]]:
    """Samples as webdataset reads them: one pass, neighbouring members with the same key are one sample."""
    sample: dict[str, bytes] = {}
    for shard in shards:
        with tarfile.open(shard, "r|") as members:
            for member in members:
                key, _, extension = member.name.partition(".")
                if sample and sample["__key__"] != key.encode():
                    yield sample
                    sample = {}
                file = members.extractfile(member)
                assert file is not None
                sample |= {"__key__": key.encode(), extension: file.read()}
    yield sample


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_a_sequential_reader_sees_every_file_unchanged_with_its_label(source, packed):
    shards = sorted((packed / "train").glob("shard-*.tar"))
    assert len(shards) >= 2
    samples = list(sequential(shards))
    assert {frozenset(sample) for sample in samples} == {frozenset({"__key__", "jpg", "cls"})}
    found = sorted((f"c{sample['cls'].decode()}", sample["jpg"]) for sample in samples)
    assert found == sorted(
        (path.parent.name, path.read_bytes()) for path in (source / "train").rglob("*.jpg")
    )
    labels = [int(sample["cls"]) for sample in samples]
    assert sum(a != b for a, b in pairwise(labels)) > len(labels) / 2, "classes are not mixed"


def test_the_index_is_the_manifest_of_the_folder_in_its_order(source, packed, cache):
    folder = Manifest.from_folder(source / "train", cache_dir=cache)
    shards = Manifest.from_shards(packed / "train")
    assert list(shards.paths) == list(folder.paths)
    assert shards.class_names == folder.class_names
    for name in ("labels", "heights", "widths"):
        np.testing.assert_array_equal(getattr(shards, name), getattr(folder, name), strict=True)
    assert shards.packed is not None
    read = SliceReader(shards.packed)
    chosen = np.array([7, 3, 229, 3])
    expected = [Path(folder.file(index)).read_bytes() for index in chosen.tolist()]
    assert [view.tobytes() for view in read(chosen)] == expected
    assert [shards.packed.read(index) for index in chosen.tolist()] == expected
    with shards.files([7, 3]) as paths:
        assert [Path(path).read_bytes() for path in paths] == expected[:2]


def both(loader, world: int = 1) -> list[tuple[int, str]]:
    """(sample, digest of its pixels) of all ranks' epoch 1, each loader closed."""
    found = []
    for rank in range(world):
        made = loader(rank)
        found += pixels(made, 1)
        made.close()
    return found


def test_batches_from_shards_are_those_from_the_folder_bit_for_bit(source, packed, cache):
    folder = Manifest.from_folder(source / "train", cache_dir=cache)
    shards = Manifest.from_shards(packed / "train")

    def training(manifest, world):
        plan = Plan(seed=3, num_samples=len(manifest), global_batch_size=24, micro_batch_size=6)
        return both(lambda rank: train_loader(manifest, plan, SPEC, Placement(rank, world)), world)

    def evaluation(manifest, world):
        spec = EvalSpec(48, 56)
        return both(lambda rank: eval_loader(manifest, spec, Placement(rank, world), batch_size=9), world)

    for run in (training, evaluation):
        assert run(shards, 1) == run(folder, 1), run.__name__
        assert sorted(run(shards, 2)) == sorted(run(folder, 1)), run.__name__


def test_a_subset_from_shards_is_the_subset_of_the_folder(source, packed, cache):
    folder = Manifest.from_folder(source / "train", cache_dir=cache).fraction(0.3, seed=1)
    shards = Manifest.from_shards(packed / "train").fraction(0.3, seed=1)
    assert list(shards.paths) == list(folder.paths)
    assert shards.packed is not None
    assert shards.packed.read(11) == Path(folder.file(11)).read_bytes()


def test_reduced_images_have_exactly_that_shorter_side_and_none_is_enlarged(source, cache, tmp_path):
    pack(str(source), str(tmp_path), **OPTIONS | {"resize_shorter": 150}, cache_dir=str(cache))
    folder = Manifest.from_folder(source / "train", cache_dir=cache)
    shards = Manifest.from_shards(tmp_path / "train")
    assert shards.packed is not None
    was_small = np.minimum(folder.heights, folder.widths) <= 150
    assert 20 < was_small.sum() < 210
    for index in range(len(shards)):
        data, original = shards.packed.read(index), Path(folder.file(index)).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (shards.widths[index], shards.heights[index])
            if was_small[index]:
                assert data == original
                continue
            assert min(image.size) == 150
            with Image.open(io.BytesIO(original)) as before:
                expected = before.resize(image.size, Image.Resampling.LANCZOS)
            error = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).mean()
            assert error < 8  # quality 90; these photographs are noisier than most
    assert Manifest.from_shards(tmp_path / "train").fingerprint != folder.fingerprint


def test_a_killed_pack_goes_on_and_equals_one_that_was_left_alone(source, packed, cache, tmp_path):
    process = start(source, tmp_path, cache)
    while not (tmp_path / "train" / "shard-000000.tar").exists():
        assert process.poll() is None
        time.sleep(0.002)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate(timeout=600)
    assert not (tmp_path / "train" / "index.npz").exists()
    with pytest.raises(DataError, match=r"no index\.npz: give the same"):
        is_packed(tmp_path / "train")
    for worker in workers:  # a worker whose parent is gone ends, too
        deadline = time.monotonic() + HANG_SECONDS
        while (
            Path(f"/proc/{worker}").exists()
            and "\nState:\tZ" not in Path(f"/proc/{worker}/status").read_text()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    kept = (tmp_path / "train" / "shard-000000.tar").stat().st_ino
    pack(str(source), str(tmp_path), **OPTIONS, cache_dir=str(cache))
    assert contents(tmp_path) == contents(packed)
    assert (tmp_path / "train" / "shard-000000.tar").stat().st_ino == kept


def test_a_full_disk_is_one_line_and_nothing_half_written_is_left(source, packed, cache, tmp_path):
    process = start(source, tmp_path, cache, largest_file_bytes=500_000)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert err.splitlines()[-1] == (
        f"{tmp_path / 'train'}: cannot be written: File too large; "
        "finished shards are kept, the same command goes on from there"
    )
    assert "Traceback" not in err
    assert contents(tmp_path) == {}
    pack(str(source), str(tmp_path), **OPTIONS, cache_dir=str(cache))
    assert contents(tmp_path) == contents(packed)


def test_a_kept_shard_that_has_changed_is_written_again(source, packed, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pipelines.packing.shard_writer.write_index", lambda *_: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):
        pack(str(source), str(tmp_path), **OPTIONS, cache_dir=str(cache))
    monkeypatch.undo()
    flip(tmp_path / "train" / "shard-000001.tar", 40_000)
    pack(str(source), str(tmp_path), **OPTIONS, cache_dir=str(cache))
    assert contents(tmp_path) == contents(packed)


@pytest.mark.parametrize("place", ["image", "header"])
def test_a_flipped_byte_is_found(source, packed, cache, tmp_path, place):
    for name, content in contents(packed).items():
        put(tmp_path / name, content)
    manifest = Manifest.from_shards(tmp_path / "train")
    slices = manifest.packed
    assert damage(slices, manifest.paths) == []
    member = 17
    shard = tmp_path / "train" / slices.shard_names[slices.shards[member]]
    offset = int(slices.offsets[member])
    flip(shard, offset + 300 if place == "image" else offset - 300)
    (found,) = damage(slices, manifest.paths)
    assert found.startswith(f"{shard}: ")
    assert (manifest.paths[member] in found) == (place == "image")
    with pytest.raises(DataError, match=r"shard-00000\d.tar: .*has changed.*pack again"):
        pack(str(source), str(tmp_path), **OPTIONS, cache_dir=str(cache))


def test_an_image_overwritten_in_its_shard_costs_a_few_pipelines_once(packed, tmp_path, monkeypatch):
    built, decode_graph = [], graphs.decode_graph
    monkeypatch.setattr(graphs, "decode_graph", lambda *a, **k: built.append(k) or decode_graph(*a, **k))
    for name, content in contents(packed / "val").items():
        put(tmp_path / name, content)
    manifest = Manifest.from_shards(tmp_path)
    member, slices = 5, manifest.packed
    with (tmp_path / slices.shard_names[slices.shards[member]]).open("r+b") as file:
        file.seek(slices.offsets[member])
        file.write(b"x" * int(slices.size_bytes[member]))
    loader = eval_loader(manifest, EvalSpec(32, 36), Placement(max_bad_fraction=0.5), batch_size=8)
    counts = []
    for _ in range(3):
        batches = list(loader.epoch(0))
        labels = torch.cat([batch.labels for batch in batches]).tolist()
        indices = torch.cat([batch.indices for batch in batches]).tolist()
        assert [index for index, label in zip(indices, labels, strict=True) if label == UNREADABLE] == [
            member
        ]
        counts.append(len(built))
    loader.close()
    assert counts[0] <= 4
    assert counts == counts[:1] * 3


def test_missing_cut_and_damaged_parts_are_named(packed, tmp_path):
    for name, content in contents(packed).items():
        put(tmp_path / name, content)
    shard = tmp_path / "train" / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=r"shard-000001\.tar: \d+ bytes, not the \d+ of index"):
        Manifest.from_shards(tmp_path / "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: missing"):
        Manifest.from_shards(tmp_path / "train")
    shard.write_bytes(whole)
    index = tmp_path / "train" / "index.npz"
    index.write_bytes(index.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"index\.npz: cannot be read"):
        Manifest.from_shards(tmp_path / "train")


def test_an_index_keeps_the_kinds_of_bad_files(packed, tmp_path):
    for name, content in contents(packed).items():
        put(tmp_path / name, content)
    with np.load(tmp_path / "train" / "index.npz") as data:
        columns = dict(data)
    bad = ("a/cut.jpg", "truncated", "ends early")
    np.savez(tmp_path / "train" / "index.npz", **columns | {"bad": np.array([bad])})
    assert Manifest.from_shards(tmp_path / "train").bad == (BadFile(*bad),)
    np.savez(tmp_path / "train" / "index.npz", **columns | {"bad": np.array([bad[:2]])})
    with pytest.raises(DataError, match=r"index\.npz: cannot be read .*pack again"):
        Manifest.from_shards(tmp_path / "train")


def test_a_destination_of_something_else_is_left_alone(source, packed, cache, tmp_path):
    for name, content in contents(packed).items():
        put(tmp_path / "other" / name, content)
    with pytest.raises(DataError, match="was packed with another resize_shorter, quality; remove it"):
        pack(
            str(source),
            str(tmp_path / "other"),
            **OPTIONS | {"resize_shorter": 9, "quality": 80},
            cache_dir=str(cache),
        )
    put(tmp_path / "mine" / "train" / "shard-000000.tar", b"mine")
    with pytest.raises(DataError, match=r"holds shard-000000\.tar, which no pack has put there"):
        pack(str(source), str(tmp_path / "mine"), **OPTIONS, cache_dir=str(cache))
    assert contents(tmp_path / "mine") == {"train/shard-000000.tar": b"mine"}
    with pytest.raises(DataError, match="holds c0, which no pack has put there"):
        pack(str(source), str(source), **OPTIONS, cache_dir=str(cache))
    with pytest.raises(DataError, match="is packed already"):
        pack(str(packed), str(tmp_path / "twice"), **OPTIONS, cache_dir=str(cache))
    with pytest.raises(DataError, match="holds neither train/<class>/ nor val/<class>/"):
        pack(str(tmp_path / "nowhere"), str(tmp_path / "out"), **OPTIONS, cache_dir=str(cache))


def test_two_packers_do_not_share_a_destination(source, cache, tmp_path, monkeypatch):
    def meanwhile(*_) -> None:
        pack(str(source), str(tmp_path), **OPTIONS, cache_dir=str(cache))

    monkeypatch.setattr("pipelines.packing.shard_writer.write_index", meanwhile)
    with pytest.raises(DataError, match="another process is packing there"):
        pack(str(source), str(tmp_path), **OPTIONS, cache_dir=str(cache))


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("labels", lambda labels: labels[:-1]),
        ("labels", lambda labels: labels + 100),
        ("labels", lambda labels: labels - 1),
        ("labels", lambda labels: labels.astype(float)),
        ("heights", lambda heights: heights[:, None]),
        ("widths", lambda widths: widths * 0),
        ("shards", lambda shards: shards + 3),
        ("offsets", lambda offsets: offsets + 10**9),
        ("size_bytes", lambda sizes: -sizes),
    ],
)
def test_an_index_that_contradicts_itself_or_its_shards_is_refused(packed, tmp_path, column, change):
    for name, content in contents(packed).items():
        put(tmp_path / name, content)
    index = tmp_path / "val" / "index.npz"
    with np.load(index) as data:
        columns = dict(data)
    np.savez(index, **columns | {column: change(columns[column])})
    with pytest.raises(DataError, match=r"index\.npz: cannot be read \(.*\); remove .*/val and pack again"):
        Manifest.from_shards(tmp_path / "val")


@pytest.mark.parametrize("inside", ["train", "val/c0", "link"])
def test_shards_among_the_classes_of_their_source_are_refused(source, cache, tmp_path, inside):
    (tmp_path / "link").symlink_to(source / "train")
    place = tmp_path / "link" / "packed" if inside == "link" else source / inside / "packed"
    with pytest.raises(DataError, match=r"/packed: lies in .*, whose folders are classes; give another"):
        pack(str(source), str(place), **OPTIONS, cache_dir=str(cache))
    assert not place.exists()


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(photographs()[1]).resize((96, 64))


def test_awkward_files(photo, cache, tmp_path):
    root = tmp_path / "in" / "train"
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    grey16 = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    images = {
        "a/\u732b.v2.jpg": jpeg(photo),
        os.fsdecode(b"a/not utf-8 \xff.jpg"): jpeg(photo, quality=50),
        "a/deep/er/1.jpeg": jpeg(photo, quality=60),
        "a/turned.jpg": jpeg(photo, exif=turned),
        "a/upright.jpg": jpeg(photo, exif=upright),
        "b c/grey.jpg": jpeg(photo.convert("L")),
        "b c/cmyk.jpg": jpeg(photo.convert("CMYK")),
        "b c/progressive.JPG": jpeg(photo, progressive=True),
    }
    for name, content in images.items():
        put(root / name, content)
    others = {
        "rgba.png": photo.convert("RGBA"),
        "grey16.png": Image.fromarray(grey16),
        "palette.png": photo.quantize(64),
        "same stem.png": photo,
        "same stem.bmp": photo,
        "lossless.webp": photo,
        "bits.png": photo.convert("1"),
    }
    for name, image in others.items():
        image.save(root / "b c" / name, **({"lossless": True} if name.endswith("webp") else {}))
    bad = {"a/cut.jpg": jpeg(photo)[:-900], "a/text.jpg": b"not a picture", "a/empty.jpg": b""}
    for name, content in bad.items():
        put(root / name, content)

    arguments = {**OPTIONS, "cache_dir": str(cache)}
    with pytest.raises(DataError, match="images cannot be used"):
        pack(str(tmp_path / "in"), str(tmp_path / "out"), **arguments)
    pack(str(tmp_path / "in"), str(tmp_path / "out"), **arguments, max_bad_fraction=0.2)
    shards = Manifest.from_shards(tmp_path / "out" / "train")
    assert shards.packed is not None
    stored = {path: shards.packed.read(index) for index, path in enumerate(shards.paths)}
    assert stored.keys() == images.keys() | {f"b c/{name}" for name in others}
    kinds = {file.path.removeprefix(f"{root}/"): file.kind for file in shards.bad}
    assert kinds == {"a/cut.jpg": "truncated", "a/text.jpg": "not_an_image", "a/empty.jpg": "truncated"}

    assert {name for name, content in images.items() if stored[name] != content} == {"a/turned.jpg"}
    with Image.open(io.BytesIO(stored["a/turned.jpg"])) as image:
        assert 0x0112 not in image.getexif()
        assert image.size == photo.size
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(jpeg(photo)))))
    for name in others:
        with Image.open(io.BytesIO(stored[f"b c/{name}"])) as image:
            assert image.format == "JPEG"
            assert image.mode == ("L" if name.startswith(("grey", "bits")) else "RGB")
            before = (
                grey16[..., None] / 257
                if name == "grey16.png"
                else Image.open(root / "b c" / name).convert("RGB")
            )
            limit = 12 if name in ("bits.png", "palette.png") else 6  # dithered
            assert (
                np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(before, float)).mean() < limit
            ), name

    pack(str(tmp_path / "in"), str(tmp_path / "worse"), **arguments | {"quality": 80}, max_bad_fraction=0.2)
    worse = Manifest.from_shards(tmp_path / "worse" / "train")
    np.testing.assert_array_equal(worse.heights, shards.heights)
    assert worse.fingerprint != shards.fingerprint, "other pixels under an equal fingerprint"

    pack(
        str(tmp_path / "in"),
        str(tmp_path / "small"),
        **arguments | {"resize_shorter": 32},
        max_bad_fraction=0.2,
    )
    shards = Manifest.from_shards(tmp_path / "small" / "train")
    assert set(shards.heights) == {32}
    assert set(shards.widths) == {48}
    assert shards.packed is not None
    for index, path in enumerate(shards.paths):
        with Image.open(io.BytesIO(shards.packed.read(index))) as image:
            assert image.mode == ("L" if path.startswith(("b c/grey", "b c/bits")) else "RGB")


def test_lists_are_packed_in_their_order_and_validation_takes_training_labels(source, cache, tmp_path):
    put(tmp_path / "in/x/1.jpg", (source / "val/c0/000.jpg").read_bytes())
    put(tmp_path / "in/x/2.jpg", (source / "val/c1/001.jpg").read_bytes())
    put(tmp_path / "in/train.txt", b"x/2.jpg,dog\nx/1.jpg,ant\n")
    put(tmp_path / "in/val.txt", b"x/1.jpg,dog\n")
    lists = {"train_list": "train.txt", "val_list": "val.txt"}
    pack(str(tmp_path / "in"), str(tmp_path / "out"), **OPTIONS, cache_dir=str(cache), **lists)
    train = Manifest.from_shards(tmp_path / "out" / "train")
    assert list(train.paths) == ["x/2.jpg", "x/1.jpg"]
    assert train.labels.tolist() == [1, 0]
    val = Manifest.from_shards(tmp_path / "out" / "val", class_names=train.class_names)
    assert val.labels.tolist() == [1]
    renamed = Manifest.from_shards(tmp_path / "out" / "val", class_names=("dog", "ant", "eel"))
    assert renamed.labels.tolist() == [0]
    with pytest.raises(DataError, match="dog is not one of the 1 training classes"):
        Manifest.from_shards(tmp_path / "out" / "val", class_names=("ant",))


def test_an_image_that_went_bad_in_its_shard_costs_one_sample(packed, tmp_path):
    for name, content in contents(packed).items():
        put(tmp_path / name, content)
    shards = Manifest.from_shards(tmp_path / "val")
    assert shards.packed is not None
    with (tmp_path / "val" / "shard-000000.tar").open("r+b") as file:
        file.seek(int(shards.packed.offsets[5]))
        file.write(bytes(2000))
    plan = Plan(seed=3, num_samples=len(shards), global_batch_size=31, micro_batch_size=31)
    loader = train_loader(shards, plan, SPEC, Placement())
    (batch,) = loader.epoch(0)
    assert 5 not in batch.indices
    (bad,) = loader.take_bad_files()
    loader.close()
    assert bad.path == shards.file(5)
