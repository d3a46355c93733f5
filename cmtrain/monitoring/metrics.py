"""Prometheus metrics of one rank. Every name is declared here and nowhere else; docs/metrics.md lists them.

Prometheus' naming rules: prefix `cmtrain_`, base units, `_total` counters, no throughput gauges (a rate is a query:
`rate(cmtrain_images_total{split="train"}[1m])`), label values that are known are there from the start. Each rank serves
its own port, so that a dead rank is a target that is down. No label holds a path, a host name or what a user typed but
the run's name, and the number of series does not grow.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from cmtrain.step.measure import StepReport
from pipelines.checks.decode_one import KINDS

disable_created_metrics()  # would double the number of counter series

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
PHASE_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2)
EVAL_BUCKETS = (1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)

STATES = ("setup", "train", "evaluate", "checkpoint")
DATA_WAIT = "data_wait"


@dataclass
class TrainMetrics:
    """The series of one rank, in a registry of their own, and what this rank is doing (`state`, one of STATES)."""

    run: str
    rank: int
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.images = self._make(Counter, "images", "Images processed by this rank.", "split")
        self.steps = self._make(Counter, "steps", "Optimizer steps by result.", "result")
        self.step_seconds = self._make(
            Histogram, "step_duration_seconds", "Wall time of a step.", buckets=STEP_BUCKETS
        )
        self.phase_seconds = self._make(
            Histogram, "phase_duration_seconds", "Time of a step in one phase; GPU time on a GPU, except data_wait.",
            "phase", buckets=PHASE_BUCKETS,
        )  # fmt: skip
        self.data_wait_seconds = self._make(
            Counter, "data_wait_seconds", "Time the step waited for a batch."
        )
        self.data_bytes = self._make(
            Counter, "data_bytes", "Encoded bytes of the images that this rank trained on."
        )
        self.decode_errors = self._make(
            Counter, "data_decode_errors", "Unreadable image files by kind.", "kind"
        )
        self.nonfinite = self._make(
            Counter, "nonfinite", "Non-finite values met by the guard.", "where", "action"
        )
        self.spikes = self._make(
            Counter, "loss_spikes", "Steps whose loss or gradient norm was far above the mean."
        )
        self.rollbacks = self._make(
            Counter, "rollbacks", "Times the run went back to a good state kept in memory."
        )
        self.bad_in_a_row = self._make(Gauge, "guard_consecutive_skips", "Bad steps in a row up to now.")
        self.in_state = self._make(
            Gauge, "state", "1 for what this rank is doing now, 0 for the rest.", "state"
        )
        self.step = self._make(Gauge, "step", "Optimizer steps done.")
        self.steps_target = self._make(Gauge, "steps_target", "Optimizer steps of the whole run.")
        self.epoch = self._make(Gauge, "epoch", "Epoch of the last step, from 0.")
        self.last_step_timestamp = self._make(
            Gauge, "last_step_timestamp_seconds", "Unix time of the last step."
        )
        self.start_timestamp = self._make(
            Gauge, "start_timestamp_seconds", "Unix time at which this process started."
        )
        self.eta_timestamp = self._make(
            Gauge, "eta_timestamp_seconds", "Unix time at which training should end."
        )
        self.train_loss = self._make(Gauge, "train_loss", "Mean loss since the last log point (nats).")
        self.learning_rate = self._make(Gauge, "learning_rate", "Learning rate of the last step.")
        self.grad_norm = self._make(Gauge, "grad_norm", "Global L2 norm of the gradient, before clipping.")
        self.weight_norm = self._make(Gauge, "weight_norm", "L2 norm of all trainable parameters together.")
        self.loss_scale = self._make(Gauge, "loss_scale", "Scale of the fp16 loss, 1 without a scaler.")
        self.bn_mean_abs_max = self._make(
            Gauge, "bn_running_mean_abs_max", "Largest absolute running mean of any BatchNorm."
        )
        self.bn_var_max = self._make(
            Gauge, "bn_running_var_max", "Largest running variance of any BatchNorm."
        )
        self.eval_accuracy = self._make(
            Gauge, "eval_accuracy_ratio", "Accuracy on the validation set.", "k", "weights"
        )
        self.eval_loss = self._make(
            Gauge, "eval_loss", "Cross entropy on the validation set (nats).", "weights"
        )
        self.eval_seconds = self._make(
            Histogram, "eval_duration_seconds", "Time of an evaluation.", buckets=EVAL_BUCKETS
        )
        self.best_accuracy = self._make(Gauge, "eval_best_accuracy_ratio", "Best top-1 of the run so far.")
        self.checkpoint_seconds = self._make(
            Histogram, "checkpoint_duration_seconds", "Time to publish a checkpoint."
        )
        self.checkpoint_wait_seconds = self._make(
            Counter, "checkpoint_wait_seconds", "Time training stood still for checkpoints."
        )
        self.checkpoint_failures = self._make(
            Counter, "checkpoint_failures", "Checkpoints that could not be written."
        )
        self.checkpoint_timestamp = self._make(
            Gauge, "checkpoint_last_success_timestamp_seconds", "Unix time of the last published checkpoint."
        )
        self.checkpoint_bytes = self._make(
            Gauge, "checkpoint_size_bytes", "Size of the last published checkpoint."
        )
        self.flops_per_image = self._make(
            Gauge,
            "flops_per_image",
            "Floating-point operations to train on one image: three forward passes.",
        )
        self.gpu_memory = self._make(
            Gauge, "gpu_memory_bytes", "Memory of torch's allocator at the last log.", "kind"
        )
        self.gpu_info = self._make(
            Gauge, "gpu_info", "The GPU of this rank, value 1; joins to DCGM.", "UUID", "model"
        )
        self.run_info = self._make(
            Gauge,
            "run_info",
            "Facts of the run, value 1.",
            "model",
            "precision",
            "device",
            "world_size",
            "version",
        )
        # The process's memory, CPU time and file descriptors, and Python's version, under their usual names.
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        # Known label values start at 0, so that rates and alerts work from the first event on.
        for split in ("train", "eval"):
            self.one(self.images, split)
        for result in ("applied", "skipped"):
            self.one(self.steps, result)
        for kind in KINDS:
            self.one(self.decode_errors, kind)
        for where, action in (("gradient", "skip"), ("batchnorm", "restore"), ("ema", "heal")):
            self.one(self.nonfinite, where, action)
        for phase in (DATA_WAIT, "forward", "backward", "optimizer"):
            self.one(self.phase_seconds, phase)
        self.one(self.start_timestamp).set(time.time())
        self.reported = StepReport(0, 0, 0.0, 0.0, 0.0, 1.0, 0, 0, 0, 0, 0)
        self.reached_step, self.num_steps = 0, 0  # of the run, of this process
        self.state = STATES[0]
        self.progress_at = self.entered_at = time.monotonic()
        for state in STATES:
            self.one(self.in_state, state).set(state == self.state)

    def _make(self, kind: type, name: str, text: str, *labels: str, **kwargs: Any) -> Any:
        metric = kind(f"cmtrain_{name}", text, ("run", "rank", *labels), registry=self.registry, **kwargs)
        if not labels:
            metric.labels(self.run, self.rank)
        return metric

    def one(self, metric: Any, *labels: str) -> Any:
        """The child of `metric` that belongs to this run and rank."""
        return metric.labels(self.run, self.rank, *labels)

    def enter(self, state: str) -> None:
        """This rank does something else from now on."""
        if self.state == "evaluate":
            self.one(self.eval_seconds).observe(time.monotonic() - self.entered_at)
        self.one(self.in_state, self.state).set(0)
        self.one(self.in_state, state).set(1)
        self.state = state
        self.progress_at = self.entered_at = time.monotonic()

    def resume(self, report: StepReport) -> None:
        """Start counting from a checkpoint: what happened before it belongs to an earlier process."""
        self.reported = report
        self.reached_step = report.step
        self.one(self.step).set(report.step)

    def count_step(
        self,
        step: int,
        *,
        num_images: int,
        num_bytes: int,
        seconds: float,
        wait_seconds: float,
        phases: Sequence[Mapping[str, float]],
    ) -> None:
        """Once a step, after `step` of them; host numbers only.

        `phases`: seconds by phase of the steps that the device has finished meanwhile, which may be earlier ones.
        """
        if self.state == "setup":
            self.enter("train")
        self.reached_step, self.num_steps = step, self.num_steps + 1
        self.progress_at = time.monotonic()
        self.one(self.step).set(step)
        self.one(self.images, "train").inc(num_images)
        self.one(self.data_bytes).inc(num_bytes)
        self.one(self.step_seconds).observe(seconds)
        self.one(self.data_wait_seconds).inc(wait_seconds)
        self.one(self.phase_seconds, DATA_WAIT).observe(wait_seconds)
        for measured in phases:
            for phase, phase_seconds in measured.items():
                self.one(self.phase_seconds, phase).observe(phase_seconds)
        self.one(self.last_step_timestamp).set(time.time())

    def report(self, now: StepReport) -> None:
        """Once a log point."""
        before, self.reported = self.reported, now
        skipped = now.bad_steps - before.bad_steps
        self.one(self.steps, "skipped").inc(skipped)
        self.one(self.steps, "applied").inc(now.step - before.step - skipped)
        self.one(self.nonfinite, "gradient", "skip").inc(skipped)
        self.one(self.nonfinite, "batchnorm", "restore").inc(now.restores - before.restores)
        self.one(self.spikes).inc(now.spikes - before.spikes)
        self.one(self.bad_in_a_row).set(now.bad_steps_in_a_row)
        self.one(self.step).set(now.step)
        self.one(self.epoch).set(now.epoch)
        self.one(self.train_loss).set(now.loss)
        self.one(self.learning_rate).set(now.lr)
        self.one(self.grad_norm).set(now.grad_norm)
        self.one(self.weight_norm).set(now.weight_norm)
        self.one(self.loss_scale).set(now.loss_scale)
        self.one(self.bn_mean_abs_max).set(now.bn_mean_abs_max)
        self.one(self.bn_var_max).set(now.bn_var_max)
