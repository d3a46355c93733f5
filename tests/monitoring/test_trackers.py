"""Trackers get the records of the run folder, and their failures do not harm the run."""

import csv
import importlib.util
import json
import os
from typing import get_args

import pytest
from accelerate.utils import LoggerType
from helpers.runs import after_start

from cmtrain.config.sections import Tracker
from cmtrain.errors import ConfigError
from cmtrain.monitoring.trackers import Trackers, tracker_options
from cmtrain.step.measure import StepReport
from cmtrain.training.run_logger import RunLogger
from pipelines.spec import DataError

# What accelerate needs of the package, each call written down as a line.
FAKE_WANDB = """
import json, os
def _note(*call):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")
class _Config:
    def update(self, values, allow_val_change): _note("config", values)
class _Run:
    def log(self, values, step): _note("log", step, values)
    def finish(self): _note("finish")
config = _Config()
def init(**options):
    _note("init", options)
    return _Run()
"""


class FakeAccelerator:
    """A main process with one tracker, which fails in the methods named `broken`."""

    is_main_process, log_with = True, ("fake",)

    def __init__(self, *broken: str) -> None:
        self.broken, self.calls, self.trackers = broken, [], [self]

    def _call(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.broken:
            raise RuntimeError(f"no\n{name}" + "!" * 999)

    def init_trackers(self, project, config, init_kwargs):
        self._call("init", project, config, init_kwargs)

    def log(self, values, step):
        self._call("log", values, step)

    def finish(self):
        self._call("finish")


def test_trackers_get_the_records_of_the_run_folder(make_job, tmp_path):
    package = tmp_path / "packages"
    for name, text in (
        ("wandb/__init__.py", FAKE_WANDB),
        ("wandb-9.dist-info/METADATA", "Name: wandb\nVersion: 9\n"),
    ):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text(text)
    path = f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    job = make_job(metrics={"enabled": False, "trackers": ["wandb"]})
    job("--max-steps", "7", launcher=["-m"], PYTHONPATH=path, FAKE_WANDB_CALLS=str(tmp_path / "calls"))
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == [
        "init",
        "config",
        "log",
        "log",
        "log",
        "log",
        "log",
        "log",
        "finish",
    ]
    assert calls[0][1] == {"project": "cmtrain", "name": "job"}
    assert (calls[1][1]["optim.lr"], calls[1][1]["augment.scale"]) == (2e-3, "[0.08, 1.0]")
    logged = [call[1:] for call in calls if call[0] == "log"]
    points = [
        [r.pop("step"), {k: v for k, v in r.items() if k != "time" and v is not None}] for r in job.log()
    ]
    rows = csv.DictReader((job.run / "summary.csv").read_text().splitlines())
    evaluations = [[int(row.pop("step")), {k: float(v) for k, v in row.items() if v}] for row in rows]
    assert sorted(logged, key=str) == sorted(points + evaluations, key=str)


def test_a_missing_package_is_a_mistake_in_the_configuration(make_job, monkeypatch, tmp_path):
    if importlib.util.find_spec("mlflow") is None:
        job = make_job(metrics={"trackers": ["mlflow"]})
        job(code=2)
        assert after_start(job.stderr.read_text()) == [
            "metrics.trackers: not installed: mlflow; pip install mlflow, or leave it out"
        ]
        assert not job.run.exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: wandb, mlflow; pip install wandb mlflow, or"):
        tracker_options(["wandb", "mlflow"], tmp_path)
    assert tracker_options([], tmp_path) == {}


def test_there_are_all_that_accelerate_knows():
    assert {*get_args(Tracker)} == {kind.value for kind in LoggerType} - {"all"}


def test_a_tracker_that_cannot_start_stops_the_run_at_once():
    with pytest.raises(
        DataError, match=r"^metrics.trackers: cannot start: RuntimeError: no init!+\.\.\.; leave it out"
    ):
        Trackers(FakeAccelerator("init"), "run", {})


def test_a_tracker_that_breaks_is_reported_once(tmp_path, capsys):
    accelerator = FakeAccelerator("log")
    trackers = Trackers(accelerator, "run", {})
    logger = RunLogger(
        tmp_path / "run", rank=0, world_size=1, first_step=0, last_step=2, epochs=1, total_steps=2,
        address=None, stall_seconds=600, trackers=trackers,
    )  # fmt: skip
    for step in (1, 2):
        logger.count_step(step, 0.1, 0.0, num_images=1, num_bytes=1, phases=[])
        logger.log(StepReport(step, 0, 1.0, 0.1, 1.0, 1.0, 0, 0, 0, 0, 0))
    logger.finish("finished", exit_code=0, reason="done")
    assert [call[0] for call in accelerator.calls] == ["init", "log"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "metrics.trackers" in line]
    begin = "step 2: the run misses a record and goes on: metrics.trackers: RuntimeError: no log!"
    assert line.startswith(begin)
    with pytest.raises(RuntimeError, match=r"^no\nfinish"):
        Trackers(FakeAccelerator("finish"), "run", {}).close()


def test_only_numbers_and_only_rank_0():
    accelerator = FakeAccelerator()
    trackers = Trackers(accelerator, "run", {"a": None, "b": (1, 2), "c": True})
    assert accelerator.calls[0][2] == {"a": "null", "b": "[1, 2]", "c": True}
    trackers.log(
        {"step": 3, "time": 1.0, "loss": None, "lr": 0.1, "grad_norm": float("inf"), "text": "x"}, 3
    )
    assert accelerator.calls[1] == ("log", {"lr": 0.1}, 3)
    accelerator.is_main_process = False
    trackers = Trackers(accelerator, "run", {})
    trackers.log({"lr": 0.1}, 4)
    trackers.close()
    assert len(accelerator.calls) == 2
