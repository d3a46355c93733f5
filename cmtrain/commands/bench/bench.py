"""`cmtrain bench`: how fast the loader is alone, the training step alone, and both together, in one run.

Machines are shared and noisy, so no figure stands alone: all are taken in one process, one after the other, and the
verdict is their ratio. Steps are timed by a host clock with the device drained before and after the whole region, never
inside it. What is compared with another run's figures (`--compare`) had better come from the same, quiet machine.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from cmtrain import __version__
from cmtrain.commands.bench import guard
from cmtrain.commands.bench.loader import bench_loader
from cmtrain.commands.bench.machine import measure_ceilings
from cmtrain.commands.bench.models import DTYPES, Figures, time_latency, time_models
from cmtrain.config.schema import Config
from cmtrain.errors import EXIT_DONE, EXIT_EXPECTATION
from cmtrain.models import cost
from cmtrain.models.cost import training_flops_per_image
from cmtrain.step.learner import Learner
from cmtrain.training import build
from cmtrain.training.schedule import Schedule
from pipelines.files.manifest import Manifest
from pipelines.spec import Batch, DataError, Loader

WARMUP_STEPS = 3
# A loader this much faster than the step keeps it fed through jitter.
COMFORTABLE_RATIO = 1.2
# A host that is busy for this share of a step does not run ahead of the device.
HOST_SHARE = 0.9


def bench(
    what: str,
    config: Config,
    *,
    steps: int,
    json_path: str | None,
    rounds: int = 5,
    packed: str | None = None,
    beside: Sequence[str] = (),
    compare: str | None = None,
    fail_below: float | None = None,
) -> int:
    """Measure `what` with the recipe of `config`, for `steps` steps each.

    "loader": ours against timm's, see `bench_loader`, which alone takes `packed`. "model", "latency": the model beside
    the timm models `beside` it, see `bench_models`. "guard": a step with the guard and without, see `bench_guard`.
    "train": training on real data. "all": loader, model and training one after the other, and which sets the pace.
    All but the last two take `rounds`.

    Prints a table on stderr and one JSON line on stdout; writes the JSON to `json_path` too, if given.

    Args:
        compare: JSON of an earlier run; the table then shows each rate over the one there.
        fail_below: a ratio; with a rate below it the exit code is 5.

    Returns:
        The process exit code, 0 or 5.

    Raises:
        ConfigError, DataError: as training would, and an earlier run that cannot be compared.
    """
    if what == "loader":
        return bench_loader(config, steps=steps, rounds=rounds, packed=packed, json_path=json_path)
    earlier = _read_earlier(compare) if compare else None
    accelerator = build.make_accelerator(config.train.precision)
    threads = build.split_threads(config, accelerator)
    data = build.open_data(config, accelerator)
    schedule = build.plan_steps(config, len(data.train), accelerator.num_processes)
    num_classes = build.num_classes_of(config, data.train)
    turns: dict[str, Any] = {"steps": steps, "rounds": rounds}
    if what == "model":
        figures = time_models(config, schedule, num_classes, accelerator, beside=beside, **turns)
    elif what == "latency":
        figures = time_latency(config, num_classes, accelerator, beside=beside, **turns)
    else:
        figures = _time_run(what, config, data.train, schedule, num_classes, accelerator, threads, **turns)
    report = {
        "what": what,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "precision": build.precision_of(accelerator),
        "compiled": config.train.compile and config.train.compile_mode,
        "model": config.model.name,
        "image_px": config.data.image_px,
        "batch": 1 if what == "latency" else schedule.micro_batch_size * schedule.accumulation,
        "world_size": accelerator.num_processes,
        "decode_threads": threads,
        "torch_threads": torch.get_num_threads(),
        "versions": {"cmtrain": __version__, "torch": torch.__version__},
        "figures": figures,
        "verdict": guard.verdict(figures) if what == "guard" else verdict(figures),
    }
    below = _compare(report, earlier, fail_below) if earlier else []
    if accelerator.is_main_process:
        _show(report)
        print(json.dumps(report), flush=True)  # noqa: T201
        if json_path:
            Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
        for line in below:
            sys.stderr.write(f"{line}\n")
    return EXIT_EXPECTATION if below else EXIT_DONE


def _time_run(
    what: str,
    config: Config,
    images: Manifest,
    schedule: Schedule,
    num_classes: int,
    accelerator: Accelerator,
    threads: int,
    *,
    steps: int,
    rounds: int,
) -> Figures:
    """The figures of guard, train and all."""
    figures: Figures = {}
    if what == "all":
        loader = build.make_train_loader(config, images, schedule, accelerator, threads)
        figures["loader"] = _time_loader(loader, steps, schedule)
        loader.close()
    model = build.make_model(config, num_classes, accelerator.device)
    flops = training_flops_per_image(model, config.data.image_px)
    learner = build.make_learner(config, model, schedule, num_classes, accelerator)
    lr = config.optim.lr
    if what == "all":
        synthetic = build.make_synthetic_loader(config, schedule, num_classes, accelerator)
        figures["model"] = _time_steps(learner, synthetic, lr, steps, schedule)
        figures["model"] |= _ceilings(
            config, num_classes, accelerator, flops, figures["model"]["images_per_second"]
        )
    if what == "guard":
        batches = _endless(build.make_synthetic_loader(config, schedule, num_classes, accelerator))
        return guard.time_guard(
            learner, batches, lr=lr, steps=steps, rounds=rounds, log_every_steps=config.train.log_every_steps
        )
    loader = build.make_train_loader(config, images, schedule, accelerator, threads)
    figures["train"] = _time_steps(learner, loader, lr, steps, schedule)
    loader.close()
    if "model" in figures:
        # Of a step on real data, what a step on data that lies ready does not need.
        spared = 1 - figures["model"]["step_ms_mean"] / figures["train"]["step_ms_mean"]
        figures["train"]["data_wait_percent"] = 100 * max(0.0, spared)
    return figures


def _ceilings(
    config: Config, num_classes: int, accelerator: Accelerator, flops: int, images_per_second: float
) -> dict[str, float]:
    """How much of the machine's bandwidth and arithmetic a training step at that rate uses."""
    dtype = DTYPES[build.precision_of(accelerator)]
    ceilings = measure_ceilings(accelerator.device, dtype)
    fresh = build.make_model(config, num_classes).train()
    moved = cost.count(fresh, image_px=config.data.image_px, dtype=dtype).total_bytes
    return {
        "mb_per_image": moved / 1e6,
        "percent_of_copy": 100 * moved * images_per_second / ceilings.copy_bytes_per_second,
        "percent_of_matrix": 100 * flops * images_per_second / ceilings.matrix_flops_per_second,
    }


