"""Measure the CPU time that metrics cost the training thread per step, and that of a scrape.

    python benchmarks/metrics_cost.py [--steps 5000] [--json FILE]

CPU time, not wall time: on a shared machine nobody sees a share of a percent in the time of a step. Counted
is all that a step does for its metrics alone: marks for phases, counters, and a log point every
`--log-every-steps`. "off" is the same loop without them. Rounds of both alternate in one process, and the
median is printed.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from prometheus_client import generate_latest

from cmtrain.commands.bench.timing import best_seconds
from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.step.measure import Phases

ROUNDS = 7
STEP_SECONDS = 0.01  # 100 steps/s: faster than any recipe here
SCRAPE_EVERY_SECONDS = 15


def work(steps: int, metrics: TrainMetrics | None, log_every_steps: int) -> None:
    """Do `steps` steps that consist of their `metrics` alone."""
    phases = Phases(torch.device("cpu"))
    how = {"num_images": 64, "num_bytes": 7_000_000, "seconds": 0.01, "wait_seconds": 0.001}
    for step in range(1, steps + 1):
        if metrics is None:
            continue
        for phase in ("", "forward", "backward", "optimizer"):
            phases.begin(phase)
        phases.end_step()
        metrics.count_step(step, phases=phases.pop_finished(), **how)
        if step % log_every_steps == 0:
            metrics.report(dataclasses.replace(metrics.reported, step=step, loss=2.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--log-every-steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    steps, log_every = options.steps, options.log_every_steps
    on, off, scrapes = [], [], []
    for number in range(ROUNDS):
        metrics = TrainMetrics(f"round{number}", 0)
        for taken, side in ((off, None), (on, metrics)):
            taken.append(
                best_seconds(lambda side=side: work(steps, side, log_every), 1, time.thread_time) / steps
            )
        scrape = partial(generate_latest, metrics.registry)
        scrapes.append(best_seconds(scrape, 1, time.thread_time))
    step_seconds = statistics.median(on) - statistics.median(off)
    share, scrape_seconds = step_seconds / STEP_SECONDS, statistics.median(scrapes)
    figures = {
        "step_us": round(1e6 * step_seconds, 1),
        "percent_of_step": round(100 * share, 2),
        "scrape_ms": round(1e3 * scrape_seconds, 2),
        "percent_with_scrapes": round(100 * (share + scrape_seconds / SCRAPE_EVERY_SECONDS), 2),
    }
    print(json.dumps(figures))
    if options.json:
        versions = {name: version(name) for name in ("cmtrain", "torch", "prometheus-client")}
        record = {
            "command": f"python benchmarks/metrics_cost.py --steps {steps} --log-every-steps {log_every}",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {"python": platform.python_version()} | versions,
            "figures": figures,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
