"""`cmtrain bench --what model` and `--what latency`: a model beside well-known ones, through the same step.

All take turns in one process, so that what else the machine does hits all of them; a ratio is the median of the ratios
within a round. Batches are synthetic and lie ready on the device.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cmtrain.commands.bench.machine import Ceilings, drain, measure_ceilings
from cmtrain.config.schema import Config, Model
from cmtrain.models import cost
from cmtrain.models.cost import training_flops_per_image
from cmtrain.step.learner import Learner
from cmtrain.training import build
from cmtrain.training.schedule import Schedule
from pipelines.spec import Batch

WARMUP_STEPS = 3
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
Figures = dict[str, dict[str, float]]


@dataclass
class Contender:
    """One model in the race. `work` does one step or one pass; `seconds`: of each of them, by round."""

    name: str
    images: int
    work: Callable[[], object]
    first_seconds: float = 0.0
    peak_bytes: int = 0
    seconds: list[list[float]] = field(default_factory=list)


def time_models(
    config: Config,
    schedule: Schedule,
    num_classes: int,
    accelerator: Accelerator,
    *,
    beside: Sequence[str],
    steps: int,
    rounds: int,
) -> Figures:
    """Training and inference of the configuration's model and of the timm models `beside` it.

    Returns:
        Rows "NAME train" and "NAME infer": `images_per_second`, `ms_p50` and `ms_p95` of a step, `first_is_times`
        (how many times as fast the configuration's model is), `first_seconds` (compilation included), `mb_per_image`
        (moved by eager kernels, counted; see traffic.py), `percent_of_copy` (of a copy's bandwidth, if nothing is
        fused), `percent_of_matrix` (of the rate of a matrix product), and on a GPU `peak_memory_gib`.
    """
    device, dtype = accelerator.device, DTYPES[build.precision_of(accelerator)]
    names = list(dict.fromkeys([config.model.name, *beside]))
    learners = {}
    for name in names:
        model = build.make_model(_with_model(config, name), num_classes, device)
        learners[name] = build.make_learner(config, model, schedule, num_classes, accelerator)
    batches = _endless(config, schedule, num_classes, accelerator)
    images = next(batches).images
    ceilings = measure_ceilings(device, dtype)
    figures: Figures = {}
    for mode in ("train", "infer"):
        contenders = [
            Contender(
                name,
                schedule.micro_batch_size * schedule.accumulation,
                _training(learner, batches, config.optim.lr),
            )
            if mode == "train"
            else Contender(name, len(images), _inference(learner.model, images, accelerator))
            for name, learner in learners.items()
        ]
        race(contenders, device, steps=steps, rounds=rounds)
        for contender in contenders:
            row = _figures(contender, contenders[0])
            row |= _against(
                contender.name, mode, row["images_per_second"], config, num_classes, dtype, ceilings
            )
            figures[f"{contender.name} {mode}"] = row
    figures["machine"] = {
        "copy_gb_per_second": ceilings.copy_bytes_per_second / 1e9,
        "matrix_tflops": ceilings.matrix_flops_per_second / 1e12,
    }
    return figures


def time_latency(
    config: Config,
    num_classes: int,
    accelerator: Accelerator,
    *,
    beside: Sequence[str],
    steps: int,
    rounds: int,
) -> Figures:
    """Inference of one image at a time, by the same models. Rows "NAME" as those of `time_models`."""
    image = torch.randn(1, 3, config.data.image_px, config.data.image_px, device=accelerator.device)
    contenders = []
    for name in dict.fromkeys([config.model.name, *beside]):
        model = build.make_model(_with_model(config, name), num_classes, accelerator.device)
        build.compile_model(config, model)
        contenders.append(Contender(name, 1, _inference(model, image, accelerator)))
    race(contenders, accelerator.device, steps=steps, rounds=rounds)
    return {contender.name: _figures(contender, contenders[0]) for contender in contenders}


def race(contenders: Sequence[Contender], device: torch.device, *, steps: int, rounds: int) -> None:
    """Let every contender do `steps` steps in each of `rounds` rounds, in alternating order."""
    for contender in contenders:
        drain(device)
        begin = time.perf_counter()
        contender.work()
        drain(device)
        contender.first_seconds = time.perf_counter() - begin
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARMUP_STEPS):
            contender.work()
        if device.type == "cuda":
            contender.peak_bytes = torch.cuda.max_memory_allocated(device)
    for turn in range(rounds):
        for contender in contenders if turn % 2 else reversed(contenders):
            contender.seconds.append(_laps(contender.work, steps, device))


def _laps(work: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Seconds of each step; on a GPU between events, so that the host may run ahead as it does in training."""
    drain(device)
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            work()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    drain(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(events)]


def _training(learner: Learner, batches: Iterator[Batch], lr: float) -> Callable[[], object]:
    steps = itertools.count()

    def step() -> None:
        learner.step(batches, next(steps), lr)
        learner.buffer.clear()  # nobody reads it here

    return step


def _inference(model: nn.Module, images: Tensor, accelerator: Accelerator) -> Callable[[], object]:
    images = images.contiguous(memory_format=torch.channels_last)
    model.eval()

    def infer() -> None:
        with torch.inference_mode(), accelerator.autocast():
            model(images)

    return infer


def _figures(contender: Contender, first: Contender) -> dict[str, float]:
    laps = [1000 * seconds for turn in contender.seconds for seconds in turn]
    rates = [len(turn) * contender.images / sum(turn) for turn in contender.seconds]
    row = {
        "images_per_second": statistics.median(rates),
        "ms_p50": float(np.percentile(laps, 50)),
        "ms_p95": float(np.percentile(laps, 95)),
        "first_seconds": contender.first_seconds,
    }
    if contender is not first:
        pairs = zip(first.seconds, contender.seconds, strict=True)
        row["first_is_times"] = statistics.median(sum(others) / sum(mine) for mine, others in pairs)
    if contender.peak_bytes:
        row["peak_memory_gib"] = contender.peak_bytes / 2**30
    return row


def _against(
    name: str,
    mode: str,
    rate: float,
    config: Config,
    num_classes: int,
    dtype: torch.dtype,
    ceilings: Ceilings,
) -> dict[str, float]:
    model = build.make_model(_with_model(config, name), num_classes).train(mode == "train")
    image_px = config.data.image_px
    moved = cost.count(model, image_px=image_px, dtype=dtype).total_bytes
    flops = training_flops_per_image(model, image_px) / (1 if mode == "train" else 3)
    return {
        "mb_per_image": moved / 1e6,
        "percent_of_copy": 100 * moved * rate / ceilings.copy_bytes_per_second,
        "percent_of_matrix": 100 * flops * rate / ceilings.matrix_flops_per_second,
    }


def _with_model(config: Config, name: str) -> Config:
    """`config` with the timm model `name`, as it comes, unless it is the configuration's own."""
    return config if name == config.model.name else config.model_copy(update={"model": Model(name=name)})


def _endless(
    config: Config, schedule: Schedule, num_classes: int, accelerator: Accelerator
) -> Iterator[Any]:
    loader = build.make_synthetic_loader(config, schedule, num_classes, accelerator)
    for epoch in itertools.count():
        yield from loader.epoch(epoch)
