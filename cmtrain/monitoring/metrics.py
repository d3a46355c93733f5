"""Declare and update the Prometheus metrics of one rank, which has its own port; see docs/metrics.md.

They follow Prometheus' naming rules: prefix `cmtrain_`, base units, counters that end in `_total`. No gauge
holds a throughput, because a rate is a query: `rate(cmtrain_images_total{split="train"}[1m])`. Known label
values exist from the start, so that rates and alerts work from the first event on. The run's name is the
only label that a user chooses; none holds a path or a host name, so the number of series does not grow.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import prometheus_client
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily

from cmtrain.step.evaluate import Evaluation
from cmtrain.step.measure import PHASES, StepReport
from pipelines.checks.decode_one import KINDS
from pipelines.files.objects import COUNTS, REASONS

prometheus_client.disable_created_metrics()  # they would double the number of counter series

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
PHASE_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2)
EVAL_BUCKETS = (1, 20, 60, 120, 300, 600, 1800)

STATES = ("setup", "train", "evaluate", "checkpoint")
DATA_WAIT = "data_wait"
MAP_TEXT = "mAP, of images of several classes."
MEMORY_KINDS = {
    "allocated": "allocated_bytes.all.current", "reserved": "reserved_bytes.all.current",
    "peak": "allocated_bytes.all.peak",
}  # fmt: skip
RUN_FACTS = ("model", "precision", "device", "world_size", "version")

Timing = Sequence[Mapping[str, float]]  # seconds by phase, of each of some steps


@dataclass(eq=False)  # a registry hashes its collectors
class TrainMetrics:
    """The series of one rank. `facts`: see `start`. `state`: of STATES. `reported`: the last log point."""

    run: str
    rank: int
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        counter, gauge, histogram = (partial(self._make, kind) for kind in (Counter, Gauge, Histogram))
        self.images = counter("images", "Images processed by this rank.", split=("train", "eval"))
        self.steps = counter("steps", "Optimizer steps by result.", result=("applied", "skipped"))
        self.step_seconds = histogram("step_duration_seconds", "Wall time of a step.", STEP_BUCKETS)
        text = "Time of a step in one phase; GPU time on a GPU, except data_wait."
        phases = (DATA_WAIT, *PHASES)
        self.phase_seconds = histogram("phase_duration_seconds", text, PHASE_BUCKETS, phase=phases)
        self.data_wait_seconds = counter("data_wait_seconds", "Time the step waited for a batch.")
        self.data_bytes = counter("data_bytes", "Encoded bytes of the images that this rank trained on.")
        self.decode_errors = counter("data_decode_errors", "Unreadable image files by kind.", kind=KINDS)
        self.nonfinite = counter("nonfinite", "Non-finite values met by the guard.", where=(), action=())
        self.spikes = counter("loss_spikes", "Steps whose loss or gradient norm was far above the mean.")
        self.rollbacks = counter("rollbacks", "Times the run went back to a good state kept in memory.")
        self.out_of_memory = counter("out_of_memory", "Steps done again in passes of fewer images.")
        self.in_state = gauge("state", "1 for what this rank is doing now, 0 for the rest.", state=STATES)
        self.step = gauge("step", "Optimizer steps done.")
        self.steps_target = gauge("steps_target", "Optimizer steps of the whole run.")
        self.last_step_timestamp = gauge("last_step_timestamp_seconds", "Unix time of the last step.")
        self.start_timestamp = gauge("start_timestamp_seconds", "Unix time at which this process started.")
        self.eta_timestamp = gauge("eta_timestamp_seconds", "Unix time at which training should end.")
        # Each is a field of StepReport, by the field's name.
        self.fields = {
            "step": self.step,
            "epoch": gauge("epoch", "Epoch of the last step, from 0."),
            "loss": gauge("train_loss", "Mean loss since the last log point (nats)."),
            "lr": gauge("learning_rate", "Learning rate of the last step."),
            "grad_norm": gauge("grad_norm", "Global L2 norm of the gradient, before clipping."),
            "weight_norm": gauge("weight_norm", "L2 norm of all trainable parameters together."),
            "loss_scale": gauge("loss_scale", "Scale of the fp16 loss, 1 without a scaler."),
            "bad_steps_in_a_row": gauge("guard_consecutive_skips", "Bad steps in a row up to now."),
            "bn_mean_abs_max": gauge("bn_running_mean_abs_max", "Largest absolute mean of any BatchNorm."),
            "bn_var_max": gauge("bn_running_var_max", "Largest variance of any BatchNorm."),
        }
        self.eval_accuracy = gauge("eval_accuracy_ratio", "Accuracy on validation data.", k=(), weights=())
        self.eval_balanced = gauge("eval_balanced_accuracy_ratio", "Mean accuracy of classes.", weights=())
        self.eval_map = gauge("eval_mean_average_precision_ratio", MAP_TEXT, weights=())
        self.eval_loss = gauge("eval_loss", "Cross entropy on the validation set (nats).", weights=())
        self.eval_seconds = histogram("eval_duration_seconds", "Time of an evaluation.", EVAL_BUCKETS)
        self.best_accuracy = gauge("eval_best_accuracy_ratio", "Best top-1 of the run so far.")
        self.checkpoint_seconds = histogram("checkpoint_duration_seconds", "Time to publish a checkpoint.")
        self.checkpoint_wait = counter("checkpoint_wait_seconds", "Time training waited for checkpoints.")
        self.checkpoint_failures = counter("checkpoint_failures", "Checkpoints that could not be written.")
        self.saved_at = gauge("checkpoint_last_success_timestamp_seconds", "Unix time of the last save.")
        self.checkpoint_bytes = gauge("checkpoint_size_bytes", "Size of the last published checkpoint.")
        self.flops_per_image = gauge("flops_per_image", "FLOPs to train on one image: 3 forward passes.")
        self.gpu_memory = gauge("gpu_memory_bytes", "Memory of torch's allocator at the last log.", kind=())
        self.gpu_info = gauge("gpu_info", "The GPU of this rank, value 1; joins to DCGM.", UUID=(), model=())
        self.run_info = gauge("run_info", "Facts of the run, value 1.", **dict.fromkeys(RUN_FACTS, ()))
        self.registry.register(self)
        # The process's memory, CPU time and file descriptors, and Python's version, under their usual names.
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.PlatformCollector(registry=self.registry)
        for where, action in (("gradient", "skip"), ("batchnorm", "restore"), ("ema", "heal")):
            self.nonfinite(where, action)
        self.start_timestamp.set(time.time())
        self.facts: Mapping[str, str] = {}
        self.device = torch.device("cpu")
        self.reported = StepReport(0, 0, 0.0, 0.0, 0.0, 1.0, 0, 0, 0, 0, 0)
        self.reached_step, self.num_steps = 0, 0  # of the run, of this process
        self.state = STATES[0]
        self.progress_at = self.entered_at = time.monotonic()
        self.in_state(self.state).set(1)

    def _make(self, kind: Any, name: str, text: str, buckets: Any = (), /, **labels: Sequence[str]) -> Any:
        """Declare a metric, and return the series of this run and rank, which starts at 0.
        With `labels`, the known values of each, return a function from their values to the series.
        """
        options = {"buckets": buckets} if buckets else {}
        metric = kind(f"cmtrain_{name}", text, ("run", "rank", *labels), registry=self.registry, **options)
        series = partial(metric.labels, self.run, self.rank)
        if not labels:
            return series()
        for values in itertools.product(*labels.values()):
            series(*values)
        return series

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield what this process has read from a bucket until now: a step may be waiting for it."""
        labels, values = ("run", "rank"), (self.run, str(self.rank))
        for name, text in ("requests", "Requests to the bucket."), ("bytes", "Bytes from the bucket."):
            family = CounterMetricFamily(f"cmtrain_store_{name}", text, labels=labels)
            family.add_metric(values, COUNTS[name])
            yield family
        text = "Repeated requests to the bucket."
        family = CounterMetricFamily("cmtrain_store_retries", text, labels=(*labels, "reason"))
        for reason in REASONS:
            family.add_metric((*values, reason), COUNTS[reason])
        yield family

    def start(
        self, facts: Mapping[str, str], *, last_step: int, flops_per_image: int, device: torch.device
    ) -> None:
        """Publish what is known before the first step. `facts`: a value for each of RUN_FACTS."""
        self.facts, self.device = facts, device
        self.steps_target.set(last_step)
        self.run_info(*(facts[name] for name in RUN_FACTS)).set(1)
        self.flops_per_image.set(flops_per_image)
        if device.type == "cuda":
            gpu = torch.cuda.get_device_properties(device)
            self.gpu_info(f"GPU-{str(gpu.uuid).removeprefix('GPU-')}", gpu.name).set(1)  # as DCGM names it

    def enter(self, state: str) -> None:
        """Note that this rank is in `state` from now on."""
        if self.state == "evaluate":
            self.eval_seconds.observe(time.monotonic() - self.entered_at)
        self.in_state(self.state).set(0)
        self.in_state(state).set(1)
        self.state = state
        self.progress_at = self.entered_at = time.monotonic()

    def resume(self, report: StepReport) -> None:
        """Start counting from a checkpoint: what happened before it belongs to an earlier process."""
        self.reported = report
        self.reached_step = report.step
        self.step.set(report.step)

    def count_step(
        self, step: int, num_images: int, num_bytes: int, seconds: float, wait_seconds: float, phases: Timing
    ) -> None:
        """Count `step`, which has just ended, on the host only: this never waits for the device.
        All numbers are this rank's. `seconds` include `wait_seconds` for data. `phases`: of finished steps.
        """
        if self.state == "setup":
            self.enter("train")
        self.reached_step, self.num_steps = step, self.num_steps + 1
        self.progress_at = time.monotonic()
        self.step.set(step)
        self.images("train").inc(num_images)
        self.data_bytes.inc(num_bytes)
        self.step_seconds.observe(seconds)
        self.data_wait_seconds.inc(wait_seconds)
        self.phase_seconds(DATA_WAIT).observe(wait_seconds)
        for measured in phases:
            for phase, phase_seconds in measured.items():
                self.phase_seconds(phase).observe(phase_seconds)
        self.last_step_timestamp.set(time.time())

    def report(self, now: StepReport) -> None:
        """Publish a log point, and count what happened since the one before."""
        before, self.reported = self.reported, now
        skipped = now.bad_steps - before.bad_steps
        self.steps("skipped").inc(skipped)
        self.steps("applied").inc(now.step - before.step - skipped)
        self.nonfinite("gradient", "skip").inc(skipped)
        self.nonfinite("batchnorm", "restore").inc(now.restores - before.restores)
        self.spikes.inc(now.spikes - before.spikes)
        for name, series in self.fields.items():
            series.set(getattr(now, name))
        if self.device.type == "cuda":
            statistics = torch.cuda.memory_stats(self.device)  # without waiting for it
            for kind, key in MEMORY_KINDS.items():
                self.gpu_memory(kind).set(statistics.get(key, 0))

    def evaluated(self, weights: str, result: Evaluation, num_images: int) -> None:
        """Publish an evaluation of `weights` (model or ema), in which this rank saw `num_images`."""
        self.eval_accuracy("1", weights).set(result.top1)
        self.eval_accuracy("5", weights).set(result.top5)
        self.eval_balanced(weights).set(result.balanced)
        self.eval_loss(weights).set(result.loss)
        if result.map is not None:
            self.eval_map(weights).set(result.map)
        self.images("eval").inc(num_images)

    def saved(self, seconds: float, num_bytes: int) -> None:
        """Publish that a checkpoint of `num_bytes` was written just now, in `seconds`."""
        self.checkpoint_seconds.observe(seconds)
        self.saved_at.set(time.time())
        self.checkpoint_bytes.set(num_bytes)
