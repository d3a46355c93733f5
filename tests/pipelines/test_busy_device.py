"""A device that is busy with other work delays batches and changes none of them.

An H100's JPEG engine is reported to write its output before what was queued earlier on the same stream has
run. On a busy GPU it may then write over an image that has still to be resized, without an error. An idle
GPU does not show it.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator

import pytest
import torch
from helpers.images import write_jpegs

from pipelines.files.manifest import Manifest
from pipelines.loader import train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, Placement

CUDA = torch.cuda.is_available()
DEVICE, DECODE = ("cuda", "mixed") if CUDA else ("cpu", "cpu")
LOADS = [1.0, 0.0] if CUDA else [None]  # all images on the JPEG engine, or none
NUM_IMAGES, BATCH_SIZE, NUM_EPOCHS = (512, 64, 3) if CUDA else (64, 32, 2)
SIDE = 8192 if CUDA else 256
SPEC = AugmentSpec(160, rand_augment="rand-m9-mstd0.5-inc1")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("busy")
    return Manifest.from_folder(write_jpegs(folder / "in", NUM_IMAGES), cache_dir=folder / "cache")


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Multiply matrices in a thread; on a GPU on a stream of its own, one always queued."""
    stop, started, errors = threading.Event(), threading.Event(), []

    def multiply() -> None:
        matrix = torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.float16 if CUDA else torch.float32)
        product, before = torch.empty_like(matrix), None
        while not stop.is_set():
            torch.mm(matrix, matrix, out=product)
            started.set()
            if CUDA:
                event = torch.cuda.Event()
                event.record()
                if before is not None:
                    before.synchronize()
                before = event

    def run() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()) if CUDA else contextlib.nullcontext():
                multiply()
        except Exception as error:
            errors.append(error)
        started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        started.wait()
        yield
    finally:
        stop.set()
        thread.join()
    assert not errors


def digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()


def make_loader(manifest: Manifest, load: float | None):
    place = Placement(0, 1, DEVICE, DECODE, 2, hw_decoder_load=load)
    return train_loader(manifest, Plan(3, len(manifest), BATCH_SIZE, BATCH_SIZE), SPEC, place)


@pytest.mark.parametrize("load", LOADS)
def test_batches_of_a_busy_device_are_those_of_an_idle_one(manifest, load):
    loader = make_loader(manifest, load)
    # Each is read before the next is asked for, so that little runs at the same time.
    idle = [[digest(batch.images) for batch in loader.epoch(epoch)] for epoch in range(NUM_EPOCHS)]
    loader.close()
    assert len({each for epoch in idle for each in epoch}) == NUM_EPOCHS * NUM_IMAGES // BATCH_SIZE
    loader = make_loader(manifest, load)
    with busy():
        kept = [[batch.images for batch in loader.epoch(epoch)] for epoch in range(NUM_EPOCHS)]
    loader.close()
    assert [list(map(digest, epoch)) for epoch in kept] == idle
