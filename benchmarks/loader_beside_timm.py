"""Race our loader against timm's on the same files, cores and augmentation.

    python benchmarks/loader_beside_timm.py [--config F] [--steps N] [--rounds N] [--packed DIR] [--json F]

Every contender is a process of its own. On a CPU its threads and workers are pinned to one core: the rate is
images/s per core, and neither side can borrow from the other. Contenders take turns in alternating order,
and a ratio is the median of the ratios within a round. CPU time per image (user and system, workers
included) is the steadier figure.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from loader_workers import BATCH_SIZE, LoaderContender, make_loader, serve
from rich.console import Console
from rich.table import Table

from cmtrain import __version__
from cmtrain.cli.arguments import Parser, positive
from cmtrain.commands.bench.timing import Figures, best_seconds, endless
from cmtrain.config.schema import Config
from cmtrain.monitoring.console import announced_parts, print_result, write_result
from cmtrain.training import build, loaders
from pipelines.files.manifest import Manifest
from pipelines.packing.encode import PackSpec
from pipelines.packing.shard_writer import pack_split
from pipelines.plan import augment_params
from pipelines.spec import AugmentSpec, Placement

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # the paper's
COLOR_JITTER = 0.4
OVERHEAD_BATCH_SIZE = 512
PACKED_IMAGES, PACKED_PX, PACKED_QUALITY = 2000, 256, 90
COLUMNS = {
    "images/s (best)": ("images_per_second", "images_per_second_max"),
    "CPU ms per image (best)": ("cpu_ms_per_image", "cpu_ms_per_image_min"),
    "times timm's (by CPU time)": ("times_timm", "times_timm_by_cpu"),
}


def race_loaders(config: Config, steps: int, rounds: int, packed: str | None, json_path: str | None) -> None:
    """Time decoding, crop + resize + flip, colour jitter and RandAugment, by DALI and by timm.

    Prints a table on stderr and one JSON line on stdout. Writes the JSON to `json_path` as well, if given,
    and before that what is known of it after each work. Raises as training does.

    Args:
        steps: batches of 64 images that are timed in each of the `rounds` of each work.
        packed: copy of data.root by `cmtrain data pack`, timed beside the files; None packs up to 2000 of
            the images into a temporary one, with shorter sides of 256 pixels.
    """
    accelerator = build.make_accelerator(config.train.precision)
    placed, lines = loaders.place_loaders(config, accelerator)
    sys.stderr.writelines(f"{line}\n" for line in lines)
    files = loaders.open_data(config, accelerator).train
    spec = loaders.augment_spec(config, accelerator)
    crop = replace(spec, color_jitter=None, rand_augment=None, fp16=False)
    jitter, hardest = replace(crop, color_jitter=COLOR_JITTER), replace(crop, rand_augment=RAND_AUGMENT)
    works = {"decode": None, "crop": crop, "crop + jitter": jitter, "crop + randaugment": hardest}
    report = {"device": "cpu"} | config.data.model_dump(include={"image_px", "interpolation"})
    versions = {"cmtrain": __version__, "torch": torch.__version__}
    report |= {"batch": BATCH_SIZE, "images": len(files), "versions": versions}
    places = {"cpu": Placement(device="cpu", decode="cpu", threads=1)}
    if accelerator.device.type == "cuda":
        report |= {"device": torch.cuda.get_device_name(), "cores": placed.threads, "decode": placed.decode}
        places["gpu"] = replace(placed, device="cuda", prefetch_batches=Placement.prefetch_batches)
    folder = Path(packed, config.data.train_dir) if packed else None
    with announced_parts(1 + len(works) * len(places)) as begin, ExitStack() as stack:
        begin("a packed copy of the images, and what a batch takes of the training thread")
        shards = stack.enter_context(_packed_copy(files, folder))
        report["overhead"] = _overhead(files, hardest)
        sources = {"timm": files, "dali": files} | ({} if shards is None else {"dali packed": shards})
        for device, place in places.items():
            contenders = [LoaderContender(name, images, place) for name, images in sources.items()]
            report[device] = figures = {}
            for work, rows in _race(contenders, works, steps, rounds):
                if not rows:
                    begin(f"{work} by {', '.join(sources)}")
                    continue
                figures[work] = rows
                write_result(report, json_path)
    _show(report)
    print_result(report, asked=json_path == "")


def summarise(rounds: list[Figures]) -> Figures:
    """Turn rounds of {contender: {"images_per_second", "cpu_ms_per_image"}} into one row per contender.

    Ratios are how many times as fast as timm, taken within a round, so that slow minutes hit both sides.
    """
    figures: Figures = {}
    for name in rounds[0]:
        rates = [row[name]["images_per_second"] for row in rounds]
        cpu_ms = [row[name]["cpu_ms_per_image"] for row in rounds]
        figures[name] = {
            "images_per_second": statistics.median(rates), "images_per_second_max": max(rates),
            "cpu_ms_per_image": statistics.median(cpu_ms), "cpu_ms_per_image_min": min(cpu_ms),
        }  # fmt: skip
        if name != "timm":
            theirs = [row["timm"] for row in rounds]
            by_rate = [rate / row["images_per_second"] for rate, row in zip(rates, theirs, strict=True)]
            by_cpu = [row["cpu_ms_per_image"] / ms for ms, row in zip(cpu_ms, theirs, strict=True)]
            figures[name]["times_timm"] = statistics.median(by_rate)
            figures[name]["times_timm_by_cpu"] = statistics.median(by_cpu)
    return figures


@contextmanager
def _packed_copy(files: Manifest, folder: Path | None) -> Iterator[Manifest | None]:
    """Yield the packed images of `folder`, or a temporary packed copy; None if `files` are packed."""
    if folder is not None or files.packed is not None:
        yield Manifest.from_shards(folder) if folder is not None else None
        return
    sample = files.fraction(min(1.0, PACKED_IMAGES / len(files)), seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        spec = PackSpec(PACKED_PX, PACKED_QUALITY, shard_bytes=2**28)
        pack_split(sample, Path(temporary, "train"), spec, processes=1, max_bad_fraction=1.0)
        yield Manifest.from_shards(Path(temporary, "train"))


def _race(
    contenders: list[LoaderContender], works: dict[str, AugmentSpec | None], steps: int, rounds: int
) -> Iterator[tuple[str, Figures]]:
    """Yield each work with its {contender: row}. One process per contender, one of them busy at a time."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for contender in contenders:
        pipes[contender.name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, contender)))
        processes[-1].start()
        theirs.close()
    try:
        for work, spec in works.items():
            yield work, {}  # it begins
            for pipe in pipes.values():
                _ask(pipe, ("prepare", spec))
            measured = []
            for number in range(rounds):
                order = reversed(pipes) if number % 2 else pipes
                measured.append({name: _ask(pipes[name], ("measure", steps)) for name in order})
            yield work, summarise(measured)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()


