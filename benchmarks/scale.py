"""Simulate the start of a run from a bucket, for many ranks, against a model of a store. Needs no network.

    python benchmarks/scale.py [--ranks 8 64 1024] [--chunk-mib 1 4 16] [--images-per-second 15500]

The plan's own order of ImageNet's training images, and the fetcher's rules: each host fetches every chunk
once, in the order of the plan; a rank has its share of them and REQUESTS requests at a time. A step begins
when the chunks of its global batch are on every host. The store gives each connection a number of bytes a
second after a latency, each host what its network takes, and all hosts together a number of requests a
second: Amazon documents 5,500 for each prefix of S3.
"""

import argparse
import heapq
from dataclasses import dataclass

import numpy as np

from pipelines.files.mirror import REQUESTS
from pipelines.plan import Plan

NUM_IMAGES, IMAGE_BYTES = 1_281_167, 36_689  # ImageNet at a shorter side of 256, quality 90
INDEX_BYTES = 73 * NUM_IMAGES  # labels, sizes, places, checksums and paths
RANKS_PER_HOST = 8
LATENCY_SECONDS, CONNECTION_BYTES, HOST_BYTES, STORE_REQUESTS = 0.02, 80e6, 3e9, 5500.0


@dataclass(frozen=True)
class Start:
    """What a run waits for. Seconds, but for `requests` of one host and `requests_per_second` of all."""

    first_step: float
    waited: float  # in the first epoch, before all is on disk
    all_local: float
    requests: int
    requests_per_second: float


def simulate(ranks: int, global_batch: int, images_per_second: float, chunk_bytes: int) -> Start:
    """Play a host's fetcher, chunk by chunk; all hosts do the same at the same time."""
    hosts = max(1, ranks // RANKS_PER_HOST)
    shares = min(ranks, RANKS_PER_HOST)
    order = Plan(0, NUM_IMAGES, global_batch, global_batch).order(0)
    # Images lie in their shards in another random order than the plan's.
    place = np.random.default_rng(0).permutation(NUM_IMAGES)
    chunk_of = place * IMAGE_BYTES // chunk_bytes
    chunks, first = np.unique(chunk_of[order], return_index=True)
    arrived = np.zeros(len(chunks))
    slots = [[0.0] * REQUESTS for _ in range(shares)]
    asked, network = 0.0, 0.0
    for chunk in np.argsort(first).tolist():
        slot = slots[chunk % shares]
        begun = max(heapq.heappop(slot), asked)
        asked = max(asked, begun - 1) + hosts / STORE_REQUESTS
        network = max(network, begun + LATENCY_SECONDS) + chunk_bytes / HOST_BYTES
        arrived[chunk] = max(network, begun + LATENCY_SECONDS + chunk_bytes / CONNECTION_BYTES)
        heapq.heappush(slot, arrived[chunk])
    needed = arrived[np.searchsorted(chunks, chunk_of[order])]
    steps = NUM_IMAGES // global_batch
    ready = np.maximum.accumulate(needed[: steps * global_batch].reshape(steps, -1).max(1))
    now = waited = 0.0
    for at in ready.tolist():
        waited += max(0.0, at - now)
        now = max(now, at) + global_batch / (ranks * images_per_second)
    end = float(arrived.max())
    return Start(float(ready[0]), waited, end, len(chunks), hosts * len(chunks) / end)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--images-per-second", type=float, default=15500, help="of a rank")
    arguments = parser.parse_args()
    print("ranks  chunk  first step  waited in epoch 1  all local  requests of a host  requests/s of all")
    for ranks in arguments.ranks:
        for mib in arguments.chunk_mib:
            batch = 4096 if ranks <= 64 else 32 * ranks
            start = simulate(ranks, batch, arguments.images_per_second, mib << 20)
            print(
                f"{ranks:5}  {mib:2} MiB  {start.first_step:8.1f} s  {start.waited:15.1f} s  "
                f"{start.all_local:7.1f} s  {start.requests:18,}  {start.requests_per_second:17,.0f}"
            )
        hosts = max(1, ranks // RANKS_PER_HOST)
        seconds = max(INDEX_BYTES / HOST_BYTES, INDEX_BYTES / CONNECTION_BYTES)
        print(f"{ranks:5}  index: {hosts} requests, {hosts * INDEX_BYTES / 1e9:.1f} GB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
