"""Time the loader alone, the step alone and both together; name what limits them (`cmtrain bench`).

Machines are shared and noisy, so all rates are taken in one process, one after the other, and the verdict is
their ratio. A host clock times the steps, with the device drained before and after all, never in between.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from cmtrain import __version__
from cmtrain.commands.bench.models import Setup, against_ceilings, predict, time_models
from cmtrain.commands.bench.timing import WARMUP_STEPS, Figures, Rows, drain, endless, measure_ceilings
from cmtrain.config.schema import Config
from cmtrain.monitoring.console import announced_parts, print_result, write_result
from cmtrain.monitoring.units import percent
from cmtrain.step.learner import Learner
from cmtrain.training import build, loaders
from pipelines.files.manifest import Manifest
from pipelines.spec import Batch, Loader, print_lines

# A loader this much faster than the step keeps it fed through jitter.
COMFORTABLE_RATIO = 1.2
# A host that is busy for this share of a step does not run ahead of the device.
HOST_SHARE = 0.9
LOST_PERCENT = 20.0  # of a step: a loader that costs more is slow beside the model, however fast alone
# key of a row -> header of its column and unit of its number
COLUMNS = {
    "images_per_second": ("images/s", ""), "step_ms_mean": ("ms per step", ""), "ms_p50": ("median ms", ""),
    "data_wait_percent": ("lost to loading", " %"), "first_is_times": ("first is", " x as fast"),
    "uses": ("of the machine's best", ""), "ms": ("ms", ""),
    "launches": ("launches", ""), "mb": ("MB", ""), "bound": ("bound by", ""),
}  # fmt: skip
USES = {
    "percent_of_copy": "memory {:.0f} %", "percent_of_matrix": "compute {:.0f} %",
    "peak_memory_gib": "{:.1f} GiB", "copy_gb_per_second": "{:.3g} GB/s", "matrix_tflops": "{:.3g} TFLOP/s",
}  # fmt: skip
KEYS = {
    "model": ("images_per_second", "ms_p50", "first_is_times", "uses"),
    "predict": ("launches", "mb", "ms", "bound"),
}
RUN_KEYS = ("images_per_second", "step_ms_mean", "data_wait_percent", "uses")
NUM_PARTS = {"loader": 1, "model": 3, "all": 4, "train": 1}


def bench(config: Config, options: argparse.Namespace) -> None:
    """Measure `options.what` with the recipe of `config`. Raises as training does.
    Prints its parts and a table on stderr, one JSON line on stdout, and what is known so far into a file.
    """
    what = options.what
    if options.predict:
        _finish(predict(config, options.predict), options.json)
        return
    accelerator = build.make_accelerator(config.train.precision)
    threads = loaders.split_threads(config, accelerator.device)
    data = loaders.open_data(config, accelerator)
    schedule = build.plan_steps(config, len(data.train), accelerator.num_processes)
    num_classes = loaders.num_classes_of(config, data.train)
    sets = loaders.label_sets(data.train, num_classes, accelerator.device)
    setup = Setup(config, accelerator, schedule, num_classes, options.steps, options.rounds, sets)
    rows = time_models(setup, options.beside) if what == "model" else _time_run(what, setup, data.train)
    figures: Figures = {}
    report: dict[str, Any] = {
        "what": what,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "precision": build.precision_of(accelerator),
        "compiled": config.train.compile and config.train.compile_mode, "model": config.model.name,
        "image_px": config.data.image_px, "batch": schedule.micro_batch_size * schedule.accumulation,
        "world_size": accelerator.num_processes, "decode_threads": threads,
        "torch_threads": torch.get_num_threads(),
        "versions": {"cmtrain": __version__, "torch": torch.__version__}, "figures": figures,
        "verdict": "unfinished",
    }  # fmt: skip
    with announced_parts(NUM_PARTS[what], enabled=accelerator.is_main_process) as begin:
        for name, row in rows:
            if not row:
                begin(name)
                continue
            figures[name] = row
            write_result(report, options.json if accelerator.is_main_process else None)
    report["verdict"] = verdict(figures, to_decode_faster(config, data.train))
    if accelerator.is_main_process:
        _finish(report, options.json)


def _finish(report: dict[str, Any], path: str | None) -> None:
    _show(report)
    print_result(report, asked=path == "")
    write_result(report, path)


def _time_run(what: str, setup: Setup, images: Manifest) -> Rows:
    """Time the loader ("loader"), training on real data ("train"), or both and the model alone ("all")."""
    config, accelerator = setup.config, setup.accelerator
    place, lines = loaders.place_loaders(config, accelerator)
    print_lines(*lines)
    if what in ("all", "loader"):
        yield "the loader alone", {}
        loader = loaders.make_train_loader(config, images, setup.schedule, accelerator, place)
        yield "loader", _time_loader(loader, setup)
        loader.close()
    if what == "loader":
        return
    learner = setup.make_learner(config)
    if what == "all":
        yield f"{config.model.name} alone", {}
        alone = _time_steps(learner, setup.synthetic_batches(), setup)
        yield "copies and matrix products", {}
        ceilings = measure_ceilings(setup.device, setup.dtype)
        alone |= against_ceilings(setup, config.model.name, "train", alone["images_per_second"], ceilings)
        yield "model", alone
    yield "training on real images", {}
    loader = loaders.make_train_loader(config, images, setup.schedule, accelerator, place)
    train = _time_steps(learner, endless(loader), setup)
    loader.close()
    if what == "all":
        # The part of a step on real data that a step on ready data does not need.
        train["data_wait_percent"] = 100 * max(0.0, 1 - alone["step_ms_mean"] / train["step_ms_mean"])
    yield "train", train


def to_decode_faster(config: Config, images: Manifest) -> str:
    """Advise on images that are decoded too slowly."""
    small, shorter = max(256, config.data.eval_resize_px), np.minimum(images.heights, images.widths)
    if (side := int(np.median(shorter))) > 1.25 * small:
        return f"cmtrain data pack --resize-shorter {small} makes images of {side} px faster to decode"
    return "give it more CPU cores, or a GPU that decodes"


def verdict(figures: Figures, advice: str) -> str:
    """Name what limits a run, with the figure that shows it: decode (`advice`), host, memory, compute."""
    if not {"loader", "model"} <= figures.keys():
        return "measure with --what all to learn what limits a run"
    loader, model = figures["loader"], figures["model"]
    ratio = loader["images_per_second"] / model["images_per_second"]
    feeds = f"the loader feeds {percent(ratio, 0)} of what the model takes"
    if ratio < 1:
        missing = model["images_per_second"] - loader["images_per_second"]
        return f"limited by decode: {feeds}, {missing:,.0f} images/s short; {advice}"
    if (lost := figures.get("train", {}).get("data_wait_percent", 0.0)) > LOST_PERCENT:
        alone = f"though alone {feeds}: the two share this machine"
        return f"limited by decode: loading costs {lost:.0f} % of a step, {alone}"
    if ratio < COMFORTABLE_RATIO:
        feeds += ", which leaves little for jitter"
    if model.get("host_share", 0.0) > HOST_SHARE:
        return f"limited by host: it needs {percent(model['host_share'], 0)} of a step to queue it; {feeds}"
    memory, compute = model["percent_of_copy"], model["percent_of_matrix"]
    if memory >= compute:
        limit = f"memory: {memory:.0f} % of a copy's bandwidth, counted as without torch.compile"
    else:
        limit = f"compute: {compute:.0f} % of a matrix product's rate"
    return f"limited by {limit}; {feeds}"


def _time_loader(loader: Loader, setup: Setup) -> dict[str, float]:
    sizes, per_step = (len(batch.labels) for batch in endless(loader)), setup.schedule.accumulation
    sum(itertools.islice(sizes, WARMUP_STEPS * per_step))
    drain(setup.device)
    begin = time.perf_counter()
    images = sum(itertools.islice(sizes, setup.steps * per_step))
    drain(setup.device)
    return {"images_per_second": images / (time.perf_counter() - begin)}


def _time_steps(learner: Learner, batches: Iterator[Batch], setup: Setup) -> dict[str, float]:
    lr, device = setup.config.optim.lr, setup.device
    for step in range(WARMUP_STEPS):
        learner.step(batches, step, lr)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    drain(device)
    begin, images, host_seconds = time.perf_counter(), 0, []
    for step in range(WARMUP_STEPS, WARMUP_STEPS + setup.steps):
        queued = time.perf_counter()
        images += learner.step(batches, step, lr)
        host_seconds.append(time.perf_counter() - queued)
    drain(device)
    seconds = time.perf_counter() - begin
    figures = {"images_per_second": images / seconds, "step_ms_mean": 1000 * seconds / setup.steps}
    figures["host_ms_median"] = 1000 * statistics.median(host_seconds)
    if device.type == "cuda":
        figures["host_share"] = figures["host_ms_median"] / figures["step_ms_mean"]
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def _show(report: dict[str, Any]) -> None:
    """Print five columns with their units; the JSON has all figures."""
    console, figures = Console(stderr=True, highlight=False), report["figures"]
    keys = KEYS.get(report["what"], RUN_KEYS)
    title = "{model} at {image_px} px, {precision}, {device}, batch {batch}".format(**report)
    columns = (Column(COLUMNS[key][0], justify="right") for key in keys)
    first = "predicted" if report["what"] == "predict" else "measured"
    table = Table(first, *columns, title=title, title_justify="left", box=None, pad_edge=False)
    for name, row in figures.items():
        table.add_row(name, *(_shown(row, key) for key in keys))
    console.print(table)
    console.print(report["verdict"])


def _shown(row: dict[str, float], key: str) -> str:
    if key == "uses":
        return ", ".join(text.format(row[key]) for key, text in USES.items() if key in row)
    if not isinstance(value := row.get(key, ""), float | int):
        return value
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + COLUMNS[key][1]
