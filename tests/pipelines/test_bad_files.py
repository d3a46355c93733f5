"""A file that breaks after it was indexed costs its own sample and nothing else, on any number of ranks."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.images import (
    SIDE,
    cut,
    digest,
    empty,
    garble,
    pixels,
    plan_for,
    save,
    shrink,
    vanish,
    write_tree,
)
from helpers.photographs import write_folder
from helpers.runs import assert_same_state, logged, losses, wait_for
from PIL import Image

from cmtrain.step.evaluate import evaluate
from cmtrain.training.run_logger import RunLogger
from pipelines.dali import graphs
from pipelines.files.manifest import BadFile, Manifest
from pipelines.loader import DaliLoader, eval_loader, train_loader
from pipelines.plan import MicroBatch
from pipelines.spec import UNREADABLE, AugmentSpec, Batch, DataError, EvalSpec, Placement
from pipelines.stand_ins import StandIns

SPEC = AugmentSpec(SIDE)
WHOLE = AugmentSpec(
    SIDE, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0
)  # crops reach the last row of a square image


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


REASONS = {
    vanish: "cannot be opened: No such file",
    garble: "not a JPEG",
    cut: "truncated",
    shrink: "is 10x20 now, was ",
    empty: "empty file",
    become_a_folder: "not a file",
}


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return Manifest.from_folder(write_folder(tmp_path / "in", 53), cache_dir=tmp_path / "cache")


@pytest.fixture
def loaders():
    """Collect loaders and close them."""
    made: list[DaliLoader] = []
    yield made
    for loader in made:
        loader.close()


def train(
    loaders, manifest, plan, spec=SPEC, rank=0, world=1, prefetch_batches=2, max_bad_fraction=0.5
) -> DaliLoader:
    place = Placement(rank, world, prefetch_batches=prefetch_batches, max_bad_fraction=max_bad_fraction)
    loader = train_loader(manifest, plan, spec, place)
    loaders.append(loader)
    return loader


def evaluation(loaders, manifest, rank=0, world=1) -> DaliLoader:
    place = Placement(rank, world, max_bad_fraction=0.5)
    loader = eval_loader(manifest, EvalSpec(SIDE, 56), place, batch_size=7)
    loaders.append(loader)
    return loader


def samples(batches) -> list[tuple[int, int, str]]:
    """Return (sample, label, digest of its pixels), in order."""
    return [
        (index, label, digest(image))
        for images, labels, indices in batches
        for index, label, image in zip(indices.tolist(), labels.tolist(), images, strict=True)
    ]


def break_some(manifest: Manifest) -> list[str]:
    """Break nine files in all ways, the last one and two neighbours among them; return their paths."""
    places = [3, 7, 19, 20, 21, 34, 40, 47, 52]
    for place, harm in zip(places, itertools.cycle(REASONS), strict=False):
        harm(Path(manifest.file(place)))
    return [manifest.file(place) for place in places]


@pytest.mark.parametrize("harm", REASONS)
def test_a_bad_file_costs_one_sample(loaders, manifest, harm):
    plan = plan_for(manifest, global_batch_size=53)
    before = [samples(train(loaders, manifest, plan, WHOLE).epoch(epoch)) for epoch in (0, 1)]
    harm(Path(manifest.file(20)))
    loader = train(loaders, manifest, plan, WHOLE)
    for epoch in (0, 1):
        of_index = {sample[0]: sample for sample in before[epoch]}
        assert samples(loader.epoch(epoch)) == [of_index[21] if s[0] == 20 else s for s in before[epoch]]
    (file,) = loader.take_bad_files()
    assert file.path == manifest.file(20)
    assert REASONS[harm] in file.reason
    assert loader.take_bad_files() == []


def test_pixels_depend_on_the_files_alone(loaders, manifest):
    """Not on ranks, the depth of the queue, where a run begins, what it met before, or other samples."""
    bad = break_some(manifest)
    plan = plan_for(manifest)
    alone = train(loaders, manifest, plan)
    epochs = [pixels(alone, epoch) for epoch in range(3)]
    assert sorted(file.path for file in alone.take_bad_files()) == sorted(bad)
    assert [
        pixels(train(loaders, manifest, plan, prefetch_batches=5), epoch) for epoch in range(3)
    ] == epochs
    assert pixels(train(loaders, manifest, plan), 2, 24) == epochs[2][24:]
    for world in (2, 3):
        ranks = [train(loaders, manifest, plan, SPEC, rank, world) for rank in range(world)]
        for epoch in range(3):
            assert sorted(pair for rank in ranks for pair in pixels(rank, epoch)) == sorted(epochs[epoch])
    large = plan_for(manifest, micro_batch_size=6)
    assert sorted(pixels(train(loaders, manifest, large), 0)) == sorted(epochs[0])


def test_a_cut_file_still_gives_the_crops_above_the_cut(loaders, manifest):
    plan, small_crops = plan_for(manifest, global_batch_size=53), AugmentSpec(SIDE, scale=(0.05, 0.2))
    whole = train(loaders, manifest, plan, small_crops)
    expected = [dict(pixels(whole, epoch))[20] for epoch in range(8)]
    cut(Path(manifest.file(20)))
    loader = train(loaders, manifest, plan, small_crops)
    used = [dict(pixels(loader, epoch)).get(20) for epoch in range(8)]
    assert None in used
    assert set(used) != {None}
    assert all(pixel in (None, before) for pixel, before in zip(used, expected, strict=True))


def cut_behind_the_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\xff\xda") + 20])  # of the scan, after the image's size


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("harm", [vanish, garble, empty, become_a_folder, cut_behind_the_header])
def test_a_file_that_never_decodes_costs_a_few_pipelines_once(loaders, manifest, harm, trains, monkeypatch):
    built, decode_graph = [], graphs.decode_graph
    monkeypatch.setattr(graphs, "decode_graph", lambda *a, **k: built.append(k) or decode_graph(*a, **k))
    harm(Path(manifest.file(20)))
    loader = train(loaders, manifest, plan_for(manifest)) if trains else evaluation(loaders, manifest)
    counts = []
    for epoch in range(4):
        list(loader.epoch(epoch if trains else 0))
        counts.append(len(built))
    # The loader's own, that one again, and two that tried the file.
    assert counts[0] <= 4
    assert counts == counts[:1] * 4


def crop_decodes(content: bytes, window: tuple[int, int, int, int]) -> bool:
    inputs = [[np.frombuffer(content, np.uint8)], np.array([window], np.int32)]
    run = graphs.Execution("cpu", "cpu", None, 1, 1, 1, reads_files=False)
    try:
        graphs.decode_graph(lambda: inputs, run, windows=True).run()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"restart_marker_blocks": 4},
        {"fmt": "PNG"},
        {"fmt": "BMP"},
        {"fmt": "WEBP"},
    ],
)
def test_what_has_no_first_pixel_has_no_crop(tmp_path, options):
    """So a file is tried once. Even a bitmap, which is stored from the bottom up, is read as a whole."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 90, 3), np.uint8)
    save(Image.fromarray(noise), tmp_path / "image", **options)
    content = (tmp_path / "image").read_bytes()
    some_decode = []
    for share in (0.02, 0.05, 0.1, 0.3, 0.6, 0.99):
        part = content[: int(share * len(content))]
        crops = [crop_decodes(part, window) for window in ((119, 0, 1, 1), (1, 1, 1, 1), (60, 40, 10, 10))]
        assert not any(crops) or crop_decodes(part, (0, 0, 1, 1))
        some_decode.append(any(crops))
    assert crop_decodes(content, (60, 40, 10, 10))
    if not options:
        assert some_decode[0] != some_decode[-1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_bad_validation_image_keeps_its_place_and_is_never_right(loaders, manifest, world):
    before = sorted(samples(evaluation(loaders, manifest).epoch(0)))
    harmed = {5: garble, 6: vanish, 52: empty}
    for place, harm in harmed.items():
        harm(Path(manifest.file(place)))
    ranks = [evaluation(loaders, manifest, rank, world) for rank in range(world)]
    for _ in range(2):
        after = sorted(sample for rank in ranks for sample in samples(rank.epoch(0)))
        assert [index for index, _, _ in after] == list(range(53))
        assert [label for index, label, _ in after if index in harmed] == [UNREADABLE] * 3
        assert [s for s in after if s[0] not in harmed] == [s for s in before if s[0] not in harmed]
    found = {file.path for rank in ranks for file in rank.take_bad_files()}
    # A rank that looks for a stand-in may find its neighbour bad, too.
    assert found == {manifest.file(place) for place in harmed}


def test_a_cut_validation_image_is_found_by_dali_2_and_is_half_grey_on_1_34(loaders, manifest):
    """There only `cmtrain data check` finds it: test_check.py."""
    cut(Path(manifest.file(5)))
    loader = evaluation(loaders, manifest)
    (label,) = (label for index, label, _ in samples(loader.epoch(0)) if index == 5)
    if graphs.READS_FILES:
        assert label == UNREADABLE
        assert [file.path for file in loader.take_bad_files()] == [manifest.file(5)]
    else:
        assert label == manifest.labels[5]
        assert loader.take_bad_files() == []


def test_a_file_that_two_ranks_met_is_logged_and_counted_once_by_its_kind(tmp_path):
    """The kind is carried: the wording of a reason changes no label."""
    cut_file, gone = (
        BadFile("a.jpg", "truncated", "not an image, more than 64 million pixels"),
        BadFile("b.jpg", "missing", "empty file, truncated"),
    )
    counts = []
    for rank in (0, 1):
        steps = {"first_step": 0, "last_step": 1, "epochs": 1, "total_steps": 1}
        serving = {"address": None, "stall_seconds": 600}
        logger = RunLogger(tmp_path / "run", rank=rank, world_size=2, **steps, **serving)
        logger.left_out([gone], tmp_path)
        logger.bad_files([[gone], [cut_file]])
        logger.bad_files([[cut_file], []])
        errors = logger.metrics.decode_errors
        counts.append([errors(kind)._value.get() for kind in ("missing", "truncated", "other")])
    assert counts == [[1, 0, 0], [0, 1, 0]]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["path"], e["kind"]) for e in events] == [
        ("bad_file", "b.jpg", "missing"),
        ("bad_file", "a.jpg", "truncated"),
    ]


