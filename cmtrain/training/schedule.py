"""Plan a run: how a batch is split, how many steps there are, and the learning rate of each.

A step is one optimizer update on one global batch. Durations are configured in epochs and become steps here.
"""

import math
from dataclasses import dataclass, field

from cmtrain.config.schema import Config
from cmtrain.errors import ConfigError
from pipelines.spec import DataError


@dataclass
class Schedule:
    """A run of `epochs` + `cooldown_epochs` epochs over `num_samples` samples on `world_size` processes.
    An epoch drops its incomplete last batch. Raises ConfigError: see split_batch. DataError: no whole batch.
    """

    num_samples: int
    world_size: int
    global_batch_size: int
    max_batch_per_gpu: int | str
    lr: float
    epochs: int
    warmup_epochs: float
    warmup_lr: float
    min_lr: float
    cooldown_epochs: int
    decay: str = "cosine"
    power: float = 1.0
    decay_epochs: float = 30.0
    decay_rate: float = 0.1
    micro_batch_size: int = field(init=False)
    accumulation: int = field(init=False)  # micro-batches that one process accumulates into a step
    steps_per_epoch: int = field(init=False)
    warmup_steps: int = field(init=False)
    decay_end_step: int = field(init=False)  # at which the decay reaches min_lr
    total_epochs: int = field(init=False)
    total_steps: int = field(init=False)

    def __post_init__(self) -> None:
        split = split_batch(self.global_batch_size, self.max_batch_per_gpu, self.world_size)
        self.micro_batch_size, self.accumulation = split
        self.steps_per_epoch = self.num_samples // self.global_batch_size
        self.warmup_steps = round(self.warmup_epochs * self.steps_per_epoch)
        self.decay_end_step = self.epochs * self.steps_per_epoch
        self.total_epochs = self.epochs + self.cooldown_epochs
        self.total_steps = self.total_epochs * self.steps_per_epoch
        if self.steps_per_epoch == 0:
            few = f"the training set has {self.num_samples:,} samples, less than one global batch of"
            raise DataError(f"{few} {self.global_batch_size:,}; lower train.global_batch_size")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` finished ones; a pure function.

        Linear from warmup_lr to lr over the warm-up; then `decay`, half a cosine or another curve from lr to
        min_lr at the end of the configured epochs; then min_lr. timm's, with `warmup_prefix` and a move per
        step. The re-implementation's cosine reaches zero at epoch 295 of 300 and rises again, to 0.07 %.
        """
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        if step < self.decay_end_step or self.decay == "step":
            return self.min_lr + (self.lr - self.min_lr) * self._rest_at(step - self.warmup_steps)
        return self.min_lr

    def _rest_at(self, step: int) -> float:
        """Return the share that is left of lr - min_lr, `step` steps after the warm-up."""
        length, part = self.decay_end_step - self.warmup_steps, self.decay_epochs * self.steps_per_epoch
        if self.decay == "poly":
            return (1 - step / length) ** self.power
        if self.decay == "step":
            return self.decay_rate ** (step // part)
        if self.decay == "wsd":
            return min(1.0, (length - step) / min(part, length))
        return (1 + math.cos(math.pi * step / length)) / 2

    def ends_epochs(self, step: int, every_epochs: int | None) -> bool:
        """Return whether `step` finished updates are a multiple of `every_epochs` whole epochs; None: no."""
        return every_epochs is not None and step % (every_epochs * self.steps_per_epoch) == 0


def split_batch(
    global_batch_size: int, max_batch_per_gpu: int | str, world_size: int, *, has_batchnorm: bool = False
) -> tuple[int, int]:
    """Return (micro-batch size, accumulation) with the fewest passes that `max_batch_per_gpu` allows; auto:
    one. Raises ConfigError: the global batch does not split evenly over the processes, or only into single
    images, or, if the model `has_batchnorm`, is a single image for each: it has no variance.
    """
    share, rest = divmod(global_batch_size, world_size)
    setting = f"train.global_batch_size: {global_batch_size}"
    if rest:
        nearest = " or ".join(str(count * world_size) for count in (share, share + 1) if count)
        found = f"{global_batch_size} = {world_size} x {share} + {rest}"
        raise ConfigError(f"{setting} does not split over {world_size} processes ({found}); use {nearest}")
    max_batch_per_gpu = share if isinstance(max_batch_per_gpu, str) else max_batch_per_gpu
    fewest = math.ceil(share / max_batch_per_gpu)
    accumulation = next(count for count in range(fewest, share + 1) if share % count == 0)
    micro_batch_size = share // accumulation
    if micro_batch_size == 1 < min(share, max_batch_per_gpu):
        what = f"leaves each of {world_size} processes {share} samples, which only batches of 1 share evenly"
        advice = f"and BatchNorm needs more; use {max_batch_per_gpu * fewest * world_size}"
        raise ConfigError(f"{setting} {what} below {max_batch_per_gpu}, {advice}")
    if micro_batch_size == 1 and has_batchnorm:
        advice = f"use {2 * world_size} or more, or fewer processes"
        if max_batch_per_gpu == 1:
            setting, advice = "train.max_batch_per_gpu: 1", "use 2 or more"
        split = f"{global_batch_size} = processes {world_size} x passes {accumulation} x 1"
        what = f"leaves 1 image at a time ({split}), and BatchNorm needs more"
        raise ConfigError(f"{setting} {what}; {advice}")
    return micro_batch_size, accumulation


def images_at_once(config: Config) -> int:
    """Return how many images a command evaluates at a time; with auto, what fits most GPUs."""
    most = config.train.max_batch_per_gpu
    return min(config.train.global_batch_size, 512 if isinstance(most, str) else most)


def plan_steps(config: Config, num_samples: int, num_processes: int) -> Schedule:
    """Plan all steps of the run. Raises ConfigError or DataError when the numbers do not fit."""
    sizes = {"global_batch_size", "max_batch_per_gpu"}
    lengths = config.train.model_dump(include=sizes) | config.schedule.model_dump()
    return Schedule(num_samples=num_samples, world_size=num_processes, lr=config.optim.lr, **lengths)
