"""Two runs are compared: the first step that differs, and in what (`cmtrain diff`)."""

import json
import shutil

import pytest
from helpers.runs import Forked, after_start
from PIL import Image

from cmtrain.commands.again.diff import _cause

# A model that changes one of its own weights while step 11 of seed 1 begins, if it is asked to.
NUDGED = """
import os

import timm
import torch
from timm.models import register_model

from cmtrain.step.learner import _torch_seed


class Nudged(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = timm.create_model("cmt_micro", **options)

    def forward(self, x):
        if "NUDGE" in os.environ and torch.initial_seed() == _torch_seed(1, 10, 0):
            with torch.no_grad():
                self.inner.head.bias[1] += 1e-3
        return self.inner(x)


@register_model
def nudged(**options):
    return Nudged(**{name: value for name, value in options.items() if "pretrained" not in name})
"""


@pytest.fixture
def make(make_job):
    def make(name, **sections):
        job = make_job(
            name,
            run={"name": "job", "seed": 1, "imports": ["own"]},
            model={"name": "nudged"} | sections.pop("model", {}),
            train={"log_every_steps": 1},
            checkpoint={"every_steps": 4, "keep": 9},
            **sections,
        )
        (job.folder / "own.py").write_text(NUDGED)
        return job

    return make


def diff(a, b, code=5):
    process = Forked(["cmtrain", "diff", str(a.run), str(b.run), "--json"], a.folder, {}, 1)
    out, err = process.communicate()
    assert process.returncode == code, err
    return json.loads(out) if out else {}, after_start(err)


def test_equal_runs_are_equal(make):
    a, b = make("a"), make("b")
    a("--max-steps", "12")
    b("--max-steps", "7")
    b("--max-steps", "12")  # killed and resumed counts as the same
    found, lines = diff(a, b, code=0)
    assert (found["differ_at"], found["agree_until"], found["settings"]) == (None, 12, [])
    assert lines[-1] == "all 12 common log points are equal; 4 common checkpoints are equal"


def test_another_seed_shows_in_the_first_weights(make):
    a, b = make("a"), make("b")
    a("--max-steps", "5")
    b("--max-steps", "5", "--run.seed", "2")
    found, lines = diff(a, b)
    assert "run.seed: 1 in A, 2 in B" in found["settings"]
    assert (found["agree_until"], found["differ_at"], found["first_step"]) == (0, 1, 1)
    assert found["cause"].startswith("model inner.stem.")
    assert found["cause"].endswith(" at the start differs")
    assert lines[-1] == f"first difference: step 1: {found['cause']}"


def test_one_changed_image_is_named(make, images, tmp_path):
    other = tmp_path / "changed"
    shutil.copytree(images, other)
    a, b = make("a"), make("b", data={"root": str(other), "cache_dir": str(tmp_path / "cache2")})
    path = sorted(other.glob("train/*/*"))[7]
    with Image.open(path) as image:
        image.rotate(180).save(path, quality=95)
    a("--max-steps", "7")
    b("--max-steps", "7")
    found, _ = diff(a, b)
    assert found["cause"].startswith("pixels of sample ")
    assert str(path.relative_to(other / "train")) in found["cause"]
    assert found["first_step"] == found["differ_at"]


def test_a_weight_that_changed_by_itself_is_found(make):
    a, b = make("a"), make("b")
    a("--max-steps", "13")
    b("--max-steps", "13", NUDGE="1")
    assert [row["loss"] for row in a.log()[:10]] == [row["loss"] for row in b.log()[:10]]
    found, lines = diff(a, b)
    assert (found["agree_until"], found["differ_at"], found["first_step"]) == (8, 11, None)
    assert "taken again, steps 9 to 11 are the same in both runs" in lines[-1]
    assert f"{b.run}: loss of step 11 is" in lines[-1]
    assert f"{a.run}: loss" not in lines[-1]


def test_another_learning_rate_from_some_step_on(make):
    a, b = make("a"), make("b")
    a("--max-steps", "12")
    b("--max-steps", "6")
    b("--max-steps", "12", "--resume", "force", "--optim.lr", "1e-3")
    found, _ = diff(a, b)
    assert "optim.lr: 0.002 in A, 0.001 in B" in found["settings"]
    assert (found["differ_at"], found["first_step"]) == (7, 7)
    assert found["cause"].startswith("learning rate is ")


def test_layers_and_gradients_are_named(make):
    """Weight decay shows only in the weights after the first step, dropout in a layer's output."""
    a, b, c = make("a"), make("b", optim={"weight_decay": 0.1}), make("c", model={"drop_rate": 0.2})
    for job in (a, b, c):
        job("--max-steps", "2")
    assert diff(a, b)[0]["cause"].endswith(" after the step differs")
    assert diff(a, c)[0]["cause"] == "output of inner.head, pass 1, differs"


def test_other_code_of_ones_own_is_named_and_not_run(make):
    a, b = make("a"), make("b")
    with open(b.folder / "own.py", "a") as file:
        file.write("\ntorch.set_flush_denormal(True)\n")
    a("--max-steps", "2")
    b("--max-steps", "2", "--optim.lr", "1e-3")
    found, _ = diff(a, b)
    assert found["cause"] == "run.imports differ, so one process cannot take the steps of both"
    assert any(line.startswith("run.imports: ") for line in found["settings"])


def test_what_cannot_be_compared_is_one_line(make):
    a = make("a")
    a("--max-steps", "1")
    _, lines = diff(a, a, code=2)
    assert lines == [f"{a.run} and {a.run} are the same run"]
    _, lines = diff(a, make("b"), code=3)
    assert "no run" in lines[0]


def test_another_division_into_micro_batches_is_named_as_such(make):
    """Where a manifest is damaged, what it would have listed is missing."""
    a, b = make("a"), make("b")
    a("--max-steps", "2", "--train.max_batch_per_gpu", "auto")
    b("--max-steps", "2", "--train.max_batch_per_gpu", "auto", nproc=2)
    found, _ = diff(a, b)
    assert found["cause"] == "micro-batch size is 16 in A, 8 in B"
    assert "micro_batch_size (checkpoint): 16 in A, 8 in B" in found["settings"]
    (a.run / "checkpoints" / "step-000000002" / "manifest.json").write_text("{}")
    found, _ = diff(a, b)
    assert "micro_batch_size (checkpoint): None in A, 8 in B" in found["settings"]


def test_what_a_run_itself_does_not_repeat_is_the_order_of_summation():
    """As on a GPU; what comes before, and is always the same in A, is a difference."""
    a, b = {"loss": "1.5", "gradient": "#1"}, {"loss": "1.5", "gradient": "#2"}
    assert _cause(a, b, a) == "gradient differs"
    assert _cause(a, b, a | {"gradient": "#3"}).endswith("the order of summation")
    assert _cause(a, b | {"loss": "2.5"}, a | {"gradient": "#3"}) == "loss is 1.5 in A, 2.5 in B"
    assert _cause(a, dict(a), a | {"gradient": "#3"}) == ""
