"""A step taken again is the step that was taken: pixels, loss, layers (`cmtrain replay`)."""

import json
import shutil

import pytest
import torch
from helpers.runs import Forked, after_start
from PIL import Image

# A model of the user's own that writes what it is fed, and that overflows in step 8 of seed 1.
RECORDER = """
import os
from pathlib import Path

import timm
import torch
from timm.models import register_model

from cmtrain.step.learner import _torch_seed


class Burst(torch.nn.Identity):
    def forward(self, x):
        return x / 0 if torch.initial_seed() == _torch_seed(1, 7, 1) else x


class Recorded(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = timm.create_model("cmt_micro", **options)
        self.burst = Burst()

    def forward(self, x):
        if self.training and "RECORD" in os.environ and x.any():  # FLOPs are counted with zeros
            torch.save(x, Path(os.environ["RECORD"]) / f"{torch.initial_seed()}.pt")
        return self.burst(self.inner(x))


@register_model
def recorded(**options):
    return Recorded(**{name: value for name, value in options.items() if "pretrained" not in name})
"""


def replay(job, *arguments, code=0, **environment):
    process = Forked(["cmtrain", "replay", *map(str, arguments)], job.folder, environment, 1)
    out, err = process.communicate()
    assert process.returncode == code, err
    return json.loads(out) if out else {}, after_start(err)


@pytest.fixture
def job(make_job):
    """Everything random that there is; two micro-batches of 8 a step, six steps an epoch."""
    job = make_job(
        run={"name": "job", "imports": ["recorder"]},
        model={"name": "recorded", "drop_rate": 0.2, "drop_path_rate": 0.1},
        augment={"rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "repeats": 2},
        mixing={"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "reprob": 0.5},
        train={"max_batch_per_gpu": 8, "log_every_steps": 1},
        checkpoint={"every_steps": 4},
    )
    (job.folder / "recorder.py").write_text(RECORDER)
    return job


def recorded(folder):
    return {path.name: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("nproc", [1, 2])
def test_pixels_and_loss_are_those_of_the_run(job, tmp_path, nproc):
    for name in ("trained", "again"):
        (tmp_path / name).mkdir()
    size = ("--train.max_batch_per_gpu", str(8 * nproc))  # two micro-batches of 8 either way
    job("--max-steps", "12", *size, nproc=nproc, RECORD=str(tmp_path / "trained"))
    trained = recorded(tmp_path / "trained")
    assert len(trained) == 24
    for step in (3, 11):  # from the beginning, in the first epoch; from a checkpoint, in the second
        found, lines = replay(job, "runs/job", "--step", step, RECORD=str(tmp_path / "again"))
        assert found["from_step"] == {3: 0, 11: 8}[step]
        assert f"step {step}: loss" in lines[-2]
        record = job.log()[step - 1]
        if nproc == 1:
            assert (found["loss"], found["grad_norm"]) == (record["loss"], record["grad_norm"])
        assert found["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert len(found["samples"]) == 16
        assert all((job.folder / sample["file"]).exists() for sample in found["samples"])
        with Image.open(job.folder / found["images"]) as sheet:
            sheet.verify()
    again = recorded(tmp_path / "again")
    assert len(again) == 12  # steps 1, 2, 3, 9, 10, 11
    assert all(torch.equal(pixels, trained[name]) for name, pixels in again.items())


def test_an_overflow_is_found_in_its_layer(job):
    job("--max-steps", "12")
    events = {(event["event"], event.get("step")) for event in job.events()}
    record = job.log()[7]
    assert record["bad_steps"] == 1, events
    found, lines = replay(job, "runs/job", "--step", 8)
    bad = [layer["layer"] for layer in found["layers"] if layer["nonfinite"]]
    assert bad == ["burst"]
    assert "burst" in "\n".join(lines)
    healthy, _ = replay(job, "runs/job", "--step", 7)
    assert not [layer for layer in healthy["layers"] if layer["nonfinite"]]
    assert (healthy["loss"], healthy["grad_norm"]) == (job.log()[6]["loss"], job.log()[6]["grad_norm"])


def test_a_replay_leaves_the_run_as_it_is_and_refuses_what_is_no_step(job, make_job):
    job("--max-steps", "5")
    before = {path: path.read_bytes() for path in job.run.rglob("*") if path.is_file()}
    found, _ = replay(job, "runs/job", "--step", 5, "--out", "sheet.png")
    assert found["images"] == "sheet.png"
    assert {path: path.read_bytes() for path in job.run.rglob("*") if path.is_file()} == before
    _, lines = replay(job, "runs/job", "--step", 99, code=2)
    assert lines == ["--step 99: the run has 18 steps"]
    _, lines = replay(job, "runs/job", "--step", "0", code=2)
    assert lines == ["--step: must be a whole number >= 1, got 0"]
    _, lines = replay(job, "runs/none", "--step", "1", code=3)
    assert "runs/none: no run" in lines[0]


def test_a_run_that_ended_before_a_checkpoint_can_be_replayed(job, tmp_path):
    for name in ("trained", "again"):
        (tmp_path / name).mkdir()
    one_pass = ("--train.max_batch_per_gpu", "16")  # for each of two ranks 8 images, for one process 16
    job("--max-steps", "12", *one_pass, nproc=2, RECORD=str(tmp_path / "trained"))
    shutil.rmtree(job.run / "checkpoints")
    found, _ = replay(job, "runs/job", "--step", 2, RECORD=str(tmp_path / "again"))
    assert found["from_step"] == 0
    assert found["loss"] == pytest.approx(job.log()[1]["loss"], rel=1e-5)
    trained, again = recorded(tmp_path / "trained"), recorded(tmp_path / "again")
    assert len(again) == 4
    assert all(torch.equal(pixels, trained[name]) for name, pixels in again.items())


def test_a_step_has_the_recipe_that_it_had_in_the_run(job):
    """The learning rate changes at step 8; config.yaml has the new one."""
    job("--max-steps", "8")
    before = job.log()
    job("--max-steps", "12", "--resume", "force", "--optim.lr", "5e-4")
    after = job.log()
    for step, record in ((3, before[2]), (7, before[6]), (10, after[9])):
        found, _ = replay(job, "runs/job", "--step", step)
        assert (found["loss"], found["grad_norm"]) == (record["loss"], record["grad_norm"])


def test_a_damaged_checkpoint_is_passed_over_and_kept(job):
    job("--max-steps", "12")
    newest = job.run / "checkpoints" / "step-000000008" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    found, lines = replay(job, "runs/job", "--step", 10)
    assert found["from_step"] == 6
    assert "step-000000008" in "\n".join(lines)
    assert found["loss"] == job.log()[9]["loss"]
    assert newest.exists()
