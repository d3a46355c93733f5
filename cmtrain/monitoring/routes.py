"""Make the pages that a rank serves over HTTP: metrics, health, status and the live page.

/              the run for people, see live_page.py
/metrics       Prometheus' text format, or OpenMetrics for clients that ask for it
/-/healthy     503 when no training step has finished for too long; evaluation and saves may take longer
/-/ready       503 until the first step of this process is done
/status.json   rank 0: status.json of the run folder; other ranks: their speed; all: what they do "now"
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics import exposition

from cmtrain.monitoring.http_server import JSON, TEXT, Page, Route
from cmtrain.monitoring.live_page import make_live_page
from cmtrain.monitoring.metrics import TrainMetrics

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
MAX_AGE_SECONDS = 1.0


def make_pages(
    metrics: TrainMetrics, status: Callable[[], dict[str, Any]], stall_seconds: float, run_path: Path
) -> dict[str, Route]:
    """Return the pages by path.

    `status`: returns what this rank knows of the run, as JSON values. After `stall_seconds` without a
    finished step the run counts as stalled.
    """

    def now() -> dict[str, Any]:
        seconds = time.monotonic() - metrics.progress_at
        stalled = metrics.state == "train" and seconds > stall_seconds
        facts = {"rank": metrics.rank, "state": metrics.state, "step": metrics.reached_step}
        return facts | {"seconds_since_progress": round(seconds, 3), "stalled": stalled}

    def healthy(accept: str) -> Page:
        facts = now()
        line = "{state}, step {step}, no progress for {seconds_since_progress} s\n".format(**facts)
        return Page(TEXT, line.encode(), 503 if facts["stalled"] else 200)

    def ready(accept: str) -> Page:
        done = metrics.num_steps
        return Page(TEXT, f"{done} steps done by this process\n".encode(), 200 if done else 503)

    def status_json(accept: str) -> Page:
        return Page(JSON, json.dumps(status() | {"now": now()}, indent=1).encode() + b"\n")

    def live_page(_: Any) -> Page:
        return make_live_page(metrics, status(), now(), run_path, since)

    since = time.time()
    pages: dict[str, Route] = {
        "/": cached(live_page, lambda _: status().get("state"))
    }  # shows an end at once
    pages["/metrics"] = cached(partial(make_metrics_page, metrics.registry), is_openmetrics)
    return pages | {"/status.json": status_json, "/-/healthy": healthy, "/-/ready": ready}


def cached(make: Callable[[Any], Page], kind_of: Callable[[str], Any]) -> Route:
    """Return a route that makes each kind of a page at most once a second for all clients.

    `kind_of`: of an Accept header, at this moment: the end of a run is shown at once. `make` gets it.
    """
    made, making = dict[Any, tuple[float, Page]](), threading.Lock()

    def route(accept: str) -> Page:
        kind = kind_of(accept)
        with making:
            if kind not in made or time.monotonic() - made[kind][0] >= MAX_AGE_SECONDS:
                made[kind] = time.monotonic(), make(kind)
            return made[kind][1]

    return route


def is_openmetrics(accept: str) -> bool:
    return "application/openmetrics-text" in accept


def make_metrics_page(registry: CollectorRegistry, openmetrics: bool) -> Page:
    """Return the series of `registry` as text.

    It takes 1.7 ms for 138 series on one CPU core, most of it with the interpreter's lock.
    """

    def collect() -> Iterator[Metric]:
        for metric in registry.collect():
            yield metric
            time.sleep(0)  # releases the interpreter's lock, for the training thread

    source: Any = SimpleNamespace(collect=collect)
    if openmetrics:
        return Page(exposition.CONTENT_TYPE_LATEST, exposition.generate_latest(source))
    return Page(PROMETHEUS_TEXT, generate_latest(source))
