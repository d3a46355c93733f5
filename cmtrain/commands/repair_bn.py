"""`cmtrain repair-bn`: give a checkpoint whose BatchNorm statistics are not finite new ones.

Such a checkpoint comes from a trainer without a guard (cmtrain/step/guard.py tells how): its weights are those of a healthy
run, and every evaluation of it is NaN. The statistics are forgotten and computed anew from training batches, as a plain
mean over them (torch.optim.swa_utils.update_bn). The precise_bn of the re-implementation cannot do that: it sets the momentum to 1
and leaves the old value in the sum, and 0 * NaN is NaN.
"""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cmtrain.config.schema import Config
from cmtrain.errors import ConfigError
from cmtrain.monitoring.console import Console
from cmtrain.step.evaluate import Evaluation, evaluate
from cmtrain.step.guard import tracked_batchnorms
from cmtrain.step.learner import Learner
from cmtrain.step.mixing import mix
from cmtrain.storage.checkpoint import Loaded, checkpoint_path, find_checkpoint, save_checkpoint
from cmtrain.storage.finite import all_finite, floating_tensors
from cmtrain.storage.state_file import CheckpointError
from cmtrain.training import build
from cmtrain.training.resume import recipe_changes, restore
from pipelines.spec import DataError, Loader

STATISTICS = ("running_mean", "running_var")


