"""Compute the numbers at the top of a report, where the time of the run went, and its events as rows.

Times cover all processes of the run, kills and resumes included, as far as its folder has a record.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from cmtrain.monitoring.units import duration, percent, short, utc, workers
from cmtrain.storage.run_record import RunRecord, is_number, last
from pipelines.spec import visible

Headline = Iterable[tuple[str, str, str]]  # name, value, remark


class Share(NamedTuple):
    """A part of a run's time. `kind` is its colour on the page."""

    name: str
    kind: str
    seconds: float


class Times(NamedTuple):
    """The times of a run. Both means are over the logged steps, without evaluations and checkpoints."""

    begin: float  # Unix time of the first record
    end: float  # and of the last one
    active_seconds: float  # in which a process ran
    num_starts: int
    images: float  # trained on, as far as the log goes
    images_per_second: float | None  # None without a log, as the next
    data_wait_ratio: float | None
    shares: list[Share]  # of active_seconds, in the order of a step


def measure_times(record: RunRecord) -> Times:
    """Sum up the time of a run. Steps that a kill undid count as "start and the rest"."""
    events = [float(event["time"]) for event in record.events]
    if is_number(updated := record.status.get("updated", "")):
        events.append(float(updated))
    seen = np.concatenate([events, record.log.get("time", np.empty(0))])
    seen = np.sort(seen[np.isfinite(seen)]) if np.isfinite(seen).any() else np.zeros(1)
    starts = sorted(event["time"] for event in record.events if event["event"] in ("started", "resumed"))
    starts = [seen[0], *starts[1:]]
    ends = [seen[seen < start].max(initial=seen[0]) for start in starts[1:]] + [seen[-1]]
    active_seconds = float(sum(end - start for start, end in zip(starts, ends, strict=True)))

    # Images and seconds of training between each log point and the one before it
    batch_size, num_images, seconds = record.config.get("train.global_batch_size"), np.zeros(0), np.zeros(0)
    speeds = record.log.get("images_per_second", np.empty(0))
    if isinstance(batch_size, int) and speeds.size:
        num_images = np.diff(record.log["step"], prepend=0) * batch_size
        seconds = np.divide(num_images, speeds, out=np.zeros_like(num_images), where=speeds > 0)
    shares = _shares(record, seconds)
    total = sum(share.seconds for share in shares)
    if shares and active_seconds > total:
        shares.append(Share("start and the rest", "rest", active_seconds - total))
    begin, end, images, trained = map(float, (seen[0], seen[-1], num_images.sum(), seconds.sum()))
    speed = images / trained if trained else None
    waited = sum(share.seconds for share in shares if share.kind == "data_wait")
    wait_ratio = waited / trained if trained else None
    return Times(begin, end, active_seconds, len(starts), images, speed, wait_ratio, shares)


def _shares(record: RunRecord, seconds: np.ndarray) -> list[Share]:
    """Divide `seconds` among the phases: a log column `<phase>_ratio` is that phase's share of the step."""
    if not seconds.sum():
        return []
    phases = [name for name in record.log if name.endswith("_ratio") and np.isfinite(record.log[name]).any()]
    shares = []
    for name in sorted(phases, key=lambda name: name != "data_wait_ratio"):
        phase = name.removesuffix("_ratio")
        total = float(np.nansum(record.log[name] * seconds))
        shares.append(Share("waiting for data" if phase == "data_wait" else phase, phase, total))
    step = max(0.0, float(seconds.sum()) - sum(share.seconds for share in shares))
    shares.append(Share("rest of the step" if len(phases) > 1 else "training step", "step", step))
    for kind, name in (("evaluated", "evaluation"), ("checkpoint", "checkpoints")):
        spent: list[Any] = [event.get("seconds") for event in record.events if event["event"] == kind]
        if known := [float(value) for value in spent if is_number(value)]:
            shares.append(Share(name, kind, sum(known)))
    return shares


def headline(record: RunRecord, times: Times, last_step: float) -> Headline:
    """Yield the numbers at the top of the report, without those that are not known."""
    status = record.status
    # Accuracy.
    for key, name in (("map", "mAP"), ("top1", "Top-1"), ("top5", "Top-5")):
        accuracy, ema = _accuracy(record, key), _accuracy(record, f"ema_{key}")
        if accuracy is not None:
            expected = _expectation(record, max(accuracy, ema or 0.0)) if key == "top1" else ""
            yield name, percent(accuracy), expected
        if ema is not None:
            yield f"{name}, EMA", percent(ema), ""
    yield from best_top1(status)
    # Steps and time.
    target = number(status.get("last_step"))
    remark = f"{short(times.images)} images" if times.images else ""
    if target and target > last_step:
        remark = f"of {target:,.0f}"
    yield "Steps", f"{last_step:,.0f}", remark
    starts = f"{times.num_starts} starts, {duration(times.end - times.begin)} from first to last"
    yield "Duration", duration(times.active_seconds), starts if times.num_starts > 1 else ""
    if times.images_per_second:
        remark = f"{percent(times.data_wait_ratio or 0.0, 0)} waiting for data"
        yield "Images per second", f"{times.images_per_second:,.0f}", remark
    # Trouble.
    rollbacks = sum(event["event"] == "rollback" for event in record.events)
    if (bad_steps := last(record.log, "bad_steps")) is not None:
        remark = "undone" if record.config.get("guard.enabled", True) else "not undone"
        if rollbacks:
            remark = "1 rollback" if rollbacks == 1 else f"{rollbacks} rollbacks"
        yield "Bad steps", f"{bad_steps:,.0f}", remark if bad_steps else ""


def best_top1(status: dict[str, Any]) -> Headline:
    best, step = number(status.get("best_top1")), number(status.get("best_step"))
    return [] if best is None or step is None else [("Best top-1", percent(best), f"at step {step:,.0f}")]


def _accuracy(record: RunRecord, key: str) -> float | None:
    """Return `key` of the newest evaluation: from summary.csv, else from the result of a finished run."""
    logged = last(record.evaluations, f"eval_{key}")
    result = record.status.get("result") or {}
    return number(result.get(key)) if logged is None else logged


def _expectation(record: RunRecord, top1: float) -> str:
    expected = number(record.config.get("expect.top1"))
    if expected is None:
        return ""
    if record.status.get("state") != "finished":
        return f"{percent(expected)} expected"
    reached = top1 >= expected - (number(record.config.get("expect.tolerance")) or 0.0)
    return f"{percent(expected)} expected: {'reached' if reached else 'missed'}"


def environment_of(record: RunRecord) -> dict[str, str]:
    """Return model, hardware and versions of the newest process of the run, by name."""
    found, hidden = dict[str, str](), ("time", "event", "step", "restarts")
    for event in record.events:
        if event["event"] in ("started", "resumed", "environment"):
            found |= {key: str(value) for key, value in event.items() if key not in hidden}
    if "world_size" in found:
        found["trained on"] = workers(found)
    return {key: value for key, value in found.items() if key not in ("device", "world_size")}


def number(value: Any) -> float | None:
    """Return `value`, as read from JSON or YAML, if it is a number."""
    return float(value) if is_number(value) else None


Mark = tuple[float, str, str]  # an event: its step, its kind, by which it has a colour, and a text
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
