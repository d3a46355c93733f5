"""Check everything that a run needs, and end with exit code 3 if it is missing (`cmtrain doctor`)."""

import json
import os
import platform
import re
import shutil
from importlib import metadata

import pytest
import torch
from helpers.runs import Forked, Job

from cmtrain.commands import doctor
from cmtrain.commands.doctor import CheckResult, checkpoint_bytes, pairing, worst
from cmtrain.config.load import load_config
from cmtrain.processes import gpus
from cmtrain.storage.run_folder import RunLock

CUDA130, CUDA120, CUDA110 = ([f"nvidia-dali-cuda{number}"] for number in (130, 120, 110))
LOCKS = {
    "requirements.lock": ("13.2", CUDA130),
    "requirements-cuda120.lock": ("12.8", CUDA120),
    "requirements-cuda110.lock": ("12.8", CUDA110),
}
DRIVERS = {"525": 12000, "580": 13000}


def examined(job: Job, code: int, nproc: int = 1) -> dict[str, dict]:
    """Results of `cmtrain doctor --json` for `job`, by check."""
    command = ["cmtrain", "doctor", "--config", str(job.config), "--json"]
    process = Forked(command, job.folder, {}, nproc)
    out, err = process.communicate()
    assert process.returncode == code, f"{out}\n{err}"
    report = json.loads(out)
    assert report["ok"] == (code == 0)
    return {result["check"]: result for result in report["checks"]}


def test_a_machine_that_can_train_passes_and_nothing_is_left_behind(make_job):
    job = make_job()
    found = examined(job, code=0)
    assert found["data"]["found"].endswith(": 96 training, 31 validation images, 3 classes")
    assert {result["verdict"] for result in found.values()} <= {"ok", "warn"}
    if not torch.cuda.is_available():
        assert {check for check in found if found[check]["verdict"] == "warn"} >= {
            "GPUs",
            "decode on the GPU",
        }
    assert all(result["advice"] for result in found.values() if result["verdict"] == "warn")
    assert not (job.folder / "runs").exists()


def test_all_ranks_check_and_one_reports(make_job):
    found = examined(make_job(), code=0, nproc=2)
    same = "2 on 1 host(s): same code and configuration; gloo's sum of ones is 2"
    assert found["ranks"]["found"] == same


def test_everything_that_is_missing_is_reported_at_once(make_job, tmp_path):
    job = make_job(data={"root": str(tmp_path / "nowhere")})
    lock = RunLock(job.run)
    lock.acquire()
    found = examined(job, code=3)
    lock.close()
    assert {check for check in found if found[check]["verdict"] == "fail"} == {"data", "run folder"}
    assert "nowhere" in found["data"]["found"]
    assert f"process {os.getpid()}" in found["run folder"]["found"]


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "flavours", "verdict", "text"),
    [
        (13000, "13.2", CUDA130, "ok", "driver for CUDA 13.0"),
        (12040, "12.8", CUDA120, "ok", "driver for CUDA 12.4"),
        (13000, "12.8", CUDA120, "ok", "DALI for CUDA 12"),
        (12040, "13.2", CUDA130, "fail", "driver >= 580, or what requirements-cuda120.lock lists"),
        (11040, "12.8", CUDA110, "fail", "driver >= 525"),
        (13000, None, CUDA130, "fail", "install what requirements.lock lists"),
        (None, "13.2", CUDA130, "warn", "on the CPU"),
        (13000, "13.2", [], "fail", "exactly one"),
        (13000, "13.2", CUDA120 + CUDA130, "fail", "exactly one"),
    ],
)
def test_driver_torch_and_dali_must_go_together(driver, torch_cuda, flavours, verdict, text):
    result = pairing(driver, torch_cuda, flavours)
    assert result.verdict == verdict
    assert text in f"{result.found}; {result.advice}"