def verdict(figures: Figures) -> str:
    """What a run is bound by: decode, host, memory or compute, with the figure that says so."""
    if not {"loader", "model"} <= figures.keys():
        return "measure with --what all to learn what a run is bound by"
    loader, model = figures["loader"], figures["model"]
    ratio = loader["images_per_second"] / model["images_per_second"]
    feeds = f"the loader feeds {ratio:.0%} of what the model takes"
    if ratio < 1:
        return f"bound by decode: {feeds}"
    tight = f"; {feeds}, which leaves little for jitter" if ratio < COMFORTABLE_RATIO else f"; {feeds}"
    if model.get("host_share", 0.0) > HOST_SHARE:
        return f"bound by host: it needs {model['host_share']:.0%} of a step to queue the step{tight}"
    memory, compute = model["percent_of_copy"], model["percent_of_matrix"]
    name, percent = ("memory", memory) if memory >= compute else ("compute", compute)
    of = (
        "a copy's bandwidth, counted as if nothing were fused"
        if name == "memory"
        else "a matrix product's rate"
    )
    return f"bound by {name}: {percent:.0f} % of {of}{tight}"


def _read_earlier(path: str) -> dict[str, Any]:
    try:
        earlier = json.loads(Path(path).read_text())
        if not isinstance(earlier, dict) or not isinstance(earlier.get("figures"), dict):
            raise ValueError("no figures in it")
    except (OSError, ValueError) as error:
        raise DataError(f"--compare: {path}: no report of cmtrain bench: {error}") from error
    return earlier


SAME = ("what", "device", "precision", "compiled", "model", "image_px", "batch", "world_size")


def _compare(report: dict[str, Any], earlier: dict[str, Any], fail_below: float | None) -> list[str]:
    """Add `times_earlier` to each row that has a rate in both; returns a line for each below `fail_below`.

    Raises:
        DataError: the two are not of the same work on the same kind of device.
    """
    if other := [
        f"{key} {earlier.get(key)} -> {report[key]}" for key in SAME if earlier.get(key) != report[key]
    ]:
        raise DataError(f"--compare: of another benchmark: {', '.join(other)}")
    below = []
    for name, row in report["figures"].items():
        before = earlier["figures"].get(name, {}).get("images_per_second")
        if before and "images_per_second" in row:
            row["times_earlier"] = row["images_per_second"] / before
            if fail_below is not None and row["times_earlier"] < fail_below:
                below.append(
                    f"{name}: {row['times_earlier']:.3f} times the earlier rate, less than {fail_below:g}"
                )
    return below


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


def _time_steps(
    learner: Learner, loader: Loader, lr: float, steps: int, schedule: Schedule
) -> dict[str, float]:
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
        figures["host_share"] = figures["host_ms_median"] / figures["step_ms_mean"]
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
        "",
        *columns,
        title=f"{report['model']} at {report['image_px']} px, {report['precision']}, {report['device']}",
    )
    for name, figures in report["figures"].items():
        table.add_row(name, *(_shown(figures[c]) if c in figures else "" for c in columns))
    console.print(table)
    console.print(report["verdict"])
