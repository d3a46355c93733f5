"""Map values to a plot, and choose the round numbers written beside it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cmtrain.monitoring.units import with_exponent

_SUPERSCRIPT = str.maketrans("-0123456789", "\u207b\u2070\xb9\xb2\xb3\u2074\u2075\u2076\u2077\u2078\u2079")

Scale = Literal["linear", "zero", "log", "log2", "auto"]  # zero: linear, from 0


@dataclass(frozen=True)
class Axis:
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


def make_axis(values: np.ndarray, scale: Scale, *, percent: bool = False) -> Axis:
    """Return the axis of all finite (if log, positive) `values`; auto is log if the largest is far above."""
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if scale == "auto":
        wide = positive.size == values.size > 0 and values.max() > 20 * np.median(values)
        scale = "log" if wide else "linear"
    if scale in ("log", "log2") and positive.size:
        return log_axis(float(positive.min()), float(positive.max()), base=2 if scale == "log2" else 10)
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


def log_axis(low: float, high: float, *, base: int) -> Axis:
    """Return an axis a little beyond low..high, with ticks at powers of `base` and, if few, between."""
    room = max((high / low) ** 0.04, 1.05)
    low, high = low / room, high * room
    first, final = math.ceil(math.log(low, base)), math.floor(math.log(high, base))
    stride = max(1, math.ceil((final - first + 1) / 6))
    powers = [exponent for exponent in range(first, final + 1) if exponent % stride == 0]
    if base == 2:
        labels = [(2.0**e, f"2{str(e).translate(_SUPERSCRIPT)}") for e in powers]
        return Axis(low, high, log=True, ticks=labels)
    ticks = [10.0**e for e in powers]
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
    return with_exponent(value, 5) if size and (tiny or size >= 1e12) else f"{round(value, 9):g}"
