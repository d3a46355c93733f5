"""A run that stops on some ranks and continues on another number sees the same samples and pixels."""

import json

import pytest
from helpers.runs import HURT

STEPS_PER_EPOCH, EPOCHS, NUM_SAMPLES = 3, 2, 48
SECTIONS = {
    "data": {"fraction": 0.5}, "optim": {"opt": "sgd", "lr": 0.02}, "train": {"log_every_steps": 1},
    "schedule": {"epochs": EPOCHS},
}  # fmt: skip
# (ranks, steps done when it is stopped), all but the last in the middle of an epoch
WAYS = {"2 -> 1 -> 2": [(2, 2), (1, 4), (2, 6)], "1 -> 2": [(1, 2), (2, 6)]}


def train(job, pieces):
    """Train in pieces. Returns the loss of every step, and the samples of every epoch."""
    seen = [[] for _ in range(EPOCHS)]
    for nproc, last_step in pieces:
        folder = job.folder / f"seen-{last_step}"
        folder.mkdir()
        job("--max-steps", str(last_step), module=HURT, SEEN=str(folder), nproc=nproc)
        files = list(folder.iterdir())
        assert len(files) == nproc
        for file in files:
            for step, samples in map(json.loads, file.read_text().splitlines()):
                seen[step // STEPS_PER_EPOCH] += samples
    return [record["loss"] for record in job.log()], seen


def test_other_ranks_see_every_sample_once_and_lose_nothing(make_job, figure):
    losses, seen = train(make_job("one", **SECTIONS), [(1, 6)])
    assert [len(set(samples)) for samples in seen] == [NUM_SAMPLES] * EPOCHS
    assert len(losses) == 6
    every_epoch = [sorted(samples) for samples in seen]
    for number, (way, pieces) in enumerate(WAYS.items()):
        again, seen = train(make_job(str(number), **SECTIONS), pieces)
        assert [sorted(samples) for samples in seen] == every_epoch, way
        assert again == pytest.approx(losses, rel=1e-5), way
        largest = max(abs(mine / its - 1) for mine, its in zip(again, losses, strict=True))
        figure(f"ranks {way}: every sample once in {EPOCHS} epochs, losses within {largest:.0e}")
