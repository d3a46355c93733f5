"""CMT-Ti beside timm's resnet50 at 160 px on one core: training step and evaluation, in turns, in one process.

    python benchmarks/model_cpu.py --json benchmarks/results/model-cpu.json

What counts is the ratio: machines differ and are shared, so every contestant takes its turn in every round, and its
best round, in seconds of the process's own time, is compared.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

# glibc gives large blocks back to the kernel and takes page faults to get them again, which costs every model a quarter
# of its rate (docs/performance.md). It reads these at start.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}


def contestants(names: list[str], image_px: int, batch: int) -> dict[str, Callable[[], None]]:
    """ "name train" and "name eval" -> what does it once, in fp32 and channels-last."""
    import timm
    import torch
    import torch.nn.functional as F

    from cmtrain.models import CMT
    from cmtrain.models.fold import folded

    images = torch.randn(batch, 3, image_px, image_px).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch)
    runs: dict[str, Callable[[], None]] = {}
    for name in names:
        options = {"img_size": image_px} if name.startswith("cmt_") else {}
        model = timm.create_model(name, **options).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def train(model=model, optimizer=optimizer) -> None:
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        def evaluate(model=model) -> None:
            model.eval()
            with torch.inference_mode():
                model(images)

        runs |= {f"{name} train": train, f"{name} eval": evaluate}
        if isinstance(model, CMT):
            for_inference = folded(model)
            runs[f"{name} folded eval"] = lambda model=for_inference: evaluate(model)
    return runs


def race(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of every run in every round, after one that does not count."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image-px", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures here, too")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    import timm
    import torch

    torch.set_num_threads(1)
    names = ["cmt_ti", "resnet50"]
    seconds = race(contestants(names, arguments.image_px, arguments.batch), arguments.rounds)
    rates = {name: arguments.batch / min(laps) for name, laps in seconds.items()}
    report = {
        "command": f"benchmarks/model_cpu.py --rounds {arguments.rounds}",
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "batch": arguments.batch,
        "image_px": arguments.image_px,
        "images_per_cpu_second": rates,
        "cpu_seconds": seconds,
        "cmt_ti_to_resnet50": {
            kind: rates[f"cmt_ti {kind}"] / rates[f"resnet50 {kind.split()[-1]}"]
            for kind in ("train", "eval", "folded eval")
        },
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
