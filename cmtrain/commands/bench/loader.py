"""`cmtrain bench --what loader`: images/s of our loader beside timm's, on the same files, cores and augmentation.

Every contestant is a process of its own. On a CPU all of its threads and workers are pinned to one core, so that the
figure is images/s per core and neither side can borrow from the other. Machines are noisy, so contestants take turns,
in alternating order, and a ratio is the median of the ratios within a round. CPU time per image (user and system, of
the process and its workers) is the steadier figure.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cmtrain import __version__
from cmtrain.commands.bench.loader_workers import BATCH_SIZE, PREFETCH_BATCHES, Contestant, serve
from cmtrain.config.schema import Config
from cmtrain.training import build
from pipelines.files.manifest import Manifest
from pipelines.loader import train_loader
from pipelines.packing.shard_writer import pack_split
from pipelines.plan import Plan, augment_params
from pipelines.spec import AugmentSpec, Decode

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # the paper's
COLOR_JITTER = 0.4
OVERHEAD_BATCH_SIZE = 512
PACKED_IMAGES, PACKED_PX, PACKED_QUALITY = 2000, 256, 90


def bench_loader(
    config: Config, *, steps: int, rounds: int, packed: str | None, json_path: str | None
) -> int:
    """Time decoding, crop + resize + flip, colour jitter and RandAugment, by DALI and by timm.

    Prints a table on stderr and one JSON line on stdout; writes the JSON to `json_path` too, if given.

    Args:
        steps: batches of 64 images that are timed in each round.
        rounds: how often each contestant has its turn at each work.
        packed: a copy of data.root by `cmtrain data pack`, timed beside the files; None packs up to 2000 of the images
            into a temporary one, with shorter sides of 256 pixels.

    Returns:
        The process exit code, 0.

    Raises:
        ConfigError, DataError: as training would.
    """
    accelerator = build.make_accelerator(config.train.precision)
    threads = build.split_threads(config, accelerator)
    files = build.open_data(config, accelerator).train
    crop = replace(build.augment_spec(config, accelerator), color_jitter=None, rand_augment=None, fp16=False)
    hardest = replace(crop, rand_augment=RAND_AUGMENT)
    works = {
        "decode": None,
        "crop": crop,
        "crop + jitter": replace(crop, color_jitter=COLOR_JITTER),
        "crop + randaugment": hardest,
    }
    report: dict[str, Any] = {
        "device": "cpu",
        "image_px": config.data.image_px,
        "interpolation": config.data.interpolation,
        "batch": BATCH_SIZE,
        "images": len(files),
        "versions": {"cmtrain": __version__, "torch": torch.__version__},
        "overhead": _overhead(files, hardest),
    }
    with _packed_copy(files, Path(packed, config.data.train_dir) if packed else None) as shards:
        report["cpu"] = _race(_contestants(files, shards, "cpu", "cpu", 1), works, steps, rounds)
        if accelerator.device.type == "cuda":
            report["device"] = torch.cuda.get_device_name()
            report["cores"] = threads
            load = config.data.hw_decoder_load
            report["gpu"] = _race(
                _contestants(files, shards, "cuda", config.data.decode, threads, load), works, steps, rounds
            )
    _show(report)
    print(json.dumps(report), flush=True)  # noqa: T201
    if json_path:
        Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Rounds of {contestant: {"images_per_second", "cpu_ms_per_image"}} to one set of figures per contestant.

    Ratios are how many times as fast as timm, taken within a round, so that slow minutes hit both sides.
    """
    figures: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        rates = [figure[name]["images_per_second"] for figure in rounds]
        cpu_ms = [figure[name]["cpu_ms_per_image"] for figure in rounds]
        figures[name] = {
            "images_per_second": statistics.median(rates),
            "images_per_second_max": max(rates),
            "cpu_ms_per_image": statistics.median(cpu_ms),
            "cpu_ms_per_image_min": min(cpu_ms),
        }
        if "timm" in rounds[0] and name != "timm":
            theirs = [figure["timm"] for figure in rounds]
            figures[name]["times_timm"] = statistics.median(
                rate / their["images_per_second"] for rate, their in zip(rates, theirs, strict=True)
            )
            figures[name]["times_timm_by_cpu"] = statistics.median(
                their["cpu_ms_per_image"] / ms for ms, their in zip(cpu_ms, theirs, strict=True)
            )
    return figures


