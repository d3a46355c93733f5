"""Evaluate a model: every image counts exactly once, whatever the number of ranks and the batch size."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from cmtrain.step.guard import running_statistics
from cmtrain.step.multi_label import MultiLabelOutcomes
from pipelines.spec import UNREADABLE, Batch

MAX_CONFUSION_CLASSES = 100  # beyond it the matrix is unreadable, and larger than the model's own outputs


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one set of weights.

    `top1`, `top5`: shares 0..1 of all images; `num_unreadable` count as wrong. Below 5 classes top5 is 1.
    Where images have several classes, one of them is enough, and images of no class are left out.
    `loss`: mean cross entropy (nats) of the images that were read; of yes and no, by class, if several.
    `class_images`, `class_correct`: images read of each class, and how many of them were recognised.
    `class_predicted`: images read that were taken for each class; if several, by a probability of 0.5.
    `map`, `thresholds`: see multi_label; None and [] where an image has one class.
    `confusion`: [true class][predicted class] counts; None beyond MAX_CONFUSION_CLASSES classes.
    `ranked`: (N, 5), or (N, K) with fewer classes, int64 on the CPU: the likeliest classes of each image, -1
        for unreadable images; None without `keeps_ranked`.
    `confidence`: (N,) the likeliest class's probability where there is one.
    """

    top1: float
    top5: float
    loss: float
    num_images: int
    num_unreadable: int = 0
    class_images: list[int] = field(default_factory=list)
    class_correct: list[int] = field(default_factory=list)
    class_predicted: list[int] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    map: float | None = None
    thresholds: list[float] = field(default_factory=list)
    ranked: Tensor | None = field(default=None, compare=False, repr=False)
    confidence: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def figures(self) -> dict[str, float]:
        """Return what a run records of each evaluation: top1, top5, loss, and map where there is one."""
        found = {"top1": self.top1, "top5": self.top5, "loss": self.loss}
        return found if self.map is None else found | {"map": self.map}

    @property
    def balanced(self) -> float:
        """Mean of the accuracies of the classes that have images: macro recall, 0..1."""
        pairs = zip(self.class_correct, self.class_images, strict=True)
        recalls = [correct / images for correct, images in pairs if images]
        return sum(recalls) / max(len(recalls), 1)

    @property
    def f1(self) -> float:
        """Macro F1: mean of 2 correct / (images + predicted) of the classes that have images, 0..1."""
        rows = zip(self.class_correct, self.class_images, self.class_predicted, strict=True)
        scores = [2 * correct / (images + predicted) for correct, images, predicted in rows if images]
        return sum(scores) / max(len(scores), 1)

    def score(self, measure: str) -> float:
        """Return what evaluate.best names: top1, balanced, f1, map, or the negative loss. More is better."""
        if not math.isfinite(self.loss) and measure in ("loss", "map"):
            return -math.inf
        return -self.loss if measure == "loss" else float(getattr(self, measure))


def evaluate(
    model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, num_images: int, num_classes: int,
    keeps_ranked: bool = False, label_sets: Tensor | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate `model` on this rank's share of the images and add up over ranks.

    `model`: unwrapped; its mode is restored. `batches`: this rank's share, each image once; may be empty.
    `num_images`: of all ranks. `num_classes`: outputs of `model`. `keeps_ranked`: fill Evaluation.ranked and
    confidence, 44 bytes per image on the device. `label_sets`: as in MixSpec.
    """
    modes, device = [(module, module.training) for module in model.modules()], accelerator.device
    model.eval()
    outcomes: _Outcomes | MultiLabelOutcomes = _Outcomes(num_classes, device)
    if label_sets is not None:
        outcomes = MultiLabelOutcomes(label_sets, num_images)
    ranked = torch.full((num_images, min(5, num_classes)), -1, device=device) if keeps_ranked else None
    confidence = torch.zeros(num_images, device=device) if keeps_ranked else None
    with torch.no_grad(), accelerator.autocast():
        for images, labels, indices in batches:
            logits = model(images).float()
            best = logits.topk(min(5, num_classes), dim=1).indices  # one answer for all, also of tied logits
            outcomes.add(logits, best, labels, indices)
            if ranked is not None and confidence is not None:
                ranked[indices] = torch.where(labels[:, None] == UNREADABLE, -1, best)
                confidence[indices] = (logits.softmax(1) if label_sets is None else logits.sigmoid()).amax(1)
    for module, mode in modes:  # a frozen BatchNorm's is another
        module.training = mode
    for values in outcomes.tensors:
        all_reduce_sum(values)
    seen, measured = outcomes.sum_up()
    assert seen == num_images, f"evaluated {seen} images of {num_images}"
    if ranked is not None and confidence is not None:
        ranked += 1  # 0 for images of other ranks
        all_reduce_sum(ranked)
        ranked -= 1
        all_reduce_sum(confidence)
        measured |= {"ranked": ranked.cpu(), "confidence": confidence.cpu()}
    return Evaluation(num_images=num_images, **measured)


class _Outcomes:
    """Counts right and wrong answers by class, on the device. `tensors`: to be added up over ranks.
    `counts`: flat (K, K) true by predicted class, or (K, 2) wrong, right beyond MAX_CONFUSION_CLASSES; then
    (K,) predicted, and one more cell for the unreadable images. So every image counts twice.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.width = num_classes if num_classes <= MAX_CONFUSION_CLASSES else 2
        self.counts = torch.zeros(num_classes * (self.width + 1) + 1, dtype=torch.int64, device=device)
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # correct at 5, summed loss
        self.tensors = [self.counts, self.totals]

    def add(self, logits: Tensor, best: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Count a batch: (B, K), its likeliest classes (B, 5), (B,), (B,). It never waits for the device."""
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNREADABLE)
        self.totals += torch.stack([(best == labels[:, None]).sum(), loss]).double()
        predicted = best[:, 0]
        column = predicted if self.width == self.num_classes else (predicted == labels).long()
        cells = torch.stack([labels * self.width + column, self.num_classes * self.width + predicted])
        cell = torch.where(labels == UNREADABLE, len(self.counts) - 1, cells).flatten()
        # torch.bincount would make the host wait for the largest value.
        self.counts.index_add_(0, cell, torch.ones_like(cell))

    def sum_up(self) -> tuple[int, dict[str, Any]]:
        """Return how many images were counted, and fields of Evaluation by name."""
        hits_at_5, loss = self.totals.tolist()
        cells, predicted = self.counts[:-1].cpu().split([self.num_classes * self.width, self.num_classes])
        table = cells.view(self.num_classes, self.width)
        whole = self.width == self.num_classes
        correct = table.diagonal() if whole else table[:, 1]
        seen, num_read = int(self.counts.sum()) // 2, int(table.sum())
        share = max(seen, 1)
        return seen, {
            "top1": int(correct.sum()) / share, "top5": hits_at_5 / share, "loss": loss / max(num_read, 1),
            "num_unreadable": seen - num_read, "class_images": table.sum(dim=1).tolist(),
            "class_correct": correct.tolist(), "class_predicted": predicted.tolist(),
            "confusion": table.tolist() if whole else None,
        }  # fmt: skip


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
        | ({"thresholds": result.thresholds} if result.thresholds else {})
        for name, result in results.items()
    }
    names = [*class_names, *map(str, range(len(class_names), num_classes))]
    return {"step": step, "classes": names, "weights": weights}
