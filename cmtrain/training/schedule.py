"""Plan a run: how a batch is split, how many steps there are, and the learning rate of each.

A step is one optimizer update on one global batch. Durations are configured in epochs and become steps here.
"""

import math
from dataclasses import dataclass

from cmtrain.errors import ConfigError
from pipelines.spec import DataError


@dataclass(frozen=True)
class Schedule:
    """The arithmetic of a run.

    `micro_batches`: micro-batches of a global batch over all processes; `accumulation`: those of one
    process. `total_epochs` includes the cool-down. `decay_end_step`: the step at which the cosine reaches
    min_lr.
    """

    global_batch_size: int
    micro_batch_size: int
    micro_batches: int
    accumulation: int
    steps_per_epoch: int
    total_epochs: int
    total_steps: int
    warmup_steps: int
    decay_end_step: int
    lr: float
    warmup_lr: float
    min_lr: float

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` finished ones; a pure function.

        Linear from warmup_lr to lr over the warm-up; half a cosine from lr to min_lr at the end of the
        configured epochs; then min_lr. The references differ. The re-implementation's cosine lasts for the
        epochs without the warm-up but starts with it: it reaches zero at epoch 295 of 300 and rises again,
        to 0.07 % of the peak. timm's starts with the warm-up, too, and moves once per epoch; with
        `warmup_prefix` and a move per step it is this one.
        """
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        if step < self.decay_end_step:
            done = (step - self.warmup_steps) / (self.decay_end_step - self.warmup_steps)
            return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2
        return self.min_lr

    def ends_epochs(self, step: int, every_epochs: int) -> bool:
        """Return whether `step` finished updates are a multiple of `every_epochs` whole epochs."""
        return step % (every_epochs * self.steps_per_epoch) == 0


def make_schedule(
    *,
    num_samples: int,
    world_size: int,
    global_batch_size: int,
    max_batch_per_gpu: int,
    lr: float,
    epochs: int,
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float,
    cooldown_epochs: int,
) -> Schedule:
    """Plan `epochs` + `cooldown_epochs` epochs over `num_samples` samples on `world_size` processes.

    The incomplete last global batch of an epoch is dropped.

    Raises:
        ConfigError: the global batch does not split evenly over the processes.
        DataError: the dataset is smaller than one global batch.
    """
    micro_batch_size, accumulation = split_batch(global_batch_size, max_batch_per_gpu, world_size)
    steps_per_epoch = num_samples // global_batch_size
    if steps_per_epoch == 0:
        raise DataError(
            f"the training set has {num_samples:,} samples, less than one global batch of "
            f"{global_batch_size:,}; lower train.global_batch_size"
        )
    return Schedule(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        micro_batches=accumulation * world_size,
        accumulation=accumulation,
        steps_per_epoch=steps_per_epoch,
        total_epochs=epochs + cooldown_epochs,
        total_steps=(epochs + cooldown_epochs) * steps_per_epoch,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        decay_end_step=epochs * steps_per_epoch,
        lr=lr,
        warmup_lr=warmup_lr,
        min_lr=min_lr,
    )


def split_batch(global_batch_size: int, max_batch_per_gpu: int, world_size: int) -> tuple[int, int]:
    """Return (micro-batch size, accumulation) with the fewest forward passes that `max_batch_per_gpu`
    allows.

    Raises:
        ConfigError: the global batch does not split evenly over the processes.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        nearest = [size for size in (share * world_size, (share + 1) * world_size) if size]
        raise ConfigError(
            f"train.global_batch_size: {global_batch_size} does not split over {world_size} processes "
            f"({global_batch_size} = {world_size} x {share} + {rest}); use {' or '.join(map(str, nearest))}"
        )
    fewest = math.ceil(share / max_batch_per_gpu)
    accumulation = next(count for count in range(fewest, share + 1) if share % count == 0)
    micro_batch_size = share // accumulation
    if micro_batch_size == 1 < min(share, max_batch_per_gpu):
        raise ConfigError(
            f"train.global_batch_size: {global_batch_size} leaves each of {world_size} processes {share} "
            f"samples, which only batches of 1 share evenly below {max_batch_per_gpu}, and BatchNorm needs "
            f"more; use {max_batch_per_gpu * fewest * world_size}"
        )
    return micro_batch_size, accumulation
