"""Load packed images from a disk and from a bucket on loopback, side by side, with added latency.

    python benchmarks/bucket.py [--images 3000] [--latency-ms 0 20 100] [--json F]

Each row loads three epochs into an empty cache, beside the disk. The server is a Python program in the same
process, so in the first epoch it is a part of what is measured. `of_the_disk`: images a second, divided by
those of the disk.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.bucket import bucket
from helpers.photographs import write_folder

from cmtrain.commands.data_pack import pack
from pipelines.files.manifest import Manifest
from pipelines.files.mirror import mirror_split
from pipelines.loader import train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, Placement


def seconds_of_epochs(manifest: Manifest, epochs: int) -> list[float]:
    """Return the seconds of each epoch, from the request of its first batch to its last."""
    plan = Plan(0, len(manifest), 128, 128)
    loader = train_loader(manifest, plan, AugmentSpec(160), Placement(threads=2))
    found = []
    for epoch in range(epochs):
        began = time.perf_counter()
        for _ in loader.epoch(epoch):
            pass
        found.append(time.perf_counter() - began)
    loader.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0, 20, 100])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, count in ("train", arguments.images), ("val", 8):
            write_folder(folder / "images" / split, count)
        options = {"resize_shorter": None, "quality": 90, "shard_mib": 16, "processes": 2}
        pack(str(folder / "images"), str(folder / "packed"), **options, cache_dir=str(folder / "scan"))
        on_disk = Manifest.from_shards(folder / "packed" / "train")
        print(f"{len(on_disk):,} images, {on_disk.size_bytes.sum() / 1e6:.0f} MB")
        rows = []
        with bucket(folder / "packed") as served:
            os.environ.update(served.environment)
            for latency in arguments.latency_ms:
                served.latency = latency / 1000
                of_disk = seconds_of_epochs(on_disk, 3)[1:]
                mirror_split("s3://images/train", folder / f"kept-{latency:g}", 1 << 40)
                kept = seconds_of_epochs(Manifest.from_shards(folder / f"kept-{latency:g}"), 3)
                disk = sum(of_disk) / len(of_disk)
                rows.append({
                    "latency_ms": latency, "disk_images_per_second": len(on_disk) / disk,
                    "first_epoch_of_the_disk": disk / kept[0],
                    "later_epochs_of_the_disk": 2 * disk / sum(kept[1:]),
                })  # fmt: skip
                sys.stdout.write(json.dumps(rows[-1]) + "\n")
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
