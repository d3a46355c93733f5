"""Make the live page of a run, at / of the metrics port: progress, curves and the newest events.

It refreshes itself while its tab is in front. It is made on request, on the server's thread, at most once a
second for all clients, of what the process knows and a bounded sample of the run folder. That takes 7 to 16
ms of CPU time after 200 log points or after 200,000. The template is report/templates/live.html.
"""

import time
from pathlib import Path
from typing import Any

from cmtrain.monitoring.http_server import Page
from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.monitoring.report.curves import PlottedRun, draw_charts
from cmtrain.monitoring.report.events import newest_rows
from cmtrain.monitoring.report.headline import Headline, best_top1, number
from cmtrain.monitoring.report.page import TONES
from cmtrain.monitoring.report.rendering import render_page
from cmtrain.monitoring.units import duration, is_part, percent, short, state_name
from cmtrain.storage.run_folder import REPORT_NAME
from cmtrain.storage.run_record import read_sample

HTML = "text/html; charset=utf-8"
STATES = {"setup": "setting up", "train": "training", "evaluate": "evaluating", "checkpoint": "saving"}


def make_live_page(
    metrics: TrainMetrics, status: dict[str, Any], now: dict[str, Any], run_path: Path, since: float
) -> Page:
    """Return the page of one rank. Rank 0 shows the run; other ranks show themselves.
    `status`, `now`: what this rank knows of the run, and is doing; see routes.make_pages. Only rank 0 reads
    files in `run_path`. `since`: this process's begin (Unix time); an older status is of an earlier one.
    """
    at, target, end = time.time(), _value(metrics.steps_target), _value(metrics.eta_timestamp)
    page: dict[str, Any] = {"metrics": metrics, "now": now, "report": run_path / REPORT_NAME}
    if metrics.rank == 0:
        record = read_sample(run_path, status)
        page |= draw_charts([PlottedRun(record)]) | {"events": newest_rows(record, at)}
    state, tone = STATES[now["state"]], "info" if now["state"] == "setup" else "good"
    if now["stalled"]:
        state, tone = "stalled", "bad"
    is_new = (number(status.get("updated")) or 0.0) >= since
    page["ended"] = is_new and status.get("state") in TONES.keys() - {"running"}
    if page["ended"]:
        state, tone, end = state_name(status), TONES[status["state"]], 0.0
        page["reason"] = status.get("reason")
        target = status["total_steps"] if is_part(status) else target
    page |= {"state": state, "tone": tone, "numbers": headline_now(metrics, status, at), "at": at}
    page |= {"target": int(target), "share": min(1.0, now["step"] / target) if target else 0.0}
    page |= {"end": end, "left_seconds": max(0.0, end - at) if end else None}
    html = render_page("live.html", page, ["curves.js", "live.js"])
    return Page(HTML, html.encode(errors="replace"))


def headline_now(metrics: TrainMetrics, status: dict[str, Any], at: float) -> Headline:
    """Yield the numbers of the newest log point, evaluation and checkpoint at the Unix time `at`."""
    report = metrics.reported
    if (speed := number(status.get("images_per_second"))) is not None:
        waited = number(status.get("data_wait_ratio"))
        remark = "" if waited is None else f"{percent(waited, 0)} of the time waiting for data"
        yield "Images per second", f"{speed:,.0f}", remark
    if report.step:
        yield "Loss", short(report.loss), f"at step {report.step:,}"
        yield "Learning rate", short(report.lr), ""
        yield "Gradient norm", short(report.grad_norm), ""
        rollbacks = round(_value(metrics.rollbacks))
        yield "Bad steps", f"{report.bad_steps:,}", f"{rollbacks} rollbacks" if rollbacks else ""
    yield from best_top1(status)
    if saved := _value(metrics.saved_at):
        yield "Last checkpoint", duration(max(0.0, at - saved)), "ago"


def _value(series: Any) -> float:
    (family,) = series.collect()
    return float(family.samples[0].value)
