"""Test the pipelines on a GPU: the same contract as on a CPU, the same pixels up to the decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.images import cut, empty, garble, shrink, vanish, write_jpegs

pytest.importorskip("nvidia.dali")

from pipelines.files.manifest import Manifest
from pipelines.loader import DaliLoader, eval_loader, train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, EvalSpec, Placement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_IMAGES, GLOBAL_BATCH_SIZE, BATCH_SIZE = 192, 64, 32
SIDE = 96
SPEC = AugmentSpec(SIDE, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("gpu")
    return Manifest.from_folder(write_jpegs(folder / "in", NUM_IMAGES), cache_dir=folder / "cache")


def train(manifest: Manifest, spec=SPEC, device="cuda", decode="mixed", rank=0, world=1) -> DaliLoader:
    plan = Plan(3, len(manifest), GLOBAL_BATCH_SIZE, BATCH_SIZE)
    return train_loader(manifest, plan, spec, Placement(rank, world, device, decode, 2))


def by_sample(loader: DaliLoader, epoch: int = 0) -> dict[int, torch.Tensor]:
    images = {
        index: image.float().cpu()
        for batch in loader.epoch(epoch)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }
    loader.close()
    return images


def mean_levels_apart(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> float:
    """Return the mean absolute difference in levels of 0..255, taking 0.226 for the channels' deviation."""
    assert a.keys() == b.keys()
    return float(torch.stack([(a[index] - b[index]).abs().mean() for index in a]).mean()) * 255 * 0.226


@pytest.mark.parametrize("decode", ["mixed", "cpu"])
def test_the_contract_on_the_device(manifest, decode):
    loader = train(
        manifest, AugmentSpec(SIDE, rand_augment="reimpl", color_jitter=0.4, fp16=True), decode=decode
    )
    for batch in loader.epoch(0):
        assert all(tensor.is_cuda for tensor in batch)
        assert batch.images.shape == (BATCH_SIZE, 3, SIDE, SIDE)
        assert batch.images.dtype == torch.float16
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.labels.cpu(), torch.from_numpy(manifest.labels)[batch.indices.cpu()])
    loader.close()


def test_augmentation_on_the_gpu_is_that_of_the_cpu(manifest):
    """Decoded on the CPU in both cases, so only the augmentation differs."""
    gpu = by_sample(train(manifest, decode="cpu"))
    cpu = by_sample(train(manifest, device="cpu", decode="cpu"))
    assert mean_levels_apart(gpu, cpu) < 0.5


def test_mixed_decoding_is_near_the_cpus(manifest):
    plain = AugmentSpec(SIDE)
    gpu = by_sample(train(manifest, plain))
    cpu = by_sample(train(manifest, plain, device="cpu", decode="cpu"))
    assert mean_levels_apart(gpu, cpu) < 1.0


def test_pixels_do_not_depend_on_the_number_of_ranks(manifest):
    alone = by_sample(train(manifest, decode="cpu"))
    shared = by_sample(train(manifest, decode="cpu", rank=0, world=2))
    shared |= by_sample(train(manifest, decode="cpu", rank=1, world=2))
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[index], shared[index]) for index in alone)


@pytest.mark.parametrize("decode", ["mixed", "cpu"])
def test_kept_batches_are_not_written_to_again(manifest, decode):
    """Batches live over three epochs; kernels queued behind others, on another stream, read them."""
    loader = train(manifest, decode=decode)
    kept = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for epoch in range(3):
            for batch in loader.epoch(epoch):
                torch.cuda._sleep(2_000_000)  # about a millisecond in which DALI runs ahead
                kept.append((batch.images, batch.images.float().sum()))
    torch.cuda.synchronize()
    for images, before in kept:
        assert images.float().sum().item() == before.item()
    loader.close()