def test_an_unreadable_image_counts_as_wrong_and_has_no_loss():
    logits = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    batch = Batch(logits, torch.tensor([0, UNREADABLE, 1]), torch.arange(3))
    result = evaluate(torch.nn.Identity(), [batch], Accelerator(cpu=True), num_images=3, num_classes=3)
    assert (result.num_images, result.num_unreadable) == (3, 1)
    assert result.top1 == pytest.approx(1 / 3)
    assert result.top5 == pytest.approx(2 / 3)
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([0, 1]))
    assert result.loss == pytest.approx(float(expected))


@pytest.mark.parametrize(("share", "survives"), [(0.0, 0), (0.001, 1), (0.06, 3)])
def test_too_many_bad_files_end_the_run(loaders, manifest, share, survives):
    plan = plan_for(manifest, global_batch_size=53)
    for place in range(0, 4 * survives, 4):
        garble(Path(manifest.file(place)))
    assert len(pixels(train(loaders, manifest, plan, max_bad_fraction=share), 0)) == 53
    garble(Path(manifest.file(50)))
    loader = train(loaders, manifest, plan, max_bad_fraction=share)
    with pytest.raises(
        DataError, match=rf"{survives + 1} of 53 images .* data\.max_bad_fraction {share:g} .*: not a JPEG"
    ):
        list(loader.epoch(0))


