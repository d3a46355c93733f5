"""The curves of one run, or of several over each other, as a report and the live page show them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmtrain.monitoring.report.axes import Scale
from cmtrain.monitoring.report.charts import Chart, Mark, Series, line_chart
from cmtrain.monitoring.report.events import hairlines
from cmtrain.monitoring.report.figures import number
from cmtrain.storage.run_record import Columns, RunRecord, last

# (column of the log, title, scale, options); a column that is not there or always 1 has no chart.
LOG_CHARTS: tuple[tuple[str, str, Scale, dict[str, Any]], ...] = (
    ("lr", "Learning rate", "linear", {"zero": True}),
    ("grad_norm", "Gradient norm", "auto", {}),
    ("loss_scale", "Loss scale", "log2", {}),
    ("images_per_second", "Images per second", "linear", {"zero": True}),
    ("data_wait_ratio", "Time waiting for data", "linear", {"zero": True, "percent": True}),
)


@dataclass(frozen=True)
class Run:
    """A run as curves show it. `letter`, `color`: of its lines, where there are several runs."""

    record: RunRecord
    letter: str = ""
    color: int = 0

    @property
    def last_step(self) -> float:
        """The last step that is known to be done."""
        record = self.record
        steps = last(record.log, "step"), last(record.evaluations, "step"), number(record.status.get("step"))
        return max([0.0, *(step for step in steps if step is not None)])


def large_charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss and accuracy, of one run with its events, or of several runs over each other."""
    expected = number(runs[0].record.config.get("expect.top1")) if len(runs) == 1 else None
    level = None if expected is None else (expected, f"expected {100 * expected:.4g}%")
    look: dict[str, Any] = {"x_high": x_high(runs), "marks": _marks(runs), "height_px": 200}
    losses, accuracies = _losses(runs), _accuracies(runs)
    charts = [line_chart("Loss", losses, key="loss", scale="auto", **look)] if losses else []
    if accuracies:
        charts.append(
            line_chart("Top-1 accuracy", accuracies, key="accuracy", percent=True, level=level, **look)
        )
    return charts


def small_charts(runs: Sequence[Run]) -> list[Chart]:
    """Learning rate, norms and speed, as far as they are known and say something."""
    charts = []
    for column, title, scale, options in LOG_CHARTS:
        series = _known([_series(run, run.record.log, column, name=run.letter) for run in runs])
        if any((line.y[np.isfinite(line.y)] != 1).any() for line in series):
            look: dict[str, Any] = {"x_high": x_high(runs), "marks": _marks(runs)}
            charts.append(line_chart(title, series, key=column, scale=scale, **look, **options))
    return charts


def x_high(runs: Sequence[Run]) -> float:
    """The step at the right end of the curves."""
    return max(1.0, *(run.last_step for run in runs))


def _marks(runs: Sequence[Run]) -> list[Mark]:
    return hairlines(runs[0].record) if len(runs) == 1 else []


def _losses(runs: Sequence[Run]) -> list[Series]:
    if len(runs) > 1:
        return _known([_series(run, run.record.log, "loss", name=run.letter) for run in runs])
    run = runs[0]
    lines = [_series(run, run.record.log, "loss", name="training")]
    lines += [_series(run, run.record.evaluations, "eval_loss", name="validation", color=1, dots=True)]
    lines += [
        _series(run, run.record.evaluations, "eval_ema_loss", name="validation, EMA", color=2, dots=True)
    ]
    return _known(lines)


def _accuracies(runs: Sequence[Run]) -> list[Series]:
    lines = []
    for run in runs:
        known = run.record.evaluations
        if len(runs) == 1:
            lines += [_series(run, known, "eval_top1", name="model", color=1, dots=True)]
            lines += [_series(run, known, "eval_ema_top1", name="EMA", color=2, dots=True)]
        else:
            lines += [_series(run, known, "eval_top1", name=run.letter, dots=True)]
            lines += [_series(run, known, "eval_ema_top1", name=f"{run.letter} EMA", dashed=True)]
    return _known(lines)


def _known(lines: Sequence[Series]) -> list[Series]:
    return [line for line in lines if np.isfinite(line.y).any()]


def _series(
    run: Run, columns: Columns, column: str, *, name: str, color: int | None = None, **look: Any
) -> Series:
    y = columns.get(column, np.full(len(columns["step"]), np.nan))
    label = "" if look.get("dashed") else run.letter
    return Series(name, columns["step"], y, color=run.color if color is None else color, label=label, **look)
