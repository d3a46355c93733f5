"""Metric names follow Prometheus' rules, start at zero and count what happened."""

import dataclasses
import re
import runpy
import subprocess
import time

import torch
from helpers.runs import ROOT
from helpers.tools import needs
from prometheus_client import generate_latest

from cmtrain.monitoring.metrics import STATES, TrainMetrics
from cmtrain.step.evaluate import Evaluation
from cmtrain.step.measure import StepReport
from pipelines.files import objects

FACTS = {"model": "cmt_ti", "precision": "fp16", "device": "cuda", "world_size": "8", "version": "0.1.0"}
REPORT = StepReport(
    step=10, epoch=1, loss=2.5, lr=0.1, grad_norm=3.0, loss_scale=65536.0, bad_steps=2, bad_steps_in_a_row=1,
    good_steps_in_a_row=0, restores=1, spikes=3,
)  # fmt: skip


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"cmtrain_{name}", {"run": "r", "rank": "0", **labels})


def test_series_are_there_before_anything_happened():
    metrics = TrainMetrics("r", 0)
    assert value(metrics, "images_total", split="train") == 0
    assert value(metrics, "steps_total", result="skipped") == 0
    assert value(metrics, "nonfinite_total", where="batchnorm", action="restore") == 0
    assert value(metrics, "checkpoint_failures_total") == 0


def test_what_was_read_from_a_bucket_is_counted_as_it_is_read(monkeypatch):
    metrics = TrainMetrics("r", 0)
    for number, name in enumerate(("requests", "bytes", *objects.REASONS), start=7):
        monkeypatch.setitem(objects.COUNTS, name, number)
    assert value(metrics, "store_requests_total") == 7
    assert value(metrics, "store_bytes_total") == 8
    retries = [value(metrics, "store_retries_total", reason=reason) for reason in objects.REASONS]
    assert retries == list(range(9, 9 + len(objects.REASONS)))


def test_a_report_is_counted_once():
    metrics = TrainMetrics("r", 0)
    metrics.report(REPORT)
    assert value(metrics, "steps_total", result="applied") == 8
    assert value(metrics, "steps_total", result="skipped") == 2
    metrics.report(dataclasses.replace(REPORT, step=20, bad_steps=3))
    assert value(metrics, "steps_total", result="applied") == 17
    assert value(metrics, "steps_total", result="skipped") == 3
    assert value(metrics, "nonfinite_total", where="gradient", action="skip") == 3
    assert value(metrics, "train_loss") == 2.5
    assert value(metrics, "loss_scale") == 65536


def test_a_resumed_run_does_not_count_the_past_again():
    metrics = TrainMetrics("r", 0)
    metrics.resume(REPORT)
    metrics.report(dataclasses.replace(REPORT, step=11))
    assert value(metrics, "steps_total", result="applied") == 1
    assert value(metrics, "steps_total", result="skipped") == 0


def test_steps_and_waiting():
    metrics = TrainMetrics("r", 0)
    phases = [
        {"forward": 0.1, "backward": 0.2, "optimizer": 0.01},
        {"forward": 0.3, "backward": 0.2, "optimizer": 0},
    ]
    metrics.count_step(7, num_images=64, num_bytes=5000, seconds=0.2, wait_seconds=0.05, phases=phases)
    assert value(metrics, "step") == 7
    assert value(metrics, "images_total", split="train") == 64
    assert value(metrics, "data_bytes_total") == 5000
    assert value(metrics, "step_duration_seconds_count") == 1
    assert value(metrics, "data_wait_seconds_total") == 0.05
    assert value(metrics, "phase_duration_seconds_sum", phase="data_wait") == 0.05
    assert value(metrics, "phase_duration_seconds_sum", phase="forward") == 0.4
    assert value(metrics, "phase_duration_seconds_count", phase="forward") == 2
    assert value(metrics, "last_step_timestamp_seconds") > 0


