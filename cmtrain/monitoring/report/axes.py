"""Axes: what maps values to a plot, and the round numbers written beside it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cmtrain.monitoring.units import with_exponent

_SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)

Scale = Literal["linear", "log", "log2", "auto"]


@dataclass(frozen=True)
class Axis:
    """What maps values to 0..1. `ticks`: (value, label)."""

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def place(self, values: Any) -> np.ndarray:
        values, low, high = np.asarray(values, dtype=float), self.low, self.high
        if self.log:
            with np.errstate(invalid="ignore", divide="ignore"):
                values, low, high = np.log(values), math.log(low), math.log(high)
        return (values - low) / (high - low)


def make_axis(values: np.ndarray, scale: Scale, *, percent: bool = False, zero: bool = False) -> Axis:
    """The axis that shows all finite `values`; on a log axis the positive ones."""
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if scale == "auto":
        wide = positive.size == values.size > 0 and values.max() > 20 * np.median(values)
        scale = "log" if wide else "linear"
    if scale in ("log", "log2") and positive.size:
        return log_axis(float(positive.min()), float(positive.max()), base=2 if scale == "log2" else 10)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    return linear_axis(0.0 if zero else low, high, 4, percent=percent)


def linear_axis(low: float, high: float, count: int, *, percent: bool = False, exact: bool = False) -> Axis:
    """From tick to tick, around low..high; `exact` ends at low and high instead."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room * (low != 0), high + room
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    slack = step * 1e-6
    first, final = math.floor((low + slack) / step), math.ceil((high - slack) / step)
    ticks = [index * step for index in range(first, final + 1)]
    if exact:
        ticks = [tick for tick in ticks if low - slack <= tick <= high + slack]
    else:
        low, high = ticks[0], ticks[-1]
    tiny = max(abs(tick) for tick in ticks) < 1e-3
    return Axis(low, high, log=False, ticks=[(tick, _tick_label(tick, percent, tiny)) for tick in ticks])


def log_axis(low: float, high: float, *, base: int) -> Axis:
    """A little beyond low..high; ticks at powers of `base`, at 10 also between them where there is room."""
    room = max((high / low) ** 0.04, 1.05)
    low, high = low / room, high * room
    first, final = math.ceil(math.log(low, base)), math.floor(math.log(high, base))
    stride = max(1, math.ceil((final - first + 1) / 6))
    powers = [exponent for exponent in range(first, final + 1) if exponent % stride == 0]
    if base == 2:
        return Axis(
            low, high, log=True, ticks=[(2.0**e, f"2{str(e).translate(_SUPERSCRIPT)}") for e in powers]
        )
    ticks = [10.0**e for e in powers]
    for factors in ((1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        denser = [
            f * 10.0**e for e in range(first - 1, final + 1) for f in factors if low <= f * 10.0**e <= high
        ]
        if len(ticks) < 3 and len(denser) <= 6:
            ticks = denser
    return Axis(
        low,
        high,
        log=True,
        ticks=[(tick, _tick_label(tick, percent=False, tiny=tick < 1e-3)) for tick in ticks],
    )


def _tick_label(value: float, percent: bool, tiny: bool) -> str:
    """A round number in few characters; `tiny` ones with an exponent."""
    if percent:
        return f"{round(value * 100, 6):g}%"
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e12:
            return f"{round(value / unit, 6):g}{letter}"
    return with_exponent(value, 5) if size and (tiny or size >= 1e12) else f"{round(value, 9):g}"
