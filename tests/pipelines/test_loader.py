"""The loader gives the plan's samples and pixels whatever the number of ranks, and owns what it gives."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers.images import SIDE, SPEC, digest, pixels, plan_for, write_awkward_files
from helpers.photographs import write_folder
from PIL import Image

from pipelines.files.manifest import Manifest
from pipelines.loader import DaliLoader, eval_loader, train_loader
from pipelines.spec import AugmentSpec, DataError, EvalSpec, Loader, Placement

UNAUGMENTED = AugmentSpec(SIDE, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, interpolation="bilinear")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("loader")
    return Manifest.from_folder(write_folder(folder / "in", 53), cache_dir=folder / "cache")


@pytest.fixture
def loaders():
    """Collect loaders and close them."""
    made: list[DaliLoader] = []
    yield made
    for loader in made:
        loader.close()


def train(loaders, manifest, plan, spec=SPEC, rank=0, world=1, prefetch_batches=2) -> DaliLoader:
    loader = train_loader(manifest, plan, spec, Placement(rank, world, prefetch_batches=prefetch_batches))
    loaders.append(loader)
    return loader


def evaluation(loaders, manifest, batch_size=8, rank=0, world=1, spec=None) -> DaliLoader:
    spec = spec or EvalSpec(SIDE, 56)
    loader = eval_loader(manifest, spec, Placement(rank, world), batch_size=batch_size)
    loaders.append(loader)
    return loader


@pytest.mark.parametrize("world", [2, 3, 4])
def test_pixels_do_not_depend_on_the_number_of_ranks(loaders, manifest, world):
    plan = plan_for(manifest)
    alone = pixels(train(loaders, manifest, plan), 1)
    shared = [
        pair
        for rank in range(world)
        for pair in pixels(train(loaders, manifest, plan, SPEC, rank, world), 1)
    ]
    assert len(alone) == 48
    assert len(set(alone)) == 48
    assert sorted(shared) == sorted(alone)


def test_a_run_killed_on_two_ranks_goes_on_on_four_with_the_same_pixels(loaders, manifest):
    plan = plan_for(manifest)
    whole = pixels(train(loaders, manifest, plan), 0)
    before = []
    for rank in range(2):
        for step, batch in enumerate(train(loaders, manifest, plan, SPEC, rank, 2).epoch(0)):
            if step == 2 * 6:
                break
            before += [(int(batch.indices), digest(batch.images[0]))]
    after = [
        pair for rank in range(4) for pair in pixels(train(loaders, manifest, plan, SPEC, rank, 4), 0, 24)
    ]
    assert not {index for index, _ in before} & {index for index, _ in after}
    assert sorted(before + after) == sorted(whole)


def test_pixels_do_not_depend_on_the_size_of_micro_batches(loaders, manifest):
    small = pixels(train(loaders, manifest, plan_for(manifest)), 0)
    large = pixels(train(loaders, manifest, plan_for(manifest, micro_batch_size=6)), 0)
    assert sorted(small) == sorted(large)


def test_every_epoch_has_its_own_pixels_of_the_same_samples(loaders, manifest):
    loader = train(loaders, manifest, plan_for(manifest, global_batch_size=53))
    first, second = dict(pixels(loader, 0)), dict(pixels(loader, 1))
    assert first.keys() == second.keys() == set(range(53))
    assert sum(first[index] == second[index] for index in first) <= 1


def test_repeated_augmentation_gives_copies_their_own_pixels_on_their_own_ranks(loaders, manifest):
    plan = plan_for(manifest, repeats=3)
    ranks = [pixels(train(loaders, manifest, plan, SPEC, rank, 3), 0) for rank in range(3)]
    for rank in ranks:
        assert len({index for index, _ in rank}) == len(rank)
    together = [pair for rank in ranks for pair in rank]
    assert len({index for index, _ in together}) == 16
    assert len({value for _, value in together}) == 48


def test_the_next_epoch_is_under_way_when_one_ends(loaders, manifest):
    plan = plan_for(manifest)
    loader = train(loaders, manifest, plan, prefetch_batches=3)
    epochs = [pixels(loader, epoch) for epoch in range(3)]
    assert [batch.epoch for batch in loader._in_flight] == [3, 3, 3]
    fresh = [pixels(train(loaders, manifest, plan), epoch) for epoch in range(3)]
    assert epochs == fresh


@pytest.mark.parametrize("prefetch_batches", [1, 5])
def test_the_depth_of_the_queue_changes_nothing(loaders, manifest, prefetch_batches):
    plan = plan_for(manifest, micro_batch_size=4)
    loader = train(loaders, manifest, plan, prefetch_batches=prefetch_batches)
    assert [pixels(loader, epoch) for epoch in (0, 1)] == [
        pixels(train(loaders, manifest, plan), e) for e in (0, 1)
    ]


@pytest.mark.parametrize("request_after", [(1, 0), (0, 0), (5, 24), (1, 24), (0, 12)])
def test_an_abandoned_epoch_leaves_no_trace(loaders, manifest, request_after):
    plan = plan_for(manifest)
    loader = train(loaders, manifest, plan)
    abandoned = loader.epoch(0)
    next(abandoned)
    next(abandoned)
    assert pixels(loader, *request_after) == pixels(train(loaders, manifest, plan), *request_after)
    with pytest.raises(RuntimeError, match="epoch 0 cannot go on"):
        next(abandoned)


def test_an_epoch_that_is_over_yields_nothing(loaders, manifest):
    loader = train(loaders, manifest, plan_for(manifest))
    assert list(loader.epoch(0, 48)) == []
    assert len(pixels(loader, 1)) == 48


def test_batches_are_not_written_to_again(loaders, manifest):
    loader = train(loaders, manifest, plan_for(manifest, micro_batch_size=4), prefetch_batches=2)
    kept = []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            kept.append((batch, digest(batch.images)))
    loader.close()
    assert all(digest(batch.images) == before for batch, before in kept)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 100])
def test_evaluation_sees_every_image_once(loaders, manifest, world, batch_size):
    for_one_epoch = []
    for rank in range(world):
        loader = evaluation(loaders, manifest, batch_size, rank, world)
        for _ in range(2):
            indices = [index for batch in loader.epoch(0) for index in batch.indices.tolist()]
            assert indices == list(range(rank, len(manifest), world))
        for_one_epoch += indices
    assert sorted(for_one_epoch) == list(range(53))


def test_a_rank_without_images_yields_nothing(loaders, manifest):
    few = manifest.fraction(0.01, seed=0)
    assert len(few) == 3
    counts = [len(list(evaluation(loaders, few, 2, rank, 5).epoch(0))) for rank in range(5)]
    assert counts == [1, 1, 1, 0, 0]


def test_evaluation_pixels_do_not_depend_on_the_batch(loaders, manifest):
    assert pixels(evaluation(loaders, manifest, 5), 0) == pixels(evaluation(loaders, manifest, 53), 7)


def test_evaluation_takes_no_start_and_no_crop_larger_than_the_image(loaders, manifest):
    with pytest.raises(ValueError, match="begins at 0"):
        list(evaluation(loaders, manifest).epoch(0, 8))
    with pytest.raises(ValueError, match="resize_px 40 is below image_px 48"):
        evaluation(loaders, manifest, spec=EvalSpec(SIDE, 40))


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("fp16", [False, True])
def test_the_contract(loaders, manifest, kind, fp16):
    plan = plan_for(manifest, micro_batch_size=6)
    loader: Loader
    if kind == "train":
        loader = train(loaders, manifest, plan, AugmentSpec(SIDE, fp16=fp16), rank=1, world=2)
    else:
        loader = evaluation(loaders, manifest, 6, 1, 2, EvalSpec(SIDE, 56, fp16=fp16))
    batches = list(loader.epoch(0))
    assert len(batches) == (5 if kind == "eval" else 4)
    for batch in batches[:4]:
        assert batch.images.shape == (6, 3, SIDE, SIDE)
        assert batch.images.dtype == (torch.float16 if fp16 else torch.float32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.labels.shape == batch.indices.shape == (6,)
    for batch in batches:
        assert torch.equal(batch.labels, torch.from_numpy(manifest.labels)[batch.indices])
    if kind == "train":
        expected = [batch.indices.tolist() for batch in plan.micro_batches(0, 0, 1, 2)]
        assert [batch.indices.tolist() for batch in batches] == expected
        tail = list(loader.epoch(0, 24))
        assert [batch.indices.tolist() for batch in tail] == expected[2:]
        assert all(torch.equal(a.images, b.images) for a, b in zip(tail, batches[2:], strict=True))
    loader.close()


def test_a_closed_loader_frees_its_graphs(loaders, manifest):
    loader = train(loaders, manifest, plan_for(manifest))
    next(loader.epoch(0))
    stages = weakref.ref(loader._stages)
    loader.close()
    gc.collect()
    assert stages() is None


def test_mixed_decoding_without_a_gpu_is_refused(manifest):
    with pytest.raises(DataError, match=r"data\.decode: mixed decodes on a GPU"):
        eval_loader(manifest, EvalSpec(SIDE, 56), Placement(decode="mixed"), batch_size=4)


def test_awkward_files_look_as_in_pillow(loaders, tmp_path):
    write_awkward_files(tmp_path / "in" / "c")
    manifest = Manifest.from_folder(tmp_path / "in", cache_dir=tmp_path / "cache")
    assert len(manifest) == 13
    assert manifest.bad == ()
    (batch,) = evaluation(loaders, manifest, 13, spec=EvalSpec(SIDE, SIDE, "bilinear")).epoch(0)
    levels = (batch.images.permute(0, 2, 3, 1).numpy() * UNAUGMENTED.std + UNAUGMENTED.mean) * 255
    errors = {}
    for index, ours in zip(batch.indices.tolist(), levels, strict=True):
        image = Image.open(manifest.file(index)).convert("RGB")
        short = min(image.size)
        image = image.resize([SIDE * side // short for side in image.size], Image.Resampling.BILINEAR)
        left, top = (round((side - SIDE) / 2) for side in image.size)
        expected = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float64)
        errors[manifest.paths[index]] = np.abs(ours - expected).mean()
    print("\nmean absolute error in levels against Pillow")
    for name, error in errors.items():
        print(f"  {name:24s} {error:.3f}")
    for name, error in errors.items():
        assert error < 0.25, name
