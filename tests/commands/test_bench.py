"""Time what is claimed to be timed, with ratios that survive a noisy machine (`cmtrain bench`)."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from guard import time_guard
from helpers.mini import batch, make_learner
from helpers.photographs import write_folder
from helpers.runs import HANG_SECONDS
from loader_beside_timm import race_loaders, summarise
from loader_workers import LoaderContender, _cpu_seconds, serve

from cmtrain.cli.main import main
from cmtrain.commands.bench import bench as bench_command
from cmtrain.commands.bench.bench import to_decode_faster, verdict
from cmtrain.commands.bench.timing import WARMUP_STEPS, Contender, race
from cmtrain.config.load import load_config
from cmtrain.monitoring.console import announced_parts
from pipelines.files.manifest import Manifest
from pipelines.spec import AugmentSpec, Placement


@pytest.mark.parametrize(
    ("loader", "host", "copy", "matrix", "expected"),
    [
        (900, 0.2, 60, 5, "limited by decode: the loader feeds 90 % of what the model takes, "
         "100 images/s short; pack them"),
        (1100, 0.2, 60, 5, "limited by memory: 60 % of a copy's bandwidth, counted as without "
         "torch.compile; the loader feeds 110 % of what the model takes, which leaves little for jitter"),
        (2000, 0.95, 60, 5, "limited by host: it needs 95 % of a step to queue it; the loader feeds 200 %"),
        (2000, 0.2, 20, 45, "limited by compute: 45 % of a matrix product's rate; the loader feeds 200 %"),
    ],
)  # fmt: skip
def test_the_verdict_names_what_limits_a_run(loader, host, copy, matrix, expected):
    model = {
        "images_per_second": 1000,
        "host_share": host,
        "percent_of_copy": copy,
        "percent_of_matrix": matrix,
    }
    figures = {"loader": {"images_per_second": loader}, "model": model}
    assert verdict(figures, "pack them").startswith(expected)


@pytest.mark.parametrize(
    ("size", "advice"),
    [((500, 375), "cmtrain data pack --resize-shorter 256 makes images of 375 px faster to decode"),
     ((341, 256), "give it more CPU cores, or a GPU that decodes")],
)  # fmt: skip
def test_large_images_are_to_be_packed(size, advice):
    widths, heights = (np.full(9, side) for side in size)
    config = load_config("configs/full_in1k.yaml").config
    assert to_decode_faster(config, SimpleNamespace(widths=widths, heights=heights)) == advice


def test_the_verdict_agrees_with_what_loading_costs_a_step():
    """A loader that is fast alone may be slow beside the model: on a CPU they share its cores."""
    model = {"images_per_second": 1000, "percent_of_copy": 20, "percent_of_matrix": 45}
    figures = {"loader": {"images_per_second": 2350}, "model": model, "train": {"data_wait_percent": 42.0}}
    assert verdict(figures, "") == (
        "limited by decode: loading costs 42 % of a step, though alone the loader feeds 235 % of what the "
        "model takes: the two share this machine"
    )
    figures["train"] = {"data_wait_percent": 7.0}
    assert verdict(figures, "").startswith("limited by compute: 45 %")


ROW = {
    "images_per_second": 1234.5,
    "step_ms_mean": 52.31,
    "percent_of_copy": 20.4,
    "percent_of_matrix": 45.0,
}
TIMES = {"images_per_second": 80.25, "ms_p50": 12.31, "ms_p95": 140.2}
MACHINE = {"copy_gb_per_second": 8.123, "matrix_tflops": 0.1234}
BEST = "of the machine's best"


@pytest.mark.parametrize(
    ("what", "figures", "header", "cells"),
    [
        ("all", {"loader": {"images_per_second": 99.0}, "train": ROW | {"data_wait_percent": 42.0}},
         ["images/s", "ms per step", "lost to loading", BEST],
         ["train", "1,234", "52.3", "42 %", "memory 20 %, compute 45 %"]),
        ("model", {"m infer": TIMES, "resnet50 infer": TIMES | ROW | {"first_is_times": 3.21}},
         ["images/s", "median ms", "first is", BEST],
         ["resnet50 infer", "1,234", "12.3", "3.21 x as fast", "memory 20 %, compute 45 %"]),
        ("model", {"m infer": TIMES, "machine": MACHINE}, ["images/s", "median ms", "first is", BEST],
         ["machine", "8.12 GB/s, 0.123 TFLOP/s"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_five_columns_with_units(what, figures, header, cells, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    report = {"what": what, "model": "m", "image_px": 32, "precision": "fp32", "device": "cpu", "batch": 8}
    bench_command._show(report | {"figures": figures, "verdict": "limited by x"})
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert "\u2026" not in shown
    assert lines[-1] == "limited by x"
    if width == 120:
        found = [[text.strip() for text in line.split("  ") if text.strip()] for line in lines]
        assert ["measured", *header] in found
        assert cells in found


def test_nobody_waits_for_a_sign_of_life(monkeypatch, capsys):
    monkeypatch.setattr("cmtrain.monitoring.console.SILENT_SECONDS", 0.01)
    seen, deadline, before = "", time.monotonic() + 60, threading.active_count()
    with announced_parts(7) as begin:
        begin("resnet50")
        while seen.count("[1 of 7] resnet50 ... 0s\n") < 3:
            assert time.monotonic() < deadline
            seen += capsys.readouterr().err
            time.sleep(0.01)
        begin("cmt_ti")
    assert seen.startswith("[1 of 7] resnet50 ...\n")
    assert "[2 of 7] cmt_ti ...\n" in seen + capsys.readouterr().err
    assert threading.active_count() <= before
    with announced_parts(7, enabled=False) as begin:
        begin("resnet50")
    assert capsys.readouterr().err == ""


def test_a_ratio_compares_what_ran_in_the_same_round():
    """The machine is four times slower in the second round and timm alone is disturbed in the third."""
    rates = [(100, 200), (25, 50), (10, 190)]
    rounds = [
        {
            "timm": {"images_per_second": timm, "cpu_ms_per_image": 8.0},
            "dali": {"images_per_second": dali, "cpu_ms_per_image": ms},
        }
        for (timm, dali), ms in zip(rates, (4.0, 2.0, 5.0), strict=True)
    ]
    figures = summarise(rounds)
    assert figures["dali"]["times_timm"] == 2.0
    assert figures["dali"]["times_timm_by_cpu"] == 2.0
    assert figures["dali"]["images_per_second"] == 190
    assert figures["dali"]["cpu_ms_per_image_min"] == 2.0
    assert "times_timm" not in figures["timm"]


def test_the_time_of_workers_counts():
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    before = _cpu_seconds(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        worker.stdout.readline()
        assert 0.4 < _cpu_seconds(os.getpid()) - before < 5
        worker.stdin.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_folder(folder / "train", 64)
    write_folder(folder / "val", 3)
    return folder


def bench(what, config, **options):
    """Call bench with the defaults of the command line."""
    defaults = {"what": what, "rounds": 5, "beside": [], "json": None, "predict": None}
    return bench_command.bench(config, argparse.Namespace(**defaults | options))


@pytest.mark.parametrize("kind", ["timm", "dali"])
def test_a_loader_and_its_workers_stay_on_their_core_and_end_with_the_pipe(root, tmp_path, kind):
    manifest = Manifest.from_folder(root / "train", cache_dir=tmp_path)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, LoaderContender(kind, manifest, Placement())))
    process.start()
    theirs.close()
    try:
        pipe.send(("prepare", AugmentSpec(32, rand_augment="rand-m9-mstd0.5-inc1")))
        assert pipe.recv() == 2 * 64
        family = [process.pid, *_children(process.pid)]
        assert len(family) == (2 if kind == "timm" else 1)
        for pid in family:
            assert len(os.sched_getaffinity(pid)) == 1
        pipe.send(("measure", 2))
        figures = pipe.recv()
        assert figures["images_per_second"] > 0
        assert figures["cpu_ms_per_image"] > 0
    finally:
        pipe.close()
    process.join(HANG_SECONDS)
    assert process.exitcode == 0
    deadline = time.monotonic() + HANG_SECONDS
    while any(os.path.exists(f"/proc/{pid}") for pid in family[1:]):
        assert time.monotonic() < deadline


def _children(pid: int) -> list[int]:
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(child) for child in file.read().split()]
    return found


def test_the_loader_alone(root, tmp_path, capsys):
    bench("loader", small(root, tmp_path), steps=2)
    report = json.loads(capsys.readouterr().out)
    assert list(report["figures"]) == ["loader"]
    assert report["figures"]["loader"]["images_per_second"] > 0


@pytest.mark.slow
def test_every_work_is_done_by_every_loader(root, tmp_path, capsys):
    overrides = {"data.root": str(root), "data.cache_dir": str(tmp_path), "data.threads": "1"}
    config = load_config("configs/demo.yaml", list(overrides.items())).config
    json_path = tmp_path / "figures.json"
    race_loaders(config, steps=1, rounds=1, packed=None, json_path=str(json_path))
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(json_path.read_text())
    assert list(report["cpu"]) == ["decode", "crop", "crop + jitter", "crop + randaugment"]
    for figures in report["cpu"].values():
        assert list(figures) == ["timm", "dali", "dali packed"]
        assert figures["dali"]["times_timm"] > 0
    assert report["overhead"]["draws_us_per_sample"] > 0


def test_steps_with_the_guard_and_without_take_turns(monkeypatch):
    learner = make_learner()
    guard, buffer, step, turns = learner.guard, learner.buffer, learner.step, []

    def noted(*arguments):
        turns.append("with" if (learner.guard, learner.buffer) == (guard, buffer) else "without")
        return step(*arguments)

    monkeypatch.setattr(learner, "step", noted)
    how = {"lr": 0.01, "steps": 2, "rounds": 2, "log_every_steps": 10}
    figures = dict(time_guard(learner, map(batch, itertools.count()), **how))
    assert turns[: 2 * WARMUP_STEPS] == ["with"] * WARMUP_STEPS + ["without"] * WARMUP_STEPS
    assert (
        turns[2 * WARMUP_STEPS :] == ["without"] * 2 + ["with"] * 4 + ["without"] * 2 + ["with"] * 2
    )  # for the save
    assert (learner.guard, learner.buffer) == (guard, buffer)
    assert 0 < figures["alone"]["ms"] < figures["without"]["ms"]
    assert figures["with"]["percent_min"] <= figures["with"]["percent"] <= figures["with"]["percent_max"]


# --- models beside models, ceilings ---


def small(root, tmp_path, **more):
    overrides = {
        "data.root": str(root), "data.cache_dir": str(tmp_path), "data.threads": "1",
        "train.global_batch_size": "8",
    }  # fmt: skip
    return load_config("configs/demo.yaml", list((overrides | more).items())).config


def test_models_take_turns_through_the_same_step(root, tmp_path, capsys):
    config = small(root, tmp_path)
    bench("model", config, steps=2, rounds=2, beside=["resnet18", "cmt_micro"])
    report = json.loads(capsys.readouterr().out)
    rows = report["figures"]
    assert list(rows) == [
        "cmt_micro train",
        "resnet18 train",
        "cmt_micro infer",
        "resnet18 infer",
        "machine",
    ]
    for name in list(rows)[:4]:
        assert rows[name]["ms_p50"] <= rows[name]["ms_p95"]
        assert 0 < rows[name]["percent_of_copy"] < 200
        assert 0 < rows[name]["percent_of_matrix"] < 200
    assert rows["resnet18 train"]["first_is_times"] > 1  # 10 times the arithmetic
    assert "first_is_times" not in rows["cmt_micro train"]
    # A step moves about three times what a forward pass moves.
    assert 2 < rows["resnet18 train"]["mb_per_image"] / rows["resnet18 infer"]["mb_per_image"] < 4


def test_a_race_alternates_and_its_ratio_is_that_of_a_round():
    order = []

    def work(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    contenders = [Contender("a", 4, work("a", 0.001)), Contender("b", 4, work("b", 0.004))]
    race(contenders, torch.device("cpu"), steps=1, rounds=2)
    assert order == ["a"] * 4 + ["b"] * 4 + ["b", "a", "a", "b"]
    contenders[0].seconds, contenders[1].seconds = [[0.1, 0.1], [0.4, 0.4]], [[0.3, 0.3], [1.2, 1.2]]
    slow = contenders[1].figures(contenders[0])
    assert slow["first_is_times"] == pytest.approx(3)
    assert slow["images_per_second"] == pytest.approx((8 / 0.6 + 8 / 2.4) / 2)


def test_a_prediction_needs_neither_dali_nor_data_nor_a_gpu(make_job, monkeypatch, capsys):
    """The rows name every kernel of the step, from the stem's convolution to the EMA; all is predicted."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    job = make_job(data={"root": "/nowhere"}, train={"precision": "auto"})
    path = str(job.folder / "h200.json")
    options = "--what", "model", "--predict", "h200", "--json", path
    assert main(["bench", "--config", str(job.config), *options]) == 0
    out, err = capsys.readouterr()
    report = json.loads(Path(path).read_text())
    assert report == json.loads(out)
    assert report["verdict"] in err
    assert report["verdict"].startswith("predicted, not measured")
    assert (report["device"], report["precision"], report["batch"]) == ("h200 (predicted)", "fp16", 8)
    rows, step = report["rows"], report["figures"].pop("step")
    assert report["predicted_step_ms"] == step["ms"] == pytest.approx(sum(row["ms"] for row in rows))
    assert report["predicted_images_per_second"] == pytest.approx(1000 * 8 / step["ms"])
    assert report["predicted_cautious_images_per_second"] <= report["predicted_images_per_second"]
    assert report["kernels"] == step["launches"] == sum(row["launches"] for row in rows)
    assert all(figure.keys() == {"launches", "mb", "ms", "bound"} for figure in report["figures"].values())
    keys = {"kernel", "sizes", "launches", "mb", "instructions", "ms", "bound", "path"}
    assert all(row.keys() == keys for row in rows)
    kernels = {row["kernel"] for row in rows}
    assert {"convolution", "norm_kernel", "depthwise_grad_kernel", "_log_softmax"} <= kernels
    assert {"_amp_foreach_non_finite_check_and_unscale_", "_foreach_norm", "_fused_adamw_"} <= kernels
    assert sum(row["kernel"] == "_foreach_sub" for row in rows) == 1  # of the EMA
    assert not any(row["kernel"].startswith("zeros_like") for row in rows)  # of the optimizer's first step


