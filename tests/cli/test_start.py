"""What can be refused without torch is refused without it, in one line and before anything is written."""

import json
import os
import subprocess
import sys

import pytest
from helpers.runs import ROOT

from cmtrain.cli.main import main
from cmtrain.storage.run_folder import RunLock

PROGRAM = """
import contextlib, io, json, sys
from cmtrain.cli.main import main
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    line = err.getvalue().splitlines()[-1]
    loaded = [n for n in ("torch", "nvidia.dali") if n in sys.modules]
    print(json.dumps([code, line, out.getvalue(), loaded]))
"""


def test_what_is_cheap_to_find_is_refused_before_torch_is_loaded(make_job, tmp_path):
    job = make_job(checkpoint={"every_steps": 1})
    job("--max-steps", "1")
    lock = RunLock(job.folder / "runs" / "held")
    lock.acquire()
    (tmp_path / "x.npz").touch()
    train, run = ["--config", str(job.config)], str(job.run)
    new = [*train, "--run.name", "new"]
    bench = ["bench", "--config", str(job.config)]
    cases = [
        (3, "no/train: no such folder", [*new, "--data.root", "no"]),
        (3, "no.csv: ", [*new, "--data.train_list", "no.csv"]),
        (3, "the training set has 96 samples", [*new, "--train.global_batch_size", "512"]),
        (2, "model.num_classes: 2, but", [*new, "--model.num_classes", "2"]),
        (3, "runs/held is in use by process", [*train, "--run.name", "held"]),
        (2, "was made with another recipe: optim.lr: 0.002 -> 0.1; ", [*train, "--optim.lr", "0.1"]),
        (2, "--resume never: runs/job already holds", [*train, "--resume", "never"]),
        (3, "--resume no: no such", [*new, "--resume", "no"]),
        (3, "no: no such file or folder", [*new, "--model.init_from", "no"]),
        (3, "neither a folder nor a", [*new, "--model.init_from", str(tmp_path / "x.npz")]),
        (2, "16 = processes 1 x passes 16 x 1", [*new, "--train.max_batch_per_gpu", "1"]),
        (2, "1 = processes 1 x passes 1 x 1", [*new, "--train.global_batch_size", "1"]),
        (2, "2 = processes 2 x passes 1 x 1", [*new, "--train.global_batch_size", "2", "--nproc", "2"]),
        (3, "no/train: no such folder", [*new, "--data.root", "no", "--nproc", "2"]),
        (3, "no: no run and no checkpoint", ["eval", "no"]),
        (2, "--resize-px: 16 is less than", ["eval", run, "--resize-px", "16"]),
        (2, "--image-px: must be multiples of 32", ["eval", run, "--image-px", "33"]),
        (3, "--folder no: no such folder", ["eval", run, "--folder", "no"]),
        (3, "no/val: no such folder", ["eval", run, "--data.root", "no"]),
        (3, "no: no run and no checkpoint", ["export", "no", "--out", "new"]),
        (2, "exists already", ["export", run, "--out", run]),
        (3, "no.pth: no such file", ["repair-bn", "no.pth", *train]),
        (3, "no: no run and no checkpoint", ["repair-bn", "no"]),
        (3, "no/train: no such folder", [*bench, "--data.root", "no"]),
        (3, "no/train: no such folder", ["data", "stats", *train, "--data.root", "no"]),
        (3, "no/train: no such folder", ["data", "preview", *train, "--data.root", "no"]),
    ]  # fmt: skip
    commands = json.dumps([command for _, _, command in cases])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, commands], cwd=job.folder, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    lock.close()
    assert done.returncode == 0, done.stderr
    for (code, text, command), line in zip(cases, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert text in found[1], (command, found)
        assert (found[0], found[2:]) == (code, ["", []]), (command, found)
    assert sorted(os.listdir(job.folder / "runs")) == ["job"]


def test_a_model_without_batch_norm_trains_with_one_image(make_job):
    """cmt_micro and resnets are refused; what has no BatchNorm is not. Known when the model is built."""
    one = {"train": {"global_batch_size": 1, "max_batch_per_gpu": 8}, "data": {"image_px": 32}}
    job = make_job("resnet", model={"name": "resnet10t"}, **one)
    job("--max-steps", "1", code=2)
    assert (
        "train.global_batch_size: 1 leaves 1 image at a time (1 = processes 1 x passes 1 x 1), and BatchNorm"
        in job.stderr.read_text()
    )
    assert not job.run.exists()
    job = make_job("convnext", model={"name": "convnext_atto"}, **one)
    assert job("--max-steps", "1")["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["help"], "usage: cmtrain [train]"),
        (["data", "--help"], "usage: cmtrain data split"),
        (["help", "data"], "usage: cmtrain data split"),
        (["config", "--help"], "usage: cmtrain config show"),
        (["demo", "--dry-run"], "run      runs/demo\n"),
        (["demo", "--photos", "--dry-run"], "run      runs/demo-photos\n"),
    ],
)
def test_help_where_people_look_for_it(capsys, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(text)
    assert os.listdir() == []
