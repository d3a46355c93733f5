"""Prometheus metrics of one rank. Every name is declared here and nowhere else.

Prometheus' naming rules: prefix `cmtrain_`, base units, `_total` counters, no throughput gauges (a rate is a query:
`rate(cmtrain_images_total{split="train"}[1m])`), label values that are known are there from the start. Each rank serves
its own port, so that a dead rank is a target that is down.
"""

import errno
import time
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from pipelines.judge import KINDS

disable_created_metrics()  # would double the number of counter series

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
PORT_ATTEMPTS = 32


@dataclass(frozen=True)
class StepReport:
    """What one rank knows at a log point. Console, log.jsonl and metrics read the same object.

    `loss` is the mean over ranks and over the good steps since the last log point, NaN when there was none.
    `bad_steps` and `restores` count since the start of the run; `bad_steps_in_a_row` ends at this step.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    loss_scale: float
    bad_steps: int
    bad_steps_in_a_row: int
    restores: int


@dataclass
class TrainMetrics:
    """The series of one rank, in a registry of their own."""

    run: str
    rank: int
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.images = self._make(Counter, "images", "Images processed by this rank.", "split")
        self.steps = self._make(Counter, "steps", "Optimizer steps by result.", "result")
        self.step_seconds = self._make(Histogram, "step_duration_seconds", "Wall time of a step.", buckets=STEP_BUCKETS)
        self.data_wait_seconds = self._make(Counter, "data_wait_seconds", "Time the step waited for a batch.")
        self.decode_errors = self._make(Counter, "data_decode_errors", "Unreadable image files by kind.", "kind")
        self.nonfinite = self._make(Counter, "nonfinite", "Non-finite values met by the guard.", "where", "action")
        self.rollbacks = self._make(Counter, "rollbacks", "Times the run went back to a good state kept in memory.")
        self.bad_in_a_row = self._make(Gauge, "guard_consecutive_skips", "Bad steps in a row up to now.")
        self.step = self._make(Gauge, "step", "Optimizer steps done.")
        self.steps_target = self._make(Gauge, "steps_target", "Optimizer steps of the whole run.")
        self.epoch = self._make(Gauge, "epoch", "Epoch of the last step, from 0.")
        self.last_step_timestamp = self._make(Gauge, "last_step_timestamp_seconds", "Unix time of the last step.")
        self.start_timestamp = self._make(Gauge, "start_timestamp_seconds", "Unix time at which this process started.")
        self.train_loss = self._make(Gauge, "train_loss", "Mean loss since the last log point (nats).")
        self.learning_rate = self._make(Gauge, "learning_rate", "Learning rate of the last step.")
        self.grad_norm = self._make(Gauge, "grad_norm", "Global L2 norm of the gradient, before clipping.")
        self.loss_scale = self._make(Gauge, "loss_scale", "Scale of the fp16 loss, 1 without a scaler.")
        self.eval_accuracy = self._make(Gauge, "eval_accuracy_ratio", "Accuracy on the validation set.", "k", "weights")
        self.eval_loss = self._make(Gauge, "eval_loss", "Cross entropy on the validation set (nats).", "weights")
        self.best_accuracy = self._make(Gauge, "eval_best_accuracy_ratio", "Best top-1 of the run so far.")
        self.checkpoint_seconds = self._make(Histogram, "checkpoint_duration_seconds", "Time to publish a checkpoint.")
        self.checkpoint_wait_seconds = self._make(
            Counter, "checkpoint_wait_seconds", "Time training stood still for checkpoints."
        )
        self.checkpoint_failures = self._make(Counter, "checkpoint_failures", "Checkpoints that could not be written.")
        self.checkpoint_timestamp = self._make(
            Gauge, "checkpoint_last_success_timestamp_seconds", "Unix time of the last published checkpoint."
        )
        self.run_info = self._make(
            Gauge, "run_info", "Facts of the run, value 1.", "model", "precision", "device", "world_size", "version"
        )
        # Known label values start at 0, so that rates and alerts work from the first event on.
        for split in ("train", "eval"):
            self.images.labels(self.run, self.rank, split)
        for result in ("applied", "skipped"):
            self.steps.labels(self.run, self.rank, result)
        for kind in KINDS:
            self.decode_errors.labels(self.run, self.rank, kind)
        for where, action in (("gradient", "skip"), ("batchnorm", "restore"), ("ema", "heal")):
            self.nonfinite.labels(self.run, self.rank, where, action)
        self.one(self.start_timestamp).set(time.time())
        self.reported = StepReport(0, 0, 0.0, 0.0, 0.0, 1.0, 0, 0, 0)

    def _make(self, kind: type, name: str, text: str, *labels: str, **kwargs: Any) -> Any:
        metric = kind(f"cmtrain_{name}", text, ("run", "rank", *labels), registry=self.registry, **kwargs)
        if not labels:
            metric.labels(self.run, self.rank)
        return metric

    def one(self, metric: Any, *labels: str) -> Any:
        """The child of `metric` that belongs to this run and rank."""
        return metric.labels(self.run, self.rank, *labels)

    def resume(self, report: StepReport) -> None:
        """Start counting from a checkpoint: what happened before it belongs to an earlier process."""
        self.reported = report
        self.one(self.step).set(report.step)

    def count_step(self, num_images: int, seconds: float, wait_seconds: float) -> None:
        """Once a step; host numbers only."""
        self.one(self.images, "train").inc(num_images)
        self.one(self.step_seconds).observe(seconds)
        self.one(self.data_wait_seconds).inc(wait_seconds)
        self.one(self.last_step_timestamp).set(time.time())

    def report(self, now: StepReport) -> None:
        """Once a log point."""
        before, self.reported = self.reported, now
        skipped = now.bad_steps - before.bad_steps
        self.one(self.steps, "skipped").inc(skipped)
        self.one(self.steps, "applied").inc(now.step - before.step - skipped)
        self.one(self.nonfinite, "gradient", "skip").inc(skipped)
        self.one(self.nonfinite, "batchnorm", "restore").inc(now.restores - before.restores)
        self.one(self.bad_in_a_row).set(now.bad_steps_in_a_row)
        self.one(self.step).set(now.step)
        self.one(self.epoch).set(now.epoch)
        self.one(self.train_loss).set(now.loss)
        self.one(self.learning_rate).set(now.lr)
        self.one(self.grad_norm).set(now.grad_norm)
        self.one(self.loss_scale).set(now.loss_scale)


def serve(registry: CollectorRegistry, host: str, port: int) -> tuple[str, Any]:
    """Serve `registry` over HTTP at the first free port from `port` on.

    Returns:
        The address `http://host:port/metrics` and the server, whose shutdown() ends it.

    Raises:
        OSError: no port of the next 32 is free, or `host` is no address of this machine.
    """
    for candidate in range(port, port + PORT_ATTEMPTS):
        try:
            server, _ = start_http_server(candidate, host, registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        return f"http://{host}:{candidate}/metrics", server
    raise OSError(f"metrics.port: {port}..{port + PORT_ATTEMPTS - 1} are all in use")
