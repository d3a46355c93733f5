"""Evaluate a model: every image counts exactly once, whatever the number of ranks and the batch size."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from pipelines.spec import UNREADABLE, Batch


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one set of weights.
    Where images have several classes, one of them is enough, and images of no class are left out.
    """

    top1: float  # a share of all images, 0..1
    top5: float  # likewise; 1 below 5 classes
    loss: float  # mean cross entropy (nats) of the images that were read; of yes and no, if several
    num_images: int
    num_unreadable: int = 0  # they count as wrong
    class_images: list[int] = field(default_factory=list)  # that were read, of each class
    class_correct: list[int] = field(default_factory=list)  # how many of them were recognised
    class_predicted: list[int] = field(default_factory=list)  # taken for it; if several, from 0.5 on
    confusion: list[list[int]] | None = None  # [true][predicted class]; None beyond MAX_CONFUSION_CLASSES
    calibration_error: float | None = None  # see below; None where images have several classes
    map: float | None = None  # see below; None where an image has one class
    thresholds: list[float] = field(default_factory=list)  # see below; [] where an image has one class
    # (N, 5), or (N, K) with fewer classes, int64: the likeliest classes; -1 for unreadable images
    ranked: Tensor = field(default_factory=lambda: torch.empty(0, 5), compare=False, repr=False)
    # (N,) the probability of the likeliest one
    confidence: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)

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
    label_sets: Tensor | None = None, among: Tensor | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate `model` on this rank's share of the images and add up over ranks.

    `model`: unwrapped; its mode is restored. `batches`: this rank's share, each image once; may be empty.
    `num_images`: of all ranks. `num_classes`: outputs of `model`. `label_sets`: as in MixSpec.
    `among`: (num_classes,) bool, on the device: the classes that compete; None: all.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    answers = Answers(num_images, num_classes, accelerator.device, label_sets)
    with torch.no_grad(), accelerator.autocast():
        for images, labels, indices in batches:
            logits = model(images).float()
            answers.add(logits if among is None else logits.where(among, -math.inf), labels, indices)
    for module, mode in modes:  # a frozen BatchNorm's is another
        module.training = mode
    for values in answers.tensors:
        all_reduce_sum(values)
    return answers.measure()


class Answers:
    """Keeps what a model answers to each of N images, on the device: 52 bytes, or 4 per class more.
    `tensors`: to be added up over ranks; an image of another rank is 0 in all of them.
    """

    def __init__(
        self, num_images: int, num_classes: int, device: torch.device, label_sets: Tensor | None
    ) -> None:
        self.num_classes, self.label_sets = num_classes, label_sets
        # 1 for unreadable images, 2 and more for labels.
        self.labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        self.ranked = torch.zeros(num_images, min(5, num_classes), dtype=torch.int64, device=device)
        # Of all classes where an image may have several, else of the likeliest alone.
        self.probabilities = torch.zeros(num_images, 1 if label_sets is None else num_classes, device=device)
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # images, summed loss
        self.tensors = [self.labels, self.ranked, self.probabilities, self.totals]

    def add(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Keep the answers to a batch: (B, num_classes), (B,), (B,). It never waits for the device."""
        if self.label_sets is None:
            probabilities = logits.softmax(1).amax(1, keepdim=True)
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNREADABLE)
        else:
            probabilities, readable = logits.sigmoid(), labels != UNREADABLE
            targets = self.label_sets[labels] * readable[:, None]
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            loss = (losses.mean(1) * readable).sum()
        self.labels[indices] = labels + 2
        self.ranked[indices] = logits.topk(self.ranked.shape[1]).indices
        self.probabilities[indices] = probabilities
        self.totals[0] += len(labels)
        self.totals[1] += loss

    def measure(self) -> Evaluation:
        """Return the result, after `tensors` have been added up."""
        labels, ranked, probabilities = (kept.cpu().numpy() for kept in self.tensors[:3])
        seen, loss = self.totals.tolist()
        labels = labels - 2
        read = labels >= 0
        num_images, num_unreadable = len(labels), int((labels == UNREADABLE).sum())
        each_once = seen == num_images == read.sum() + num_unreadable
        assert each_once, f"evaluated {seen:.0f} images of {num_images}"
        true, best = labels[read], ranked[read]
        if self.label_sets is None:
            hits, num_labelled = best == true[:, None], len(true)
            of_classes = count_classes(true, best[:, 0], self.num_classes)
            of_classes["calibration_error"] = calibration_error(hits[:, 0], probabilities[read, 0])
        else:
            classes = self.label_sets.cpu().numpy()[true].astype(bool)  # (N, K)
            hits, num_labelled = np.take_along_axis(classes, best, 1), int(classes.any(1).sum())
            of_classes = measure_classes(classes, probabilities[read])
        share = max(num_labelled + num_unreadable, 1)
        ranked[~read] = UNREADABLE
        return Evaluation(
            top1=int(hits[:, 0].sum()) / share, top5=int(hits.any(1).sum()) / share,
            loss=loss / max(len(true), 1), num_images=num_images, num_unreadable=num_unreadable,
            ranked=torch.from_numpy(ranked), confidence=torch.from_numpy(probabilities.max(1)),
            **of_classes,
        )  # fmt: skip


def all_reduce_sum(values: Tensor) -> None:
    """Sum `values` over all ranks, in place; nothing to do in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)


