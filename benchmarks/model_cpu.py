"""Race CMT-Ti against timm's resnet50 at 160 px on one core: training step and evaluation.

    python benchmarks/model_cpu.py --json benchmarks/results/model-cpu.json

Machines differ and are shared, so the ratio counts: contenders take turns, and the best round of each, in
seconds of the process's own time, is compared.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import timm
import torch
from model_gpu import make_model, step_of

from cmtrain.commands.bench.timing import Contender, race
from cmtrain.models.fold import folded

# glibc gives large blocks back to the kernel and takes page faults to get them again, which costs every
# model a quarter of its rate (docs/performance.md). It reads these at start.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image-px", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the report to this file as well")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    torch.set_num_threads(1)
    images = torch.randn(options.batch, 3, options.image_px, options.image_px)
    racers = []
    for name in ("cmt_ti", "resnet50"):
        for kind, mode in (("train", "train"), ("eval", "infer"), ("folded eval", "infer")):
            model = make_model(name, options.image_px, mode)
            if kind == "folded eval":
                if name != "cmt_ti":
                    continue
                model = folded(model)
            racers.append(Contender(f"{name} {kind}", options.batch, step_of(model, images, mode)))
    race(racers, torch.device("cpu"), steps=1, rounds=options.rounds, clock=time.process_time)
    seconds = {racer.name: [turn[0] for turn in racer.seconds] for racer in racers}
    rates = {name: options.batch / min(taken) for name, taken in seconds.items()}
    report = {
        "command": f"benchmarks/model_cpu.py --rounds {options.rounds}",
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "batch": options.batch,
        "image_px": options.image_px,
        "images_per_cpu_second": rates,
        "cpu_seconds": seconds,
        "cmt_ti_to_resnet50": {
            kind: rates[f"cmt_ti {kind}"] / rates[f"resnet50 {kind.split()[-1]}"]
            for kind in ("train", "eval", "folded eval")
        },
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
