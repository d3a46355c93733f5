"""Test decoding on the GPU: exactness at any share of the JPEG engine, odd files, the memory it keeps.

The images are as large as ImageNet's and of every kind: decoders have paths that only batches take which are
large and mix kinds of chroma subsampling.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from helpers.images import write_awkward_files, write_jpegs
from PIL import Image

pytest.importorskip("nvidia.dali")

from pipelines.files.manifest import Manifest
from pipelines.loader import DaliLoader, eval_loader, train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, EvalSpec, Placement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_IMAGES, GLOBAL_BATCH_SIZE, BATCH_SIZE = 256, 128, 32
SIDE = 96
SPEC = AugmentSpec(SIDE, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, fp16=True)
LEVEL = 1 / (255 * 0.226)  # of a normalised image, the standard deviation of the channels taken as 0.226


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("decoding")
    return Manifest.from_folder(write_jpegs(folder / "in", NUM_IMAGES), cache_dir=folder / "cache")


def train(
    manifest: Manifest, load: float | None, rank=0, world=1, micro_batch_size=BATCH_SIZE, spec=SPEC
) -> DaliLoader:
    plan = Plan(3, len(manifest), GLOBAL_BATCH_SIZE, micro_batch_size)
    return train_loader(
        manifest, plan, spec, Placement(rank, world, "cuda", "mixed", 2, hw_decoder_load=load)
    )


def evaluation(manifest: Manifest, spec: EvalSpec, batch_size: int) -> DaliLoader:
    return eval_loader(manifest, spec, Placement(0, 1, "cuda", "mixed", 2), batch_size=batch_size)


def by_sample(loader: DaliLoader, epoch: int = 0, start: int = 0) -> dict[int, torch.Tensor]:
    images = {
        index: image.cpu()
        for batch in loader.epoch(epoch, start)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }
    loader.close()
    return images


def digests(images: dict[int, torch.Tensor]) -> dict[int, str]:
    return {
        index: hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
        for index, image in images.items()
    }


@pytest.mark.parametrize("load", [0.0, 1.0])
def test_one_decoder_alone_is_elastic(manifest, load):
    """With all images on the engine or none, no rank, batch or resumption may change a pixel."""
    whole = digests(by_sample(train(manifest, load)))
    ranks = [digests(by_sample(train(manifest, load, rank, 2))) for rank in range(2)]
    assert ranks[0] | ranks[1] == whole
    assert digests(by_sample(train(manifest, load, micro_batch_size=2 * BATCH_SIZE))) == whole
    rest = digests(by_sample(train(manifest, load), start=GLOBAL_BATCH_SIZE))
    assert rest.items() <= whole.items()
    assert digests(by_sample(train(manifest, load))) == whole


def test_a_shared_load_stays_within_the_difference_of_the_two_decoders(manifest):
    """DALI divides a batch between engine and cores, so an image's decoder depends on its batch."""
    plain = AugmentSpec(SIDE)
    one = by_sample(train(manifest, None, spec=plain))
    other = by_sample(train(manifest, None, micro_batch_size=2 * BATCH_SIZE, spec=plain))
    apart = torch.stack([(one[index] - other[index]).abs().mean() for index in one])
    exact = int((apart == 0).sum())
    print(
        f"\ndefault load: {exact} of {len(one)} images are bit-equal, mean {apart.mean() / LEVEL:.4f} levels"
    )
    assert apart.mean() < 1.0 * LEVEL


def test_the_engine_and_the_cores_see_the_same_image(manifest):
    plain = AugmentSpec(SIDE)
    cores, engine = (by_sample(train(manifest, load, spec=plain)) for load in (0.0, 1.0))
    apart = torch.stack([(cores[index] - engine[index]).abs().mean() for index in cores])
    mean, worst = apart.mean() / LEVEL, apart.max() / LEVEL
    print(f"\nengine against cores: mean {mean:.4f} levels, worst image {worst:.4f}")
    assert apart.mean() < 1.0 * LEVEL


def test_awkward_files_look_as_in_pillow(tmp_path):
    """Progressive, grey, CMYK, PNG, WebP, EXIF, one pixel: the CPU decodes what the GPU cannot."""
    write_awkward_files(tmp_path / "in" / "c")
    manifest = Manifest.from_folder(tmp_path / "in", cache_dir=tmp_path / "cache")
    spec = EvalSpec(48, 48, "bilinear")
    (batch,) = evaluation(manifest, spec, len(manifest)).epoch(0)
    levels = (batch.images.permute(0, 2, 3, 1).cpu().numpy() * spec.std + spec.mean) * 255
    errors = {}
    for index, ours in zip(batch.indices.tolist(), levels, strict=True):
        image = Image.open(manifest.file(index)).convert("RGB")
        short = min(image.size)
        image = image.resize([48 * side // short for side in image.size], Image.Resampling.BILINEAR)
        left, top = (round((side - 48) / 2) for side in image.size)
        expected = np.asarray(image.crop((left, top, left + 48, top + 48)), np.float64)
        errors[manifest.paths[index]] = np.abs(ours - expected).mean()
    print("\n" + "\n".join(f"{name:24s} {error:.3f}" for name, error in errors.items()))
    assert max(errors.values()) < 1.5, errors


def test_evaluation_leaves_no_memory_behind(tmp_path):
    """The loader is closed after each evaluation, as in training: the two never hold memory together."""
    manifest = Manifest.from_folder(write_jpegs(tmp_path / "in", NUM_IMAGES), cache_dir=tmp_path / "cache")
    training = train(manifest, None)
    batches = training.epoch(0)
    next(batches)
    loader = evaluation(manifest, EvalSpec(SIDE, 110), 96)

    def evaluate() -> tuple[int, int]:
        for batch in loader.epoch(0):
            del batch
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        during = torch.cuda.mem_get_info()[0]
        loader.close()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return during, torch.cuda.mem_get_info()[0]

    evaluate()  # libraries load some things once and keep them
    free_bytes = [evaluate() for _ in range(4)]
    print(
        "\nfree MiB while the loader is open, after it was closed:",
        [(a >> 20, b >> 20) for a, b in free_bytes],
    )
    assert all(after >= during for during, after in free_bytes)
    assert abs(free_bytes[0][1] - free_bytes[-1][1]) < 64 << 20
    next(batches)  # training goes on
    training.close()
