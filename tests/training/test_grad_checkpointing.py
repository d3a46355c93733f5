"""A run that computes its blocks twice is the same run; models that cannot do it are refused."""

import pytest
from helpers.runs import after_start, assert_same_state, losses

MODEL = {"name": "cmt_micro", "drop_path_rate": 0.2}


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_may_begin_with_it_and_end_without(make_job, nproc):
    """Two micro-batches a step on one process, one on each of two."""
    plain = make_job("plain", model=MODEL, train={"max_batch_per_gpu": 8})
    job = make_job("job", model=MODEL, train={"max_batch_per_gpu": 8, "grad_checkpointing": True})
    for each in (plain, job):
        each("--max-steps", "4", nproc=nproc)
    plain("--max-steps", "6", nproc=nproc)
    job("--max-steps", "6", "--train.grad_checkpointing", "false", nproc=nproc)
    assert losses(job) == losses(plain)
    assert_same_state(job, plain)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--model.name", "resnet18"), "resnet18 would move the statistics of its BatchNorms twice a step"),
        (("--model.name", "convit_tiny"), "convit_tiny does not support it"),
        (("--train.compile", "true"), "(true) does not go with train.compile (true)"),
    ],
)
def test_what_cannot_do_it_is_refused(make_job, arguments, line):
    job = make_job(model={"name": "cmt_micro"}, train={"grad_checkpointing": True})
    job(*arguments, code=2)
    (said,) = after_start(job.stderr.read_text())
    assert line in said
    assert "train.grad_checkpointing" in said