def test_events_are_counted():
    metrics = TrainMetrics("r", 0)
    metrics.decode_errors("truncated").inc()
    metrics.rollbacks.inc()
    metrics.nonfinite("ema", "heal").inc()
    metrics.checkpoint_failures.inc()
    metrics.checkpoint_wait.inc(0.5)
    metrics.saved(seconds=2.0, num_bytes=1000)
    metrics.best_accuracy.set(0.7)
    metrics.eta_timestamp.set(1.79e9)
    counts = {"class_images": [60, 40], "class_correct": [30, 0]}
    metrics.evaluated(
        "ema", Evaluation(top1=0.5, top5=0.9, loss=1.0, num_images=100, **counts), num_images=50
    )
    assert value(metrics, "data_decode_errors_total", kind="truncated") == 1
    assert value(metrics, "rollbacks_total") == 1
    assert value(metrics, "nonfinite_total", where="ema", action="heal") == 1
    assert value(metrics, "checkpoint_failures_total") == 1
    assert value(metrics, "checkpoint_wait_seconds_total") == 0.5
    assert value(metrics, "checkpoint_duration_seconds_sum") == 2
    assert value(metrics, "checkpoint_size_bytes") == 1000
    assert value(metrics, "checkpoint_last_success_timestamp_seconds") > 0
    assert value(metrics, "eval_best_accuracy_ratio") == 0.7
    assert value(metrics, "eta_timestamp_seconds") == 1.79e9
    assert value(metrics, "eval_accuracy_ratio", k="1", weights="ema") == 0.5
    assert value(metrics, "eval_accuracy_ratio", k="5", weights="ema") == 0.9
    assert value(metrics, "eval_balanced_accuracy_ratio", weights="ema") == 0.25
    assert value(metrics, "eval_loss", weights="ema") == 1
    assert value(metrics, "images_total", split="eval") == 50


def test_a_rank_is_in_one_state():
    metrics = TrainMetrics("r", 0)

    def states():
        return [state for state in STATES if value(metrics, "state", state=state)]

    assert states() == ["setup"]
    metrics.count_step(1, num_images=1, num_bytes=1, seconds=1, wait_seconds=0, phases=[])
    assert states() == ["train"]
    metrics.enter("evaluate")
    assert states() == ["evaluate"]
    assert value(metrics, "eval_duration_seconds_count") == 0
    metrics.enter("train")
    assert states() == ["train"]
    assert value(metrics, "eval_duration_seconds_count") == 1


def test_two_runs_in_one_process_do_not_clash():
    TrainMetrics("a", 0)
    TrainMetrics("a", 0)


def every_metric():
    """Return a rank's metrics with all series, as on a GPU after an evaluation and a checkpoint."""
    metrics = TrainMetrics("r", 0)
    metrics.report(REPORT)
    metrics.start(FACTS, last_step=20, flops_per_image=10, device=torch.device("cpu"))
    metrics.gpu_info("GPU-0", "H100").set(1)
    for kind in ("allocated", "reserved", "peak"):
        metrics.gpu_memory(kind).set(1)
    for weights in ("model", "ema"):
        result = Evaluation(top1=0.5, top5=0.9, loss=1.0, num_images=100, map=0.8)
        metrics.evaluated(weights, result, num_images=50)
    return metrics


@needs("promtool")
def test_names_satisfy_promtool():
    page = generate_latest(every_metric().registry)
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_names_have_units_and_labels_are_few():
    """Prometheus' naming rules, where promtool does not check them."""
    for family in every_metric().registry.collect():
        if not family.name.startswith("cmtrain_"):
            assert re.match("process_|python_", family.name)
            continue
        assert re.fullmatch(r"[a-z0-9_]+", family.name)
        assert family.documentation.endswith(".")
        words = family.name.split("_")
        assert not {"ms", "percent", "gib", "mib", "throughput"} & set(words)
        assert family.type != "histogram" or words[-2:] == ["duration", "seconds"]
        assert "timestamp" not in words or words[-1] == "seconds"
        for sample in family.samples:
            assert (sample.labels["run"], sample.labels["rank"]) == ("r", "0")
            assert not any("/" in text for text in sample.labels.values())


def test_every_metric_is_documented():
    """docs/metrics.md has a row per metric: name, type, labels, meaning. A failure prints the difference."""
    lines = set()
    for family in every_metric().registry.collect():
        if family.name.startswith("cmtrain_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = sorted(
                {label for sample in family.samples for label in sample.labels} - {"run", "rank", "le"}
            )
            lines.add(
                " ".join(
                    f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |".split()
                )
            )
    documented = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    assert lines == {line for line in documented if line.startswith("| `cmtrain_")}


def test_a_rank_has_few_series():
    lines = [
        line for line in generate_latest(every_metric().registry).decode().splitlines() if line[0] != "#"
    ]
    assert len(lines) <= 150


def test_what_metrics_cost_can_be_measured():
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "metrics_cost.py"))
    begin = time.thread_time()
    benchmark["work"](1000, TrainMetrics("r", 0), 50)
    seconds = (time.thread_time() - begin) / 1000
    assert seconds < 0.05 * benchmark["STEP_SECONDS"]  # it is 0.3 %; shared machines are slow at times