@contextmanager
def _packed_copy(files: Manifest, folder: Path | None) -> Iterator[Manifest | None]:
    """The packed images of `folder`, or a copy of `files` that is removed afterwards; None if those are packed."""
    if folder is not None or files.packed is not None:
        yield Manifest.from_shards(folder) if folder is not None else None
        return
    sample = files.fraction(min(1.0, PACKED_IMAGES / len(files)), seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        options = {"resize_shorter": PACKED_PX, "quality": PACKED_QUALITY, "shard_bytes": 2**28}
        pack_split(sample, Path(temporary, "train"), **options, processes=1, max_bad_fraction=1.0)
        yield Manifest.from_shards(Path(temporary, "train"))


def _contestants(
    files: Manifest,
    shards: Manifest | None,
    device: str,
    decode: Decode,
    cores: int,
    load: float | None = None,
) -> list[Contestant]:
    contestants = [
        Contestant("timm", "timm", files, device, "cpu", cores),
        Contestant("dali", "dali", files, device, decode, cores, load),
    ]
    if shards is not None:
        contestants.append(Contestant("dali packed", "dali", shards, device, decode, cores, load))
    return contestants


def _race(
    contestants: list[Contestant], works: dict[str, AugmentSpec | None], steps: int, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """{work: {contestant: figures}}; one process a contestant, one of them busy at a time."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for contestant in contestants:
        pipes[contestant.name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, contestant)))
        processes[-1].start()
        theirs.close()
    figures = {}
    try:
        for work, spec in works.items():
            for pipe in pipes.values():
                _ask(pipe, ("prepare", spec))
            measured = []
            for number in range(rounds):
                order = list(pipes) if number % 2 == 0 else list(reversed(pipes))
                measured.append({name: _ask(pipes[name], ("measure", steps)) for name in order})
            figures[work] = summarise(measured)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()
    return figures


def _ask(pipe: Connection, question: tuple[str, Any]) -> Any:
    pipe.send(question)
    return pipe.recv()  # EOFError if the contestant died; its traceback is on stderr


def _overhead(manifest: Manifest, spec: AugmentSpec) -> dict[str, float]:
    """The time that the loader takes from the thread that trains for a batch, and that of one sample's random draws."""
    size = min(OVERHEAD_BATCH_SIZE, len(manifest))
    plan = Plan(0, len(manifest), size, size)
    loader = train_loader(
        manifest,
        plan,
        spec,
        rank=0,
        world=1,
        device="cpu",
        decode="cpu",
        threads=1,
        prefetch_batches=PREFETCH_BATCHES,
    )
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
    for _ in range(PREFETCH_BATCHES):
        next(batches)
    in_thread = _best_seconds(lambda: next(batches), time.thread_time, 5)
    loader.close()
    batch = next(plan.micro_batches(0, 0, 0, 1))
    heights, widths = manifest.heights[batch.indices], manifest.widths[batch.indices]
    draws = _best_seconds(lambda: augment_params(plan, batch, heights, widths, spec), time.perf_counter, 20)
    return {
        "batch": size,
        "thread_ms_per_batch": 1000 * in_thread,
        "draws_us_per_sample": 1e6 * draws / size,
    }


def _best_seconds(function: Callable[[], Any], clock: Callable[[], float], repeats: int) -> float:
    laps = []
    for _ in range(repeats):
        begin = clock()
        function()
        laps.append(clock() - begin)
    return min(laps)


def _show(report: dict[str, Any]) -> None:
    console = Console(stderr=True)
    for device in ("cpu", "gpu"):
        if device not in report:
            continue
        cores = "one core" if device == "cpu" else f"{report['device']}, {report['cores']} cores"
        table = Table(
            *("work", "loader", "images/s", "best", "cpu ms/image", "best", "x timm", "x timm by cpu time"),
            title=f"{report['image_px']} px, {report['interpolation']}, {cores}",
        )
        for work, figures in report[device].items():
            for name, figure in figures.items():
                ratios = [
                    f"{figure[key]:.2f}" if key in figure else ""
                    for key in ("times_timm", "times_timm_by_cpu")
                ]
                rates = [f"{figure[key]:,.0f}" for key in ("images_per_second", "images_per_second_max")]
                costs = [f"{figure[key]:.2f}" for key in ("cpu_ms_per_image", "cpu_ms_per_image_min")]
                table.add_row(work, name, *rates, *costs, *ratios)
        console.print(table)
    overhead = report["overhead"]
    console.print(
        f"a batch of {overhead['batch']} takes {overhead['thread_ms_per_batch']:.2f} ms of the thread that trains; "
        f"random draws take {overhead['draws_us_per_sample']:.2f} us a sample"
    )
