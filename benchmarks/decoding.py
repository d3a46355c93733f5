"""Time the loader alone: threads, loads of the GPU's JPEG engine, RandAugment. Also its GPU memory.

    python benchmarks/decoding.py FOLDER --json FILE [--batch 512] [--batches 30] [--decode WAY]

FOLDER holds train/<class>/*.jpg, or is demo:jpegs. One process for all, because starting costs more than
measuring. Writes one JSON line per measurement as soon as it is known. Every setting is measured twice,
forwards and backwards through the list.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from loader_workers import LoaderContender, make_loader

from cmtrain.commands.bench.timing import best_seconds, endless
from pipelines.checks.bad_list import user_cache
from pipelines.decoder_probe import WAYS
from pipelines.files.demo_images import demo_folder
from pipelines.files.manifest import Manifest
from pipelines.spec import AugmentSpec, Placement

WARMUP_BATCHES = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# RandAugment, threads, load. At a load of 1 no image is left for the GPU's general cores.
SETTINGS = [
    *itertools.product((None,), (16, 8, 4), (0.65, 0.0, 0.99)),
    *itertools.product(("reimpl", "rand-m9-mstd0.5-inc1"), (16,), (0.65,)),
]


def measure(
    manifest: Manifest, options: argparse.Namespace, rand_augment: str | None, threads: int, load: float
) -> dict[str, float]:
    """Return images/s, and MiB of the GPU that the process and its CUDA context hold."""
    spec = AugmentSpec(160, "bilinear", rand_augment=rand_augment, fp16=DEVICE.type == "cuda")
    size = min(options.batch, len(manifest))
    place = Placement(device=DEVICE, decode=options.decode, threads=threads, hw_decoder_load=load)
    loader, _ = make_loader(LoaderContender("dali", manifest, place), spec, size)
    batches = endless(loader)

    def read(count: int) -> None:
        for _ in range(count):
            next(batches)

    read(WARMUP_BATCHES)
    seconds = best_seconds(lambda: read(options.batches), 1, device=DEVICE)
    free_bytes, total_bytes = torch.cuda.mem_get_info() if DEVICE.type == "cuda" else (0, 0)
    loader.close()
    rate, mib = options.batches * size / seconds, (total_bytes - free_bytes) / 2**20
    return {"images_per_second": round(rate), "gpu_memory_mib": round(mib)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--decode", choices=WAYS, default="mixed")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    name = options.root.removeprefix("demo:")
    root = demo_folder(name, user_cache()) if name != options.root else Path(options.root)
    manifest = Manifest.from_folder(root / "train")
    with options.json.open("w") as file:
        for setting in SETTINGS + SETTINGS[::-1]:
            row = dict(zip(("rand_augment", "threads", "hw_decoder_load"), setting, strict=True))
            row |= {"batch": options.batch, "decode": options.decode}
            row |= measure(manifest, options, *setting)
            print(json.dumps(row), file=file, flush=True)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
