"""Summarise the last evaluation by class: accuracies, confused pairs and the confusion matrix."""

from typing import Any

import numpy as np

from cmtrain.monitoring.report.charts import heat_map
from cmtrain.storage.run_record import ClassCounts, RunRecord

MAX_TABLE_CLASSES = 25  # up to here the confusion matrix is a table with numbers
MAX_ROWS = 100
NUM_OPEN_ROWS = 12  # of the table of classes; the others unfold
MAX_PAIRS = 12


def class_section(record: RunRecord) -> dict[str, Any] | None:
    """Return what the template shows of the better of model and EMA; None before the first evaluation.

    `rows`, `more_rows`: classes, the worst first; each was mistaken most often for the class `taken_for`,
    `mistakes` times. `pairs`: (true, predicted, count, share of the true class's images). `counts`,
    `shades`: the confusion matrix as a table, and how dark each cell is, 0 to 1. `heat`: the matrix as SVG,
    if it is too large for a table.
    """
    if not record.classes:
        return None
    weights, result = max(record.classes.items(), key=lambda item: int(item[1].correct.sum()))
    names, matrix = record.class_names, result.confusion
    seen = np.flatnonzero(result.images)
    if not seen.size:
        return None
    accuracy = result.correct / np.maximum(result.images, 1)
    worst = seen[np.lexsort((-result.images[seen], accuracy[seen]))][:MAX_ROWS]
    errors = np.zeros((len(names), 1), int)
    counts, shades, heat = np.empty((0, 0), int), np.empty((0, 0)), ""
    if matrix is not None:
        errors = matrix - np.diag(np.diagonal(matrix))
        if len(names) <= MAX_TABLE_CLASSES:
            # The root makes a few errors in a hundred visible.
            counts, shades = matrix, np.sqrt(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))
        else:
            heat = heat_map(matrix, names, key="confusion")
    rows = [
        {
            "name": names[index], "images": int(result.images[index]), "accuracy": float(accuracy[index]),
            "taken_for": names[int(errors[index].argmax())], "mistakes": int(errors[index].max()),
        }
        for index in worst.tolist()
    ]  # fmt: skip
    section = {"weights": weights, "names": names, "median_accuracy": float(np.median(accuracy[seen]))}
    section["mean_accuracy"] = float(accuracy[seen].mean())
    section |= {"rows": rows[:NUM_OPEN_ROWS], "more_rows": rows[NUM_OPEN_ROWS:]}
    section |= {"counts": counts.tolist(), "shades": shades.round(2).tolist(), "heat": heat}
    return section | {"pairs": _pairs(names, result, errors)}


def _pairs(names: list[str], result: ClassCounts, errors: np.ndarray) -> list[tuple[str, str, int, float]]:
    pairs = []
    for place in np.argsort(-errors, axis=None, kind="stable")[:MAX_PAIRS].tolist():
        true, predicted = divmod(place, errors.shape[1])
        if count := int(errors[true, predicted]):
            pairs.append((names[true], names[predicted], count, count / int(result.images[true])))
    return pairs