def test_a_folder_without_one_readable_file_ends_the_run(loaders, manifest):
    for index in range(len(manifest)):
        garble(Path(manifest.file(index)))
    with pytest.raises(DataError, match="no image can be read"):
        list(train(loaders, manifest, plan_for(manifest), max_bad_fraction=1.0).epoch(0))


def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_reported(loaders, manifest):
    plan = plan_for(manifest, micro_batch_size=4)
    expected = pixels(train(loaders, manifest, plan), 0)
    loader = train(loaders, manifest, plan)
    calls, good = [0], loader._inputs

    def failing(at: range):
        def inputs(batch):
            calls[0] += 1
            if calls[0] in at:
                raise OSError("the file server does not answer")
            return good(batch)

        return inputs

    for fails_once in (
        range(1, 2),
        range(3, 4),
    ):  # for a batch that is waited for, and for one prepared ahead
        calls[0], loader._inputs = 0, failing(fails_once)
        assert pixels(loader, 0) == expected
        assert loader.take_bad_files() == []
        loader.close()
    calls[0], loader._inputs = 0, failing(range(3, 99))
    with pytest.raises(
        DataError, match=r"failed twice, but Pillow can read all .* file server does not answer"
    ):
        list(loader.epoch(0))
    loader._inputs = good
    assert pixels(loader, 0) == expected


