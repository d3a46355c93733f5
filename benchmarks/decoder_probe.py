"""Try every way to decode for this GPU in a process of its own: crashes, hangs and wrong pixels become rows.

    python benchmarks/decoder_probe.py --json FILE

Decodes JPEGs of every kind, with crop windows and whole, and compares them with the CPU's, at three loads
of the GPU's JPEG engine. Writes one JSON line for each way and load as soon as it is known; its `fault` is
empty if the pixels are right.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from pipelines.decoder_probe import WAYS, fault_of
from pipelines.spec import Placement

LOADS = (0.65, 1.0, 0.0)  # DALI's default first
MAX_SECONDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if torch.cuda.is_available():
        device, tries = "cuda", [(decode, load) for decode in WAYS[:-1] for load in LOADS]
    else:
        device, tries = "cpu", [(WAYS[-1], LOADS[0])]
    with options.json.open("w") as file:
        for decode, load in tries:
            begin = time.monotonic()
            place = Placement(device=device, threads=4, hw_decoder_load=load)
            fault = fault_of(place, decode, max_seconds=MAX_SECONDS)
            row = {"decode": decode, "load": load, "fault": fault, "seconds": time.monotonic() - begin}
            print(json.dumps(row), file=file, flush=True)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
