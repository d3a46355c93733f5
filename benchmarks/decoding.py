"""Images/s and GPU memory of the loader alone: threads 4, 8, 16; RandAugment; shares of the JPEG engine.

    python benchmarks/decoding.py FOLDER [--batch 512] [--batches 30] [--decode mixed|cpu] [--json FILE]

FOLDER holds train/<class>/*.jpg, or is demo:photos. One process for all, because starting costs more than measuring;
every setting is measured twice, forwards and backwards through the list, and both figures are told.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch

from pipelines.files.demo_images import demo_folder
from pipelines.files.manifest import Manifest
from pipelines.loader import train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec

WARMUP_BATCHES = 4


def measure(
    manifest: Manifest, arguments: argparse.Namespace, rand_augment, threads, load
) -> tuple[float, float]:
    """Images/s, and MiB of the GPU that the process and its CUDA context hold."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = AugmentSpec(160, "bilinear", rand_augment=rand_augment, fp16=device == "cuda")
    size = min(arguments.batch, len(manifest))
    loader = train_loader(
        manifest, Plan(0, len(manifest), size, size), spec, rank=0, world=1, device=device, decode=arguments.decode,
        threads=threads, prefetch_batches=2, hw_decoder_load=load,
    )  # fmt: skip
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
    for _ in range(WARMUP_BATCHES):
        next(batches)
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(arguments.batches):
        next(batches)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    free_bytes, total_bytes = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
    loader.close()
    return arguments.batches * size / seconds, (total_bytes - free_bytes) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--decode", choices=("mixed", "cpu"), default="mixed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name = arguments.root.removeprefix("demo:")
    cache = Path.home() / ".cache" / "cmtrain"
    root = demo_folder(name, cache) if name != arguments.root else Path(arguments.root)
    manifest = Manifest.from_folder(root / "train")
    settings = [
        *itertools.product((None, "reimpl", "rand-m9-mstd0.5-inc1"), (4, 8, 16), (None,)),
        *((None, 8, load) for load in (0.0, 0.5, 0.8, 1.0)),
    ]
    measured: dict[tuple, list[tuple[float, float]]] = {setting: [] for setting in settings}
    for setting in settings + settings[::-1]:
        measured[setting].append(measure(manifest, arguments, *setting))
        print(setting, *map(round, measured[setting][-1]), flush=True)
        if arguments.json:  # after each, for whom time runs out
            write(arguments, measured)


def write(arguments: argparse.Namespace, measured: dict[tuple, list[tuple[float, float]]]) -> None:
    rows = [
        {
            "rand_augment": ra, "threads": threads, "hw_decoder_load": load,
            "images_per_second": [round(rate) for rate, _ in figures],
            "gpu_memory_mib": [round(mib) for _, mib in figures],
        }
        for (ra, threads, load), figures in measured.items()
    ]  # fmt: skip
    arguments.json.write_text(
        json.dumps({"batch": arguments.batch, "decode": arguments.decode, "rows": rows}) + "\n"
    )


if __name__ == "__main__":
    main()