def bmp_of_16_bits(height: int = 60, width: int = 80) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 2**15, (height, width), np.uint16).tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 0, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


def animated_webp() -> bytes:
    buffer, image = io.BytesIO(), Image.new("RGB", (80, 60), (200, 100, 50))
    image.save(buffer, "WEBP", save_all=True, append_images=[image.rotate(90)])
    return buffer.getvalue()


def test_a_file_that_pillow_reads_and_dali_does_not_is_found_and_costs_one_sample(loaders, tmp_path):
    root = write_folder(tmp_path / "in", 53)
    odd = bmp_of_16_bits() if graphs.READS_FILES else animated_webp()  # of DALI 2.4, of 1.34
    for name in ("c0/027.jpg", "c2/026.jpg"):
        (root / name).write_bytes(odd)
    manifest = Manifest.from_folder(root, cache_dir=tmp_path / "cache")
    places = [place for place, path in enumerate(manifest.paths) if path in {"c0/027.jpg", "c2/026.jpg"}]
    assert not manifest.bad
    plan = plan_for(manifest, global_batch_size=53)
    loader = train(loaders, manifest, plan, WHOLE)
    for epoch in (0, 1):
        planned = np.concatenate([batch.indices for batch in plan.micro_batches(epoch, 0, 0, 1)]).tolist()
        used = [index for index, _ in pixels(loader, epoch)]
        assert used == [index + 1 if index in places else index for index in planned]
    found = loader.take_bad_files()
    assert {file.path for file in found} == {str(root / "c0/027.jpg"), str(root / "c2/026.jpg")}
    for file in found:
        assert file.reason.startswith("Pillow can read it, DALI cannot: ")
        assert "frame" not in file.reason
        assert len(file.reason) < 120
    labels = {index: label for index, label, _ in samples(evaluation(loaders, manifest).epoch(0))}
    assert [place for place, label in labels.items() if label == UNREADABLE] == places


def find_undecodable(manifest: Manifest, failing: set[int]) -> tuple[int, list[BadFile]]:
    """Return how many parts of two batches were decoded (25 is in both), and the bad files found."""
    makes = 0

    def make(batch: MicroBatch) -> None:
        nonlocal makes
        makes += 1
        if failing & set(batch.indices.tolist()):
            raise RuntimeError("nvidia.dali says:\n  no")

    stand_ins = StandIns(manifest, 0.5, 1)
    batches = [
        MicroBatch(0, 0, 0, np.arange(26), np.zeros(26)),
        MicroBatch(0, 1, 0, np.arange(25, 52), np.zeros(27)),
    ]
    stand_ins.find_undecodable(batches, make, RuntimeError("together"))
    return makes, stand_ins.take_new()


def test_decoding_few_parts_of_a_batch_finds_the_files_that_fail(manifest):
    makes, found = find_undecodable(manifest, {40})
    reason = "Pillow can read it, DALI cannot: nvidia.dali says: no"
    assert found == [BadFile(manifest.file(40), "other", reason)]
    assert makes <= 1 + 2 + 2 * 5
    for failing in ({0, 25, 26, 51}, set(range(26))):  # also where all neighbours are of the same kind
        _, found = find_undecodable(manifest, failing)
        assert [file.path for file in found] == [manifest.file(place) for place in sorted(failing)]


def test_where_all_fail_or_none_alone_it_is_not_the_files(manifest):
    with pytest.raises(DataError, match=r"failed twice, .* of the 52 .* no others either: together"):
        find_undecodable(manifest, set(range(53)))
    with pytest.raises(DataError, match=r"failed twice, .* each one alone; together: together"):
        find_undecodable(manifest, set())
    with pytest.raises(
        DataError, match=r"of the 0 images .*: no GPU"
    ):  # DALI failed while the graph was built
        StandIns(manifest, 0.5, 1).find_undecodable([], lambda batch: None, RuntimeError("no GPU"))


