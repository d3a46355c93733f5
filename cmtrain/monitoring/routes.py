"""Make the pages that a rank serves over HTTP: metrics, health, status and the live page.

/              the run for people: progress, curves and the newest events
/metrics       Prometheus' text format
/-/healthy     503 when no training step has finished for too long; evaluation and saves may take longer
/-/ready       503 until the first step of this process is done
/status.json   rank 0: status.json of the run folder; other ranks: their speed; all: what they do "now"

The live page refreshes itself while its tab is in front. It is made on request, on the server's thread, at
most once a second for all clients, of what the process knows and a bounded sample of the run folder. That
takes 7 to 16 ms of CPU time after 200 log points or after 200,000. Its template is templates/live.html.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

from cmtrain.monitoring.http_server import JSON, TEXT, Page, Route
from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.monitoring.report import charts, headline, rendering
from cmtrain.monitoring.report.page import TONES
from cmtrain.monitoring.units import is_part, state_name
from cmtrain.storage import run_folder, run_record

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
MAX_AGE_SECONDS = 1.0
STATES = {"setup": "setting up", "train": "training", "evaluate": "evaluating", "checkpoint": "saving"}


def make_pages(
    metrics: TrainMetrics, status: Callable[[], dict[str, Any]], stall_seconds: float, run_path: Path
) -> dict[str, Route]:
    """Return the pages by path. `status` returns what this rank knows of the run, as JSON values."""

    def now() -> dict[str, Any]:
        seconds = time.monotonic() - metrics.progress_at
        stalled = metrics.state == "train" and seconds > stall_seconds
        facts = {"rank": metrics.rank, "state": metrics.state, "step": metrics.reached_step}
        return facts | {"seconds_since_progress": round(seconds, 3), "stalled": stalled}

    def healthy() -> Page:
        facts = now()
        line = "{state}, step {step}, no progress for {seconds_since_progress} s\n".format(**facts)
        return Page(TEXT, line.encode(), 503 if facts["stalled"] else 200)

    def ready() -> Page:
        done = metrics.num_steps
        return Page(TEXT, f"{done} steps done by this process\n".encode(), 200 if done else 503)

    def status_json() -> Page:
        return Page(JSON, json.dumps(status() | {"now": now()}, indent=1).encode() + b"\n")

    since = time.time()
    live = cached(
        lambda: _live_page(metrics, status(), now(), run_path, since), lambda: status().get("state")
    )
    numbers = cached(lambda: Page(PROMETHEUS_TEXT, generate_latest(metrics.registry)))
    pages = {"/": live, "/metrics": numbers, "/status.json": status_json}
    return pages | {"/-/healthy": healthy, "/-/ready": ready}


def cached(make: Route, kind: Callable[[], Any] = lambda: None) -> Route:
    """Return a route that makes each `kind` of a page, such as the state, once a second at most."""
    made, making = dict[Any, tuple[float, Page]](), threading.Lock()

    def route() -> Page:
        now, key = time.monotonic(), kind()
        with making:
            if key not in made or now - made[key][0] >= MAX_AGE_SECONDS:
                made[key] = now, make()
            return made[key][1]

    return route


def _live_page(
    metrics: TrainMetrics, status: dict[str, Any], now: dict[str, Any], run_path: Path, since: float
) -> Page:
    """Return the page of one rank. Rank 0 shows the run; other ranks show themselves.
    `status`, `now`: what this rank knows of the run, and is doing; see make_pages. Only rank 0 reads
    files in `run_path`. `since`: this process's begin (Unix time); an older status is of an earlier one.
    """
    at, target, end = time.time(), _value(metrics.steps_target), _value(metrics.eta_timestamp)
    page: dict[str, Any] = {"metrics": metrics, "now": now, "report": run_path / run_folder.REPORT_NAME}
    if metrics.rank == 0:
        record = run_record.read_sample(run_path, status)
        newest = headline.newest_rows(record, at)
        page |= charts.draw_charts([charts.PlottedRun(record)]) | {"events": newest}
    state, tone = STATES[now["state"]], "info" if now["state"] == "setup" else "good"
    if now["stalled"]:
        state, tone = "stalled", "bad"
    is_new = (headline.number(status.get("updated")) or 0.0) >= since
    page["ended"] = is_new and status.get("state") in TONES.keys() - {"running"}
    if page["ended"]:
        state, tone, end = state_name(status), TONES[status["state"]], 0.0
        page["reason"] = status.get("reason")
        target = status["total_steps"] if is_part(status) else target
    page |= {"state": state, "tone": tone, "at": at, "saved": _value(metrics.saved_at)}
    speed, waited = (headline.number(status.get(key)) for key in ("images_per_second", "data_wait_ratio"))
    page |= {"speed": speed, "waited": waited, "best": headline.best_top1(status)}
    page |= {"target": int(target), "end": end, "rollbacks": round(_value(metrics.rollbacks))}
    html = rendering.render_page("live.html", page, ["curves.js", "live.js"])
    return Page("text/html; charset=utf-8", html.encode(errors="replace"))


def _value(series: Any) -> float:
    (family,) = series.collect()
    return float(family.samples[0].value)
