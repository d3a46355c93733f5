"""The head of a report: the run in a line, and its figures."""

from typing import Any

from cmtrain.config.strict_yaml import emit
from cmtrain.monitoring.console import duration
from cmtrain.monitoring.report.axes import short
from cmtrain.monitoring.report.figures import Times
from cmtrain.storage.run_record import RunRecord, is_number, last


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
    found.append(("Steps", f"{last_step:,.0f}", f"of {target:,.0f}" if target and target > last_step else images))
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
    merged = {key: value for event in facts for key, value in event.items() if key not in ("time", "event", "step")}
    return {str(key): str(value) for key, value in merged.items()}


def number(value: Any) -> float | None:
    """`value`, as read from JSON or YAML, if it is a number."""
    return float(value) if is_number(value) else None