def test_a_restored_file_is_used_again(loaders, manifest):
    plan = plan_for(manifest)
    expected = pixels(train(loaders, manifest, plan), 1)
    path = Path(manifest.file(int(plan.order(1)[5])))
    content = path.read_bytes()
    loader = train(loaders, manifest, plan)
    garble(path)
    assert pixels(loader, 1) != expected
    path.write_bytes(content)
    assert pixels(loader, 1) == expected


# Whole runs, by the program itself.


@pytest.fixture
def bad_job(make_job, tmp_path):
    """bad_job("name") -> Job on 220 images, 19 that only decoding finds bad, and 3 whose header is bad."""
    root = write_tree(tmp_path / "data", 220, 31)
    files = sorted((root / "train").rglob("*.jpg"))
    never_good, broken = files[5:200:70], files[10:200:10]
    for path in never_good:
        path.write_bytes(b"never an image")
    for path in broken[::2]:
        cut(path)
    for path in files:  # older than a tick, so that what is garbled below is remembered as it was
        os.utime(path, (10**9, 10**9))
    Manifest.from_folder(root / "train", cache_dir=tmp_path / "cache", max_bad_fraction=0.1)
    for path in broken[1::2]:
        garble(path)

    def make(name: str, **sections):
        sections["data"] = {"root": str(root), "max_bad_fraction": 0.15} | sections.get("data", {})
        augment = {
            "scale": [1.0, 1.0],
            "ratio": [1.0, 1.0],
            "color_jitter": None,
        }  # every crop meets every cut
        return make_job(name, augment=augment, schedule={"epochs": 2}, **sections), broken, never_good

    return make


def logged_bad_files(job) -> list[str]:
    return sorted(event["path"] for event in job.events() if event["event"] == "bad_file")


def test_a_run_over_a_folder_that_breaks(bad_job, tmp_path):
    """Two ranks; files that are cut, overwritten or, during the run, removed. A second run is the same."""
    job, broken, never_good = bad_job("a")
    again, _, _ = bad_job("b")
    for each in (job, again):
        result = each(nproc=2)
        assert (result["state"], result["step"], result["num_unreadable"]) == ("finished", 26, 0)
        assert logged_bad_files(each) == sorted(map(str, [*broken, *never_good]))
        kinds = [event["kind"] for event in each.events() if event["event"] == "bad_file"]
        assert (kinds.count("not_an_image"), kinds.count("truncated")) == (12, 10)
        assert "3 bad files are left out: " in each.stderr.read_text()
        assert each.stderr.read_text().count("replaced from now on") == 19
    assert losses(job) == losses(again)
    assert_same_state(job, again)


def test_files_that_vanish_during_the_run(make_job, tmp_path):
    root = write_tree(tmp_path / "data", 96, 31)
    job = make_job(data={"root": str(root), "max_bad_fraction": 0.1}, schedule={"epochs": 16})
    vanishing = [
        *sorted((root / "train").rglob("*.jpg"))[4:90:20],
        *sorted((root / "val").rglob("*.jpg"))[3:4],
    ]
    process = job.start("--evaluate.every_epochs", "16", "--checkpoint.every_epochs", "16", nproc=2)
    wait_for(lambda: logged(job, 2), process)
    for path in vanishing:
        path.unlink()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert '"num_unreadable": 1,' in out
    assert "on 31 images, 1 unreadable ones counted as wrong" in err
    assert logged_bad_files(job) == sorted(map(str, vanishing))
    assert {event["kind"] for event in job.events() if event["event"] == "bad_file"} == {"missing"}


def test_a_run_ends_when_too_many_files_break(bad_job):
    job, _, _ = bad_job("a", data={"max_bad_fraction": 0.02})
    job(code=3)
    assert job.status()["exit_code"] == 3
    assert "5 of 217 images became unreadable during the run" in job.status()["reason"]
    assert "5 of 217" in job.stderr.read_text()
