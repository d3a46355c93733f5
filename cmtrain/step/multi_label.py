"""Measure answers about images of several classes each: mean average precision, and a threshold by class."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.spec import UNREADABLE

THRESHOLD = 0.5  # probability from which a class counts as predicted, until better thresholds are known


class MultiLabelOutcomes:
    """Keeps (N, K) float32 probabilities on the device. `tensors`: to be summed over ranks.
    `label_sets`: (S, K) float32, 0 or 1: the classes of each label.
    """

    def __init__(self, label_sets: Tensor, num_images: int) -> None:
        self.label_sets = label_sets
        self.probabilities = torch.zeros(num_images, label_sets.shape[1], device=label_sets.device)
        # 0 for images of other ranks, 1 for unreadable ones, 2 and more for labels.
        self.labels = torch.zeros(num_images, dtype=torch.int64, device=label_sets.device)
        # Hits of the likeliest class and of five, summed loss.
        self.totals = torch.zeros(3, dtype=torch.float64, device=label_sets.device)
        self.tensors = [self.probabilities, self.labels, self.totals]

    def add(self, logits: Tensor, best: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Count a batch: (B, K), its likeliest classes (B, 5), (B,), (B,). It never waits for the device."""
        self.probabilities[indices] = logits.sigmoid()
        self.labels[indices] = labels + 2
        readable = labels != UNREADABLE
        classes = self.label_sets[labels] * readable[:, None]
        hits = classes.gather(1, best)
        loss = F.binary_cross_entropy_with_logits(logits, classes, reduction="none").mean(1) * readable
        self.totals += torch.stack([hits[:, 0].sum(), hits.amax(1).sum(), loss.sum()]).double()

    def sum_up(self) -> tuple[int, dict[str, Any]]:
        """Return how many images were counted, and fields of Evaluation by name.
        `map`: mean over classes of the average precision, as scikit-learn's. `thresholds`: by class, the
        probability from which to predict it for the best F1; THRESHOLD for a class without images.
        """
        labels = self.labels.cpu().numpy() - 2
        read = labels >= 0
        probabilities = self.probabilities.cpu().numpy()[read]
        classes = self.label_sets.cpu().numpy()[labels[read]].astype(bool)  # (N, K)
        predicted = probabilities >= THRESHOLD
        ranked = [rank(*columns) for columns in zip(classes.T, probabilities.T, strict=True)]
        precisions = [precision for precision, _ in ranked if precision is not None]
        num_unreadable = int((labels == UNREADABLE).sum())
        hits, hits_at_5, loss = self.totals.tolist()
        share = max(int(classes.any(1).sum()) + num_unreadable, 1)
        return int((labels >= UNREADABLE).sum()), {
            "top1": hits / share, "top5": hits_at_5 / share, "loss": loss / max(len(classes), 1),
            "num_unreadable": num_unreadable, "class_images": classes.sum(0).tolist(),
            "class_correct": (classes & predicted).sum(0).tolist(),
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
    precision = hits / (ends + 1)
    average = float((precision * np.diff(hits, prepend=0)).sum() / hits[-1])
    best = int((2 * hits / (ends + 1 + hits[-1])).argmax())
    next_best = values[ends[best] + 1] if best + 1 < len(ends) else 0.0
    return average, float(values[ends[best]] + next_best) / 2
