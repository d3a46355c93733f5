"""A run that is killed in the middle of an epoch resumes on any number of ranks with the same pixels."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from helpers.photographs import write_folder

from pipelines.files.manifest import Manifest
from pipelines.loader import train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, Placement

SIDE = 48
NUM_IMAGES = 53
GLOBAL_BATCH_SIZE = 24
MICRO_BATCH_SIZE = {1: 8, 2: 4, 3: 4, 4: 2}  # by number of ranks, as if more ranks had less memory
STEPS = NUM_IMAGES // GLOBAL_BATCH_SIZE

Sample = tuple[int, int, str]  # global step, sample, digest of its pixels


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("elastic")
    return Manifest.from_folder(write_folder(folder / "in", NUM_IMAGES), cache_dir=folder / "cache")


def run(
    manifest: Manifest, world: int, first_step: int, last_step: int, repeats: int, fp16: bool
) -> list[Sample]:
    """Return what all ranks together get from step `first_step` to before `last_step`, over epochs."""
    plan = Plan(3, NUM_IMAGES, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE[world], repeats)
    spec = AugmentSpec(SIDE, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, fp16=fp16)
    samples: list[Sample] = []
    for rank in range(world):
        loader = train_loader(manifest, plan, spec, Placement(rank, world, decode="cpu"))
        epoch, step = divmod(first_step, STEPS)
        batches = itertools.chain(
            loader.epoch(epoch, step * GLOBAL_BATCH_SIZE),
            itertools.chain.from_iterable(
                loader.epoch(following) for following in itertools.count(epoch + 1)
            ),
        )
        micro_batches_a_step = plan.num_micro_batches // world
        for number in range((last_step - first_step) * micro_batches_a_step):
            batch = next(batches)
            assert batch.images.dtype == (torch.float16 if fp16 else torch.float32)
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                digest = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
                samples.append((first_step + number // micro_batches_a_step, index, digest))
        loader.close()
    return sorted(samples)


@pytest.mark.parametrize(("repeats", "fp16"), [(1, False), (3, False), (3, True)])
def test_any_number_of_ranks_before_and_after_a_kill(manifest, repeats, fp16):
    """Two epochs of two steps: killed after the first step, and once more after the third."""
    whole = run(manifest, 1, 0, 4, repeats, fp16)
    assert len(set(whole)) == 4 * GLOBAL_BATCH_SIZE
    for first, second, third in ((1, 2, 3), (4, 3, 2), (2, 4, 1), (3, 1, 4)):
        pieces = [(first, 0, 1), (second, 1, 3), (third, 3, 4)]
        again = [
            sample
            for world, begin, end in pieces
            for sample in run(manifest, world, begin, end, repeats, fp16)
        ]
        assert sorted(again) == whole, f"{first}, then {second}, then {third} ranks"
