"""Time the loader alone: threads 4, 8, 16; RandAugment; loads of the GPU's JPEG engine. Also its GPU memory.

    python benchmarks/decoding.py FOLDER [--batch 512] [--batches 30] [--decode mixed|cpu] [--json FILE]

FOLDER holds train/<class>/*.jpg, or is demo:photos. One process for all, because starting costs more than
measuring. Every setting is measured twice, forwards and backwards through the list, and both rates are
printed.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch

from cmtrain.commands.bench.loader_workers import LoaderContender, make_loader
from cmtrain.commands.bench.timing import best_seconds, endless
from pipelines.files.demo_images import demo_folder
from pipelines.files.manifest import Manifest
from pipelines.spec import AugmentSpec

WARMUP_BATCHES = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(
    manifest: Manifest, options: argparse.Namespace, rand_augment, threads, load
) -> tuple[float, float]:
    """Return images/s, and MiB of the GPU that the process and its CUDA context hold."""
    spec = AugmentSpec(160, "bilinear", rand_augment=rand_augment, fp16=DEVICE.type == "cuda")
    size = min(options.batch, len(manifest))
    ours = LoaderContender("dali", "dali", manifest, DEVICE.type, options.decode, threads, load)
    loader, _ = make_loader(ours, spec, size)
    batches = endless(loader)

    def read(count: int) -> None:
        for _ in range(count):
            next(batches)

    read(WARMUP_BATCHES)
    seconds = best_seconds(lambda: read(options.batches), 1, device=DEVICE)
    free_bytes, total_bytes = torch.cuda.mem_get_info() if DEVICE.type == "cuda" else (0, 0)
    loader.close()
    return options.batches * size / seconds, (total_bytes - free_bytes) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--decode", choices=("mixed", "cpu"), default="mixed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = options.root.removeprefix("demo:")
    cache = Path.home() / ".cache" / "cmtrain"
    root = demo_folder(name, cache) if name != options.root else Path(options.root)
    manifest = Manifest.from_folder(root / "train")
    augments = (None, "reimpl", "rand-m9-mstd0.5-inc1")
    settings = [
        *itertools.product(augments, (4, 8, 16), (None,)),
        *((None, 8, load) for load in (0.0, 0.5, 0.8, 1.0)),
    ]
    rows = {
        setting: dict(zip(("rand_augment", "threads", "hw_decoder_load"), setting, strict=True))
        | {"images_per_second": [], "gpu_memory_mib": []}
        for setting in settings
    }
    for setting in settings + settings[::-1]:
        rate, mib = map(round, measure(manifest, options, *setting))
        print(setting, rate, mib, flush=True)
        rows[setting]["images_per_second"].append(rate)
        rows[setting]["gpu_memory_mib"].append(mib)
        if options.json:  # after each setting, in case time runs out
            report = {"batch": options.batch, "decode": options.decode, "rows": list(rows.values())}
            options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
