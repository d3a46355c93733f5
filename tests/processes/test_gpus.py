"""GPUs that torch cannot use end a run with the cause in one line, unless a CPU was asked for."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.fake_driver import fake_driver
from helpers.runs import ROOT

from cmtrain.cli.main import main
from cmtrain.processes import gpus
from cmtrain.processes.environment import ignore_variables
from cmtrain.processes.gpus import has_code_for, why_no_code, why_unavailable
from cmtrain.training import build
from pipelines.spec import DataError

V100, A10, H100, B300, RTX5090 = (7, 0), (8, 6), (9, 0), (10, 3), (12, 0)
CUDA13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        (V100, CUDA13, False),
        (V100, ["sm_70", "sm_90"], True),
        (A10, ["sm_80"], True),  # machine code runs on later minor versions,
        ((8, 9), ["sm_80", "compute_120"], True),
        ((8, 0), ["sm_86"], False),  # not on earlier ones,
        (H100, ["sm_80", "sm_86"], False),  # nor on another major version
        (B300, CUDA13, True),
        (RTX5090, ["sm_90", "compute_90"], True),  # what is compiled at the start runs on all later GPUs
        (H100, ["compute_120"], False),
        ((12, 1), ["sm_90", "compute_90"], True),
        (H100, ["sm_90a"], True),  # for this GPU alone
        ((10, 3), ["sm_100a", "compute_90a"], False),
        ((10, 3), ["sm_100f"], True),  # for this family alone
        (RTX5090, ["sm_100f", "compute_100f"], False),
        (H100, [], False),
    ],
)
def test_code_runs_on_the_gpus_it_was_made_for_and_some_later_ones(capability, architectures, runs):
    assert has_code_for(capability, architectures) == runs


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "text"),
    [
        (None, 13000, "is built without CUDA: install what requirements.lock lists"),
        (None, 12040, "is built without CUDA: install what requirements-cuda120.lock lists"),
        (None, 11040, "install a driver >= 525 and what requirements-cuda120.lock lists"),
        ("12.8", None, "finds no libcuda.so.1"),
        ("12.8", 11040, "needs CUDA 12, and the driver is for 11.4: install a driver >= 525"),
        ("13.2", 12080, "is for 12.8: install a driver >= 580, or what requirements-cuda120.lock lists"),
        ("14.0", 13000, "install a driver for CUDA 14, or what requirements.lock lists"),
    ],
)
def test_the_cause_is_named(torch_cuda, driver, text):
    assert text in why_unavailable(torch_cuda, driver)


def test_a_driver_that_is_new_enough_is_no_cause():
    assert why_unavailable("12.8", 12020) == why_unavailable("12.8", 13000) == ""


def test_a_gpu_without_code_is_named_with_the_lock_that_has_some():
    names = {H100: "NVIDIA H100", V100: "Tesla V100"}
    found = why_no_code(names, CUDA13, "13.2")
    assert found == "has no code for Tesla V100 (sm_70): install what requirements-cuda120.lock lists"
    assert why_no_code({H100: "NVIDIA H100"}, CUDA13, "13.2") == ""
    assert why_no_code(names, ["sm_75", "sm_90"], "12.8").endswith("no requirements*.lock has it")
    newer = why_no_code({(13, 0): "NVIDIA R100"}, ["sm_90", "sm_120"], "12.8")
    assert newer == "has no code for NVIDIA R100 (sm_130): install what requirements.lock lists"


@pytest.fixture
def eight_gpus(monkeypatch):
    """NVML sees eight GPUs, and torch cannot use them."""
    monkeypatch.setattr(
        gpus, "visible_gpus", lambda: gpus.num_visible(os.environ.get("CUDA_VISIBLE_DEVICES"), 8)
    )
    monkeypatch.setattr(gpus, "cuda_of_driver", lambda: 11040)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is restored, whatever a test sets
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def unavailable():
        warnings.warn("CUDA initialization: too old (of several lines)", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_gpus_that_torch_cannot_use_are_refused(eight_gpus, precision):
    with pytest.raises(
        DataError, match=r"^torch .* needs CUDA 12, and the driver is for 11\.4: .* >= 525; set"
    ):
        build.make_accelerator(precision)


def test_a_gpu_that_torch_has_no_code_for_is_refused(eight_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA13)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: V100)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(DataError, match=r"no code for Tesla V100 \(sm_70\): .*requirements-cuda120\.lock"):
        build.make_accelerator("auto")


@pytest.mark.parametrize("devices", ["", "-1"])
def test_a_cpu_may_be_asked_for_as_cuda_does(eight_gpus, monkeypatch, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert gpus.why_unusable() == ""


@pytest.mark.parametrize(("value", "asks"), [("1", True), ("True", True), ("False", False), ("", False)])
def test_a_cpu_may_be_asked_for_as_accelerate_does(eight_gpus, monkeypatch, value, asks):
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    ignore_variables()
    assert (gpus.why_unusable() == "") == asks


def test_every_verb_that_computes_refuses_them(eight_gpus, make_job, monkeypatch, capsys):
    job = make_job()
    job("--max-steps", "1")
    monkeypatch.chdir(job.folder)
    run, config = str(job.run), str(job.config)
    bench = [["bench", "--what", what, "--config", config] for what in ("loader", "model")]
    for command in (["eval", run], ["repair-bn", run], *bench):
        assert main(command) == 3, command
        first, loading, error = capsys.readouterr().err.splitlines()
        assert first.startswith("cmtrain ")
        assert loading == "loading torch and DALI ..."
        assert "needs CUDA 12" in error


def start(job, driver, *options, **environment):
    command = [sys.executable, "-m", "cmtrain", "--config", str(job.config), "--max-steps", "1", *options]
    environment = os.environ | driver | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        command, cwd=job.folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_ranks_are_not_started_on_cpus_where_there_are_gpus(make_job, tmp_path):
    """Two GPUs of a driver for CUDA 11: as many ranks end before they join, and one of them reports why."""
    driver = fake_driver(tmp_path, gpus=2, cuda=11040)
    run = start(job := make_job(), driver)
    assert run.returncode == 3, run.stderr
    assert "and the driver is for 11.4: install a driver >= " in run.stderr
    first, loading, *errors = run.stderr.splitlines()
    assert first.endswith(", 2 GPUs")
    assert loading == "loading torch and DALI ..."
    assert len(set(errors)) == 1  # a slow machine may print it for both ranks
    assert not (job.run / "status.json").exists()
    many = start(job, driver, "--nproc", "3")
    assert (many.returncode, many.stderr) == (2, "--nproc 3: a GPU takes one process, and there are 2\n")
    asked = start(job, driver, ACCELERATE_USE_CPU="1")
    assert asked.returncode == 0, asked.stderr
    assert "1 process on the CPU" in asked.stderr
