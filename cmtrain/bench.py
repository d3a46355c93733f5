"""`cmtrain bench`: how fast the loader is alone, the training step alone, and both together, in one run.

Machines are shared and noisy, so no figure stands alone: all are taken in one process, one after the other, and the
verdict is their ratio. Steps are timed by a host clock with the device drained before and after the whole region, never
inside it.
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cmtrain import __version__, bench_guard, build
from cmtrain.bench_loader import bench_loader
from cmtrain.config import Config
from cmtrain.learner import Learner
from cmtrain.schedule import Schedule
from pipelines.spec import Batch, Loader

WARMUP_STEPS = 3
# A loader this much faster than the step keeps it fed through jitter.
COMFORTABLE_RATIO = 1.2


def bench(
    what: str, config: Config, *, steps: int, json_path: str | None, rounds: int = 5, packed: str | None = None
) -> int:
    """Measure `what` (loader, model, guard, train or all) with the recipe of `config`, for `steps` steps each.

    Prints a table on stderr and one JSON line on stdout; writes the JSON to `json_path` too, if given. "loader" is a
    race against timm's, see `bench_loader`, which alone takes `packed`; "guard" is a step with the guard and without,
    see `bench_guard`. Both take `rounds`.

    Returns:
        The process exit code, 0.

    Raises:
        ConfigError, DataError: as training would.
    """
    if what == "loader":
        return bench_loader(config, steps=steps, rounds=rounds, packed=packed, json_path=json_path)
    accelerator = build.make_accelerator(config.train.precision)
    threads = build.split_threads(config, accelerator)
    data = build.open_data(config, accelerator)
    schedule = build.plan_steps(config, len(data.train), accelerator.num_processes)
    num_classes = build.num_classes_of(config, data.train)

    figures: dict[str, dict[str, float]] = {}
    if what == "all":
        loader = build.make_train_loader(config, data.train, schedule, accelerator, threads)
        figures["loader"] = _time_loader(loader, steps, schedule)
        loader.close()
    if what in ("model", "guard", "train", "all"):
        model = build.make_model(config, num_classes, accelerator.device)
        learner = build.make_learner(config, model, schedule, num_classes, accelerator)
        lr = config.optim.lr
        if what in ("model", "all"):
            synthetic = build.make_synthetic_loader(config, schedule, num_classes, accelerator)
            figures["model"] = _time_steps(learner, synthetic, lr, steps, schedule)
        if what == "guard":
            batches = _endless(build.make_synthetic_loader(config, schedule, num_classes, accelerator))
            figures = bench_guard.time_guard(
                learner, batches, lr=lr, steps=steps, rounds=rounds, log_every_steps=config.train.log_every_steps
            )
        if what in ("train", "all"):
            loader = build.make_train_loader(config, data.train, schedule, accelerator, threads)
            figures["train"] = _time_steps(learner, loader, lr, steps, schedule)
            loader.close()

    if {"model", "train"} <= figures.keys():
        # Of a step on real data, what a step on data that lies ready does not need.
        spared = 1 - figures["model"]["step_ms_mean"] / figures["train"]["step_ms_mean"]
        figures["train"]["data_wait_percent"] = 100 * max(0.0, spared)

    report = {
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "precision": build.precision_of(accelerator),
        "model": config.model.name,
        "image_px": config.data.image_px,
        "batch": schedule.micro_batch_size * schedule.accumulation,
        "world_size": accelerator.num_processes,
        "decode_threads": threads,
        "torch_threads": torch.get_num_threads(),
        "versions": {"cmtrain": __version__, "torch": torch.__version__},
        "figures": figures,
        "verdict": bench_guard.verdict(figures) if what == "guard" else verdict(figures),
    }
    if accelerator.is_main_process:
        _show(report)
        print(json.dumps(report), flush=True)  # noqa: T201
        if json_path:
            Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def verdict(figures: dict[str, dict[str, float]]) -> str:
    """Which of loader and model sets the pace, from their rates in images/s."""
    if not {"loader", "model"} <= figures.keys():
        return "measure with --what all to learn what the run is bound by"
    ratio = figures["loader"]["images_per_second"] / figures["model"]["images_per_second"]
    if ratio < 1:
        return f"bound by the loader: it feeds {ratio:.0%} of what the model takes"
    if ratio < COMFORTABLE_RATIO:
        return f"balanced: the loader feeds {ratio:.0%} of what the model takes, little is left for jitter"
    return f"bound by the model: the loader feeds {ratio:.0%} of what the model takes"


def _time_loader(loader: Loader, steps: int, schedule: Schedule) -> dict[str, float]:
    batches = _endless(loader)
    for _ in range(WARMUP_STEPS * schedule.accumulation):
        next(batches)
    _drain()
    begin, images = time.perf_counter(), 0
    for _ in range(steps * schedule.accumulation):
        images += len(next(batches).labels)
    _drain()
    return {"images_per_second": images / (time.perf_counter() - begin)}


def _time_steps(learner: Learner, loader: Loader, lr: float, steps: int, schedule: Schedule) -> dict[str, float]:
    batches = _endless(loader)
    for step in range(WARMUP_STEPS):
        learner.step(batches, step, lr)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _drain()
    begin, images, laps = time.perf_counter(), 0, []
    for step in range(WARMUP_STEPS, WARMUP_STEPS + steps):
        lap = time.perf_counter()
        images += learner.step(batches, step, lr)
        laps.append(time.perf_counter() - lap)
    _drain()
    seconds = time.perf_counter() - begin
    figures = {
        "images_per_second": images / seconds,
        "step_ms_mean": 1000 * seconds / steps,
        "host_ms_median": 1000 * statistics.median(laps),
    }
    if torch.cuda.is_available():
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def _endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _shown(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _show(report: dict[str, Any]) -> None:
    console = Console(stderr=True)
    columns = sorted({name for figures in report["figures"].values() for name in figures})
    table = Table(
        "", *columns, title=f"{report['model']} at {report['image_px']} px, {report['precision']}, {report['device']}"
    )
    for name, figures in report["figures"].items():
        table.add_row(name, *(_shown(figures[c]) if c in figures else "" for c in columns))
    console.print(table)
    console.print(report["verdict"])
