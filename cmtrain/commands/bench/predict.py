"""Predict the training step on a GPU that need not be here (`cmtrain bench --what model --predict`).

The step of training runs on fake tensors, so a change to it shows. Loading and DALI are no part of it.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cmtrain.commands.bench.timing import DTYPES
from cmtrain.config.schema import Config
from cmtrain.errors import ConfigError
from cmtrain.models import blocks, cost, device_time
from cmtrain.training import build
from cmtrain.training.schedule import split_batch
from pipelines.spec import Batch

SHOWN = 30  # dearest kernels
CAUTIOUS = 0.65  # share of its rates that a GPU reaches with such kernels, estimated


def predict(config: Config, gpu: str) -> dict[str, Any]:
    """Report on a step of one micro-batch, the largest of `config`, on one of DEVICES.
    `figures`: sums of the dearest kernels, by path; `rows`: all kernels, by their sizes. Raises ConfigError:
    a model that cannot be made, or a precision other than fp16 and bf16.
    """
    train, rates = config.train, device_time.DEVICES[gpu]
    precision = "fp16" if train.precision == "auto" else train.precision
    if precision not in ("fp16", "bf16"):
        raise ConfigError(f"train.precision: --predict knows fp16 and bf16, not {precision}")
    batch = split_batch(train.global_batch_size, train.max_batch_per_gpu, 1)[0]
    calls = calls_of_step(config, batch, DTYPES[precision])
    rows, cautious_rows = (device_time.predict_rows(calls, rates, share) for share in (1, CAUTIOUS))
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
