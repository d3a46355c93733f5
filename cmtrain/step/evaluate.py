"""Evaluate a model: every image counts exactly once, whatever the number of ranks and the batch size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from cmtrain.step.guard import running_statistics
from pipelines.spec import UNREADABLE, Batch

MAX_CONFUSION_CLASSES = 100  # beyond it the matrix is unreadable, and larger than the model's own outputs


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one set of weights.

    `top1`, `top5`: shares 0..1 of all images; `num_unreadable` count as wrong. Below 5 classes top5 is 1.
    `loss`: mean cross entropy (nats) of the images that were read.
    `class_images`, `class_correct`: images read of each class, and how many of them were recognised.
    `confusion`: [true class][predicted class] counts; None beyond MAX_CONFUSION_CLASSES classes.
    `ranked`: (N, 5), or (N, K) with fewer classes, int64 on the CPU: the likeliest classes of each image, -1
        for the images of other ranks; None without `keeps_ranked`.
    """

    top1: float
    top5: float
    loss: float
    num_images: int
    num_unreadable: int = 0
    class_images: list[int] = field(default_factory=list)
    class_correct: list[int] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    ranked: Tensor | None = field(default=None, compare=False, repr=False)


def evaluate(
    model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, num_images: int, num_classes: int,
    keeps_ranked: bool = False,
) -> Evaluation:  # fmt: skip
    """Evaluate `model` on this rank's share of the images and add up over ranks.

    `model`: unwrapped; its mode is restored. `batches`: this rank's share, each image once; may be empty.
    `num_images`: of all ranks together. `num_classes`: number of `model`'s outputs. `keeps_ranked`: fill
    Evaluation.ranked, which costs 40 bytes per image on the device.
    """
    modes, device = [(module, module.training) for module in model.modules()], accelerator.device
    model.eval()
    totals = torch.zeros(5, dtype=torch.float64, device=device)  # as in _count
    outcomes = _Outcomes(num_classes, device)
    ranked = torch.full((num_images, min(5, num_classes)), -1, device=device) if keeps_ranked else None
    with torch.no_grad(), accelerator.autocast():
        for images, labels, indices in batches:
            logits = model(images).float()
            best = logits.topk(min(5, num_classes), dim=1).indices  # one answer for all, also of tied logits
            totals += _count(logits, labels, best)
            outcomes.add(best[:, 0], labels)
            if ranked is not None:
                ranked[indices] = best
    for module, mode in modes:  # a frozen BatchNorm's is another
        module.training = mode
    all_reduce_sum(totals)
    top1, top5, loss, seen, unreadable = totals.tolist()
    assert seen == num_images, f"evaluated {seen:.0f} images of {num_images}"
    return Evaluation(
        top1 / seen, top5 / seen, loss / max(seen - unreadable, 1), num_images, int(unreadable),
        *outcomes.sum_up(), None if ranked is None else ranked.cpu(),
    )  # fmt: skip


class _Outcomes:
    """Counts right and wrong answers by class, on the device.

    `counts`: flat (K, K) true by predicted class, or (K, 2) wrong, right beyond MAX_CONFUSION_CLASSES, and
    one more cell for the unreadable images.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.width = num_classes if num_classes <= MAX_CONFUSION_CLASSES else 2
        self.counts = torch.zeros(num_classes * self.width + 1, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Count a batch: (B,), (B,). torch.bincount would make the host wait for the largest value."""
        column = predicted if self.width == self.num_classes else (predicted == labels).long()
        cell = torch.where(labels == UNREADABLE, len(self.counts) - 1, labels * self.width + column)
        self.counts.index_add_(0, cell, torch.ones_like(cell))

    def sum_up(self) -> tuple[list[int], list[int], list[list[int]] | None]:
        """Return Evaluation's images, correct ones and confusion of all ranks; all ranks must call it."""
        all_reduce_sum(self.counts)
        table = self.counts[:-1].view(self.num_classes, self.width).cpu()
        whole = self.width == self.num_classes
        correct = table.diagonal() if whole else table[:, 1]
        return table.sum(dim=1).tolist(), correct.tolist(), table.tolist() if whole else None


def _count(logits: Tensor, labels: Tensor, best: Tensor) -> Tensor:
    """Return (5,) float64: correct at 1, correct at 5, summed loss, images, unreadable images.

    `logits` (B, K), `labels` (B,), `best` (B, 5): the likeliest classes.
    """
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNREADABLE)
    images = torch.full((), len(labels), device=logits.device)
    unreadable = (labels == UNREADABLE).sum()
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, images, unreadable]).double()


def all_reduce_sum(values: Tensor) -> None:
    """Sum `values` over all ranks, in place; nothing to do in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)


@torch.no_grad()
def average_running_statistics(*models: nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics, as if taken after every step."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for model in models:
        if statistics := running_statistics(model):
            flat = torch.cat(statistics)
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            torch._foreach_copy_(statistics, list(flat.split([t.numel() for t in statistics])))


def by_class(results: dict[str, Evaluation], class_names: Sequence[str], step: int) -> dict[str, Any]:
    """Return the content of classes.json. Outputs without a class of the data are named by their number."""
    num_classes = len(results["model"].class_images)
    weights = {
        name: {"images": result.class_images, "correct": result.class_correct, "confusion": result.confusion}
        for name, result in results.items()
    }
    names = [*class_names, *map(str, range(len(class_names), num_classes))]
    return {"step": step, "classes": names, "weights": weights}
