"""Make the pages that a rank serves over HTTP: metrics, health, status and the live page.

/              the run for people, see live_page.py
/metrics       Prometheus' text format
/-/healthy     503 when no training step has finished for too long; evaluation and saves may take longer
/-/ready       503 until the first step of this process is done
/status.json   rank 0: status.json of the run folder; other ranks: their speed; all: what they do "now"
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

from cmtrain.monitoring.http_server import JSON, TEXT, Page, Route
from cmtrain.monitoring.live_page import make_live_page
from cmtrain.monitoring.metrics import TrainMetrics

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
MAX_AGE_SECONDS = 1.0


def make_pages(
    metrics: TrainMetrics, status: Callable[[], dict[str, Any]], stall_seconds: float, run_path: Path
) -> dict[str, Route]:
    """Return the pages by path. `status`: returns what this rank knows of the run, as JSON values.
    After `stall_seconds` without a finished step the run counts as stalled.
    """

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

    def live_page() -> Page:
        return make_live_page(metrics, status(), now(), run_path, since)

    def metrics_page() -> Page:
        return Page(PROMETHEUS_TEXT, generate_latest(metrics.registry))

    since = time.time()
    pages = {"/": cached(live_page, lambda: status().get("state")), "/metrics": cached(metrics_page)}
    return pages | {"/status.json": status_json, "/-/healthy": healthy, "/-/ready": ready}


def cached(make: Route, kind: Callable[[], Any] = lambda: None) -> Route:
    """Return a route that makes each `kind` of a page at most once a second for all clients.
    The state of a run is a kind, so its end is shown at once.
    """
    made, making = dict[Any, tuple[float, Page]](), threading.Lock()

    def route() -> Page:
        now, key = time.monotonic(), kind()
        with making:
            if key not in made or now - made[key][0] >= MAX_AGE_SECONDS:
                made[key] = now, make()
            return made[key][1]

    return route