def test_a_prediction_is_of_blocks_that_are_computed_once(make_job, capsys):
    job = make_job(train={"precision": "auto"})
    predicted = []
    for value in ("false", "true"):
        options = "--what", "model", "--predict", "h100", "--train.grad_checkpointing", value
        assert main(["bench", "--config", str(job.config), *options]) == 0
        predicted.append(json.loads(capsys.readouterr().out)["predicted_step_ms"])
    assert predicted[0] == predicted[1]


def test_a_prediction_is_in_half_precision(make_job, capsys):
    job = make_job(train={"precision": "fp32"})
    assert main(["bench", "--config", str(job.config), "--what", "model", "--predict", "a100"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "train.precision: --predict knows fp16 and bf16, not fp32"


def test_all_names_what_limits_a_run(root, tmp_path, capsys):
    bench("all", small(root, tmp_path), steps=2)
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line.endswith(" ...")] == [
        "[1 of 4] the loader alone ...", "[2 of 4] cmt_micro alone ...",
        "[3 of 4] copies and matrix products ...", "[4 of 4] training on real images ...",
    ]  # fmt: skip
    report = json.loads(out)
    assert list(report["figures"]) == ["loader", "model", "train"]
    assert report["verdict"].startswith("limited by ")
    assert report["figures"]["model"]["mb_per_image"] > 1


def test_an_interrupted_benchmark_leaves_the_rows_that_were_known(root, tmp_path, monkeypatch):
    time_steps, path = bench_command._time_steps, tmp_path / "figures.json"

    def interrupted(learner, batches, setup):
        if isinstance(batches, itertools.repeat):  # of synthetic ones
            return time_steps(learner, batches, setup)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_command, "_time_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench("all", small(root, tmp_path), steps=1, json=str(path))
    report = json.loads(path.read_text())
    assert list(report["figures"]) == ["loader", "model"]
    assert report["figures"]["model"]["images_per_second"] > 0
    assert report["verdict"] == "unfinished"
