"""Run the loaders that loader_beside_timm.py compares, each in a process pinned to its cores."""

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
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from pipelines.files.manifest import Manifest
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, Placement

if TYPE_CHECKING:
    from pipelines.loader import DaliLoader

BATCH_SIZE = 64
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
Counter = Iterator[int]  # number of images in each batch


@dataclass(frozen=True)
class LoaderContender:
    """A loader to time: timm's if that is its `name`, else ours. `manifest` may be packed."""

    name: str
    manifest: Manifest
    place: Placement  # its threads are the cores, of timm as well


def serve(pipe: Connection, contender: LoaderContender) -> None:
    """Build the loader that the parent asks for, time it, and end when the pipe is closed."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-contender.place.threads :])
    torch.set_num_threads(1)
    # timm's workers start as they do in a training script.
    multiprocessing.set_start_method("fork", force=True)
    make = _timm_batches if contender.name == "timm" else _dali_batches
    batches: Counter = iter(())
    while True:
        try:
            verb, argument = pipe.recv()
        except EOFError:
            return
        if verb == "prepare":
            del batches  # ends the workers of the previous loader
            batches = make(contender, argument)
            pipe.send(_take(batches, 2))
        else:
            pipe.send(_measure(batches, argument))


def _measure(batches: Counter, steps: int) -> dict[str, float]:
    # The queue was filled during the turns of the others: its batches cost nothing now.
    _take(batches, Placement.prefetch_batches + 2)
    begin, cpu = time.perf_counter(), _cpu_seconds(os.getpid())
    images = _take(batches, steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds(os.getpid()) - cpu
    # The kernel counts in ticks of 10 ms; less than one is not zero.
    return {
        "images_per_second": images / seconds,
        "cpu_ms_per_image": 1000 * max(cpu, 1 / _TICKS_PER_SECOND) / images,
    }


def _take(batches: Counter, count: int) -> int:
    return sum(next(batches) for _ in range(count))


def _cpu_seconds(pid: int) -> float:
    """Return user and system time of a process and its living descendants."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    lists = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
    children = [child for path in lists for child in path.read_text().split()]
    own = (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
    return own + sum(_cpu_seconds(int(child)) for child in children)


def make_loader(contender: LoaderContender, spec: AugmentSpec, size: int) -> tuple[DaliLoader, Plan]:
    """Return our loader of `size` training images a batch, and its plan. Raises DataError without DALI."""
    from pipelines.loader import train_loader

    plan = Plan(0, len(contender.manifest), size, size)
    return train_loader(contender.manifest, plan, spec, contender.place), plan


def _dali_batches(contender: LoaderContender, spec: AugmentSpec | None) -> Counter:
    manifest, place = contender.manifest, contender.place
    size = min(BATCH_SIZE, len(manifest))
    if spec is not None:
        loader, _ = make_loader(contender, spec, size)
        return (len(batch.labels) for epoch in itertools.count() for batch in loader.epoch(epoch))
    from pipelines.dali import graphs
    from pipelines.loader import file_reader

    plan = Plan(0, len(manifest), size, size)
    read = file_reader(manifest, place.threads)
    upcoming = (batch.indices for epoch in itertools.count() for batch in plan.micro_batches(epoch, 0, 0, 1))
    run = graphs.execution(place, size, reads_files=manifest.packed is None)
    pipeline = graphs.decode_graph(lambda: [read(next(upcoming))], run, windows=False)
    return (len(pipeline.run()[0]) for _ in itertools.count())


class _ManifestReader:
    """Give timm's ImageDataset the files and labels of a manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        packed = self._manifest.packed
        file = open(self._manifest.file(index), "rb") if packed is None else io.BytesIO(packed.read(index))  # noqa: SIM115
        return file, int(self._manifest.labels[index])


def _timm_batches(contender: LoaderContender, spec: AugmentSpec | None) -> Counter:
    import timm.data
    from timm.data import auto_augment

    # timm asks Pillow to keep 0 bits at full magnitude, which Pillow refuses since 12.0; ours keeps one bit.
    keep_bits = auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"]
    auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"] = lambda *args: (max(1, keep_bits(*args)[0]),)
    augmented = spec or AugmentSpec(32)
    kept = ("scale", "ratio", "hflip", "interpolation", "mean", "std")
    how = {name: getattr(augmented, name) for name in kept}
    how |= {"color_jitter": augmented.color_jitter or 0.0, "auto_augment": augmented.rand_augment}
    how |= {"num_workers": contender.place.threads, "pin_memory": contender.place.device == "cuda"}
    # Without the second, its queue runs dry at the end of every epoch.
    how |= {"is_training": True, "use_multi_epochs_loader": True}
    dataset = timm.data.ImageDataset("", reader=_ManifestReader(contender.manifest))
    size, device = min(BATCH_SIZE, len(dataset)), torch.device(contender.place.device)
    loader = timm.data.create_loader(dataset, augmented.image_px, size, device=device, **how)
    if spec is None:
        dataset.transform = _one_pixel  # the dataset has decoded the image by then
    return (len(labels) for _ in itertools.count() for _, labels in loader)


def _one_pixel(image: Any) -> Any:
    return np.zeros((3, 1, 1), np.uint8)
