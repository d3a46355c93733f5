"""Format durations, numbers, times and the states of runs for people."""

import datetime
import math
from typing import Any


def duration(seconds: float) -> str:
    """Format seconds for people: 41s, 12m 5s, 3h 20m, 1d 4h."""
    for size, unit, part, part_unit in (86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s"):
        if seconds >= size:
            return f"{int(seconds // size)}{unit} {int(seconds % size // part)}{part_unit}"
    return f"{seconds:.0f}s"


def short(value: float) -> str:
    """A number in few characters: 0.1363, 12.5, 35.2k, 5e-5."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    size = abs(value)
    if size >= 1e12 or size < 1e-3:
        return with_exponent(value, 3)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.4g}"


def utc(seconds: float) -> str:
    """A Unix time as text; empty for one that no calendar has."""
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return ""


def with_exponent(value: float, digits: int) -> str:
    """Format a number as 1.5e-7, with `digits` significant digits."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(share: float, digits: int = 1) -> str:
    """Format a share of 1, as people read it everywhere in cmtrain: 98.7 %."""
    return f"{100 * share:.{digits}f} %"


def is_part(status: dict[str, Any]) -> bool:
    """Return whether a run, by its status.json, ended as planned but not whole: by --max-steps."""
    step, total_steps = status.get("step"), status.get("total_steps")
    if not isinstance(step, int) or not isinstance(total_steps, int):
        return False
    return status.get("state") == "finished" and step < total_steps


def state_name(status: dict[str, Any]) -> str:
    """Return the state in status.json for people."""
    return "ended by --max-steps" if is_part(status) else str(status.get("state", "unknown"))


def step_place(status: dict[str, Any], step: int) -> str:
    """Return how far a run is: `step 3 of 10,800`; of the steps until --max-steps while it runs."""
    target = status.get("total_steps" if is_part(status) else "last_step") or 0
    return f"step {step:,} of {target:,}"


def workers(facts: dict[str, Any]) -> str:
    """Return what a run trains on, by `device` and `world_size`: 8 GPUs, or 2 processes on the CPU."""
    count, device = facts.get("world_size"), facts.get("device")
    many = "" if str(count) == "1" else "s" if device == "cuda" else "es"
    if device == "cuda":
        return f"{count} GPU{many}"
    return f"{count} process{many}" + (" on the CPU" if device == "cpu" else "")
