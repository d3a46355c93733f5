"""A forward overflow that never ends by itself: going back cures it, skipping alone does not."""

import math

import pytest
import torch
from test_learner import accuracy, batch, make_learner, snapshot
from test_train import POISONED

from cmtrain.recovery import Recovery, first_nonfinite


def make_recovery(**options):
    return Recovery(**{"after_bad_steps": 5, "max_rollbacks": 3, "lr_backoff": 0.25, "backoff_steps": 1000} | options)


def run(recovery, *, lr, steps=160, protect=True):
    """The loop of train.py, as far as the guard goes: the learner, its last report, and the causes of rollbacks."""
    learner, causes = make_learner(protect=protect), []
    if recovery:
        recovery.keep(0, learner)
    for step in range(steps):
        learner.step(iter([batch(step)]), step, lr * (recovery.lr_factor(step) if recovery else 1))
        if (step + 1) % 5 == 0:
            report = learner.report(step + 1, 0, lr, reset=True)
            if recovery and report.bad_steps_in_a_row >= recovery.after_bad_steps:
                causes.append(first_nonfinite(learner))
                if recovery.roll_back(step + 1, learner) is None:
                    break
            elif recovery and report.bad_steps_in_a_row == 0:
                recovery.keep(step + 1, learner)
    return learner, report, causes


def test_a_learning_rate_that_freezes_a_run_is_survived():
    """SGD without warm-up in fp16, as in seed section 4.3, at 2.5 times its rate: this net is smaller."""
    unguarded, _, _ = run(None, lr=4.0, steps=40, protect=False)
    assert math.isnan(accuracy(unguarded, unguarded.model)[1])
    _, report, _ = run(None, lr=4.0, steps=40)
    assert report.bad_steps >= 35  # finite weights, and never trained again
    recovery = make_recovery(max_rollbacks=6)
    cured, report, causes = run(recovery, lr=4.0)
    assert recovery.rollback_steps
    assert any("not finite in" in cause for cause in causes if cause)
    assert report.bad_steps < 60
    assert accuracy(cured, cured.model)[0] >= 0.95


def test_a_healthy_run_is_not_touched():
    plain, _, _ = run(None, lr=0.05, steps=20)
    recovery = make_recovery()
    watched, _, _ = run(recovery, lr=0.05, steps=20)
    a, b = snapshot(plain), snapshot(watched)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not recovery.rollback_steps
    assert len(recovery.copies) == 3


def test_a_rollback_restores_everything_but_the_counters():
    learner, recovery = make_learner("adamw"), make_recovery()
    for step in range(4):
        learner.step(iter([batch(step)]), step, 0.01)
    recovery.keep(4, learner)
    good = snapshot(learner)
    for step in range(4, 24):
        learner.step(iter([batch(step, 3e6 if step > 13 else 1.0)]), step, 0.01)
    assert learner.accelerator.scaler.get_scale() < 2**10
    assert recovery.roll_back(24, learner) == 4
    restored = snapshot(learner)
    assert all(torch.equal(good[key], restored[key]) for key in good)
    assert learner.accelerator.scaler.get_scale() == 2**10
    report = learner.report(24, 0, 0.01, reset=True)
    assert (report.bad_steps, report.bad_steps_in_a_row) == (10, 0)
    # The copy is still whole after the learner has gone on from it.
    learner.step(iter([batch(30)]), 24, 0.01)
    recovery.roll_back(40, learner)
    again = snapshot(learner)
    assert all(torch.equal(good[key], again[key]) for key in good)


def test_used_copies_are_spent_and_patience_ends():
    learner, recovery = make_learner(), make_recovery(max_rollbacks=3)
    for step in (10, 20, 30):
        recovery.keep(step, learner)
    # The copy of step 30 is too young to be trusted, that of step 20 is not.
    assert [recovery.roll_back(35, learner) for _ in range(4)] == [20, 10, 10, None]


def test_learning_rate_factors_multiply_and_expire():
    recovery = make_recovery(lr_backoff=0.5, backoff_steps=100)
    recovery.load_state_dict({"rollback_steps": [50, 120]})
    assert [recovery.lr_factor(step) for step in (130, 149, 150, 219, 220)] == [0.25, 0.25, 0.5, 0.5, 1.0]
    assert make_recovery().lr_factor(5) == 1.0


def test_the_first_bad_module_is_named_and_looking_changes_nothing():
    learner = make_learner()
    learner.step(iter([batch(0)]), 0, 0.05)
    assert first_nonfinite(learner) is None
    with torch.no_grad():
        learner.model.stages[1].embed.weight[0, 0, 0, 0] = 1e30
    learner.step(iter([batch(1)]), 1, 0.05)
    before = snapshot(learner)
    assert first_nonfinite(learner).startswith("stages.1.embed: not finite in 16 of 16 images")
    after = snapshot(learner)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_whole_run_goes_back_and_goes_on(make_job, nproc):
    """Six poisoned steps in a row, four are too many: one rollback, named with its cause, and the run finishes."""
    guard = {"rollback_after_bad_steps": 4, "lr_backoff_epochs": 1}
    job = make_job(guard=guard, mixing={"mixup": 0, "cutmix": 0, "reprob": 0})
    steps = ",".join(map(str, range(6, 12)))
    result = job(nproc=nproc, module=POISONED, POISON_STEPS=steps, POISON_RANK=str(nproc - 1))
    assert result["state"] == "finished"
    (event,) = [e for e in job.events() if e["event"] == "rollback"]
    assert event["step"] == 10
    assert event["lr_factor"] == 0.25
    assert "stem.conv1: not finite in 8 of 8 images" in event["cause"]
    lr = {record["step"]: record["lr"] for record in job.log()}
    assert lr[12] < 0.3 * lr[10]
