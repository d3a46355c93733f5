"""Images/s of the loader alone: decode threads 4, 8, 16, with RandAugment and without, shares of the JPEG engine.

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

from cmtrain.demo_data import demo_folder
from pipelines.dataset import Manifest
from pipelines.loader import train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec

WARMUP_BATCHES = 4


def images_per_second(manifest: Manifest, arguments: argparse.Namespace, rand_augment, threads, load) -> float:
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
    loader.close()
    return arguments.batches * size / seconds


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
        *itertools.product((None, "seed", "rand-m9-mstd0.5-inc1"), (4, 8, 16), (None,)),
        *((None, 8, load) for load in (0.0, 0.5, 0.8, 1.0)),
    ]
    rates: dict[tuple, list[float]] = {setting: [] for setting in settings}
    for setting in settings + settings[::-1]:
        rates[setting].append(images_per_second(manifest, arguments, *setting))
    rows = [
        {"rand_augment": ra, "threads": threads, "hw_decoder_load": load, "images_per_second": [round(r) for r in rate]}
        for (ra, threads, load), rate in rates.items()
    ]
    for row in rows:
        print(row)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"batch": arguments.batch, "decode": arguments.decode, "rows": rows}) + "\n"
        )


if __name__ == "__main__":
    main()
