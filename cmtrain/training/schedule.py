"""All arithmetic of a run, done once: how a batch is split, how many steps there are, and the learning rate of each.

A step is one optimizer update on one global batch. Durations are configured in epochs and become steps here, once.
"""

import math
from dataclasses import dataclass

from cmtrain.errors import ConfigError
from pipelines.spec import DataError


@dataclass(frozen=True)
class Schedule:
    """What `make_schedule` worked out.

    `micro_batches`: micro-batches of a global batch, over all processes; `accumulation`: of them, those of one process.
    `total_epochs` includes the cool-down. `decay_end_step`: where the cosine reaches min_lr.
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
        """The learning rate of the update that follows `step` finished ones; a pure function.

        Linear from warmup_lr to lr over the warm-up; then half a cosine, from lr to exactly min_lr at the end of the
        configured epochs; then min_lr. The references differ: the re-implementation's cosine is as long as the epochs without the
        warm-up but starts with it, so that it reaches zero at epoch 295 of 300 and rises again, to 0.07 % of the peak.
        timm's starts with the warm-up, too, and moves once an epoch; with its `warmup_prefix`, a step, it is this one.
        """
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        if step < self.decay_end_step:
            done = (step - self.warmup_steps) / (self.decay_end_step - self.warmup_steps)
            return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2
        return self.min_lr

    def ends_epochs(self, step: int, every_epochs: int) -> bool:
        """Whether `step` finished updates are a multiple of `every_epochs` whole epochs."""
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
    """Plan a run of `epochs` + `cooldown_epochs` epochs over `num_samples` samples on `world_size` processes.

    The incomplete last global batch of an epoch is dropped.

    Raises:
        ConfigError: the global batch does not split evenly over the processes.
        DataError: the dataset is smaller than one global batch.
    """
    micro_batch_size, accumulation = split_batch(global_batch_size, max_batch_per_gpu, world_size)
    steps_per_epoch = num_samples // global_batch_size
    if steps_per_epoch == 0:
        raise DataError(
            f"the training set has {num_samples:,} samples, less than one global batch of {global_batch_size:,}; "
            f"lower train.global_batch_size"
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
    """(micro-batch size, accumulation) with the fewest forward passes that `max_batch_per_gpu` allows.

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
            f"train.global_batch_size: {global_batch_size} leaves each of {world_size} processes {share} samples, "
            f"which only batches of 1 share evenly below {max_batch_per_gpu}, and BatchNorm needs more; "
            f"use {max_batch_per_gpu * fewest * world_size}"
        )
    return micro_batch_size, accumulation