@pytest.mark.parametrize("driver", [11040, 12040, 13000])
@pytest.mark.parametrize("torch_cuda", [None, "12.8", "13.2"])
@pytest.mark.parametrize("flavours", [CUDA110, CUDA120, CUDA130])
def test_advice_on_the_pairing_helps_and_never_names_what_is_installed(driver, torch_cuda, flavours):
    result = pairing(driver, torch_cuda, flavours)
    needed = max(float(torch_cuda or "99"), int(flavours[0][-3:]) / 10) // 1
    assert result.verdict == ("ok" if needed <= driver / 1000 else "fail")
    for way in result.advice.split(", or ") if result.advice else ():
        drivers, locks = re.findall(r">= (\d+)", way), re.findall(r"requirements[-\w]*\.lock", way)
        assert drivers or locks
        changed = LOCKS[locks[0]] if locks else (torch_cuda, flavours)
        assert locks == [] or changed != (torch_cuda, flavours)
        assert pairing(DRIVERS[drivers[0]] if drivers else driver, *changed).verdict == "ok", way


def test_the_gravest_result_of_all_ranks_is_shown():
    ok, warn, fail = (CheckResult(verdict, verdict) for verdict in ("ok", "warn", "fail"))
    assert worst([ok, ok]) == ok
    assert worst([ok, warn, fail, fail]).found == "rank 2: fail"
    assert worst([warn, ok]) == warn


def test_the_versions_of_packages_are_listed(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.1" if name == "timm" else "1.2")
    found = doctor.packages().found
    assert found.startswith(f"Python {platform.python_version()}, torch 1.2, torchvision 1.2, timm 0.9.1, ")


def test_an_error_is_a_result():
    def broken() -> CheckResult:
        raise ImportError("libnvjpeg.so.13:\ncannot open")

    assert doctor._result(broken) == CheckResult("fail", "ImportError: libnvjpeg.so.13: cannot open")


@pytest.mark.parametrize("optim", [{"opt": "adamw"}, {"opt": "sgd", "weight_decay": 0.0}])
def test_size_of_a_checkpoint_is_known_before_there_is_one(make_job, optim):
    job = make_job(optim=optim)
    job("--max-steps", "1")
    size = next(job.run.glob("checkpoints/step-*/state.safetensors")).stat().st_size
    assert checkpoint_bytes(load_config(job.config).config, num_classes=3) == pytest.approx(size, rel=0.2)


def test_a_disk_too_small_for_the_checkpoints_fails(make_job, monkeypatch, tmp_path):
    config = load_config(make_job(checkpoint={"keep": 3, "milestone_every_epochs": 1}).config).config
    size = checkpoint_bytes(config, 3)
    for free, verdict in (
        (8 * size, "ok"),
        (8 * size - 1, "fail"),
    ):  # 3 newest, 3 milestones, the best, the next
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert doctor.disk(config, tmp_path / "runs" / "a", 3).verdict == verdict


def test_fp16_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "visible_gpus", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.gpus("auto").verdict == "warn"
    for precision in ("fp16", "tf32"):
        result = doctor._result(lambda precision=precision: doctor.gpus(precision))
        assert result.verdict == "fail"
        assert f"{precision} needs a CUDA device" in result.found


def test_gpus_that_torch_cannot_use_are_a_failure_with_its_cause(monkeypatch):
    monkeypatch.setattr(gpus, "visible_gpus", lambda: 8)
    monkeypatch.setattr(gpus, "cuda_of_driver", lambda: 11040)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    result = doctor.gpus("auto")
    assert result.verdict == "fail"
    assert "the driver is for 11.4" in result.found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert "has no code for Tesla V100 (sm_70)" in doctor.gpus("auto").found


def test_a_machine_without_dali_is_named_as_such(monkeypatch):
    monkeypatch.setattr(doctor, "dali_packages", list)
    assert doctor.packages().found.endswith(", no DALI installed")
    assert pairing(13000, "13.2", []).found == "no DALI installed"