@pytest.mark.parametrize("decode", ["mixed", "cpu"])
def test_batches_that_are_dropped_while_kernels_still_read_them(manifest, decode):
    """Training drops batches like this: a queued kernel reads the batch that it was queued with."""

    def sums(queued_milliseconds: int) -> list[float]:
        loader, taken = train(manifest, decode=decode), []
        for epoch in range(3):
            for batch in loader.epoch(epoch):
                torch.cuda._sleep(queued_milliseconds * 2_000_000)
                taken.append(batch.images.double().sum())
                del batch
                if not queued_milliseconds:
                    torch.cuda.synchronize()
        loader.close()
        return torch.stack(taken).tolist()

    assert sums(3) == sums(0)


@pytest.mark.parametrize("load", [None, 0.0, 1.0])
def test_bad_files_cost_their_own_samples(tmp_path, load):
    """As on a CPU, the same files are named, the same ones replace them, and no other pixels change."""
    manifest = Manifest.from_folder(write_jpegs(tmp_path / "in", NUM_IMAGES), cache_dir=tmp_path / "cache")
    plain = AugmentSpec(SIDE, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)  # whole images
    plan = Plan(3, len(manifest), GLOBAL_BATCH_SIZE, BATCH_SIZE)
    on_engine = {"cuda": {"hw_decoder_load": load}, "cpu": {}}

    def images_and_bad(device: str, decode) -> tuple[dict[int, torch.Tensor], set[str]]:
        place = Placement(0, 1, device, decode, 2, max_bad_fraction=0.5, **on_engine[device])
        loader = train_loader(manifest, plan, plain, place)
        images = {
            index: image.float().cpu()
            for batch in loader.epoch(0)
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
        }
        bad = {Path(file.path).name for file in loader.take_bad_files()}
        loader.close()
        return images, bad

    before, _ = images_and_bad("cuda", "mixed")
    places = (3, 20, 41, 60)
    hurt = [Path(manifest.file(index)) for index in places]
    for path, fault in zip(hurt, (vanish, garble, shrink, empty), strict=True):
        fault(path)
    on_cpu, named = images_and_bad("cpu", "cpu")
    on_gpu, named_too = images_and_bad("cuda", "mixed")
    assert named == named_too == {path.name for path in hurt}
    assert on_cpu.keys() == on_gpu.keys() == set(range(NUM_IMAGES)) - set(places)
    assert mean_levels_apart(on_gpu, {index: before[index] for index in on_gpu}) < 0.1
    assert mean_levels_apart(on_gpu, on_cpu) < 1.0


def test_a_file_cut_in_the_middle_ends_nothing(tmp_path):
    """nvJPEG may decode the upper half, or the file is replaced: it is printed. The rest must be whole."""
    manifest = Manifest.from_folder(write_jpegs(tmp_path / "in", NUM_IMAGES), cache_dir=tmp_path / "cache")
    before = by_sample(train(manifest, AugmentSpec(SIDE)))
    cut(Path(manifest.file(20)))
    loader = train(manifest, AugmentSpec(SIDE))
    after = by_sample(loader)
    print("\ncut file:", loader.take_bad_files() or "decoded without an error")
    whole = before.keys() & after.keys() - {20}
    assert len(whole) == NUM_IMAGES - 1
    assert mean_levels_apart({i: before[i] for i in whole}, {i: after[i] for i in whole}) < 0.1


@pytest.mark.parametrize("decode", ["mixed", "cpu"])
def test_evaluation_sees_every_image_once_and_nearly_as_on_the_cpu(manifest, decode):
    def evaluate(device: str, how) -> dict[int, torch.Tensor]:
        place = Placement(0, 1, device, how, 2)
        return by_sample(eval_loader(manifest, EvalSpec(SIDE, 110), place, batch_size=BATCH_SIZE + 3))

    gpu = evaluate("cuda", decode)
    assert sorted(gpu) == list(range(NUM_IMAGES))
    assert mean_levels_apart(gpu, evaluate("cpu", "cpu")) < (1.0 if decode == "mixed" else 0.3)
