"""Turn the events of a run into table rows and marks on the curves."""

from collections import Counter
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np

from cmtrain.monitoring.report.charts import Mark
from cmtrain.monitoring.units import percent, short, utc, workers
from cmtrain.storage.run_record import RunRecord
from pipelines.spec import visible

Event = dict[str, Any]
Row = dict[str, Any]

HIDDEN = ("time", "event", "step", "device", "world_size")  # have a column, or are named below
ROUTINE = ("checkpoint", "evaluated", "environment")  # go as planned: the report leaves them out

# The glyph of an event; those without one here are notes.
GLYPHS = {
    "started": "start", "resumed": "start", "bad_steps": "bad", "bad_batch": "bad", "loss_spikes": "spike",
    "rollback": "rollback", "ema_healed": "rollback", "checkpoint_failed": "failure", "diverged": "failure",
    "failed": "failure", "bad_file": "file", "finished": "end", "preempted": "end",
}  # fmt: skip
MAX_HAIRLINES = 40
MAX_ROWS_OF_A_KIND = 15
MAX_NEWEST = 10
MAX_NEWEST_OF_A_KIND = 3  # frequent events must not hide rare ones
MAX_ITEMS = 3  # of a list in an event


def event_rows(record: RunRecord) -> list[Row]:
    """Return a row for every event that is not routine, but only the first few of each kind."""
    events = [event for event in _without_repeats(record) if event["event"] not in ROUTINE]
    events.sort(key=itemgetter("time"))
    return _rows(record, events, MAX_ROWS_OF_A_KIND, lambda time: time - events[0]["time"])


def newest_rows(record: RunRecord, now: float) -> list[Row]:
    """Return rows of the newest events, the newest first, a few of each kind. `now`: Unix time."""
    events = [event for event in _without_repeats(record) if event["event"] != "environment"]
    events.sort(key=itemgetter("time"), reverse=True)
    return _rows(record, events, MAX_NEWEST_OF_A_KIND, lambda time: max(0.0, now - time))[:MAX_NEWEST]


def _rows(record: RunRecord, events: list[Event], most: int, seconds: Callable[[float], float]) -> list[Row]:
    """Return rows of the table of events, at most `most` of each kind. `seconds`: of a Unix time.
    `details`: (name, value) pairs. `more`: number of further events of this kind, which have no row.
    """
    total, seen = Counter(event["event"] for event in events), Counter[str]()
    rows = []
    for event in events:
        kind, time = event["event"], event["time"]
        seen[kind] += 1
        if seen[kind] <= most:
            row: Row = {"time": utc(time), "seconds": seconds(time), "step": round(_step_of(record, event))}
            row |= {"kind": _name(event), "glyph": GLYPHS.get(kind, "note"), "details": [*_details(event)]}
            rows.append(row | {"more": total[kind] - most if seen[kind] == most else 0})
    return rows


def hairlines(record: RunRecord) -> list[Mark]:
    """Return the events that explain a kink in a curve, without the start at step 0."""
    found: list[Mark] = []
    for event in record.events:
        glyph = GLYPHS.get(event["event"])
        if glyph in ("start", "rollback", "failure") and (step := _step_of(record, event)) > 0:
            details = ", ".join(f"{key}: {value}" for key, value in _details(event))
            found.append((step, glyph, f"{_name(event)}, step {step:,.0f}. {details}"[:300]))
    return found[:: max(1, -(-len(found) // MAX_HAIRLINES))]


def _name(event: Event) -> str:
    return event["event"].replace("_", " ").replace("ema", "EMA")


def _without_repeats(record: RunRecord) -> list[Event]:
    """Return the events, each bad file once: every start of a run has all of them again."""
    first: dict[Any, Event] = {}
    for number, event in enumerate(record.events):
        first.setdefault(str(event.get("path")) if event["event"] == "bad_file" else number, event)
    return list(first.values())


def _step_of(record: RunRecord, event: Event) -> float:
    """Return the step that an event names, else the last step that was logged before it."""
    step = event.get("step", event.get("last_step"))
    if isinstance(step, int | float) and 0 <= step < 2**63:
        return float(step)
    times = record.log.get("time", np.empty(0))
    before = record.log["step"][times <= event["time"]] if times.size else times
    return float(before.max(initial=0))


def _details(event: Event) -> Iterator[tuple[str, str]]:
    for key, value in event.items():
        if key not in HIDDEN and value not in (None, "", [], {}) and (key, value) != ("restarts", 0):
            yield key.replace("_", " "), _text(key, value)
    if "world_size" in event:
        yield "on", workers(event)


def _text(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_text(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - MAX_ITEMS} more" if len(value) > MAX_ITEMS else ""
        return "; ".join(_text(key, item) for item in value[:MAX_ITEMS]) + more
    if not isinstance(value, float):
        return visible(value)
    return percent(value) if key.endswith(("top1", "top5", "map", "_ratio")) else short(value)
