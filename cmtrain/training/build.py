"""Build the parts of a run from its configuration; what is built takes flat arguments and no Config."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import math
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, utils
from torch import Tensor, nn

from cmtrain.config.load import load_config, source_of
from cmtrain.config.schema import CMT_OPTIONS, Config, Model, as_begun
from cmtrain.errors import ConfigError, did_you_mean
from cmtrain.models import cmt, cost, ffn_check
from cmtrain.monitoring.trackers import tracker_options
from cmtrain.processes import environment, gpus, preflight
from cmtrain.processes.collectives import any_rank, control_group, join, set_cuda_math, set_torch_defaults
from cmtrain.step.learner import Learner
from cmtrain.step.mixing import MixSpec
from cmtrain.step.optimizer import frozen_names, make_optimizer, set_frozen
from cmtrain.storage.run_folder import RunLock
from cmtrain.storage.weights import classes_beside, fit, read_weights, start_from
from cmtrain.training import loaders
from cmtrain.training.pretrained import find_pretrained, load_pretrained
from cmtrain.training.recovery import Recovery
from cmtrain.training.resume import Start, choose_start
from cmtrain.training.schedule import Schedule, images_at_once, plan_steps, split_batch
from pipelines.spec import DataError


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of, before its first step. `control`: a group of all ranks, None for one."""

    config: Config
    accelerator: Accelerator
    control: Any
    data: loaders.Data
    schedule: Schedule
    start: Start
    train_loader: loaders.DaliLoader
    eval_loader: loaders.DaliLoader
    learner: Learner
    recovery: Recovery
    num_classes: int
    flops_per_image: int
    notes: list[str]
    fingerprint: str  # of the training images and class weights


def assemble(config: Config, lock: RunLock, resume: str, data: loaders.Data | None = None) -> Parts:
    """Join the other ranks and build everything that a run needs. Writes nothing; rank 0 takes the `lock`.
    `resume`: see choose_start. `data`: images that are open. Raises ConfigError, DataError: any mistake.
    """
    timeout_seconds = config.train.collective_timeout_seconds
    set_torch_defaults(lock.folder)
    options = tracker_options(config.metrics.trackers, lock.folder)
    accelerator = make_accelerator(config.train.precision, timeout_seconds, **options)
    control = control_group(accelerator.num_processes, timeout_seconds)
    preflight.check_ranks(control, config, lock.folder)
    place, lines = loaders.place_loaders(config, accelerator, control)
    data = data or loaders.open_data(config, accelerator)
    schedule = plan_steps(config, len(data.train), accelerator.num_processes)
    num_classes = loaders.num_classes_of(config, data.train)
    model = make_model(config, num_classes, accelerator.device)
    try:
        flops_per_image = cost.training_flops_per_image(model, config.data.image_px)
    except (RuntimeError, AssertionError, ValueError) as error:
        what = f"{config.model.name} does not take images of {config.data.image_px} px"
        raise ConfigError(f"data.image_px: {what}: {error}".partition("\n")[0]) from error
    weights = loaders.class_weights(config, data.train, num_classes)
    fingerprint = data.train.fingerprint
    if weights:  # a file of them may have changed, too
        fingerprint = hashlib.sha256(f"{fingerprint} {weights}".encode()).hexdigest()
    start = choose_start(lock, resume, config, fingerprint, data.val.fingerprint, control)
    notes = [*lines, *data.notes, *start.notes]
    if start.checkpoint:
        config = as_begun(config, start.checkpoint.meta["config"])
    elif config.model.init_from:
        notes += start_from(config.model.init_from, model, data.train.class_names)
    elif config.model.pretrained:
        make = functools.partial(make_model, config, num_classes, accelerator.device)
        model, config, note = load_pretrained(config, num_classes, make)
        notes.append(note)
    # The loaders are not prepared by accelerate: order, sharding and every random draw are the plan's.
    train_loader = loaders.make_train_loader(config, data.train, schedule, accelerator, place)
    at_once = min(schedule.micro_batch_size, images_at_once(config))
    eval_loader = loaders.make_eval_loader(config, data.val, at_once, accelerator, place)
    sets = loaders.label_sets(data.train, num_classes, accelerator.device)
    teacher, lines = make_teacher(config, num_classes, data.train.class_names, accelerator.device)
    notes += lines
    how = config, model, schedule, num_classes, accelerator
    learner = make_learner(*how, start.step, weights, sets, teacher)
    learner.any_rank = functools.partial(any_rank, group=control)
    if start.checkpoint:
        learner.images_per_pass = start.checkpoint.meta.get("images_per_pass") or math.inf
    return Parts(
        config, accelerator, control, data, schedule, start, train_loader, eval_loader, learner,
        make_recovery(config, schedule), num_classes, flops_per_image, notes, fingerprint,
    )  # fmt: skip


