"""Measure the answers to all images, in numpy: counts by class, calibration, mean average precision.

N images, K classes.
"""

from typing import Any

import numpy as np

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
