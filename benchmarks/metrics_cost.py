"""What metrics cost a training step: CPU time of the training thread, and of a scrape.

    python benchmarks/metrics_cost.py [--steps 5000] [--json FILE]

CPU time, not wall time: on a shared machine a share of a percent is not to be seen in the time of a step. Counted is
all that a step does for its metrics and would not do without: marks for phases, counters, and a log point in every
`--log-every-steps`. The metrics are on, in a journal as in training; "off" is the same loop without them. Rounds of
both alternate in one process, and the median is told.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch

from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.monitoring.routes import MetricsPage
from cmtrain.step.measure import Phases

ROUNDS = 7
STEP_SECONDS = 0.01  # 100 steps/s: faster than any recipe here
SCRAPE_EVERY_SECONDS = 15


def work(steps: int, metrics: TrainMetrics | None, log_every_steps: int) -> float:
    """CPU seconds of this thread for `steps` steps that do nothing but what `metrics` asks for."""
    phases = Phases(torch.device("cpu"))
    begin = time.thread_time()
    for step in range(1, steps + 1):
        if metrics is None:
            continue
        phases.begin("")
        phases.begin("forward")
        phases.begin("backward")
        phases.begin("optimizer")
        phases.end_step()
        metrics.count_step(
            step,
            num_images=64,
            num_bytes=7_000_000,
            seconds=0.01,
            wait_seconds=0.001,
            phases=phases.pop_finished(),
        )
        if step % log_every_steps == 0:
            metrics.report(dataclasses.replace(metrics.reported, step=step, loss=2.0))
    return time.thread_time() - begin


def scrape(metrics: TrainMetrics) -> float:
    """CPU seconds to make the page once."""
    page = MetricsPage(metrics.registry)
    begin = time.thread_time()
    page("")
    return time.thread_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--log-every-steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    on, off, scrapes = [], [], []
    for number in range(ROUNDS):
        metrics = TrainMetrics(f"round{number}", 0)
        off.append(work(arguments.steps, None, arguments.log_every_steps) / arguments.steps)
        on.append(work(arguments.steps, metrics, arguments.log_every_steps) / arguments.steps)
        scrapes.append(scrape(metrics))
    step_seconds = statistics.median(on) - statistics.median(off)
    figures = {
        "step_us": round(1e6 * step_seconds, 1),
        "percent_of_step": round(100 * step_seconds / STEP_SECONDS, 2),
        "scrape_ms": round(1e3 * statistics.median(scrapes), 2),
        "percent_with_scrapes": round(
            100 * (step_seconds / STEP_SECONDS + statistics.median(scrapes) / SCRAPE_EVERY_SECONDS), 2
        ),
    }
    print(json.dumps(figures))
    if arguments.json:
        record = {
            "command": f"python benchmarks/metrics_cost.py --steps {arguments.steps} "
            f"--log-every-steps {arguments.log_every_steps}",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("cmtrain", "torch", "prometheus-client")},
            "figures": figures,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