def make_accelerator(
    precision: str, collective_timeout_seconds: float = 600.0, *, checks_gpus: bool = True, **options: Any
) -> Accelerator:
    """Join the process group, if a launcher made one, and pick the device. `options`: for Accelerator.
    Raises ConfigError: see check_precision. DataError, if it `checks_gpus`: GPUs that torch cannot use.
    """
    if checks_gpus and (why := gpus.why_unusable()):
        raise DataError(why)
    cuda = torch.cuda.is_available()
    if precision == "auto":
        precision = "fp16" if cuda else "fp32"
    check_precision(precision)
    # BatchNorm statistics are averaged over ranks before an evaluation, not at every forward pass.
    ddp = utils.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    handlers: list[Any] = [ddp]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # accelerate takes a backend as proof of a launcher
        timeout = datetime.timedelta(seconds=collective_timeout_seconds)
        backend = "nccl" if cuda else "gloo"
        join(backend, timeout)
        handlers.append(utils.InitProcessGroupKwargs(backend=backend, timeout=timeout))
    environment.ignore_variables()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS", UserWarning)  # see loaders.split_threads
        # Whatever accelerate would take from the environment is given.
        accelerator = Accelerator(
            cpu=not cuda, mixed_precision=precision if precision in ("fp16", "bf16") else "no",
            dynamo_backend="no", gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=handlers, **options,
        )  # fmt: skip
    set_cuda_math(precision)  # after accelerate, which may allow TF32
    return accelerator


def check_precision(precision: str) -> None:
    """Raise ConfigError for a precision that the GPUs here do not have."""
    if precision in ("fp16", "tf32") and not torch.cuda.is_available():
        what = f"{precision} needs a CUDA device, and there is none"
        raise ConfigError(f"train.precision: {what}; use auto, bf16 or fp32")
    if precision == "tf32":
        oldest = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
        if oldest < (8, 0):
            needs = "tf32 needs GPUs of compute capability 8.0 (A100) or newer, and one here has"
            raise ConfigError(f"train.precision: {needs} {oldest[0]}.{oldest[1]}; use fp16 or fp32")


def precision_of(accelerator: Accelerator) -> str:
    """Return how `accelerator` and its process compute: fp32, tf32, fp16 or bf16."""
    if (mixed := accelerator.mixed_precision) != "no":
        return mixed
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def make_model(
    config: Config, num_classes: int, device: torch.device | str = "cpu", **pretrained: Any
) -> nn.Module:
    """Make the model, CMT or any of timm's, with random weights from run.seed, equal on all ranks.
    Other weights come later, since a resumed run has its own: see weights.start_from. `pretrained`: see
    load_pretrained. Raises ConfigError: an unknown name, options that the model refuses, a failed import.
    """
    import_modules(config.run.imports)
    model = config.model
    if not timm.is_model(model.name):
        hint = did_you_mean(model.name, timm.list_models())
        raise ConfigError(f"model.name: no model {model.name!r}{hint}")
    options = model.model_dump(include={"drop_rate", "drop_path_rate"})
    if model.name.startswith("cmt_"):
        options |= model.model_dump(include=set(CMT_OPTIONS))
    pretrained_cfg = timm.get_pretrained_cfg(model.name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        options["img_size"] = config.data.image_px
    torch.manual_seed(config.run.seed)
    try:
        built = timm.create_model(model.name, num_classes=num_classes, **options, **pretrained)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"model: {model.name}: {error}") from error
    built = built.to(device, memory_format=torch.channels_last)
    ffn_check.use_fused_where_it_agrees(built)
    return built


def make_teacher(
    config: Config, num_classes: int, class_names: Sequence[str], device: torch.device
) -> tuple[nn.Module | None, list[str]]:
    """Make distill.teacher, which is never trained, and lines for the user. Raises ConfigError: it has other
    classes; as load_pretrained and read_weights.
    """
    name, lines = config.distill.teacher, list[str]()
    if name is None:
        return None, lines
    try:
        is_run = (file := Path(name) / "config.yaml").exists()
        model = load_config(file).config.model if is_run else Model(name=name, pretrained=True)
        theirs = config.model_copy(update={"model": model})
        make = functools.partial(make_model, theirs, num_classes, device)
        if is_run:
            weights, teacher = read_weights(name), make()
            lines = [*fit(teacher, weights.tensors, keeps_head=True), *weights.warnings, str(weights.path)]
            if (names := classes_beside(weights.path)) and names != list(class_names):
                raise ConfigError("its classes are not those of the data, in the same order")
        elif (cfg := find_pretrained(model)[0]).num_classes != num_classes:
            raise ConfigError(f"it has {cfg.num_classes} classes, and the data {num_classes}")
        else:
            teacher, _, line = load_pretrained(theirs, num_classes, make)
            lines = [line]
    except (ConfigError, DataError) as error:
        raise type(error)(f"distill.teacher: {name}: {error}") from error
    compile_model(config, teacher)
    return teacher.eval().requires_grad_(False), [f"distill.teacher: {line}" for line in lines]


