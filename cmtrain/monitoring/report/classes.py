"""How each class fared in the last evaluation, as a report shows it."""

from dataclasses import dataclass

import numpy as np

from cmtrain.monitoring.report.charts import heat_map
from cmtrain.storage.run_record import ClassCounts, RunRecord

MAX_TABLE_CLASSES = 25  # up to here the confusion matrix is a table with numbers
MAX_ROWS = 100
MAX_PAIRS = 12
NUM_OPEN_ROWS = 12  # of the table of classes; the others unfold


@dataclass(frozen=True)
class ClassRow:
    """`taken_for`: the class it was most often mistaken for, and how often; "" where that is not known."""

    name: str
    images: int
    accuracy: float
    taken_for: str
    mistakes: int


@dataclass(frozen=True)
class Cell:
    """`strength`: 0..1, how dark it is."""

    count: int
    strength: float
    right: bool


@dataclass(frozen=True)
class ClassSection:
    """`rows`: the worst classes first. `pairs`: (true, predicted, count, share of the true class's images).

    One of `cells` (a table) and `heat` (a picture) is there if there is a confusion matrix.
    """

    weights: str
    num_classes: int
    median_accuracy: float
    rows: list[ClassRow]
    pairs: list[tuple[str, str, int, float]]
    names: list[str]
    cells: list[list[Cell]]
    heat: str


def class_section(record: RunRecord) -> ClassSection | None:
    """Of the better of the model's and the EMA's weights; None before the first evaluation."""
    if not record.classes:
        return None
    weights, counts = max(record.classes.items(), key=lambda item: int(item[1].correct.sum()))
    names = record.class_names
    accuracy = counts.correct / np.maximum(counts.images, 1)
    seen = np.flatnonzero(counts.images)
    if not seen.size:
        return None
    worst = seen[np.lexsort((-counts.images[seen], accuracy[seen]))][:MAX_ROWS]
    errors = _errors(counts)
    matrix = counts.confusion
    as_table = matrix is not None and len(names) <= MAX_TABLE_CLASSES
    return ClassSection(
        weights=weights,
        num_classes=len(names),
        median_accuracy=float(np.median(accuracy[seen])),
        rows=[_row(int(index), names, counts, errors) for index in worst],
        pairs=_pairs(names, counts, errors),
        names=names,
        cells=_cells(matrix) if matrix is not None and as_table else [],
        heat=_heat(matrix) if matrix is not None and not as_table else "",
    )


def _errors(counts: ClassCounts) -> np.ndarray | None:
    if counts.confusion is None:
        return None
    errors = counts.confusion.copy()
    np.fill_diagonal(errors, 0)
    return errors


def _row(index: int, names: list[str], counts: ClassCounts, errors: np.ndarray | None) -> ClassRow:
    taken_for = int(errors[index].argmax()) if errors is not None else -1
    mistakes = int(errors[index, taken_for]) if errors is not None else 0
    images = int(counts.images[index])
    return ClassRow(
        names[index],
        images,
        int(counts.correct[index]) / images,
        names[taken_for] if mistakes else "",
        mistakes,
    )


def _pairs(
    names: list[str], counts: ClassCounts, errors: np.ndarray | None
) -> list[tuple[str, str, int, float]]:
    if errors is None:
        return []
    order = np.argsort(-errors, axis=None, kind="stable")[:MAX_PAIRS]
    pairs = zip(*(axis.tolist() for axis in np.unravel_index(order, errors.shape)), strict=True)
    return [
        (
            names[true],
            names[predicted],
            int(errors[true, predicted]),
            errors[true, predicted] / counts.images[true],
        )
        for true, predicted in pairs
        if errors[true, predicted]
    ]


def _cells(matrix: np.ndarray) -> list[list[Cell]]:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return [
        [
            Cell(int(count), round(float(share) ** 0.5, 2), row == column)
            for column, (count, share) in enumerate(zip(counts, row_shares, strict=True))
        ]
        for row, (counts, row_shares) in enumerate(zip(matrix, shares, strict=True))
    ]


def _heat(matrix: np.ndarray) -> str:
    wrong = int(matrix.sum() - np.trace(matrix))
    description = (
        f"{len(matrix)} classes, {int(matrix.sum()):,} images, {wrong:,} of them not on the diagonal."
    )
    return heat_map(matrix, key="confusion", description=description)
