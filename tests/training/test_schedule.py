"""The arithmetic of a run, against what the recipes state and against invariants over many sizes."""

from itertools import pairwise

import pytest

from cmtrain.errors import ConfigError
from cmtrain.training.schedule import Schedule, split_batch
from pipelines.spec import DataError

IMAGENET = 1_281_167
REIMPL_RECIPE = {
    "num_samples": IMAGENET,
    "world_size": 8,
    "global_batch_size": 4096,
    "max_batch_per_gpu": 512,
    "lr": 6e-3,
    "epochs": 300,
    "warmup_epochs": 5.0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "cooldown_epochs": 0,
}


def plan(**changes: float) -> Schedule:
    return Schedule(**{**REIMPL_RECIPE, **changes})  # type: ignore[arg-type]


def test_the_recipe_of_the_re_implementation_by_hand():
    schedule = plan(cooldown_epochs=10)
    assert (schedule.micro_batch_size, schedule.accumulation) == (512, 1)
    assert schedule.steps_per_epoch == 312  # 1281167 // 4096
    assert (schedule.total_epochs, schedule.total_steps) == (310, 96_720)
    assert (schedule.warmup_steps, schedule.decay_end_step) == (1560, 93_600)


def test_learning_rate_hits_its_landmarks_exactly():
    schedule = plan(cooldown_epochs=10)
    assert schedule.lr_at(0) == 1e-6
    assert schedule.lr_at(780) == pytest.approx((1e-6 + 6e-3) / 2)
    assert schedule.lr_at(1560) == 6e-3
    assert schedule.lr_at((1560 + 93_600) // 2) == pytest.approx((6e-3 + 1e-5) / 2)
    assert schedule.lr_at(93_600) == 1e-5
    assert schedule.lr_at(96_720) == 1e-5


def test_learning_rate_rises_then_falls_then_stays():
    schedule = plan(num_samples=40_960, epochs=12, warmup_epochs=2.5, cooldown_epochs=3)
    rates = [schedule.lr_at(step) for step in range(schedule.total_steps)]
    assert (len(rates), schedule.warmup_steps) == (150, 25)
    assert all(before < after for before, after in pairwise(rates[:26]))
    assert all(before > after for before, after in pairwise(rates[25:120]))
    assert rates[120:] == [1e-5] * 30


def test_warm_up_may_be_absent_or_fill_every_step():
    assert plan(warmup_epochs=0).lr_at(0) == 6e-3
    one_step_epochs = plan(num_samples=4096, epochs=1, warmup_epochs=0.9)
    assert [one_step_epochs.lr_at(step) for step in (0, 1)] == [1e-6, 1e-5]


def test_timm_has_the_same_curve_with_prefixed_warm_up():
    import torch
    from timm.scheduler import CosineLRScheduler

    schedule = plan(num_samples=40_960, epochs=12, warmup_epochs=2.0, cooldown_epochs=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-3)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=100,
        warmup_t=20,
        warmup_prefix=True,
        warmup_lr_init=1e-6,
        lr_min=1e-5,
        t_in_epochs=False,
    )
    for step in range(schedule.total_steps):
        theirs.step_update(step)
        assert schedule.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_every_step_of_timms_polynomial(power):
    from timm.scheduler import PolyLRScheduler

    options = {"power": power, "t_initial": 295 * 312, "lr_min": 1e-5}
    assert_same_as_timm(PolyLRScheduler, options, decay="poly", power=power)


@pytest.mark.parametrize(("epochs", "rate"), [(30, 0.1), (2.4, 0.97)])
def test_every_step_of_timms_steps(epochs, rate):
    from timm.scheduler import StepLRScheduler

    options = {"decay_t": epochs * 312, "decay_rate": rate}
    assert_same_as_timm(
        StepLRScheduler, options, decay="step", decay_epochs=epochs, decay_rate=rate, min_lr=0.0
    )


