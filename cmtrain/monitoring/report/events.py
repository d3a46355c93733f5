"""What happened in a run, as a report shows it: marks over the steps, and a table."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmtrain.monitoring.report.charts import Mark, lane
from cmtrain.monitoring.units import short, utc
from cmtrain.storage.run_record import RunRecord

# What goes as planned is not shown as an event.
ROUTINE = ("checkpoint", "evaluated", "environment")

# event -> (its name, its glyph on the page). Others are shown under their own name, as notes.
KINDS = {
    "started": ("started", "start"),
    "resumed": ("resumed", "start"),
    "bad_steps": ("bad steps", "bad"),
    "bad_batch": ("bad batch", "bad"),
    "loss_spikes": ("loss spikes", "spike"),
    "rollback": ("rollback", "rollback"),
    "ema_healed": ("EMA healed", "rollback"),
    "checkpoint_failed": ("checkpoint failed", "failure"),
    "bad_file": ("bad file", "file"),
    "finished": ("finished", "end"),
    "preempted": ("preempted", "end"),
    "diverged": ("diverged", "failure"),
    "failed": ("failed", "failure"),
}
LANES = {
    "start": "starts",
    "bad": "bad steps",
    "spike": "loss spikes",
    "rollback": "rollbacks",
    "failure": "failures",
    "file": "bad files",
}
HAIRLINES = ("start", "rollback")
MAX_HAIRLINES = 40
MAX_ROWS_OF_A_KIND = 15
MAX_NEWEST = 10
MAX_NEWEST_OF_A_KIND = 3  # so that what comes often does not hide what is rare
MAX_ITEMS = 3  # of a list in an event


@dataclass(frozen=True)
class Row:
    """A line of the table. `seconds`: since the run began, or from then to now. `more`: how many of its kind follow."""

    time: str
    seconds: float
    step: int
    kind: str
    glyph: str
    details: str
    more: int


@dataclass(frozen=True)
class Lane:
    """`count`: how many events; `svg`: where they are."""

    name: str
    glyph: str
    count: int
    svg: str


def event_rows(record: RunRecord) -> list[Row]:
    """Every event worth a line, the first few of each kind."""
    events = sorted(_noteworthy(record), key=lambda event: event["time"])
    total = Counter(event["event"] for event in events)
    seen: Counter[str] = Counter()
    rows = []
    for event in events:
        kind = event["event"]
        seen[kind] += 1
        if seen[kind] > MAX_ROWS_OF_A_KIND:
            continue
        more = total[kind] - seen[kind] if seen[kind] == MAX_ROWS_OF_A_KIND else 0
        rows.append(_row(record, event, event["time"] - events[0]["time"], more))
    return rows


def newest_rows(record: RunRecord, now: float) -> list[Row]:
    """The newest events first, routine among them, a few of each kind.

    Args:
        now: Unix time.
    """
    seen: Counter[str] = Counter()
    rows = []
    for event in sorted(record.events, key=lambda event: event["time"], reverse=True):
        kind = event["event"]
        seen[kind] += 1
        if kind != "environment" and seen[kind] <= MAX_NEWEST_OF_A_KIND:
            rows.append(_row(record, event, max(0.0, now - event["time"])))
    return rows[:MAX_NEWEST]


def event_lanes(record: RunRecord, x_high: float) -> list[Lane]:
    """One lane for each kind of event there was; a start alone is none."""
    marks = _marks(record)
    lanes = []
    for glyph, name in LANES.items():
        mine = [mark for mark in marks if mark.kind == glyph]
        if len(mine) > (glyph == "start"):
            lanes.append(Lane(name, glyph, len(mine), lane(mine, x_high)))
    return lanes


def hairlines(record: RunRecord) -> list[Mark]:
    """The events that explain a kink in a curve; not the start at step 0."""
    found = [mark for mark in _marks(record) if mark.kind in HAIRLINES and mark.x > 0]
    return found[:: max(1, -(-len(found) // MAX_HAIRLINES))]


def _row(record: RunRecord, event: dict[str, Any], seconds: float, more: int = 0) -> Row:
    name, glyph = KINDS.get(event["event"], (event["event"].replace("_", " "), "note"))
    step = round(_step_of(record, event))
    return Row(utc(event["time"]), seconds, step, name, glyph, _details(event), more)


def _noteworthy(record: RunRecord) -> Iterable[dict[str, Any]]:
    return (event for event in record.events if event["event"] not in ROUTINE)


def _marks(record: RunRecord) -> list[Mark]:
    marks = []
    for event in _noteworthy(record):
        name, glyph = KINDS.get(event["event"], ("", "note"))
        step = _step_of(record, event)
        if glyph in LANES:
            marks.append(Mark(step, glyph, f"{name}, step {step:,.0f}: {_details(event)}"[:300]))
    return marks


def _step_of(record: RunRecord, event: dict[str, Any]) -> float:
    """The step an event names, else the one that was logged next before it."""
    step = event.get("step", event.get("last_step"))
    if isinstance(step, int | float) and 0 <= step < 2**63:
        return float(step)
    times = record.log.get("time", np.empty(0))
    before = record.log["step"][times <= event["time"]] if times.size else times
    return float(before.max(initial=0))


def _details(event: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {_say(value)}"
        for key, value in event.items()
        if key not in ("time", "event", "step") and value not in (None, "", [], {})
    )


def _say(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key.replace('_', ' ')} {_say(item)}" for key, item in value.items()) + ")"
    if isinstance(value, list):
        more = f" and {len(value) - MAX_ITEMS} more" if len(value) > MAX_ITEMS else ""
        return "; ".join(_say(item) for item in value[:MAX_ITEMS]) + more
    return short(value) if isinstance(value, float) else str(value)