def repair_bn(config: Config, *, checkpoint: str, out: str | None, batches: int) -> int:
    """Recompute the BatchNorm statistics of model and EMA in `checkpoint`, and write the result as a new checkpoint.

    The batches are training's own, augmented and mixed; the forward passes run in fp32, which does not overflow where
    fp16 did. Prints what was wrong and the accuracy before and after on stderr, and one JSON line on stdout.

    Args:
        config: the one the checkpoint was made with, but for what a resumed run may change as well.
        checkpoint: path of a checkpoint folder, or of a run folder, whose newest usable one is taken. Never changed.
        out: folder to write `step-...` to; None: `repaired`, beside the folder that holds the checkpoint.
        batches: micro-batches to average over.

    Returns:
        The process exit code, 0.

    Raises:
        ConfigError: the checkpoint belongs to another recipe or model, or there are several processes.
        DataError: no usable checkpoint; its weights themselves are not finite; or the new one cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("cmtrain repair-bn: runs in one process, without a launcher")
    accelerator = build.make_accelerator(config.train.precision)
    threads = build.split_threads(config, accelerator)
    data = build.open_data(config, accelerator)
    schedule = build.plan_steps(config, len(data.train), 1)
    num_classes = build.num_classes_of(config, data.train)
    loaded = _load(checkpoint, config, data.train.fingerprint)
    step = loaded.state["progress"]["step"]
    root = Path(out) if out else loaded.path.absolute().parent.parent / "repaired"
    if checkpoint_path(root, step).exists():
        raise DataError(f"{checkpoint_path(root, step)} exists already; choose another --out")
    model = build.make_model(config, num_classes, accelerator.device)
    learner = build.make_learner(config, model, schedule, num_classes, accelerator)
    restore(learner, loaded)
    sick = _sick_statistics(learner, loaded)

    train_loader = build.make_train_loader(config, data.train, schedule, accelerator, threads)
    eval_loader = build.make_eval_loader(config, data.val, schedule.micro_batch_size, accelerator, threads)
    before = _evaluate(learner, eval_loader, len(data.val), accelerator)
    torch.manual_seed(config.run.seed)  # of stochastic depth and dropout
    for module in learner.weights.values():
        update_bn(_images(train_loader, learner, batches), module)
    still = [name for weights, module in learner.weights.items() for name in _nonfinite(module, weights)]
    if still:
        raise DataError(
            f"{still[0]} is not finite after {batches} batches in fp32 either; take an older checkpoint"
        )
    after = _evaluate(learner, eval_loader, len(data.val), accelerator)
    train_loader.close()
    eval_loader.close()

    state = loaded.state | {name: module.state_dict() for name, module in learner.weights.items()}
    meta = loaded.meta | {"repaired": {"from": str(loaded.path), "statistics": sick, "batches": batches}}
    try:
        written = save_checkpoint(root, step, state, meta)
    except (OSError, RuntimeError, CheckpointError) as error:
        raise DataError(f"{root}: {error}") from error
    _tell(loaded.path, written, sick, batches, before, after)
    return 0


def _load(checkpoint: str, config: Config, fingerprint: str) -> Loaded:
    try:
        loaded = find_checkpoint(Path(checkpoint))
    except (CheckpointError, OSError) as error:
        raise DataError(f"--checkpoint {checkpoint}: {error}") from error
    if changes := recipe_changes(loaded, config, fingerprint):
        raise ConfigError(f"{loaded.path} was made with another recipe: {'; '.join(changes)}")
    return loaded


def _sick_statistics(learner: Learner, loaded: Loaded) -> list[str]:
    """The running statistics that are not finite. Raises DataError: something else is not finite, too."""
    names = [name for weights, module in learner.weights.items() for name in _nonfinite(module, weights)]
    optimizer = {
        f"optimizer {name} {index}": value
        for index, values in loaded.state["optimizer"]["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    if optimizer:
        finite = all_finite(list(optimizer.values()))
        names += [name for name, good in zip(optimizer, finite, strict=True) if not good]
    statistics = set[str]()
    for weights, module in learner.weights.items():
        batchnorms = tracked_batchnorms(module)
        layers = [name for name, child in module.named_modules() if child in batchnorms]
        statistics |= {f"{weights} {layer}.{statistic}" for layer in layers for statistic in STATISTICS}
    if beyond := [name for name in names if name not in statistics]:
        raise DataError(
            f"{loaded.path}: {beyond[0]} is not finite, and only BatchNorm statistics can be recomputed"
        )
    return names


def _nonfinite(module: nn.Module, weights: str) -> list[str]:
    tensors = floating_tensors(module)
    finite = all_finite(list(tensors.values()))
    return [f"{weights} {name}" for name, good in zip(tensors, finite, strict=True) if not good]


def _images(loader: Loader, learner: Learner, batches: int) -> Iterator[Tensor]:
    """`batches` micro-batches of training, mixed, in fp32."""
    endless = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    for number, (images, labels, _) in enumerate(itertools.islice(endless, batches)):
        yield mix(images.float(), labels, learner.mixing, (learner.seed, number, 0))[0]


def _evaluate(
    learner: Learner, loader: Loader, num_images: int, accelerator: Accelerator
) -> dict[str, Evaluation]:
    return {
        name: evaluate(
            module,
            loader.epoch(0),
            autocast=accelerator.autocast(),
            device=accelerator.device,
            num_images=num_images,
            num_classes=learner.mixing.num_classes,
        )
        for name, module in learner.weights.items()
    }


def _tell(
    source: Path, written: Path, sick: list[str], batches: int, before: dict[str, Any], after: dict[str, Any]
) -> None:
    console = Console(enabled=True)
    first = f", {sick[0]} first" if sick else ""
    console.line(
        f"{source}: {len(sick)} BatchNorm statistics were not finite{first}; averaged over {batches} batches"
    )
    for weights in before:
        was, now = before[weights], after[weights]
        console.line(
            f"{weights} top1 {was.top1:.4f} -> {now.top1:.4f}, loss {was.loss:.4f} -> {now.loss:.4f}"
        )
    console.line(f"written to {written}; go on from it with --run.name NEW --resume {written}")
    accuracy = {weights: [before[weights].top1, after[weights].top1] for weights in before}
    result = {"checkpoint": str(written), "nonfinite_statistics": sick, "batches": batches, "top1": accuracy}
    print(json.dumps(result), flush=True)  # noqa: T201