def import_modules(entries: Sequence[str]) -> None:
    """Import the modules of run.imports. Raises ConfigError: one fails; names the line at which it did."""
    for entry in entries:
        name = entry.partition("@")[0]
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            lines = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[1:]]
            own = [*(line for line in lines if "importlib" not in line), f"{name}.py"]
            if isinstance(error, SyntaxError) and error.filename:
                own = [f"{error.filename}:{error.lineno}"]
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ConfigError(f"{own[0]}: run.imports: {name}: {why}") from error
        file, loaded = source_of(entry), getattr(module, "__file__", None)
        if not loaded or Path(loaded).read_bytes() != file.read_bytes():  # two runs may have one copy each
            raise ConfigError(f"run.imports: {name}: a library has this name; rename {file}")


def compile_model(config: Config, model: nn.Module) -> None:
    """Compile `model` with torch.compile at its next call, if configured; its state_dict does not change."""
    if config.train.compile:
        model.compile(mode=config.train.compile_mode)


def make_recovery(config: Config, schedule: Schedule) -> Recovery:
    guard, epochs = config.guard, config.guard.lr_backoff_epochs
    return Recovery(
        after_bad_steps=guard.rollback_after_bad_steps if guard.enabled else sys.maxsize,
        max_rollbacks=guard.max_rollbacks, lr_backoff=guard.lr_backoff,
        backoff_steps=math.inf if epochs is None else round(epochs * schedule.steps_per_epoch),
        on_spikes=guard.enabled and guard.spike_action == "rollback",
    )  # fmt: skip


def mix_spec(
    config: Config, num_classes: int, label_sets: Tensor | None = None, steps_per_epoch: float = math.inf
) -> MixSpec:
    """Return how a batch is mixed. Raises ConfigError: there is no such function as augment.extra."""
    custom = None
    if config.augment.extra:
        import_modules(config.run.imports)
        module, _, name = config.augment.extra.partition(":")
        if not callable(custom := getattr(sys.modules[module], name, None)):
            raise ConfigError(f"augment.extra: {source_of(module)} has no function {name}")
    mixing, distill = config.mixing.model_dump(exclude={"class_weights", "until_epoch"}), config.distill
    return MixSpec(
        num_classes, **mixing, until_step=(config.mixing.until_epoch or math.inf) * steps_per_epoch,
        teaching=distill.kind, teacher_weight=distill.weight, temperature=distill.temperature,
        label_sets=label_sets, custom=custom,
    )  # fmt: skip


def make_learner(
    config: Config, model: nn.Module, schedule: Schedule, num_classes: int, accelerator: Accelerator,
    first_step: int = 0, class_weights: Sequence[float] | None = None, label_sets: Tensor | None = None,
    teacher: nn.Module | None = None,
) -> Learner:  # fmt: skip
    """Make the learner. Raises ConfigError: train.grad_checkpointing is not supported; as what it calls."""
    freeze, epoch = config.model.freeze, config.model.unfreeze_epoch
    unfreeze_step = math.inf if epoch is None else epoch * schedule.steps_per_epoch
    frozen = frozen_names(model, freeze) if freeze and first_step < unfreeze_step else ()
    has_batchnorm = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    sizes = schedule.global_batch_size, schedule.max_batch_per_gpu, schedule.world_size
    split_batch(*sizes, has_batchnorm=has_batchnorm)
    optimizer = make_optimizer(model, **config.optim.model_dump(exclude={"clip_grad", "clip_mode"}))
    if config.train.grad_checkpointing:
        what = f"train.grad_checkpointing: {config.model.name}"
        if has_batchnorm and not isinstance(model, cmt.CMT):
            raise ConfigError(f"{what} would move the statistics of its BatchNorms twice a step")
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ConfigError(f"{what} does not support it") from error
    set_frozen(model, frozen)  # not before: the optimizer has all parameters from the beginning
    compile_model(config, model)
    weights = None if class_weights is None else torch.tensor(class_weights, device=accelerator.device)
    return Learner(
        model, optimizer, accelerator, ema_decay=config.ema.decay, protect=config.guard.enabled,
        spike_sigma=config.guard.spike_sigma, accumulation=schedule.accumulation,
        mixing=mix_spec(config, num_classes, label_sets, schedule.steps_per_epoch),
        clip_grad=config.optim.clip_grad, clip_mode=config.optim.clip_mode, ema_warmup=config.ema.warmup,
        seed=config.run.seed, class_weights=weights, teacher=teacher,
        frozen=frozen, unfreeze_step=unfreeze_step,
    )  # fmt: skip