def _ask(pipe: Connection, question: tuple[str, Any]) -> Any:
    pipe.send(question)
    return pipe.recv()  # EOFError if the contender crashed; its traceback is on stderr


def _overhead(manifest: Manifest, spec: AugmentSpec) -> dict[str, float]:
    """Time what a batch takes of the training thread, and the random draws of one sample."""
    size = min(OVERHEAD_BATCH_SIZE, len(manifest))
    loader, plan = make_loader(LoaderContender("dali", manifest, Placement()), spec, size)
    batches = endless(loader)
    for _ in range(Placement.prefetch_batches):
        next(batches)
    in_thread = best_seconds(lambda: next(batches), 5, time.thread_time)
    loader.close()
    batch = next(plan.micro_batches(0, 0, 0, 1))
    heights, widths = manifest.heights[batch.indices], manifest.widths[batch.indices]
    draws = best_seconds(lambda: augment_params(plan, batch, heights, widths, spec), 20)
    micros = 1e6 * draws / size
    return {"batch": size, "thread_ms_per_batch": 1000 * in_thread, "draws_us_per_sample": micros}


def _show(report: dict[str, Any]) -> None:
    console = Console(stderr=True)
    for device in ("cpu", "gpu"):
        if device not in report:
            continue
        cores = "one core" if device == "cpu" else f"{report['device']}, {report['cores']} cores"
        title = f"{report['image_px']} px, {report['interpolation']}, {cores}"
        table = Table("work", "loader", *COLUMNS, title=title, box=None, pad_edge=False)
        for work, figures in report[device].items():
            for name, row in figures.items():
                shown = (f"{row[a]:,.2f} ({row[b]:,.2f})" if a in row else "" for a, b in COLUMNS.values())
                table.add_row(work, name, *shown)
        console.print(table)
    overhead = report["overhead"]
    console.print(
        f"a batch of {overhead['batch']} takes {overhead['thread_ms_per_batch']:.2f} ms of the training "
        f"thread; random draws take {overhead['draws_us_per_sample']:.2f} us per sample"
    )


def main() -> None:
    parser = Parser("loader_beside_timm", __doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="batches of a turn")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns of each side")
    parser.add_argument("--packed", metavar="DIR", help="packed copy of the data to time, too")
    parser.add_json(to_file=True)
    options, resolved = parser.parse_with_config(sys.argv[1:], "configs/demo.yaml")
    race_loaders(resolved.config, options.steps, options.rounds, options.packed, options.json)


if __name__ == "__main__":
    main()
