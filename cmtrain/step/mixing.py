"""Erase and mix a batch between the pipeline and the model: random erasing, MixUp or CutMix, soft targets.

As `timm.data.Mixup` in batch mode, with its flipped partner and lambda correction, and
`timm.data.RandomErasing` in pixel mode. But all draws come from a key that the caller gives, so that a
resumed run mixes the same, and erasing works on the whole batch at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmtrain.errors import ConfigError

ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)
ERASE_ATTEMPTS = 10

Box = tuple[int, int, int, int]  # y0, y1, x0, x1


@dataclass(frozen=True)
class MixSpec:
    """timm's options. `mixup`, `cutmix`: Beta alphas, 0 is off, until step `until_step`. `re...`: erasing.
    `custom`: a function of (images, seed) that augments the batch before all else. `label_sets`: (S,
    num_classes) float32, 0 or 1: the classes of each label; None: a label is a class.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    smoothing: float = 0.0
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    until_step: float = math.inf
    loss: str = "cross_entropy"
    target_threshold: float | None = None
    teaching: str = "soft"  # or hard; weight and temperature: see `taught`
    teacher_weight: float = 0.5
    temperature: float = 1.0
    label_sets: Tensor | None = None
    custom: Callable[[Tensor, int], Tensor] | None = None


def mix(images: Tensor, labels: Tensor, spec: MixSpec, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Erase, mix and soften one batch: normalised images (B, C, H, W), not modified, and labels (B,) int64.
    `key`: (seed, step, micro-batch), from which all but the noise of erasing is drawn. Returns images and
    float32 targets (B, num_classes); rows sum to 1 without label_sets. Raises ConfigError: another shape.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    if spec.custom:
        given, images = images, spec.custom(images, int(rng.integers(2**63)))
        wanted = given.shape, given.dtype, given.device
        if not isinstance(images, Tensor) or (images.shape, images.dtype, images.device) != wanted:
            what = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else repr(images)
            raise ConfigError(f"augment.extra: gave {what} for {given.dtype} {tuple(given.shape)}")
    if spec.reprob:
        images = erase(images, spec, rng)
    mixes = math.isinf(spec.until_step) or key[1] < spec.until_step
    lam, box = draw_mix(spec, images.shape[-2], images.shape[-1], rng) if mixes else (1.0, None)
    if box is not None:
        y0, y1, x0, x1 = box
        partner, images = images.flip(0), images.clone()
        images[:, :, y0:y1, x0:x1] = partner[:, :, y0:y1, x0:x1]
    elif lam < 1:
        images = torch.lerp(images.flip(0), images, lam)
    return images, soft_targets(labels, spec, lam)


def draw_mix(spec: MixSpec, height: int, width: int, rng: np.random.Generator) -> tuple[float, Box | None]:
    """Choose MixUp, CutMix or neither for a batch of (height, width) images.
    Returns the weight of the image itself, 1 for neither, and CutMix's box.
    """
    if not (spec.mixup or spec.cutmix) or rng.random() >= spec.mixup_prob:
        return 1.0, None
    use_cutmix = rng.random() < spec.mixup_switch_prob if spec.mixup and spec.cutmix else bool(spec.cutmix)
    alpha = spec.cutmix if use_cutmix else spec.mixup
    lam = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return lam, None
    side = math.sqrt(1 - lam)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    y0, y1 = max(y - half_height, 0), min(y + half_height, height)
    x0, x1 = max(x - half_width, 0), min(x + half_width, width)
    # The border may cut the box off: weigh by the pasted area.
    return 1 - (y1 - y0) * (x1 - x0) / (height * width), (y0, y1, x0, x1)


def soft_targets(labels: Tensor, spec: MixSpec, lam: float) -> Tensor:
    """Smooth labels and mix them with the flipped batch's: (B,) int64 -> (B, num_classes) float32.
    One class is smoothed towards all of them; where there may be several, each towards yes and no.
    """
    if spec.label_sets is None:
        off = spec.smoothing / spec.num_classes
        targets = torch.full((len(labels), spec.num_classes), off, device=labels.device)
        targets.scatter_(1, labels[:, None], 1 - spec.smoothing + off)
    else:
        targets = spec.label_sets[labels] * (1 - spec.smoothing) + spec.smoothing / 2
    return targets if lam == 1 else torch.lerp(targets.flip(0), targets, lam)


def loss_of(logits: Tensor, targets: Tensor, spec: MixSpec, class_weights: Tensor | None = None) -> Tensor:
    """Return the mean loss of float32 logits (B, num_classes) and `mix`'s targets; bce as timm's."""
    if spec.label_sets is None and spec.loss == "cross_entropy":
        return F.cross_entropy(logits, targets, class_weights)
    if spec.target_threshold is not None:
        targets = (targets > spec.target_threshold).float()
    loss = F.binary_cross_entropy_with_logits(logits, targets, class_weights)
    return loss * spec.num_classes if spec.loss == "bce_sum" else loss


def taught(loss: Tensor, logits: Tensor, teacher_logits: Tensor, spec: MixSpec) -> Tensor:
    """Return the weighted sum of `loss`, of the labels, and the teacher's; both logits (B, num_classes).
    soft: Kullback-Leibler divergence times temperature squared (arXiv 1503.02531), as timm's.
    """
    if spec.teaching == "hard":
        theirs = F.cross_entropy(logits, teacher_logits.argmax(1))
    else:
        ours, answer = (F.log_softmax(given / spec.temperature, 1) for given in (logits, teacher_logits))
        theirs = F.kl_div(ours, answer, reduction="batchmean", log_target=True) * spec.temperature**2
    return (1 - spec.teacher_weight) * loss + spec.teacher_weight * theirs


def erase(images: Tensor, spec: MixSpec, rng: np.random.Generator) -> Tensor:
    """Replace `recount` random boxes per image by what `remode` names, in a share `reprob` of the images."""
    batch, _, height, width = images.shape
    mask = torch.zeros((batch, 1, height, width), dtype=torch.bool, device=images.device)
    chosen = rng.random(batch) < spec.reprob
    for _ in range(spec.recount):
        top, left, box_height, box_width = draw_boxes(batch, height, width, spec.recount, rng) * chosen
        edges = np.stack([top, top + box_height, left, left + box_width])  # (4, B)
        y0, y1, x0, x1 = torch.from_numpy(edges).to(images.device, non_blocking=True)[:, :, None, None, None]
        rows = torch.arange(height, device=images.device)[:, None]
        columns = torch.arange(width, device=images.device)
        mask |= (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
    if spec.remode == "const":
        return images.masked_fill(mask, 0)
    filled = images if spec.remode == "pixel" else images[:, :, :1, :1]
    return torch.where(mask, torch.randn_like(filled), images)


def draw_boxes(batch: int, height: int, width: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a box per image: top, left, height, width, (4, batch) int64; 0 x 0 where no attempt fits."""
    attempts = (ERASE_ATTEMPTS, batch)
    area = rng.uniform(*ERASE_AREA, size=attempts) * height * width / count
    aspect = np.exp(rng.uniform(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1]), size=attempts))
    box_height, box_width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (box_height < height) & (box_width < width)
    first = fits.argmax(0), np.arange(batch)
    box_height, box_width = np.where(fits, [box_height, box_width], 0)[:, *first].astype(np.int64)
    # timm draws both ends inclusive.
    top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
    return np.stack([top, left, box_height, box_width])
