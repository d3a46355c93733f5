"""Without DALI everything works that needs no images from files; the rest ends in one line."""

import json
import os
import subprocess
import sys

import pytest
from helpers.runs import ROOT, after_start

HIDDEN = ROOT / "tests" / "helpers" / "without_dali"
REMEDY = (
    "DALI is not installed: install nvidia-dali-cuda130 (or -cuda120 for drivers of CUDA 12), "
    "or run make setup"
)


def start(job, *command: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` in the folder of `job`, with DALI hidden."""
    path = os.pathsep.join([str(HIDDEN), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=job.folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_doctor_reports_it(make_job):
    run = start(job := make_job(), "cmtrain", "doctor", "--config", str(job.config))
    assert run.returncode == 3, run.stderr
    rows = {line.split("  ")[1].strip(): line for line in run.stdout.splitlines() if line.startswith("fail")}
    assert {"driver", "decode on the CPU"} <= rows.keys(), run.stdout
    assert "no DALI installed" in rows["driver"]
    assert "DALI is not installed" in rows["decode on the CPU"]
    assert after_start(run.stderr) == []


def test_a_benchmark_on_ready_images_needs_none(make_job):
    options = ("--what", "model", "--steps", "1", "--rounds", "1", "--beside", "")
    run = start(job := make_job(), "cmtrain", "bench", "--config", str(job.config), *options)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["what"] == "model"


@pytest.mark.parametrize("verb", [
    ("train",),
    pytest.param(("bench", "--what", "loader"), marks=pytest.mark.slow),
    pytest.param(("data", "preview"), marks=pytest.mark.slow),
])  # fmt: skip
def test_what_reads_images_ends_in_one_line(make_job, verb):
    run = start(job := make_job(), "cmtrain", *verb, "--config", str(job.config))
    assert run.returncode == 3
    assert after_start(run.stderr) == [REMEDY]
    assert run.stdout == ""
    assert not (job.folder / "runs" / "job" / "status.json").exists()


def test_tests_of_the_model_the_step_and_a_gpu_are_collected(make_job):
    folders = [str(ROOT / "tests" / name) for name in ("models", "step", "gpu")]
    run = start(make_job(), "pytest", *folders, "--collect-only", "-q", "-c", str(ROOT / "pyproject.toml"))
    assert run.returncode == 0, run.stdout
    assert "tests/models/test_golden.py" in run.stdout
