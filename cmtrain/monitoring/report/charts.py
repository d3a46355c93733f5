"""Draw line charts and heat maps as inline SVG, of 10 to 100 kB (plotly's script has 4.6 MB).

A chart has no width of its own. Its lines are in a nested <svg> that is stretched to the room there is,
while strokes keep their width. Text and marks are placed in per cent. Colours are CSS classes, which the
page defines for light and dark. The markup is in templates/*.svg.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cmtrain.monitoring import units
from cmtrain.monitoring.report.headline import Mark, hairlines, number
from cmtrain.monitoring.report.rendering import make_templates
from cmtrain.monitoring.units import percent
from cmtrain.storage.run_record import Columns, RunRecord, last

PLOT_UNITS = 1000  # width of the nested <svg>, in its own units
MAX_COLUMNS = 600  # of a thinned line: about half the pixels of a page's width
MEDIAN_COLUMNS = 200
HEAT_LEVELS, HEAT_NAME, HEAT_CELL_PX = 8, 24, 28  # shades, letters of a class name, a cell at most

Scale = Literal["linear", "zero", "log", "auto"]  # zero: linear, from 0


class Axis(NamedTuple):
    """A mapping of low..high to 0..1. `ticks`: (value, label)."""

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def place(self, values: Any) -> np.ndarray:
        """Map `values`, a number or an array."""
        values, low, high = np.asarray(values, dtype=float), self.low, self.high
        if self.log:
            with np.errstate(invalid="ignore", divide="ignore"):
                values, low, high = np.log(values), math.log(low), math.log(high)
        return (values - low) / (high - low)


class Series(NamedTuple):
    """A line. `color`: 0..7. `dots`: mark every point (for few points)."""

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    dashed: bool = False
    dots: bool = False

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (x, y) of the points whose y is finite."""
        finite = np.isfinite(self.y)
        return self.x[finite], self.y[finite]

    @property
    def css(self) -> str:
        return f"c{self.color} dashed" if self.dashed else f"c{self.color}"


class Chart(NamedTuple):
    """A drawn chart. `key`: its id on the page. `legend`: (name, CSS class, last value) of each line."""

    key: str
    title: str
    svg: str
    legend: list[tuple[str, str, str]]


def line_chart(
    title: str, series: Sequence[Series], *, key: str, x_high: float, scale: Scale = "linear",
    percent: bool = False, level: tuple[float, str] | None = None, marks: Iterable[Mark] = (),
    height_px: int = 150,
) -> Chart:  # fmt: skip
    """Draw lines over steps 0..x_high, and `marks` as hairlines over the height of the plot.
    `key`: an id on the page. `level`: a value to compare with, and its name. `percent`: of values 0..1.
    """
    x_axis = linear_axis(0, x_high, 6, exact=True)
    values = [line.y for line in series] + ([np.array([level[0]])] if level else [])
    y_axis = make_axis(np.concatenate(values) if values else np.empty(0), scale, percent=percent)
    show = units.percent if percent else units.short

    def x_at(step: float) -> str:  # in per cent of the width
        return f"{round(100 * float(x_axis.place(step)), 2):g}%"

    def y_at(value: Any) -> Any:  # in pixels
        return height_px * (1 - y_axis.place(value))

    last = [line.known()[1][-1:] for line in series]
    ends = f"{x_high:g} {y_axis.low:.17g} {y_axis.high:.17g}"
    svg = make_templates().get_template("line_chart.svg").render(
        key=key, height_px=height_px, series=series, show=show, plot_units=PLOT_UNITS,
        axes=f"{ends} {height_px} {y_axis.log:d} {percent:d}",  # by which the page's script reads values off
        x_ticks=[(x_at(value), label) for value, label in x_axis.ticks],
        y_ticks=[(_px(y_at(value)), label) for value, label in y_axis.ticks],
        level=level, level_y=level and _px(y_at(level[0])),
        ends_above=level and any((y >= level[0]).any() for y in last),
        marks=[(x_at(step), kind, text) for step, kind, text in marks],
        paths=[path for line in series for path in _paths(line, x_axis, y_at)],
    )  # fmt: skip
    shown = [show(float(y[0])) if y.size else "-" for y in last]
    legend = [(line.name, line.css, value) for line, value in zip(series, shown, strict=True)]
    return Chart(key, title, svg, legend)


def heat_map(matrix: np.ndarray, names: Sequence[str], *, key: str) -> str:
    """Draw a confusion matrix with class names; shades show shares of a row. A shade is one path: small."""
    size, images = len(matrix), int(matrix.sum())
    wrong = images - int(np.trace(matrix))
    description = f"{size} classes, {images:,} images, {wrong:,} of them not on the diagonal."
    short = [name if len(name) <= HEAT_NAME else f"{name[: HEAT_NAME - 1]}\u2026" for name in names]
    margin = max(map(len, short)) / 2 + 1  # in cells, which are as high as a letter and twice as wide
    box = f"{-margin:g} {-margin:g} {size + margin:g} {size + margin:g}"
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # The root makes a few errors in a hundred visible.
    level = np.ceil(np.sqrt(shares) * HEAT_LEVELS).astype(int)
    diagonal, shades = np.eye(size, dtype=bool), []
    for right, value in itertools.product((True, False), range(1, HEAT_LEVELS + 1)):
        if cells := np.argwhere((level == value) & (diagonal == right)).tolist():
            path = "".join(f"M{x} {y}h1v1h-1z" for y, x in cells)
            shades.append((path, "right" if right else "wrong", value / HEAT_LEVELS))
    return make_templates().get_template("heat_map.svg").render(
        key=key, description=description, box=box, width_px=round(HEAT_CELL_PX * (size + margin)),
        names=list(zip(names, short, strict=True)), shades=shades,
    )  # fmt: skip


