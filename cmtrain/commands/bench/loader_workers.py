"""The loaders that `cmtrain bench --what loader` compares: each in a process of its own, pinned to its cores."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from pipelines.dali import graphs
from pipelines.files.manifest import Manifest
from pipelines.loader import file_reader, train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, Decode

BATCH_SIZE = 64
PREFETCH_BATCHES = 2
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
Counter = Iterator[int]  # the number of images of every batch that comes out


@dataclass(frozen=True)
class Contestant:
    """A loader to time. `manifest` may be packed; timm reads the very same bytes."""

    name: str
    kind: Literal["dali", "timm"]
    manifest: Manifest
    device: str
    decode: Decode
    cores: int
    hw_decoder_load: float | None = None


def serve(pipe: Connection, contestant: Contestant) -> None:
    """The life of a contestant: builds what it is asked for, times it, ends when the pipe is closed."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-contestant.cores :])
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # timm's workers start as they do in a training script
    make = _timm_batches if contestant.kind == "timm" else _dali_batches
    batches: Counter = iter(())
    while True:
        try:
            verb, argument = pipe.recv()
        except EOFError:
            return
        if verb == "prepare":
            del batches  # ends the workers of the work before
            batches = make(contestant, argument)
            pipe.send(_take(batches, 2))
        else:
            pipe.send(_measure(batches, argument))


def _measure(batches: Counter, steps: int) -> dict[str, float]:
    # While the others had their turn this one filled its queue: a few batches that cost nothing now.
    _take(batches, PREFETCH_BATCHES + 2)
    begin, cpu = time.perf_counter(), _cpu_seconds(os.getpid())
    images = _take(batches, steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds(os.getpid()) - cpu
    # The kernel counts in ticks of 10 ms: less than one is not nothing.
    return {
        "images_per_second": images / seconds,
        "cpu_ms_per_image": 1000 * max(cpu, 1 / _TICKS_PER_SECOND) / images,
    }


def _take(batches: Counter, count: int) -> int:
    return sum(next(batches) for _ in range(count))


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and its living descendants."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = [
        child
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    own = (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
    return own + sum(_cpu_seconds(int(child)) for child in children)


def _dali_batches(contestant: Contestant, spec: AugmentSpec | None) -> Counter:
    manifest, device = contestant.manifest, torch.device(contestant.device)
    size = min(BATCH_SIZE, len(manifest))
    plan = Plan(0, len(manifest), size, size)
    if spec is not None:
        loader = train_loader(
            manifest,
            plan,
            spec,
            rank=0,
            world=1,
            device=device,
            decode=contestant.decode,
            threads=contestant.cores,
            prefetch_batches=PREFETCH_BATCHES,
            hw_decoder_load=contestant.hw_decoder_load,
        )
        return (len(batch.labels) for epoch in itertools.count() for batch in loader.epoch(epoch))
    read = file_reader(manifest, contestant.cores)
    upcoming = (batch.indices for epoch in itertools.count() for batch in plan.micro_batches(epoch, 0, 0, 1))
    run = graphs.execution(
        device,
        contestant.decode,
        size,
        contestant.cores,
        PREFETCH_BATCHES,
        reads_files=manifest.packed is None,
        hw_decoder_load=contestant.hw_decoder_load,
    )
    pipeline = graphs.decode_graph(lambda: [read(next(upcoming))], run, windows=False)
    return (len(pipeline.run()[0]) for _ in itertools.count())


class _ManifestReader:
    """The manifest's files and labels, in the form in which timm's ImageDataset asks for them."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        packed = self._manifest.packed
        file = open(self._manifest.file(index), "rb") if packed is None else io.BytesIO(packed.read(index))  # noqa: SIM115
        return file, int(self._manifest.labels[index])


def _timm_batches(contestant: Contestant, spec: AugmentSpec | None) -> Counter:
    import timm.data
    from timm.data import auto_augment

    # timm asks Pillow to keep 0 bits at full magnitude, which Pillow refuses since 12.0; ours keeps one bit, too.
    keep_bits = auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"]
    auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"] = lambda *args: (max(1, keep_bits(*args)[0]),)
    augmented = spec or AugmentSpec(32)
    dataset = timm.data.ImageDataset("", reader=_ManifestReader(contestant.manifest))
    loader = timm.data.create_loader(
        dataset,
        input_size=augmented.image_px,
        batch_size=min(BATCH_SIZE, len(dataset)),
        is_training=True,
        scale=augmented.scale,
        ratio=augmented.ratio,
        hflip=augmented.hflip,
        color_jitter=augmented.color_jitter or 0.0,
        auto_augment=augmented.rand_augment,
        interpolation=augmented.interpolation,
        mean=augmented.mean,
        std=augmented.std,
        num_workers=contestant.cores,
        use_multi_epochs_loader=True,  # or its queue runs dry at the end of every epoch
        pin_memory=contestant.device == "cuda",
        device=torch.device(contestant.device),
    )
    if spec is None:
        dataset.transform = _one_pixel  # the dataset has decoded the image by then
    return (len(labels) for _ in itertools.count() for _, labels in loader)


def _one_pixel(image: Any) -> Any:
    return np.zeros((3, 1, 1), np.uint8)
