"""Metric names follow Prometheus' rules, start at zero and count what happened."""

import dataclasses
import shutil
import socket
import subprocess
import urllib.request

import pytest
from prometheus_client import generate_latest

from cmtrain.metrics import StepReport, TrainMetrics, serve

REPORT = StepReport(step=10, epoch=1, loss=2.5, lr=0.1, grad_norm=3.0, loss_scale=65536.0, bad_steps=2, bad_steps_in_a_row=1, restores=1)  # fmt: skip  # noqa: E501


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"cmtrain_{name}", {"run": "r", "rank": "0", **labels})


def test_series_are_there_before_anything_happened():
    metrics = TrainMetrics("r", 0)
    assert value(metrics, "images_total", split="train") == 0
    assert value(metrics, "steps_total", result="skipped") == 0
    assert value(metrics, "nonfinite_total", where="batchnorm", action="restore") == 0
    assert value(metrics, "checkpoint_failures_total") == 0


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
    metrics.count_step(num_images=64, seconds=0.2, wait_seconds=0.05)
    assert value(metrics, "images_total", split="train") == 64
    assert value(metrics, "step_duration_seconds_count") == 1
    assert value(metrics, "data_wait_seconds_total") == 0.05
    assert value(metrics, "last_step_timestamp_seconds") > 0


def test_two_runs_in_one_process_do_not_clash():
    TrainMetrics("a", 0)
    TrainMetrics("a", 0)


def test_serves_over_http_and_moves_to_a_free_port_when_taken():
    metrics = TrainMetrics("r", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url, server = serve(metrics.registry, "127.0.0.1", taken.getsockname()[1])
        try:
            assert not url.startswith(f"http://127.0.0.1:{taken.getsockname()[1]}/")
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert b'cmtrain_images_total{rank="0",run="r",split="train"} 0.0' in opener.open(url, timeout=10).read()
        finally:
            server.shutdown()
            server.server_close()


def test_names_satisfy_promtool():
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    metrics = TrainMetrics("r", 0)
    metrics.report(REPORT)
    subprocess.run(["promtool", "check", "metrics"], input=generate_latest(metrics.registry), check=True, timeout=60)


def test_a_rank_has_few_series():
    lines = [line for line in generate_latest(TrainMetrics("r", 0).registry).decode().splitlines() if line[0] != "#"]
    assert len(lines) <= 150