def thin(x: np.ndarray, y: np.ndarray, columns: int) -> np.ndarray:
    """Return indices of the points to draw: the lowest and the highest point of each of `columns` stripes.
    So a spike of one step in half a million stays visible. `x` ascends, `y` may hold NaN; both are (N,).
    """
    if len(x) <= 2 * columns:
        return np.arange(len(x))
    stripes = _stripes(x, columns)
    starts = np.flatnonzero(np.diff(stripes, prepend=-1))
    # NaN sorts last: a stripe without a number keeps a NaN, so a hole stays a hole.
    lowest, highest = (np.lexsort((values, stripes))[starts] for values in (y, -y))
    return np.unique([0, *lowest, *highest, len(x) - 1])


def medians(x: np.ndarray, y: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the median (x, y) of each of `columns` stripes: the trend, which one spike does not bend."""
    starts = np.flatnonzero(np.diff(_stripes(x, columns), prepend=-1))[1:]
    pieces = [piece[np.isfinite(piece)] for piece in np.split(y, starts)]
    trend = np.array([np.median(piece) if piece.size else np.nan for piece in pieces])
    return np.array([piece.mean() for piece in np.split(x, starts)]), trend


def _stripes(x: np.ndarray, columns: int) -> np.ndarray:
    """Return the stripe of each point, of `columns` stripes of equal width; `x` ascends."""
    return np.minimum(((x - x[0]) / max(x[-1] - x[0], 1) * columns).astype(int), columns - 1)


def _paths(line: Series, x_axis: Axis, y_at: Callable[[Any], Any]) -> Iterator[tuple[str, str]]:
    """Yield path and class of a line; of one with many points, of its band and then of its medians."""
    kept = thin(line.x, line.y, MAX_COLUMNS)
    x, y = line.x, line.y
    if len(kept) < len(x):
        yield _path(PLOT_UNITS * x_axis.place(x[kept]), y_at(y[kept])), f"band c{line.color}"
        x, y = medians(x, y, MEDIAN_COLUMNS)
    x, y = PLOT_UNITS * x_axis.place(x), y_at(y)
    yield _path(x, y), f"line {line.css}"
    if line.dots:
        # A stroke of no length with round caps is a dot that stays round however the plot is stretched.
        dots = (f"M{_px(a)} {_px(b)}h0" for a, b in zip(x, y, strict=True) if math.isfinite(b))
        yield "".join(dots), f"dots c{line.color}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Return straight lines through the points. NaN interrupts them; a point on its own becomes a dot."""
    texts = [f"{_px(a)} {_px(b)}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    # Each stretch of finite points begins where isfinite changes to true, and ends where it changes back.
    stretches = np.flatnonzero(np.diff(np.isfinite(y), prepend=False, append=False)).reshape(-1, 2).tolist()
    paths = ["M" + "L".join(texts[start:end]) for start, end in stretches]
    return "".join(path if "L" in path else f"{path}h0" for path in paths)


def _px(value: float) -> str:
    return f"{round(float(value), 1):g}"


# Axes, and the round numbers written beside them


def make_axis(values: np.ndarray, scale: Scale, *, percent: bool = False) -> Axis:
    """Return the axis of all finite (if log, positive) `values`; auto is log if the largest is far above."""
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if scale == "auto":
        wide = positive.size == values.size > 0 and values.max() > 20 * np.median(values)
        scale = "log" if wide else "linear"
    if scale == "log" and positive.size:
        return log_axis(float(positive.min()), float(positive.max()))
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    return linear_axis(0.0 if scale == "zero" else low, high, 4, percent=percent)


def linear_axis(low: float, high: float, count: int, *, percent: bool = False, exact: bool = False) -> Axis:
    """Return an axis with about `count` ticks, one below `low` and one above `high` unless `exact`."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        high = low + room
        low = low - room if low else low
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    slack = step * 1e-6
    ticks = [i * step for i in range(math.floor((low + slack) / step), math.ceil((high - slack) / step) + 1)]
    if exact:
        ticks = [tick for tick in ticks if low - slack <= tick <= high + slack]
    else:
        low, high = ticks[0], ticks[-1]
    tiny = max(abs(tick) for tick in ticks) < 1e-3
    return Axis(low, high, log=False, ticks=[(tick, _tick_label(tick, percent, tiny)) for tick in ticks])


def log_axis(low: float, high: float) -> Axis:
    """Return an axis a little beyond low..high, with ticks at powers of ten and, if few, between."""
    room = max((high / low) ** 0.04, 1.05)
    low, high = low / room, high * room
    first, final = math.ceil(math.log10(low)), math.floor(math.log10(high))
    stride = max(1, math.ceil((final - first + 1) / 6))
    ticks = [10.0**e for e in range(first, final + 1) if e % stride == 0]
    for factors in ((1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        denser = [factor * 10.0**e for e in range(first - 1, final + 1) for factor in factors]
        denser = [tick for tick in denser if low <= tick <= high]
        if len(ticks) < 3 and len(denser) <= 6:
            ticks = denser
    return Axis(low, high, log=True, ticks=[(tick, _tick_label(tick, tiny=tick < 1e-3)) for tick in ticks])


def _tick_label(value: float, percent: bool = False, tiny: bool = False) -> str:
    """Write a round number in few characters; a `tiny` one with an exponent."""
    if percent:
        return f"{round(value * 100, 6):g} %"
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e12:
            return f"{round(value / unit, 6):g}{letter}"
    return units.with_exponent(value, 5) if size and (tiny or size >= 1e12) else f"{round(value, 9):g}"


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
