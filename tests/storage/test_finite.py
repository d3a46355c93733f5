"""Before a save, a non-finite EMA is repaired from the model, and a non-finite model is rejected."""

import math

import pytest
import torch
from helpers.mini import batch, make_learner
from helpers.runs import HURT

from cmtrain.storage.checkpoint import load_checkpoint
from cmtrain.storage.finite import FiniteCheck, all_finite, repair_or_reject


@pytest.fixture
def learner():
    learner = make_learner()
    learner.step(iter([batch(0)]), 0, 0.05)
    return learner


def first_statistic(module):
    return next((name, value) for name, value in module.state_dict().items() if name.endswith("running_var"))


def test_a_healthy_state_passes_untouched(learner):
    before = {name: value.clone() for name, value in learner.ema.module.state_dict().items()}
    assert repair_or_reject(**learner.weights) == FiniteCheck()
    assert all(torch.equal(before[name], value) for name, value in learner.ema.module.state_dict().items())
    assert repair_or_reject(learner.model) == FiniteCheck()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_ema_is_repaired_where_it_is_nonfinite(learner, value):
    name, statistic = first_statistic(learner.ema.module)
    whole = learner.ema.module.state_dict()["head.weight"].clone()
    saved = learner.state_dict()  # what is about to be saved is repaired, too
    statistic[0] = value
    assert repair_or_reject(**learner.weights) == FiniteCheck(repaired=(name,))
    assert torch.equal(saved["ema"][name], learner.model.state_dict()[name])
    assert torch.equal(learner.ema.module.state_dict()["head.weight"], whole)
    assert not torch.equal(whole, learner.model.state_dict()["head.weight"])
    assert repair_or_reject(**learner.weights) == FiniteCheck()


def test_a_nonfinite_model_is_rejected_and_named(learner):
    name, statistic = first_statistic(learner.model)
    statistic[0] = math.nan
    first_statistic(learner.ema.module)[1][0] = math.nan
    assert repair_or_reject(**learner.weights) == FiniteCheck(nonfinite=(name,))
    assert math.isnan(first_statistic(learner.ema.module)[1][0])


def test_what_is_large_is_not_what_is_infinite():
    assert all_finite([torch.full((9,), 3e38), torch.zeros(1), torch.tensor([1.0, math.inf])]) == [
        True,
        True,
        False,
    ]


def test_a_run_repairs_its_ema_and_keeps_its_checkpoints_if_the_model_is_nonfinite(make_job):
    """The EMA is damaged before the save at step 4, the model's statistics before those at steps 8 and
    10."""
    job = make_job(evaluate={"every_epochs": 3}, checkpoint={"every_steps": 4, "every_epochs": 3})
    job("--max-steps", "10", module=HURT, NONFINITE="1 ema, 2 model, 3 model", code=3)
    events = {(e["event"], e["step"]): e for e in job.events() if "step" in e}
    assert len(events["ema_healed", 4]["tensors"]) == 1
    assert ("checkpoint", 4) in events
    assert "the model is not finite: " in events["checkpoint_failed", 8]["error"]
    assert job.status()["resume_from"].endswith("step-000000004")
    assert job.status()["state"] == "failed"
    state = load_checkpoint(job.run / "checkpoints" / "step-000000004").state
    assert all(value.isfinite().all() for value in state["ema"].values())
    job("--max-steps", "10")  # from step 4, well
    assert job.status()["state"] == "finished"