def by_class(results: dict[str, Evaluation], class_names: Sequence[str], step: int) -> dict[str, Any]:
    """Return the content of classes.json. Outputs without a class of the data are named by their number."""
    weights = {
        name: {"images": result.class_images, "correct": result.class_correct, "confusion": result.confusion}
        | ({"thresholds": result.thresholds} if result.thresholds else {})
        for name, result in results.items()
    }
    names = [*class_names, *map(str, range(len(class_names), len(results["model"].class_images)))]
    return {"step": step, "classes": names, "weights": weights}


MAX_CONFUSION_CLASSES = 100  # beyond it the matrix is unreadable, and larger than the model's own outputs
CALIBRATION_BINS = 15
THRESHOLD = 0.5  # probability from which a class counts as predicted, until better thresholds are known


def count_classes(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Return fields of Evaluation by name, of images that have one class: (N,) int64 each."""
    kinds = {"class_images": true, "class_correct": true[true == predicted], "class_predicted": predicted}
    fields: dict[str, Any] = {
        name: np.bincount(classes, minlength=num_classes).tolist() for name, classes in kinds.items()
    }
    if num_classes <= MAX_CONFUSION_CLASSES:
        cells = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
        fields["confusion"] = cells.reshape(num_classes, num_classes).tolist()
    return fields


def calibration_error(is_right: np.ndarray, confidence: np.ndarray) -> float:
    """Return the expected calibration error, 0..1, of answers with this probability: (N,) bool, (N,).
    Mean over images of |accuracy - mean probability| of all images in the same of 15 bins of equal width
    (Guo et al., arXiv 1706.04599). 0 without images.
    """
    places = np.minimum(np.nan_to_num(confidence) * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    gaps = np.bincount(places, is_right - confidence.astype(np.float64), CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / max(len(confidence), 1))


def measure_classes(classes: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Return fields of Evaluation by name, given which classes images are of: (N, K) bool, (N, K).
    `map`: mean over classes of the average precision, as scikit-learn's. `thresholds`: by class, the
    probability from which to predict it for the best F1; THRESHOLD for a class without images.
    """
    predicted = probabilities >= THRESHOLD
    ranked = [rank(*columns) for columns in zip(classes.T, probabilities.T, strict=True)]
    precisions = [precision for precision, _ in ranked if precision is not None]
    return {
        "class_images": classes.sum(0).tolist(), "class_correct": (classes & predicted).sum(0).tolist(),
        "class_predicted": predicted.sum(0).tolist(), "map": float(np.mean(precisions or [0.0])),
        "thresholds": [threshold for _, threshold in ranked],
    }  # fmt: skip


def rank(is_of_class: np.ndarray, probabilities: np.ndarray) -> tuple[float | None, float]:
    """Return average precision (None without images) and threshold of one class: (N,) bool, (N,).
    Precision after each distinct probability, weighted by the recall that it adds. The threshold lies
    between two images, so that rounding does not matter.
    """
    if not is_of_class.any():
        return None, THRESHOLD
    if np.isnan(probabilities).any():  # each would be a rank of its own
        return 0.0, THRESHOLD
    order = np.argsort(-probabilities, kind="stable")
    values = probabilities[order].astype(np.float64)
    ends = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # equal ones count together
    hits = np.cumsum(is_of_class[order])[ends]
    average = float((hits / (ends + 1) * np.diff(hits, prepend=0)).sum() / hits[-1])
    best = int((2 * hits / (ends + 1 + hits[-1])).argmax())
    next_best = values[ends[best] + 1] if best + 1 < len(ends) else 0.0
    return average, float(values[ends[best]] + next_best) / 2
