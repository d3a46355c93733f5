"""The page of a run for people, at / of the metrics port: how far it is, its curves, and what happened last.

It needs nothing but a browser, and refreshes itself while its tab is in front. It is made when somebody asks for it, on
the exporter's thread, at most once a second however many ask, from what the process knows and a sample of its folder.
That takes 7 to 16 ms of CPU time, be it after 200 log points or after 200,000 (on a shared 2-core machine).
The page is templates/live.html.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmtrain import __version__
from cmtrain.monitoring.discovery import read_target
from cmtrain.monitoring.http_server import Page
from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.monitoring.report.curves import Run, large_charts, small_charts
from cmtrain.monitoring.report.events import newest_rows
from cmtrain.monitoring.report.figures import number
from cmtrain.monitoring.report.templating import join_scripts, make_templates
from cmtrain.monitoring.units import duration, short, utc
from cmtrain.storage.run_record import is_sampled, read_sample

HTML = "text/html; charset=utf-8"
MAX_AGE_SECONDS = 1.0
STATES = {"setup": "setting up", "train": "training", "evaluate": "evaluating", "checkpoint": "saving"}

Figure = tuple[str, str, str]  # name, value, remark


class LivePage:
    """The page of one rank. Rank 0 shows the run; the others show themselves and where rank 0 is.

    Args:
        status: what is known of the run on this rank, see pages.make_pages.
        now: what this rank is doing, see pages.make_pages.
        run_path: the run folder; only rank 0 reads files in it.
        links: (path, what is there) of the other pages.
    """

    def __init__(
        self,
        metrics: TrainMetrics,
        status: Callable[[], dict[str, Any]],
        now: Callable[[], dict[str, Any]],
        run_path: Path,
        links: list[tuple[str, str]],
    ) -> None:
        self.metrics, self.status, self.now = metrics, status, now
        self.run_path, self.links = run_path, links
        self.templates = make_templates()
        self.made_at, self.page = 0.0, Page(HTML, b"")

    def __call__(self, accept: str) -> Page:
        if not self.page.body or time.monotonic() - self.made_at >= MAX_AGE_SECONDS:
            self.page = Page(HTML, self._render().encode(errors="replace"))
            self.made_at = time.monotonic()
        return self.page

    def _render(self) -> str:
        metrics, now, status, at = self.metrics, self.now(), self.status(), time.time()
        target, end = value_of(metrics.steps_target), value_of(metrics.eta_timestamp)
        stalled, rank = now["stalled"], metrics.rank
        page: dict[str, Any] = {}
        if rank == 0:
            record = read_sample(self.run_path, status)
            run = Run(record)
            page = {
                "large_charts": large_charts([run]),
                "small_charts": small_charts([run]),
                "sampled": is_sampled(self.run_path / "log.jsonl"),
                "events": newest_rows(record, at),
            }
        first = read_target(self.run_path, 0) if rank else None
        return self.templates.get_template("live.html").render(
            **join_scripts(self.templates, ["curves.js", "live.js"]),
            **page,
            run=metrics.run,
            rank=rank,
            first_rank=first and f"http://{first}/",
            state="stalled" if stalled else STATES[now["state"]],
            tone="bad" if stalled else "info" if now["state"] == "setup" else "good",
            stalled_seconds=now["seconds_since_progress"] if stalled else None,
            summary=summary(metrics),
            step=now["step"],
            target=int(target),
            share=min(1.0, now["step"] / target) if target else 0.0,
            epoch=metrics.reported.epoch + 1 if metrics.reported.step else 0,
            left_seconds=max(0.0, end - at) if end else None,
            end=utc(end),
            figures=figures(metrics, status, at),
            pages=self.links,
            version=__version__,
            written=utc(at),
        )


def summary(metrics: TrainMetrics) -> str:
    """What learns on what, from the facts of the run; empty before they are known."""
    (family,) = metrics.run_info.collect()
    for sample in family.samples:
        facts = sample.labels
        return " \u00b7 ".join(
            (facts["model"], facts["precision"], f"{facts['world_size']} x {facts['device']}")
        )
    return ""


def figures(metrics: TrainMetrics, status: dict[str, Any], at: float) -> list[Figure]:
    """What is known of the newest log point, of evaluations and checkpoints. `at`: Unix time."""
    report, found = metrics.reported, list[Figure]()
    if (speed := number(status.get("images_per_second"))) is not None:
        waited = number(status.get("data_wait_ratio"))
        remark = "" if waited is None else f"{waited:.0%} of the time waiting for data"
        found.append(("Images per second", f"{speed:,.0f}", remark))
    if report.step:
        found.append(("Loss", short(report.loss), f"at step {report.step:,}"))
        found.append(("Learning rate", short(report.lr), ""))
        found.append(("Gradient norm", short(report.grad_norm), ""))
        rollbacks = round(value_of(metrics.rollbacks))
        found.append(("Bad steps", f"{report.bad_steps:,}", f"{rollbacks} rollbacks" if rollbacks else ""))
    best, best_step = number(status.get("best_top1")), number(status.get("best_step"))
    if best is not None and best_step is not None:
        found.append(("Best top-1", f"{best:.2%}", f"at step {best_step:,.0f}"))
    if saved := value_of(metrics.checkpoint_timestamp):
        found.append(("Last checkpoint", duration(max(0.0, at - saved)), "ago"))
    return found


def value_of(metric: Any) -> float:
    """Of a gauge or counter without labels of its own."""
    (family,) = metric.collect()
    return float(family.samples[0].value)
