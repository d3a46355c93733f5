"""Measure answers about images of several classes each: mean average precision, and a threshold by class."""

from typing import Any

import numpy as np

THRESHOLD = 0.5  # probability from which a class counts as predicted, until better thresholds are known


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
    precision = hits / (ends + 1)
    average = float((precision * np.diff(hits, prepend=0)).sum() / hits[-1])
    best = int((2 * hits / (ends + 1 + hits[-1])).argmax())
    next_best = values[ends[best] + 1] if best + 1 < len(ends) else 0.0
    return average, float(values[ends[best]] + next_best) / 2
