"""Where the time of a run went, as far as its folder knows: over all of its processes, kills and resumes included."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cmtrain.config.strict_yaml import emit
from cmtrain.monitoring.units import duration, short
from cmtrain.storage.run_record import RunRecord, is_number, last

PHASE_NAMES = {"data_wait": "waiting for data"}


@dataclass(frozen=True)
class Share:
    """A part of a run's time. `kind` is its colour on the page."""

    name: str
    kind: str
    seconds: float


@dataclass(frozen=True)
class Times:
    """`begin`, `end`: Unix times of the first and the last sign of life.

    `active_seconds`: in which one of the `num_processes` was there. `images`: trained on, as far as the log goes.
    `images_per_second`, `data_wait_ratio`: means over the logged steps, evaluations and checkpoints left out; None
    without a log. `shares`: of `active_seconds`, in the order of a step.
    """

    begin: float
    end: float
    active_seconds: float
    num_processes: int
    images: float
    images_per_second: float | None
    data_wait_ratio: float | None
    shares: list[Share]


def measure_times(record: RunRecord) -> Times:
    """Sum up. Steps that were done twice, after a kill, are in the log once; their first time is among `the rest`."""
    told = [float(event["time"]) for event in record.events]
    if is_number(record.status.get("updated")):
        told.append(float(record.status["updated"]))
    signs = np.concatenate([told, record.log.get("time", np.empty(0))])
    signs = np.sort(signs[np.isfinite(signs)])
    if not signs.size:
        signs = np.zeros(1)
    begins = sorted(event["time"] for event in record.events if event["event"] in ("started", "resumed"))
    begins = [signs[0], *begins[1:]]
    lasts = [signs[signs < begin].max(initial=signs[0]) for begin in begins[1:]] + [signs[-1]]
    active_seconds = sum(last - begin for begin, last in zip(begins, lasts, strict=True))

    num_images, seconds = _windows(record)
    shares = _shares(record, seconds)
    total = sum(share.seconds for share in shares)
    if shares and active_seconds > total:
        shares.append(Share("start and the rest", "rest", active_seconds - total))
    trained = float(seconds.sum())
    return Times(
        begin=float(signs[0]),
        end=float(signs[-1]),
        active_seconds=float(active_seconds),
        num_processes=len(begins),
        images=float(num_images.sum()),
        images_per_second=float(num_images.sum()) / trained if trained else None,
        data_wait_ratio=_seconds_of(record, "data_wait_ratio", seconds) / trained if trained else None,
        shares=shares,
    )


