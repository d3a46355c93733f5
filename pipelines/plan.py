"""Plan the order and the random numbers of all samples, as pure functions of (seed, epoch, sample).

So a killed run resumes on any number of GPUs with the same samples and the same augmented pixels.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.rand_augment import NUM_LAYER_DRAWS, Branch, Floats, Ints, LayerParams, layer_params, parse
from pipelines.spec import AugmentSpec

Words = NDArray[np.uint64]
Sizes = NDArray[np.int32]

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after ten

# Where a sample's random streams begin; those of the crop are the first. Changing this layout changes every
# augmented pixel of every run.
_FLIP = 2 * CROP_ATTEMPTS + 2
_JITTER = _FLIP + 1
_LAYERS = _JITTER + 4

# Keep unrelated uses of one seed apart: of the plan, of a manifest's subset, of the order inside shards.
_ORDER_DOMAIN, _AUGMENT_DOMAIN, SUBSET_DOMAIN, SHARD_DOMAIN, _DRAW_DOMAIN = range(1, 6)

# Brightness, contrast, saturation and their six orders.
_JITTER_BRANCHES = np.array([Branch.SCALE, Branch.SCALE, Branch.SATURATE], np.int32)
_CONTRAST = 1
_JITTER_ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


class MicroBatch(NamedTuple):
    """One micro-batch of one global batch: its identity and its samples."""

    epoch: int
    step: int
    slot: int
    indices: Ints  # (B,) into the manifest
    copies: Ints  # (B,) which of the `repeats` copies of the sample this is

    @property
    def identity(self) -> tuple[int, int, int]:
        return self.epoch, self.step, self.slot

    def part(self, places: slice) -> Self:
        """Return these samples only."""
        return self._replace(indices=self.indices[places], copies=self.copies[places])


@dataclass(frozen=True, eq=False)
class ClassSampling:
    """How often an epoch draws each class: in proportion to (its images) ** `power`, 0 for all alike."""

    labels: Ints  # (num_samples,) the class of each sample
    power: float


@dataclass(frozen=True)
class Plan:
    """The order of samples. Raises ValueError for numbers that do not fit each other.

    Global batch k of epoch e is `order(e)[k * G : (k + 1) * G]`, its micro-batch j is that slice's `[j::M]`,
    where M = G / micro_batch_size; rank r of W handles j = r, r + W, ... An incomplete last batch is
    dropped. `repeats` > 1 is repeated augmentation (DeiT's sampler, arXiv 1902.05509): an epoch keeps
    `num_samples` samples, of num_samples / repeats images; up to M copies of one are in different
    micro-batches. With `sampling`, a rare class gives its images several times, each with other
    augmentation, and a frequent one gives a part of its images, others in each epoch.
    """

    seed: int
    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    repeats: int = 1
    sampling: ClassSampling | None = None

    def __post_init__(self) -> None:
        size, micro = self.global_batch_size, self.micro_batch_size
        if micro < 1 or size % micro:
            raise ValueError(f"global_batch_size {size} is no multiple of micro_batch_size {micro}")
        if not 1 <= size <= self.num_samples:
            raise ValueError(f"global_batch_size {size} is not in 1..{self.num_samples} (samples)")
        if self.repeats < 1:
            raise ValueError(f"repeats {self.repeats} is below 1")
        if self.sampling and (self.repeats > 1 or len(self.sampling.labels) != self.num_samples):
            raise ValueError("sampling needs a label for each sample, and no repeats")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one global batch, over all ranks."""
        return self.global_batch_size // self.micro_batch_size

    def order(self, epoch: int) -> Ints:
        """Return the sample indices of one epoch, (num_samples,), read-only."""
        return _order(self, epoch)[0]

    def micro_batches(self, epoch: int, start: int, rank: int, world: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of one epoch after its first `start` samples.
        Raises ValueError at the call: `world` must divide num_micro_batches, and global_batch_size `start`.
        """
        size, count = self.global_batch_size, self.num_micro_batches
        if count % world:
            what = f"the {count} micro-batches of a global batch ({size} / {self.micro_batch_size})"
            raise ValueError(f"{world} ranks do not divide {what}")
        if start % size or not 0 <= start <= self.num_samples:
            raise ValueError(f"start {start} is no multiple of global_batch_size {size} in the epoch")
        order, copies = _order(self, epoch)
        slots = itertools.product(range(start, self.steps_per_epoch * size, size), range(rank, count, world))
        parts = ((begin, slot, np.arange(begin + slot, begin + size, count)) for begin, slot in slots)
        return (MicroBatch(epoch, begin // size, slot, order[at], copies[at]) for begin, slot, at in parts)

    def uniforms(self, batch: MicroBatch, num_streams: int) -> Floats:
        """Return independent uniforms in [0, 1) for every sample of the batch, (B, num_streams)."""
        # Keyed by sample and copy, never by position: a sample keeps its pixels wherever it lands.
        copies = batch.copies.astype(np.uint64)
        states = _mix(sample_keys(self.seed, _AUGMENT_DOMAIN, batch.indices, batch.epoch) ^ _mix(copies))
        counters = np.arange(1, num_streams + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        words = _mix(states[:, None] + counters)  # (B,) -> (B, streams)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class JitterParams(NamedTuple):
    """The three enhancements of ColorJitter in the order of each sample, as branches of RandAugment."""

    branches: NDArray[np.int32]  # (B, 3) Branch.SCALE or Branch.SATURATE
    factors: NDArray[np.float32]  # (B, 3, 2) factor, 1 if it is about the image's mean


class AugmentParams(NamedTuple):
    """Everything random about a batch, as whole arrays ready for DALI; None is off."""

    windows: NDArray[np.int32]  # (B, 4) top, left, height, width of the crop, in pixels of the stored image
    flips: NDArray[np.int32]  # (B,) 1 mirrors left to right
    jitter: JitterParams | None
    layers: LayerParams | None  # of RandAugment


def augment_params(
    plan: Plan, batch: MicroBatch, heights: Sizes, widths: Sizes, spec: AugmentSpec
) -> AugmentParams:
    """Draw the augmentation of a batch; `heights` and `widths` are (B,) pixels as stored in the file."""
    policy = None if spec.rand_augment is None else parse(spec.rand_augment)
    num_layers = policy.num_layers if policy else 0
    u = plan.uniforms(batch, _LAYERS + NUM_LAYER_DRAWS * num_layers)  # (B, streams)
    draws = u[:, _LAYERS:].reshape(len(u), num_layers, NUM_LAYER_DRAWS)
    return AugmentParams(
        windows=crop_windows(u[:, :_FLIP], heights, widths, spec.scale, spec.ratio),
        flips=(u[:, _FLIP] < spec.hflip).astype(np.int32),
        jitter=jitter_params(u[:, _JITTER:_LAYERS], spec.color_jitter) if spec.color_jitter else None,
        layers=layer_params(policy, draws, spec.image_px) if policy else None,
    )


def crop_windows(
    u: Floats, heights: Sizes, widths: Sizes, scale: tuple[float, float], ratio: tuple[float, float]
) -> Sizes:
    """Return crops as torchvision's RandomResizedCrop: (B, 22) uniforms -> (B, 4) top, left, height, width.

    The first of ten attempts that fits is used, else the largest centre crop of an aspect in `ratio`.
    """
    h, w = heights.astype(np.float64), widths.astype(np.float64)
    area = (h * w)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[:, :CROP_ATTEMPTS])  # (B, 10)
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[:, CROP_ATTEMPTS : 2 * CROP_ATTEMPTS])
    # rint rounds halves to even, as Python's round does
    crop_w, crop_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (crop_w > 0) & (crop_w <= w[:, None]) & (crop_h > 0) & (crop_h <= h[:, None])
    first, rows = fits.argmax(axis=1), np.arange(len(u))
    chosen_w, chosen_h, chosen = crop_w[rows, first], crop_h[rows, first], fits[rows, first]
    centre_w = np.where(w / h > ratio[1], np.rint(h * ratio[1]), w)
    centre_h = np.where(w / h < ratio[0], np.rint(w / ratio[0]), h)
    out_w, out_h = np.where(chosen, chosen_w, centre_w), np.where(chosen, chosen_h, centre_h)
    top = np.where(chosen, np.floor(u[:, -2] * (h - out_h + 1)), (h - out_h) // 2)
    left = np.where(chosen, np.floor(u[:, -1] * (w - out_w + 1)), (w - out_w) // 2)
    return np.stack([top, left, out_h, out_w], axis=1).astype(np.int32)


def jitter_params(u: Floats, strength: float) -> JitterParams:
    """Return the params of ColorJitter(strength, strength, strength); the last of u (B, 4) is the order."""
    low = max(0.0, 1.0 - strength)
    factors = low + (1.0 + strength - low) * u[:, :3]  # (B, 3) of brightness, contrast, saturation
    operations = _JITTER_ORDERS[(u[:, 3] * len(_JITTER_ORDERS)).astype(np.int64)]  # (B, 3)
    pairs = [np.take_along_axis(factors, operations, axis=1), operations == _CONTRAST]
    return JitterParams(_JITTER_BRANCHES[operations], np.stack(pairs, axis=2).astype(np.float32))


@lru_cache(maxsize=2)  # the epoch being trained and the one whose first batches are already in flight
def _order(plan: Plan, epoch: int) -> tuple[Ints, Ints]:
    """Return the samples of an epoch in order, and which copy of its sample each is, (num_samples,) both."""
    # Sorting by our own hash, because numpy does not promise the same permutations in all versions.
    samples = np.arange(plan.num_samples)
    shuffled = np.argsort(sample_keys(plan.seed, _ORDER_DOMAIN, samples, epoch), kind="stable")
    if plan.sampling is None:
        order = np.repeat(shuffled, plan.repeats)[: plan.num_samples]
        copies = samples % plan.repeats
    else:
        keys = sample_keys(plan.seed, _DRAW_DOMAIN, samples, epoch)
        drawn, drawn_copies = _draw_classes(shuffled, plan.sampling, (keys[0] >> np.uint64(11)) * 2.0**-53)
        places = np.argsort(keys, kind="stable")
        order, copies = drawn[places], drawn_copies[places]
    order.setflags(write=False)
    copies.setflags(write=False)
    return order, copies


def _draw_classes(shuffled: Ints, sampling: ClassSampling, offset: float) -> tuple[Ints, Ints]:
    """Return as many samples as there are, class by class, and which copy each is.
    `offset`, 0..1, decides for all classes whether their share is rounded up or down.
    """
    counts, total = np.bincount(sampling.labels), len(shuffled)
    shares = np.where(counts > 0, np.maximum(counts, 1.0) ** sampling.power, 0.0)
    # Rounded, because a power's last bit may differ between CPUs.
    ends = np.ceil(np.round(np.cumsum(shares) / shares.sum() * total, 6) - offset).astype(np.int64)
    ends[-1] = total
    times = np.diff(ends, prepend=0)
    classes = np.repeat(np.arange(len(counts)), times)
    turns = np.arange(total) - (ends - times)[classes]
    by_class = shuffled[np.argsort(sampling.labels[shuffled], kind="stable")]
    place, copies = turns % counts[classes], turns // counts[classes]
    return by_class[(np.cumsum(counts) - counts)[classes] + place], copies


def sample_keys(seed: int, domain: int, indices: Ints, epoch: int = 0) -> Words:
    """Return one 64-bit hash per index; epoch 0 also where a choice belongs to none, as of a subset."""
    key = np.zeros(1, np.uint64)
    for part in (seed, domain, epoch):
        key = _mix(key ^ np.uint64(part))
    return _mix(key ^ indices.astype(np.uint64))


def _mix(x: Words) -> Words:
    """Mix bits as SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection of 64-bit words."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