def assert_same_as_timm(scheduler, options, **ours):
    """Compare all steps of 300 epochs of ImageNet, of which five are the warm-up."""
    import torch

    schedule = plan(**({"epochs": 300, "warmup_epochs": 5.0, "min_lr": 1e-5} | ours))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-3)
    warmup = {"warmup_t": 5 * 312, "warmup_prefix": True, "warmup_lr_init": 1e-6}
    theirs = scheduler(optimizer, t_in_epochs=False, **warmup, **options)
    for step in range(schedule.total_steps):
        assert schedule.lr_at(step) == pytest.approx(theirs._get_lr(step)[0], rel=1e-9, abs=1e-15)


def test_warm_up_stable_decay():
    """By hand: 10 epochs of 312 steps, of which 2 warm up and the last 4 decay."""
    schedule = plan(
        epochs=10, warmup_epochs=2.0, min_lr=1e-4, cooldown_epochs=1, decay="wsd", decay_epochs=4.0
    )
    at = {epoch: schedule.lr_at(round(epoch * 312)) for epoch in (0, 1, 2, 4, 6, 7, 8, 9, 10, 11)}
    assert at[0] == 1e-6
    assert [at[epoch] for epoch in (2, 4, 6)] == [6e-3] * 3
    assert [at[epoch] for epoch in (7, 8, 9)] == pytest.approx(
        [1e-4 + 5.9e-3 * share for share in (0.75, 0.5, 0.25)]
    )
    assert at[10] == at[11] == 1e-4


def test_a_decay_longer_than_the_run_begins_at_the_peak():
    schedule = plan(epochs=10, warmup_epochs=2.0, min_lr=1e-4, decay="wsd", decay_epochs=30.0)
    assert schedule.lr_at(2 * 312) == 6e-3
    assert schedule.lr_at(6 * 312) == pytest.approx((6e-3 + 1e-4) / 2)


def test_steps_go_on_through_the_cooldown():
    schedule = plan(
        epochs=10, warmup_epochs=0.0, min_lr=0.0, cooldown_epochs=5, decay="step", decay_epochs=4.0
    )
    rates = [schedule.lr_at(epoch * 312) for epoch in (3, 4, 9, 11, 12)]
    assert rates == pytest.approx([6e-3, 6e-4, 6e-5, 6e-5, 6e-6])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 64])
@pytest.mark.parametrize("max_batch_per_gpu", [1, 7, 64, 512])
def test_batch_is_split_with_the_fewest_passes_that_fit(world_size, max_batch_per_gpu):
    for size in range(world_size, 40 * world_size, world_size):
        share = size // world_size
        if max_batch_per_gpu > 1 and share > 1 and all(share % n for n in range(2, max_batch_per_gpu + 1)):
            with pytest.raises(ConfigError, match="only batches of 1"):
                split_batch(size, max_batch_per_gpu, world_size)
            continue
        micro_batch_size, accumulation = split_batch(size, max_batch_per_gpu, world_size)
        assert world_size * accumulation * micro_batch_size == size
        assert micro_batch_size <= max_batch_per_gpu
        fewer = range(1, accumulation)
        assert not [
            n
            for n in fewer
            if size % (world_size * n) == 0 and size // (world_size * n) <= max_batch_per_gpu
        ]


def test_fewer_gpus_accumulate_the_same_micro_batches():
    splits = {world_size: split_batch(4096, 512, world_size) for world_size in (1, 2, 4, 8)}
    assert splits == {1: (512, 8), 2: (512, 4), 4: (512, 2), 8: (512, 1)}


def test_batch_that_does_not_split_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError) as refused:
        plan(world_size=3)
    assert str(refused.value) == (
        "train.global_batch_size: 4096 does not split over 3 processes (4096 = 3 x 1365 + 1); "
        "use 4095 or 4098"
    )
    with pytest.raises(ConfigError, match=r"4 does not split over 8 processes \(4 = 8 x 0 \+ 4\); use 8$"):
        plan(global_batch_size=4)


def test_dataset_smaller_than_a_batch_is_refused():
    assert plan(num_samples=4096).steps_per_epoch == 1
    with pytest.raises(DataError, match=r"has 4,095 samples, less than one global batch of 4,096"):
        plan(num_samples=4095)


def test_every_n_epochs_is_counted_in_finished_steps():
    schedule = plan(num_samples=40_960, epochs=12)
    assert [step for step in range(1, 61) if schedule.ends_epochs(step, 2)] == [20, 40, 60]
