"""Choose and draw the curves of one run, or of several runs over each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmtrain.monitoring.report.axes import Scale
from cmtrain.monitoring.report.charts import Chart, Mark, Series, line_chart
from cmtrain.monitoring.report.events import hairlines
from cmtrain.monitoring.report.headline import number
from cmtrain.monitoring.units import percent
from cmtrain.storage.run_record import Columns, RunRecord, last

# (column of the log, title, scale, options); a column that is missing or always 1 has no chart.
LOG_CHARTS: tuple[tuple[str, str, Scale, dict[str, Any]], ...] = (
    ("lr", "Learning rate", "linear", {"zero": True}),
    ("grad_norm", "Gradient norm", "auto", {}),
    ("loss_scale", "Loss scale", "log2", {}),
    ("images_per_second", "Images per second", "linear", {"zero": True}),
    ("data_wait_ratio", "Time waiting for data", "linear", {"zero": True, "percent": True}),
)


@dataclass(frozen=True)
class PlottedRun:
    """A run, with the letter and colour of its lines where several runs share a chart."""

    record: RunRecord
    letter: str = ""
    color: int = 0

    @property
    def last_step(self) -> float:
        """The last step that is known to be done."""
        record = self.record
        steps = last(record.log, "step"), last(record.evaluations, "step"), number(record.status.get("step"))
        return max([0.0, *(step for step in steps if step is not None)])


def large_charts(runs: Sequence[PlottedRun]) -> list[Chart]:
    """Draw loss and accuracy. A single run also shows its events and the expected accuracy."""
    expected = number(runs[0].record.config.get("expect.top1")) if len(runs) == 1 else None
    level = None if expected is None else (expected, f"expected {percent(expected)}")
    options: dict[str, Any] = {"x_high": x_high(runs), "marks": _marks(runs), "height_px": 200}
    losses, accuracies, charts = _losses(runs), _accuracies(runs), []
    if losses:
        charts.append(line_chart("Loss", losses, key="loss", scale="auto", **options))
    if accuracies:
        options |= {"percent": True, "level": level}
        charts.append(line_chart("Top-1 accuracy", accuracies, key="accuracy", **options))
    return charts


def small_charts(runs: Sequence[PlottedRun]) -> list[Chart]:
    """Draw learning rate, norms and speed, as far as they are known and not constantly 1."""
    charts = []
    for column, title, scale, options in LOG_CHARTS:
        series = _known([_series(run, run.record.log, column, run.letter) for run in runs])
        if any((line.y[np.isfinite(line.y)] != 1).any() for line in series):
            place: dict[str, Any] = {"x_high": x_high(runs), "marks": _marks(runs)}
            charts.append(line_chart(title, series, key=column, scale=scale, **place, **options))
    return charts


def x_high(runs: Sequence[PlottedRun]) -> float:
    """Return the step at the right end of the curves."""
    return max(1.0, *(run.last_step for run in runs))


def _marks(runs: Sequence[PlottedRun]) -> list[Mark]:
    return hairlines(runs[0].record) if len(runs) == 1 else []


def _losses(runs: Sequence[PlottedRun]) -> list[Series]:
    if len(runs) > 1:
        return _known([_series(run, run.record.log, "loss", run.letter) for run in runs])
    run, known = runs[0], runs[0].record.evaluations
    return _known([
        _series(run, run.record.log, "loss", "training"),
        _series(run, known, "eval_loss", "validation", color=1, dots=True),
        _series(run, known, "eval_ema_loss", "validation, EMA", color=2, dots=True),
    ])  # fmt: skip


def _accuracies(runs: Sequence[PlottedRun]) -> list[Series]:
    lines = []
    for run in runs:
        known = run.record.evaluations
        if len(runs) == 1:
            lines += [_series(run, known, "eval_top1", "model", color=1, dots=True)]
            lines += [_series(run, known, "eval_ema_top1", "EMA", color=2, dots=True)]
        else:
            lines += [_series(run, known, "eval_top1", run.letter, dots=True)]
            lines += [_series(run, known, "eval_ema_top1", f"{run.letter} EMA", dashed=True)]
    return _known(lines)


def _known(lines: Sequence[Series]) -> list[Series]:
    return [line for line in lines if np.isfinite(line.y).any()]


def _series(
    run: PlottedRun, columns: Columns, column: str, name: str, *, color: int | None = None, **style: Any
) -> Series:
    y = columns.get(column, np.full(len(columns["step"]), np.nan))
    label = "" if style.get("dashed") else run.letter
    return Series(
        name, columns["step"], y, color=run.color if color is None else color, label=label, **style
    )
