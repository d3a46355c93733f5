"""Make the pages that a rank serves over HTTP: metrics, health, status and the live page.

/              the run for people, see live_page.py
/metrics       Prometheus' text format, or OpenMetrics for clients that ask for it
/-/healthy     503 when no training step has finished for too long; evaluation and saves may take longer
/-/ready       503 until the first step of this process is done
/status.json   rank 0: status.json of the run folder; other ranks: their speed; all: what they do "now"
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from cmtrain.monitoring.http_server import JSON, TEXT, Page, Route
from cmtrain.monitoring.live_page import LivePage
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

    pages: dict[str, Route] = {"/": LivePage(metrics, status, now, run_path)}
    pages |= {"/metrics": MetricsPage(metrics.registry), "/status.json": status_json}
    return pages | {"/-/healthy": healthy, "/-/ready": ready}


class MetricsPage:
    """The series of `registry` as text, made on request and at most once a second for all clients.

    It takes 1.7 ms for 138 series on one CPU core, most of it with the interpreter's lock.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.made: dict[bool, tuple[float, Page]] = {}  # by whether it is OpenMetrics

    def __call__(self, accept: str) -> Page:
        wants_openmetrics = "application/openmetrics-text" in accept
        at, page = self.made.get(wants_openmetrics, (0.0, None))
        if page is None or time.monotonic() - at >= MAX_AGE_SECONDS:
            if wants_openmetrics:
                page = Page(openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest(self))
            else:
                page = Page(PROMETHEUS_TEXT, generate_latest(self))
            self.made[wants_openmetrics] = time.monotonic(), page
        return page

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the registry, and let the training thread run between them."""
        for metric in self.registry.collect():
            yield metric
            time.sleep(0)  # releases the interpreter's lock
