"""Choose and draw the curves of one run, or of several runs over each other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cmtrain.monitoring.report.charts import Chart, Scale, Series, line_chart
from cmtrain.monitoring.report.events import hairlines
from cmtrain.monitoring.report.headline import number
from cmtrain.monitoring.units import percent
from cmtrain.storage.run_record import Columns, RunRecord, last

# (column of the log, title, scale); a column that is missing or always 1 has no chart.
LOG_CHARTS: tuple[tuple[str, str, Scale], ...] = (
    ("lr", "Learning rate", "zero"), ("grad_norm", "Gradient norm", "auto"),
    ("loss_scale", "Loss scale", "log"), ("images_per_second", "Images per second", "zero"),
    ("data_wait_ratio", "Time waiting for data", "zero"),
)  # fmt: skip


class PlottedRun(NamedTuple):
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


def draw_charts(runs: Sequence[PlottedRun]) -> dict[str, list[Chart]]:
    """Draw `large_charts` and `small_charts`. A single run also shows its events and expected accuracy."""
    # By mAP if all runs are of several labels
    is_map = all(last(run.record.evaluations, "eval_map") is not None for run in runs)
    measure, losses, accuracies = "map" if is_map else "top1", list[Series](), list[Series]()
    for run in runs:
        log, known = run.record.log, run.record.evaluations
        if len(runs) > 1:
            losses += _series(run, log, "loss", run.letter)
            accuracies += _series(run, known, f"eval_{measure}", run.letter, dots=True)
            accuracies += _series(run, known, f"eval_ema_{measure}", f"{run.letter} EMA", dashed=True)
        else:
            losses += _series(run, log, "loss", "training")
            losses += _series(run, known, "eval_loss", "validation", color=1, dots=True)
            losses += _series(run, known, "eval_ema_loss", "validation, EMA", color=2, dots=True)
            accuracies += _series(run, known, f"eval_{measure}", "model", color=1, dots=True)
            accuracies += _series(run, known, f"eval_ema_{measure}", "EMA", color=2, dots=True)
    expected = number(runs[0].record.config.get("expect.top1")) if len(runs) == 1 else None
    level = None if expected is None else (expected, f"expected {percent(expected)}")
    options: dict[str, Any] = {"x_high": max(1.0, *(run.last_step for run in runs))}
    options["marks"] = hairlines(runs[0].record) if len(runs) == 1 else []
    large, small = [], []
    if losses:
        large.append(line_chart("Loss", losses, key="loss", scale="auto", height_px=200, **options))
    if accuracies:
        how = options | {"height_px": 200, "percent": True, "level": level}
        title = "Mean average precision" if is_map else "Top-1 accuracy"
        large.append(line_chart(title, accuracies, key="accuracy", **how))
    for key, title, scale in LOG_CHARTS:
        series = [line for run in runs for line in _series(run, run.record.log, key, run.letter)]
        if any((line.y[np.isfinite(line.y)] != 1).any() for line in series):
            share = key.endswith("_ratio")
            small.append(line_chart(title, series, key=key, scale=scale, percent=share, **options))
    return {"large_charts": large, "small_charts": small}


def _series(run: PlottedRun, columns: Columns, column: str, name: str, **style: Any) -> list[Series]:
    """Return the line of a column, none without a number."""
    y = columns.get(column, np.empty(0))
    return [Series(name, columns["step"], y, **{"color": run.color} | style)] if np.isfinite(y).any() else []
