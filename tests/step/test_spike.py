"""Test that spikes, and nothing else, are found at their step, also in a run that was stopped."""

import copy
import math
import random

import pytest
from helpers.mini import make_learner, step

from cmtrain.step.measure import MEMORY_STEPS, WARMUP_STEPS, SpikeDetector
from cmtrain.training.schedule import Schedule


def healthy_run(num_steps, seed=0):
    """Yield (loss, norm) of a good run's steps: the loss falls, the norm rises in the warm-up and falls."""
    noise = random.Random(seed)
    schedule = Schedule(
        num_samples=100, world_size=1, global_batch_size=1, max_batch_per_gpu=1, lr=1.0,
        epochs=20, warmup_epochs=5, warmup_lr=1e-6, min_lr=0.0, cooldown_epochs=0,
    )  # fmt: skip
    for done in range(num_steps):
        loss = 1 + 6 * math.exp(-done / 600) + noise.gauss(0, 0.1)
        norm = (0.5 + 8 * schedule.lr_at(done)) * math.exp(noise.gauss(0, 0.15))
        yield loss, norm


def spikes_of(measured, sigma=6.0):
    return [spike.step for spike in SpikeDetector(sigma).find_spikes(0, list(measured))]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_none(seed):
    """Neither the start, nor the warm-up of the learning rate (500 steps), nor its end."""
    assert spikes_of(healthy_run(2000, seed)) == []


@pytest.mark.parametrize("which", ["loss", "norm"])
@pytest.mark.parametrize("at", [WARMUP_STEPS, 700, 1700])
def test_a_spike_is_found_at_its_step(which, at):
    measured = list(healthy_run(2000))
    loss, norm = measured[at]
    measured[at] = (loss * 10, norm) if which == "loss" else (loss, norm * 20)
    assert spikes_of(measured) == [at + 1]


def test_the_first_steps_are_never_spikes():
    measured = list(healthy_run(WARMUP_STEPS))
    measured[-1] = (1000.0, 1000.0)
    assert spikes_of(measured) == []


def test_a_low_outlier_is_no_spike():
    measured = list(healthy_run(300))
    measured[200] = (0.0, 0.0)
    assert spikes_of(measured) == []


@pytest.mark.parametrize("bad", [(math.nan, math.nan), (2.0, math.inf), (math.inf, 1.0)])
def test_a_bad_step_is_no_spike_and_leaves_no_trace(bad):
    """In OLMo-core one NaN within its window makes every comparison false for the next 128 steps."""
    measured = list(healthy_run(300))
    with_bad = [*measured[:200], bad, *measured[200:]]
    a, b = SpikeDetector(6.0), SpikeDetector(6.0)
    assert a.find_spikes(0, measured) == b.find_spikes(0, with_bad) == []
    assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
    assert (a.good_steps_in_a_row, b.good_steps_in_a_row) == (300, 100)


def test_one_spike_does_not_hide_the_next():
    measured = list(healthy_run(1000))
    for at in (600, 602, 610):
        measured[at] = (1000.0, measured[at][1])
    assert spikes_of(measured) == [601, 603, 611]


def test_a_new_level_that_stays_is_learned():
    measured = [
        (loss * (4 if done >= 1500 else 1), norm) for done, (loss, norm) in enumerate(healthy_run(2000))
    ]
    found = spikes_of(measured)
    assert found[0] == 1501
    assert len(found) >= 5
    assert found[-1] < 1500 + MEMORY_STEPS / 2


def test_a_run_without_noise_has_none():
    assert spikes_of([(0.5 + 1e-4 * (step % 2), 1e-3) for step in range(500)]) == []


def test_a_resumed_detector_goes_on_as_if_nothing_had_happened():
    measured = list(healthy_run(300))
    measured[250] = (50.0, 1.0)
    whole = SpikeDetector(6.0)
    expected = whole.find_spikes(0, measured)
    first, second = SpikeDetector(6.0), SpikeDetector(6.0)
    found = first.find_spikes(0, measured[:117])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found += second.find_spikes(117, measured[117:])
    assert found == expected
    assert second.state_dict() == whole.state_dict()
    assert whole.num_spikes == 1


def test_a_stopped_run_counts_the_same_spikes():
    """Stop a model that learns between two log points. A low sigma makes spikes."""

    def go(learner, first, last):
        reports = []
        for number in range(first, last):
            step(learner, number, lr=0.002)
            if (number + 1) % 10 == 0:
                reports.append(learner.report(number + 1, 0, 0.05, reset=True))
        return reports

    undisturbed, stopped = (make_learner(spike_sigma=1.0) for _ in range(2))
    expected = go(undisturbed, 0, 100)
    assert expected[-1].spikes >= 2
    reports = go(stopped, 0, 75)
    final = stopped.report(75, 0, 0.05, reset=False)  # a run's last step is reported, log point or not
    assert final.good_steps_in_a_row <= 75
    resumed = make_learner(spike_sigma=1.0)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert reports + go(resumed, 75, 100) == expected


def test_a_spike_names_its_batch():
    """Feed negative images, which the model takes for the opposite class."""
    learner = make_learner(accumulation=2, spike_sigma=2.0)
    for number in range(80):
        step(learner, number, lr=0.01, poison=-3.0 if number == 77 else 1.0)
    assert learner.report(80, 0, 0.05, reset=True).spikes >= 1
    assert max(learner.spikes, key=lambda spike: spike.z).step == 78
    assert sorted(learner.spike_samples) == list(range(77 * 32, 78 * 32))