def _windows(record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Images and seconds of training from each log point back to the one before."""
    batch_size = record.config.get("train.global_batch_size")
    images_per_second = record.log.get("images_per_second", np.empty(0))
    if not isinstance(batch_size, int) or not images_per_second.size:
        return np.zeros(0), np.zeros(0)
    num_images = np.diff(record.log["step"], prepend=0) * batch_size
    known = images_per_second > 0
    return num_images, np.divide(num_images, images_per_second, out=np.zeros_like(num_images), where=known)


def _shares(record: RunRecord, seconds: np.ndarray) -> list[Share]:
    """A column of the log that is called `<phase>_ratio` is a phase's share of the step."""
    if not seconds.sum():
        return []
    phases = [name for name in record.log if name.endswith("_ratio") and np.isfinite(record.log[name]).any()]
    shares = []
    for name in sorted(phases, key=lambda name: name != "data_wait_ratio"):
        phase = name.removesuffix("_ratio")
        shares.append(Share(PHASE_NAMES.get(phase, phase), phase, _seconds_of(record, name, seconds)))
    step = max(0.0, float(seconds.sum()) - sum(share.seconds for share in shares))
    shares.append(Share("rest of the step" if len(phases) > 1 else "training step", "step", step))
    for event, name in (("evaluated", "evaluation"), ("checkpoint", "checkpoints")):
        told: list[Any] = [entry.get("seconds") for entry in record.events if entry["event"] == event]
        if known := [float(seconds) for seconds in told if is_number(seconds)]:
            shares.append(Share(name, event, sum(known)))
    return shares


def _seconds_of(record: RunRecord, column: str, seconds: np.ndarray) -> float:
    ratio = record.log.get(column, np.zeros(len(seconds)))
    return float(np.nansum(ratio * seconds))


def summary(record: RunRecord) -> str:
    """The run in a line: what learned what, at which size, on what."""
    config, facts = record.config, environment_of(record)
    said = [config.get("model.name"), config.get("data.root")]
    if "data.image_px" in config:
        said.append(f"{emit(config['data.image_px'])} px")
    said += [facts.get("precision"), f"{facts.get('world_size', '?')} x {facts.get('device', '?')}"]
    return " \u00b7 ".join(str(part) for part in said if part)


def figures(record: RunRecord, times: Times, last_step: float) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the headline; what is not known is not there."""
    status = record.status
    top1, ema_top1 = _accuracy(record, "top1"), _accuracy(record, "ema_top1")
    found = []
    if top1 is not None:
        found.append(("Top-1", f"{top1:.2%}", _expectation(record, max(top1, ema_top1 or 0.0))))
    if ema_top1 is not None:
        found.append(("Top-1, EMA", f"{ema_top1:.2%}", ""))
    top5, ema_top5 = _accuracy(record, "top5"), _accuracy(record, "ema_top5")
    if top5 is not None:
        found.append(("Top-5", f"{top5:.2%}", f"EMA {ema_top5:.2%}" if ema_top5 is not None else ""))
    best, best_step = number(status.get("best_top1")), number(status.get("best_step"))
    if best is not None and best_step is not None:
        found.append(("Best top-1", f"{best:.2%}", f"at step {best_step:,.0f}"))
    target = number(status.get("last_step"))
    images = f"{short(times.images)} images" if times.images else ""
    found.append(
        ("Steps", f"{last_step:,.0f}", f"of {target:,.0f}" if target and target > last_step else images)
    )
    processes = f"{times.num_processes} processes, {duration(times.end - times.begin)} from first to last"
    found.append(("Duration", duration(times.active_seconds), processes if times.num_processes > 1 else ""))
    if times.images_per_second:
        waited = f"{times.data_wait_ratio:.0%} waiting for data" if times.data_wait_ratio is not None else ""
        found.append(("Images per second", f"{times.images_per_second:,.0f}", waited))
    rollbacks = sum(event["event"] == "rollback" for event in record.events)
    if (bad_steps := last(record.log, "bad_steps")) is not None:
        undone = "undone" if record.config.get("guard.enabled", True) else "not undone"
        answer = f"{rollbacks} rollback{'s' * (rollbacks > 1)}" if rollbacks else undone
        found.append(("Bad steps", f"{bad_steps:,.0f}", answer if bad_steps else ""))
    return found


def _accuracy(record: RunRecord, key: str) -> float | None:
    """Of the newest evaluation: from summary.csv, else from the result of a finished run."""
    logged = last(record.evaluations, f"eval_{key}")
    result = record.status.get("result")
    return logged if logged is not None else number(result.get(key)) if isinstance(result, dict) else None


def _expectation(record: RunRecord, top1: float) -> str:
    expected = number(record.config.get("expect.top1"))
    if expected is None:
        return ""
    if record.status.get("state") != "finished":
        return f"expected: {100 * expected:.4g}%"
    reached = top1 >= expected - (number(record.config.get("expect.tolerance")) or 0.0)
    return f"{'reached' if reached else 'missed'} {100 * expected:.4g}%"


def environment_of(record: RunRecord) -> dict[str, str]:
    """Where the newest process of the run ran, by name."""
    facts = [event for event in record.events if event["event"] in ("started", "resumed", "environment")]
    merged = {
        key: value for event in facts for key, value in event.items() if key not in ("time", "event", "step")
    }
    return {str(key): str(value) for key, value in merged.items()}


def number(value: Any) -> float | None:
    """`value`, as read from JSON or YAML, if it is a number."""
    return float(value) if is_number(value) else None
