"""Time a model beside well-known ones, in the same step, on noise (`cmtrain bench --what model`); or predict
its training step on a GPU that need not be here (`--predict`).

The predicted step runs on fake tensors, so a change to it shows. Loading and DALI are no part of either.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cmtrain.commands.bench.timing import DTYPES, Contender, Row, Rows, measure_ceilings, race
from cmtrain.config.schema import Config, Model
from cmtrain.errors import ConfigError
from cmtrain.models import blocks, cost
from cmtrain.step.learner import Learner
from cmtrain.training import build
from cmtrain.training.schedule import Schedule, split_batch
from pipelines.spec import Batch


class Setup(NamedTuple):
    """Common input of all benchmarks of a call. `steps` in each turn, `rounds`: turns of each side."""

    config: Config
    accelerator: Accelerator
    schedule: Schedule
    num_classes: int
    steps: int
    rounds: int
    label_sets: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[build.precision_of(self.accelerator)]

    def make_learner(self, config: Config) -> Learner:
        """Make a new model and what trains it; `config` may name another model than the setup's."""
        model = build.make_model(config, self.num_classes, self.device)
        parts = model, self.schedule, self.num_classes, self.accelerator
        return build.make_learner(config, *parts, label_sets=self.label_sets)

    def synthetic_batches(self) -> Iterator[Batch]:
        """Yield one micro-batch of noise, which lies ready on the device, without end."""
        size, side = self.schedule.micro_batch_size, self.config.data.image_px
        dtype = torch.float16 if self.dtype == torch.float16 else torch.float32
        images = torch.randn(size, 3, side, side, device=self.device, dtype=dtype)
        indices = torch.arange(size, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        num_labels = self.num_classes if self.label_sets is None else len(self.label_sets)
        return itertools.repeat(Batch(images, indices % num_labels, indices))


def time_models(setup: Setup, beside: Sequence[str]) -> Rows:
    """Time training and inference of the configuration's model and of the timm models `beside` it.
    Yields rows "NAME train" and "NAME infer" as of Contender.figures and against_ceilings, and "machine".
    """
    config, accelerator = setup.config, setup.accelerator
    yield "setting up", {}
    names = dict.fromkeys([config.model.name, *beside])
    learners = {name: setup.make_learner(with_model(config, name)) for name in names}
    batches = setup.synthetic_batches()
    images = next(batches).images
    ceilings = measure_ceilings(setup.device, setup.dtype)
    step_images = setup.schedule.micro_batch_size * setup.schedule.accumulation
    for mode in ("train", "infer"):
        yield f"{mode}: {', '.join(names)}, {setup.rounds} rounds of {setup.steps} steps each", {}
        contenders = []
        for name, learner in learners.items():
            work, size = partial(_train, learner, batches, itertools.count(), config.optim.lr), step_images
            if mode == "infer":
                work, size = partial(_infer, learner.model.eval(), images, accelerator), len(images)
            contenders.append(Contender(name, size, work))
        race(contenders, setup.device, steps=setup.steps, rounds=setup.rounds)
        for contender in contenders:
            row = contender.figures(contenders[0])
            row |= against_ceilings(setup, contender.name, mode, row["images_per_second"], ceilings)
            yield f"{contender.name} {mode}", row
    yield "machine", ceilings


def against_ceilings(setup: Setup, name: str, mode: str, images_per_second: float, ceilings: Row) -> Row:
    """Return the share of the machine's ceilings, as of measure_ceilings, that a model uses at that rate.
    `mb_per_image` is counted (models/cost.py) as without torch.compile: operation by operation, but CMT's
    Triton kernels, where this machine's GPU runs them, as one each.
    """
    model = build.make_model(with_model(setup.config, name), setup.num_classes).train(mode == "train")
    image_px = setup.config.data.image_px
    moved = cost.count(model, image_px=image_px, dtype=setup.dtype).total_bytes
    flops = cost.training_flops_per_image(model, image_px) / (1 if mode == "train" else 3)
    return {
        "mb_per_image": moved / 1e6,
        "percent_of_copy": moved * images_per_second / ceilings["copy_gb_per_second"] / 1e7,
        "percent_of_matrix": flops * images_per_second / ceilings["matrix_tflops"] / 1e10,
    }


def with_model(config: Config, name: str) -> Config:
    """Return `config` with the timm model `name` and its defaults, or as it is if that is its own model."""
    return config if name == config.model.name else config.model_copy(update={"model": Model(name=name)})


def _infer(model: nn.Module, images: Tensor, accelerator: Accelerator) -> None:
    with torch.inference_mode(), accelerator.autocast():
        model(images)


def _train(learner: Learner, batches: Iterator[Batch], steps: Iterator[int], lr: float) -> None:
    learner.step(batches, next(steps), lr)
    learner.buffer.clear()  # nobody reads it here


SHOWN = 30  # dearest kernels
CAUTIOUS = 0.65  # share of its rates that a GPU reaches with such kernels, estimated


def predict(config: Config, gpu: str) -> dict[str, Any]:
    """Report on a step of one micro-batch, the largest of `config`, on one of DEVICES.
    `figures`: sums of the dearest kernels, by path; `rows`: all kernels, by their sizes. Raises ConfigError:
    a model that cannot be made, or a precision other than fp16 and bf16.
    """
    train, rates = config.train, cost.DEVICES[gpu]
    precision = "fp16" if train.precision == "auto" else train.precision
    if precision not in ("fp16", "bf16"):
        raise ConfigError(f"train.precision: --predict knows fp16 and bf16, not {precision}")
    batch = split_batch(train.global_batch_size, train.max_batch_per_gpu, 1)[0]
    calls = calls_of_step(config, batch, DTYPES[precision])
    rows, cautious_rows = (cost.predict_rows(calls, rates, share) for share in (1, CAUTIOUS))
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name in (f"{row['kernel']}, {row['path']}".removesuffix(", "), "step"):
            total = sums.setdefault(name, {"launches": 0, "mb": 0.0, "ms": 0.0, "bound": row["bound"]})
            total |= {key: total[key] + row[key] for key in ("launches", "mb", "ms")}
    step = sums.pop("step") | {"bound": ""}
    dearest = sorted(sums, key=lambda name: -sums[name]["ms"])[:SHOWN]
    images = [1000 * batch / sum(row["ms"] for row in each) for each in (rows, cautious_rows)]
    verdict = "predicted, not measured: {:,.0f} images/s; {:,.0f} at {:.0f} % of the GPU's rates"
    return {
        "what": "predict", "device": f"{gpu} (predicted)", "precision": precision,
        "model": config.model.name, "image_px": config.data.image_px, "batch": batch,
        "predicted_images_per_second": images[0], "predicted_cautious_images_per_second": images[1],
        "predicted_step_ms": step["ms"], "kernels": step["launches"], "mb_per_image": step["mb"] / batch,
        "figures": {name: sums[name] for name in dearest} | {"step": step},
        "verdict": verdict.format(*images, 100 * CAUTIOUS), "rows": rows,
    }  # fmt: skip


def calls_of_step(config: Config, batch: int, dtype: torch.dtype) -> list[cost.Call]:
    """Return the operations of a later step on `batch` images, on a GPU that runs Triton."""
    plain = {"compile": False, "grad_checkpointing": False}
    config = config.model_copy(update={"train": config.train.model_copy(update=plain)})
    num_classes, side = config.model.num_classes or 1000, config.data.image_px
    model = build.make_model(config, num_classes).train()
    for part in model.modules():
        if isinstance(part, blocks.FusedPart) and part.kernel == "auto" and blocks.fused_ffn is not None:
            part.kernel = "fused"
    scaler = torch.amp.GradScaler("cpu") if dtype == torch.float16 else None
    accelerator: Any = SimpleNamespace(  # what a Learner needs of accelerate
        device=torch.device("cpu"), num_processes=1, process_index=0, scaler=scaler,
        prepare_model=lambda model, **_: torch.autocast("cpu", dtype)(lambda images: model(images)),
        backward=lambda loss: (scaler.scale(loss) if scaler else loss).backward(),
    )  # fmt: skip
    plan = {"global_batch_size": batch, "max_batch_per_gpu": batch, "world_size": 1, "accumulation": 1}
    schedule: Any = SimpleNamespace(**plan, steps_per_epoch=1)
    learner = build.make_learner(config, model, schedule, num_classes, accelerator)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for parameter in learner.parameters:
            parameter.grad = torch.empty_like(parameter)
        learner.optimizer.step()  # makes its state
        images = torch.empty(batch, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        numbers = torch.empty(batch, dtype=torch.int64)
        with cost.Counter() as counter, cost.AsOnCuda():
            learner.step(iter([Batch(images, numbers, numbers)]), 0, config.optim.lr)
    return counter.calls
