"""Kill -9 anywhere: the same command continues, and the run equals one never killed, bit for bit."""

import json
import random
import signal

import pytest
from helpers.runs import HURT, Job, assert_same_state

from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint

SECTIONS = {
    "data": {"fraction": 0.5},  # 48 images: 6 steps an epoch
    "train": {"global_batch_size": 8, "max_batch_per_gpu": 8, "log_every_steps": 1},
    "checkpoint": {"every_steps": 2, "keep": 2},
}

STEPS = 18


def curve(job: Job) -> list[tuple]:
    """Every step's figures to the last bit, the counters among them."""
    floats = ("loss", "lr", "grad_norm", "loss_scale")
    counts = ("step", "epoch", "bad_steps", "bad_steps_in_a_row", "restores")
    hexed = [[float(r[key]).hex() if r[key] is not None else None for key in floats] for r in job.log()]
    return [(*figures, *(r[key] for key in counts)) for figures, r in zip(hexed, job.log(), strict=True)]


@pytest.fixture
def undisturbed(make_job) -> Job:
    """A run in fp16 that nobody kills; `calls.json` counts the calls of its loop and its writer."""
    job = make_job("undisturbed", **SECTIONS)
    job(module=HURT, HALF="1", COUNT=str(job.folder / "calls.json"))
    scales = [record["loss_scale"] for record in job.log()]
    assert scales[0] > scales[-1] > 1, "the loss scale has nothing to lose"
    return job


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kills", "seed"),
    [pytest.param(3, 0), *(pytest.param(5, seed, marks=pytest.mark.slow) for seed in range(1, 5))],
)
def test_killed_anywhere_is_never_killed(make_job, undisturbed, figure, kills, seed):
    """`kills` in one run: every other one while a checkpoint is being written, each at a random call of a
    function.
    """
    draw = random.Random(seed)
    calls = json.loads((undisturbed.folder / "calls.json").read_text())
    job = make_job("killed", **SECTIONS)
    in_the_middle, saved = 0, 0
    for number in range(kills):
        place = ("writer", "main")[number % 2]
        # Of the calls that are left, such a share that the last kill, too, finds the run at work.
        left = 0.9 * calls[place] * (1 - saved / STEPS)
        after = draw.randrange(1, int(left / (kills - number)))
        process = job.start(module=HURT, HALF="1", KILL=f"{place} {after}")
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        checkpoints = job.run / "checkpoints"
        for step in checkpoint_steps(checkpoints):  # whatever is there is whole
            load_checkpoint(checkpoint_path(checkpoints, step))
            saved = step
        in_the_middle += len(list(checkpoints.glob(".tmp-*")))
    job(module=HURT, HALF="1")
    assert curve(job) == curve(undisturbed)
    assert_same_state(job, undisturbed)
    resumed = [event["step"] for event in job.events() if event["event"] == "resumed"]
    figure(
        f"kill -9: {kills} injected, {in_the_middle} in the middle of a file, {kills} survived "
        f"(from steps {resumed}), lost updates {len(set(curve(undisturbed)) - set(curve(job)))}"
    )
