"""Test a packed split that is read from a bucket on loopback: its pixels, its requests, its faults."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bucket import KEY, SECRET, Bucket, bucket
from helpers.photographs import write_folder
from helpers.runs import ROOT

from cmtrain.commands.data_pack import pack
from pipelines.files import mirror as mirrors
from pipelines.files import objects, shards
from pipelines.files.manifest import Manifest
from pipelines.files.mirror import mirror_split
from pipelines.loader import eval_loader, train_loader
from pipelines.plan import Plan
from pipelines.spec import UNREADABLE, AugmentSpec, DataError, EvalSpec, Placement

OPTIONS = {"resize_shorter": None, "quality": 90, "shard_mib": 1, "processes": 1}
SPEC = AugmentSpec(32, color_jitter=0.4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """230 photographs, 2 MB in three shards."""
    root = tmp_path_factory.mktemp("source")
    write_folder(root / "train", 230)
    write_folder(root / "val", 31)
    destination = tmp_path_factory.mktemp("packed")
    pack(str(root), str(destination), **OPTIONS, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return destination


@pytest.fixture
def served(packed, monkeypatch):
    monkeypatch.setattr(mirrors, "CHUNK_BYTES", 64 << 10)  # some 30 chunks
    monkeypatch.setattr(objects, "FIRST_WAIT_SECONDS", 0.01)
    with bucket(packed) as served:
        for name, value in served.environment.items():
            monkeypatch.setenv(name, value)
        yield served


def copy_of(served: Bucket, folder: Path, room_bytes: int = 1 << 40, split: str = "train") -> Manifest:
    gc.collect()  # a copy is in use as long as its manifest lives
    mirror_split(f"s3://images/{split}", folder / split, room_bytes)
    return Manifest.from_shards(folder / split)


def batches(manifest: Manifest, epochs: int = 1, start: int = 0, rank: int = 0, world: int = 1) -> list:
    plan = Plan(3, len(manifest), 40, 20)
    loader = train_loader(manifest, plan, SPEC, Placement(rank, world))
    found = [batch for epoch in range(epochs) for batch in loader.epoch(epoch, start if epoch == 0 else 0)]
    loader.close()
    return found


def assert_equal(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def expected(packed) -> list:
    return batches(Manifest.from_shards(packed / "train"), epochs=2)


def test_pixels_order_and_identity_are_those_of_the_disk(served, packed, expected, tmp_path):
    manifest = copy_of(served, tmp_path)
    assert manifest.fingerprint == Manifest.from_shards(packed / "train").fingerprint
    assert_equal(batches(manifest, epochs=2), expected)


def test_a_reader_waits_until_its_images_are_there(served, packed, tmp_path):
    """Without the loader, which checks the files of a batch that fails, and so would fetch them late."""
    served.latency = 0.02
    slices, of_disk = (
        manifest.packed for manifest in (copy_of(served, tmp_path), Manifest.from_shards(packed / "train"))
    )
    indices = np.arange(230)[::-1]
    slices.mirror.begin(slices, indices)
    ours, theirs = shards.SliceReader(slices), shards.SliceReader(of_disk)
    for part in np.split(indices, 10):
        pairs = zip(ours(part), theirs(part), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)


def test_each_byte_is_fetched_once_and_never_again(served, expected, tmp_path):
    assert_equal(batches(copy_of(served, tmp_path)), expected[: len(expected) // 2])
    first = served.of_images()
    assert len(first) == len(set(first)) > 20
    served.requests.clear()
    assert_equal(batches(copy_of(served, tmp_path), epochs=2), expected)
    assert [path for path, _ in served.requests] == ["/images/train/index.npz"]  # is it still the same?


def test_images_that_need_more_than_the_room_are_refused_before_one_is_fetched(served, tmp_path):
    copy_of(served, tmp_path / "enough")
    served.requests.clear()
    what = r"s3://images/train: takes 0.0 GB of local disk, and 0.0 GB of data.cache_gb are left; raise it"
    with pytest.raises(DataError, match=what):
        copy_of(served, tmp_path / "short", 1 << 20)
    assert [path for path, _ in served.requests] == ["/images/train/index.npz"]


def test_a_rank_fetches_its_share_alone_in_the_order_of_the_plan(served, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(mirrors, "REQUESTS", 1)
    slices = copy_of(served, tmp_path).packed
    order = np.random.default_rng(0).permutation(230)
    slices.mirror.begin(slices, order)
    slices.mirror._pool.shutdown()  # waits for its end
    wanted = list(
        dict.fromkeys(chunk for chunk in slices.mirror.chunks(slices)[order].tolist() if chunk % 2)
    )
    begins = [
        (slices.shard_names[slices.shards[images[0]]], slices.offsets[images].min())
        for images in (np.flatnonzero(slices.mirror.chunks(slices) == chunk) for chunk in wanted)
    ]
    asked = [(path.split("/")[-1], int(of[6:].split("-")[0])) for path, of in served.of_images()]
    assert asked == begins


def test_the_ranks_of_a_host_share_one_copy(served, expected, tmp_path, monkeypatch):
    """Each fetches its share; one that waits too long for another's fetches it itself."""
    monkeypatch.setattr(shards, "HELP_SECONDS", 0.05)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    copy_of(served, tmp_path)
    found = []
    for rank in (0, 1):  # one after the other: the first gets no help
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(batches(Manifest.from_shards(tmp_path / "train"), rank=rank, world=2))
    assert_equal(
        [batch for pair in zip(*found, strict=True) for batch in pair], expected[: len(expected) // 2]
    )
    assert len(served.of_images()) == len(set(served.of_images()))


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "corrupt"])
def test_a_store_that_fails_now_and_then_costs_time_only(served, expected, tmp_path, fault):

    def first_try(path: str, number: int) -> str | None:
        is_first = served.requests.index(served.requests[number]) == number
        return fault if is_first and number % 3 == 1 else None

    served.fault = first_try
    before = objects.COUNTS.copy()
    assert_equal(batches(copy_of(served, tmp_path)), expected[: len(expected) // 2])
    reason = "corrupt" if fault == "corrupt" else "failed"
    assert objects.COUNTS[reason] - before[reason] > 5
    assert objects.COUNTS["requests"] - before["requests"] == len(served.requests)


def test_a_store_that_stays_wrong_costs_the_samples_that_it_damages(served, packed, tmp_path):
    """As a damaged file does: others take their place, and the next run asks for them again."""
    manifest = copy_of(served, tmp_path)
    slices = manifest.packed
    chunks = slices.mirror.chunks(slices)
    begin = int(slices.offsets[chunks == chunks[7]].min())
    name = slices.shard_names[slices.shards[7]]

    def fault(path: str, number: int) -> str | None:
        is_chunk = served.requests[number][1].startswith(f"bytes={begin}-")
        return "corrupt" if path.endswith(name) and is_chunk else None

    served.fault = fault
    plan = Plan(3, len(manifest), 40, 20)
    loader = train_loader(manifest, plan, SPEC)
    images = sum(len(batch.labels) for batch in loader.epoch(0))
    bad = loader.take_bad_files()
    loader.close()
    assert images == 40 * plan.steps_per_epoch
    assert 1 <= len(bad) <= 2  # 600 wrong bytes lie in one image or two
    assert all(file.kind == "not_an_image" for file in bad)
    asked = [path for path, of in served.of_images() if of.startswith(f"bytes={begin}-")]
    assert sum(path.endswith(name) for path in asked) == objects.TRIES_IF_WRONG
    served.fault, served.latency = (lambda path, number: None), 0.02
    again = copy_of(served, tmp_path)
    slices, of_disk = again.packed, Manifest.from_shards(packed / "train")
    slices.mirror.begin(slices, np.roll(np.arange(len(again)), -8))  # chunk 7's images come last
    places = np.flatnonzero(chunks == chunks[7])
    pairs = zip(shards.SliceReader(slices)(places), shards.SliceReader(of_disk.packed)(places), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    served.latency = 0
    assert_equal(batches(again), batches(of_disk))


@pytest.mark.parametrize(("fault", "what"), [
    ("403", "the store refuses to give it (HTTP 403): credentials are missing, have expired"),
    ("400", "the store refuses to give it (HTTP 400): credentials are missing, have expired"),
    ("301", "the store refuses to give it: credentials are missing, have expired"),
    ("404", "is not there"),
    ("500", "the store has failed for 0 minutes (HTTP 500); nothing was left out"),
])  # fmt: skip
def test_a_store_that_fails_for_good_ends_the_run_in_one_line_without_a_secret(
    served, tmp_path, monkeypatch, fault, what
):
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.2)
    manifest = copy_of(served, tmp_path)
    served.fault = lambda path, number: fault if number > 8 else None
    with pytest.raises(DataError) as raised:
        batches(manifest)
    assert str(raised.value).startswith("s3://images/train/shard-00000")
    assert what in str(raised.value)
    assert "\n" not in str(raised.value)
    assert KEY not in str(raised.value)
    assert SECRET not in str(raised.value)
    served.fault, came = lambda path, number: None, set(served.of_images()[:8])
    while np.count_nonzero(np.fromfile(tmp_path / "train" / "states", np.uint8)) < len(came):
        time.sleep(0.01)
    served.requests.clear()
    batches(copy_of(served, tmp_path))
    assert not came & set(served.of_images())  # it is kept


def test_evaluation_sees_each_image_once(served, packed, tmp_path):
    found = []
    for manifest in (copy_of(served, tmp_path, split="val"), Manifest.from_shards(packed / "val")):
        loader = eval_loader(manifest, EvalSpec(32, 36), batch_size=8)
        found.append(list(loader.epoch(0)))
        loader.close()
    assert_equal(*found)
    assert sum(len(batch.labels) for batch in found[0]) == 31
    assert all(UNREADABLE not in batch.labels for batch in found[0])


def test_another_version_of_the_images_replaces_the_copy_unless_a_run_uses_it(served, packed, tmp_path):
    manifest = copy_of(served, tmp_path)
    batches(manifest)
    index = (packed / "train" / "index.npz").read_bytes()
    try:
        with np.load(packed / "train" / "index.npz") as data:
            columns = dict(data) | {"recipe": "another"}
        np.savez(packed / "train" / "index.npz", **columns)
        with pytest.raises(DataError, match="another version of the images than the run that is at work"):
            copy_of(served, tmp_path)
        assert len(batches(manifest)) == 10  # not harmed
        del manifest
        served.requests.clear()
        batches(copy_of(served, tmp_path))
        assert len(served.of_images()) > 20
    finally:
        (packed / "train" / "index.npz").write_bytes(index)


@pytest.mark.parametrize("damage", [b"", b"\0" * 1000])
def test_a_damaged_index_in_the_copy_is_fetched_again(served, expected, tmp_path, damage):
    copy_of(served, tmp_path)
    (tmp_path / "train" / "index.npz").write_bytes(damage)
    assert_equal(batches(copy_of(served, tmp_path)), expected[: len(expected) // 2])


def test_a_process_whose_store_fails_ends_at_once(served, tmp_path):
    """Its threads would ask again for minutes."""
    code = f"""
import sys
from pathlib import Path
from pipelines.files.manifest import Manifest
from pipelines.files.mirror import mirror_split
from pipelines.files import mirror, objects
from pipelines.spec import DataError
mirror.CHUNK_BYTES, objects.PATIENCE_SECONDS, objects.FIRST_WAIT_SECONDS = 1 << 14, 0.5, 0.1
mirror_split("s3://images/train", Path({str(tmp_path)!r}, "train"), 1 << 40)
packed = Manifest.from_shards(Path({str(tmp_path)!r}, "train")).packed
packed.mirror.begin(packed, packed.shards.argsort())
try:
    packed.mirror.wait_for(packed.mirror.chunks(packed))
except DataError as error:
    objects.PATIENCE_SECONDS = 1e6  # of the threads that have not given up yet
    print("leaving")
"""
    served.fault = lambda path, number: "500" if path.endswith(".tar") else None
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert (done.stdout, done.returncode) == ("leaving\n", 0)


def test_after_a_restart_of_the_host_all_is_fetched_again(served, expected, tmp_path):
    """A power failure may have left a hole where a chunk was marked as written."""
    batches(copy_of(served, tmp_path))
    source = json.loads((tmp_path / "train" / "source.json").read_bytes())
    (tmp_path / "train" / "source.json").write_text(json.dumps(source | {"boot": "another"}))
    for path in (tmp_path / "train").glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_equal(batches(copy_of(served, tmp_path)), expected[: len(expected) // 2])


@pytest.mark.parametrize("name", ["../../../escaped.tar", "/tmp/escaped.tar", "index.npz"])
def test_an_index_that_names_other_files_than_shards_is_refused(served, packed, tmp_path, name):
    (tmp_path / "bad").mkdir()
    with np.load(packed / "train" / "index.npz") as data:
        columns = dict(data) | {"shard_names": np.array([name] * len(data["shard_names"]))}
    np.savez(tmp_path / "bad" / "index.npz", **columns)
    served.folder = tmp_path
    with pytest.raises(DataError, match="no index of packed images"):
        mirror_split("s3://images/bad", tmp_path / "copies" / "bad", 1 << 40)
    assert not list((tmp_path / "copies").rglob("*.tar"))


def test_an_index_without_images_is_refused(served, packed, tmp_path):
    (tmp_path / "bad").mkdir()
    with np.load(packed / "train" / "index.npz") as data:
        columns = dict(data) | {"shards": data["shards"][:0], "offsets": data["offsets"][:0]}
    np.savez(tmp_path / "bad" / "index.npz", **columns)
    served.folder = tmp_path
    with pytest.raises(DataError, match="no index of packed images"):
        mirror_split("s3://images/bad", tmp_path / "copies" / "bad", 1 << 40)


def test_a_copy_that_lost_a_shard_is_made_again(served, expected, tmp_path):
    batches(copy_of(served, tmp_path))
    (tmp_path / "train" / "shard-000001.tar").unlink()
    assert_equal(batches(copy_of(served, tmp_path)), expected[: len(expected) // 2])


def test_a_place_without_packed_images_says_what_to_put_there(served, tmp_path):
    with pytest.raises(DataError, match=r"s3://images/none/index.npz: is not there.*cmtrain data pack"):
        mirror_split("s3://images/none", tmp_path / "none", 1 << 40)


def test_a_web_server_will_do(served, packed, tmp_path):
    for name in served.environment:
        os.environ.pop(name, None)
    mirror_split(f"{served.url}/images/train", tmp_path / "train", 1 << 40)
    ours = batches(Manifest.from_shards(tmp_path / "train"))
    assert_equal(ours, batches(Manifest.from_shards(packed / "train")))
