"""Order and randomness are pure functions of (seed, epoch, sample), and as random as they should be."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import ColorJitter, RandomResizedCrop

from pipelines.plan import ClassSampling, MicroBatch, Plan, augment_params, crop_windows, jitter_params
from pipelines.rand_augment import BRANCH_OF, NUM_LAYER_DRAWS, Branch, layer_params, op_params, parse
from pipelines.spec import AugmentSpec

GOLDEN_ORDER = [1, 6, 0, 2, 5, 4, 9, 3, 7, 8]
GOLDEN_DRAWS = [[0.18669850101802465, 0.8769540576527802], [0.5553774917933562, 0.14468113695229434]]

PLAN = Plan(seed=7, num_samples=1003, global_batch_size=48, micro_batch_size=4)


def batch_of(indices, epoch: int = 0, copies=None) -> MicroBatch:
    indices = np.asarray(indices)
    return MicroBatch(epoch, 0, 0, indices, np.zeros_like(indices) if copies is None else np.asarray(copies))


def test_every_sample_comes_once_an_epoch_and_epochs_differ():
    for epoch in range(3):
        assert sorted(PLAN.order(epoch)) == list(range(1003))
    assert PLAN.steps_per_epoch == 1003 // 48
    assert (PLAN.order(0) != PLAN.order(1)).mean() > 0.9
    assert (PLAN.order(0) != Plan(8, 1003, 48, 4).order(0)).mean() > 0.9


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_a_rank_takes_every_world_th_sample_of_each_global_batch(world):
    for rank in range(world):
        mine = list(PLAN.micro_batches(1, 0, rank, world))
        assert len(mine) == PLAN.steps_per_epoch * PLAN.num_micro_batches // world
        for step in range(PLAN.steps_per_epoch):
            taken = np.concatenate([batch.indices for batch in mine if batch.step == step])
            whole = PLAN.order(1)[step * 48 : (step + 1) * 48]
            assert sorted(taken) == sorted(whole[rank::world])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_micro_batches_do_not_depend_on_the_number_of_ranks(world):
    alone = {batch.identity: batch.indices for batch in PLAN.micro_batches(2, 0, 0, 1)}
    shared = {b.identity: b.indices for rank in range(world) for b in PLAN.micro_batches(2, 0, rank, world)}
    assert alone.keys() == shared.keys()
    assert all(np.array_equal(alone[key], shared[key]) for key in alone)


def test_a_start_in_mid_epoch_gives_the_tail_of_the_epoch():
    whole = list(PLAN.micro_batches(0, 0, 1, 2))
    tail = list(PLAN.micro_batches(0, 5 * 48, 1, 2))
    assert [batch.identity for batch in tail] == [batch.identity for batch in whole if batch.step >= 5]
    assert list(PLAN.micro_batches(0, PLAN.steps_per_epoch * 48, 0, 2)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 5), "5 ranks do not divide the 12 micro-batches"),
        ((0, 47, 0, 1), "start 47 is no multiple"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PLAN.micro_batches(*arguments)


@pytest.mark.parametrize("sizes", [(100, 48, 5), (40, 48, 4), (100, 48, 0)])
def test_batch_sizes_that_do_not_fit_are_refused(sizes):
    num_samples, global_batch, micro_batch = sizes
    with pytest.raises(ValueError, match="global_batch_size"):
        Plan(0, num_samples, global_batch, micro_batch)


def test_copies_of_repeated_augmentation_land_on_different_ranks_with_different_pixels():
    plan = Plan(seed=1, num_samples=1024, global_batch_size=256, micro_batch_size=16, repeats=3)
    order = plan.order(0)
    assert len(order) == 1024
    assert len(set(order)) == 342
    assert max(Counter(order).values()) == 3
    for rank in range(4):
        mine = np.concatenate([batch.indices for batch in plan.micro_batches(0, 0, rank, 4)])
        for step in range(plan.steps_per_epoch):
            assert max(Counter(mine[step * 64 : (step + 1) * 64]).values()) == 1
    first = next(plan.micro_batches(0, 0, 0, 1))
    u = plan.uniforms(batch_of([order[0]] * 3, copies=[0, 1, 2]), 8)
    assert len(np.unique(u, axis=0)) == 3
    assert first.copies[0] == 0


def test_the_order_and_the_draws_never_change():
    """A checkpoint of last year must resume today: changing these numbers changes every run."""
    plan = Plan(seed=42, num_samples=10, global_batch_size=5, micro_batch_size=5)
    assert plan.order(3).tolist() == GOLDEN_ORDER
    u = plan.uniforms(batch_of([0, 9], epoch=3, copies=[0, 1]), 2)
    np.testing.assert_allclose(u, GOLDEN_DRAWS, rtol=0, atol=1e-15)


def test_draws_follow_the_sample_and_not_its_place():
    together = PLAN.uniforms(batch_of([5, 900, 17]), 30)
    alone = PLAN.uniforms(batch_of([17]), 30)
    assert np.array_equal(together[2], alone[0])
    assert np.array_equal(PLAN.uniforms(batch_of([17]), 40)[:, :30], alone)


def test_draws_are_uniform_and_independent():
    count, streams = 20_000, 40
    u = PLAN.uniforms(batch_of(np.arange(count)), streams)
    assert u.min() >= 0
    assert u.max() < 1
    bins = np.stack([np.bincount((u[:, k] * 64).astype(int), minlength=64) for k in range(streams)])
    chi_square = ((bins - count / 64) ** 2 / (count / 64)).sum(
        axis=1
    )  # 63 degrees of freedom: mean 63, std 11.2
    assert chi_square.max() < 63 + 5 * 11.2
    assert 55 < chi_square.mean() < 71
    others = {
        "neighbour": np.roll(u, 1, axis=0),
        "next epoch": PLAN.uniforms(batch_of(np.arange(count), epoch=1), streams),
        "next copy": PLAN.uniforms(batch_of(np.arange(count), copies=np.ones(count, int)), streams),
        "next seed": Plan(8, 1003, 48, 4).uniforms(batch_of(np.arange(count)), streams),
    }
    limit = 5 / np.sqrt(count)  # five standard deviations of a correlation of independent samples
    for name, other in others.items():
        correlation = np.corrcoef(u.T, other.T)[:streams, streams:]
        assert np.abs(correlation).max() < limit, name
    within = np.corrcoef(u.T) - np.eye(streams)
    assert np.abs(within).max() < limit


def largest_gap(a: np.ndarray, b: np.ndarray) -> float:
    """The Kolmogorov-Smirnov statistic of two samples, in units of its 0.1 % critical value."""
    grid = np.sort(np.concatenate([a, b]))
    cdf_a = np.searchsorted(np.sort(a), grid, side="right") / len(a)
    cdf_b = np.searchsorted(np.sort(b), grid, side="right") / len(b)
    return np.abs(cdf_a - cdf_b).max() / (1.95 * np.sqrt(1 / len(a) + 1 / len(b)))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (100, 400)])
def test_crop_windows_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )
    u = PLAN.uniforms(batch_of(np.arange(6000)), 22)
    ours = crop_windows(
        u, np.full(6000, height, np.int32), np.full(6000, width, np.int32), (0.08, 1.0), (3 / 4, 4 / 3)
    )
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for measure in (
        lambda w: w[:, 2] * w[:, 3],
        lambda w: np.log(w[:, 3] / w[:, 2]),
        lambda w: w[:, 0] + w[:, 2] / 2,
        lambda w: w[:, 1] + w[:, 3] / 2,
    ):
        assert largest_gap(measure(theirs), measure(ours)) < 1


@pytest.mark.parametrize(("height", "width"), [(3000, 4), (4, 3000), (1, 1), (1, 9)])
def test_images_that_no_window_fits_get_torchvisions_centre_crop(height, width):
    scale, ratio = (0.9, 1.0), (3 / 4, 4 / 3)
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
    ours = crop_windows(
        np.full((1, 22), 0.5), np.array([height], np.int32), np.array([width], np.int32), scale, ratio
    )
    assert ours[0].tolist() == list(theirs)


def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    theirs = [ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], None) for _ in range(3000)]
    ours = jitter_params(PLAN.uniforms(batch_of(np.arange(6000)), 4), 0.4)
    saturation = ours.factors[..., 0][ours.branches == Branch.SATURATE]
    assert largest_gap(np.array([params[3] for params in theirs]), saturation) < 1
    # Orders: which slot holds contrast, and which holds saturation.
    contrast_slot = ours.factors[..., 1].argmax(axis=1)
    saturation_slot = (ours.branches == Branch.SATURATE).argmax(axis=1)
    counts = Counter(zip(contrast_slot.tolist(), saturation_slot.tolist(), strict=True))
    assert len(counts) == 6
    assert all(850 < count < 1150 for count in counts.values())


def test_jitter_factors_stay_positive_at_full_strength():
    factors = jitter_params(PLAN.uniforms(batch_of(np.arange(1000)), 4), 1.5).factors[..., 0]
    assert factors.min() >= 0
    assert factors.max() <= 2.5


def test_rand_augment_draws_timms_operations_gates_and_magnitudes():
    policy = parse("rand-m9-mstd0.5-inc1")
    u = PLAN.uniforms(batch_of(np.arange(30_000)), 2 * NUM_LAYER_DRAWS).reshape(-1, 2, NUM_LAYER_DRAWS)
    params = layer_params(policy, u, 160)
    shares = np.bincount(params.branches.ravel(), minlength=8) / params.branches.size
    per_branch = Counter(BRANCH_OF[name] for name in policy.ops)
    for branch, number in per_branch.items():
        assert shares[branch] == pytest.approx(0.5 * number / 15, rel=0.06)
    assert shares[Branch.NONE] == pytest.approx(0.5, rel=0.02)
    # Sharpness is one operation, so its factors show magnitude, noise, clipping and sign: 1 +- 0.9 * N(0.9,
    # 0.05).
    strength = (params.factors[..., 0][params.branches == Branch.SHARPEN] - 1) / 0.9
    assert np.abs(strength).mean() == pytest.approx(0.899, abs=0.004)
    assert np.abs(strength).std() == pytest.approx(0.049, abs=0.004)
    assert np.abs(strength).max() == pytest.approx(1)
    assert (strength > 0).mean() == pytest.approx(0.5, abs=0.04)


def test_three_augment_is_always_one_of_three_and_blurs_by_up_to_two_pixels():
    u = PLAN.uniforms(batch_of(np.arange(30_000)), NUM_LAYER_DRAWS).reshape(-1, 1, NUM_LAYER_DRAWS)
    params = layer_params(parse("3a"), u, 160)
    counts = Counter(params.branches.ravel().tolist())
    assert counts.keys() == {Branch.BITS, Branch.SATURATE, Branch.BLUR}
    assert all(count == pytest.approx(10_000, rel=0.03) for count in counts.values())
    factors = params.factors[..., 0]
    sigma_px = factors[params.branches == Branch.BLUR]
    assert largest_gap(sigma_px, np.linspace(0.1, 2.0, len(sigma_px))) < 1.4
    assert not factors[params.branches == Branch.SATURATE].any()
    assert (params.bits == [255, 0, 127, 0]).all(axis=-1)[params.branches == Branch.BITS].all()


def test_layers_are_independent():
    u = PLAN.uniforms(batch_of(np.arange(20_000)), 2 * NUM_LAYER_DRAWS).reshape(-1, 2, NUM_LAYER_DRAWS)
    branches = layer_params(parse("dali-n2-m9"), u, 160).branches
    table = np.histogram2d(branches[:, 0], branches[:, 1], bins=np.arange(9) - 0.5)[0] / len(branches)
    assert np.abs(table - np.outer(table.sum(1), table.sum(0))).max() < 0.006


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rand-m9-w0", "'w0'"),
        ("rand-m9-mmax20", "'mmax20'"),
        ("rand-m", "'m'"),
        ("rand-m9.5", "whole number"),
        ("rand-n0", "at least 1"),
        ("rand-p1.5", "at most 1"),
        ("augmix-m5", "augmix-m5"),
        ("3a-mstd0.5", "3a-mstd0.5"),
        ("dali-m31", "m31"),
        ("dali-n2-inc1", "'inc1'"),
    ],
)
def test_policies_that_are_not_understood_are_refused_by_name(text, named):
    with pytest.raises(ValueError, match=named):
        parse(text)


def test_the_parts_of_a_policy_are_read_as_timm_reads_them():
    assert parse("rand-m9-mstd0.5-inc1").magnitude == pytest.approx(0.9)
    assert parse("rand-m9-mstd0.5-inc1").magnitude_std == pytest.approx(0.05)
    assert parse("rand").magnitude == 1.0
    assert parse("rand").severity == "timm"
    assert parse("rand-n3-p0.25").num_layers == 3
    assert parse("rand-n3-p0.25").prob == 0.25
    assert parse("reimpl") == parse("rand-m10-n2-p0.5")
    assert np.isinf(parse("rand-mstd101").magnitude_std)


def test_uniform_magnitudes_when_the_noise_is_above_100():
    u = PLAN.uniforms(batch_of(np.arange(20_000)), NUM_LAYER_DRAWS).reshape(-1, 1, NUM_LAYER_DRAWS)
    params = layer_params(parse("rand-m6-mstd101"), u, 160)
    magnitude = (params.factors[..., 0] - 0.1) / 1.8  # not increasing: 0.1 + 1.8 * magnitude
    assert largest_gap(magnitude.ravel(), np.linspace(0, 0.6, 20_000)) < 1


def test_the_reimplementations_solarize_is_no_operation_and_its_enhancements_are_all_1_9():
    policy = parse("reimpl")
    op = np.arange(15)[:, None]
    params = op_params(policy, op, np.ones((15, 1)), np.ones((15, 1)), 160)
    assert params.factors[:, 0, 0] == pytest.approx(1.9)
    assert params.bits[policy.ops.index("Solarize"), 0].tolist() == [255, 0, 255, 0]


def test_augmentation_can_be_left_out():
    spec = AugmentSpec(160, hflip=0.0)
    params = augment_params(
        PLAN, batch_of([1, 2]), np.array([50, 60], np.int32), np.array([70, 80], np.int32), spec
    )
    assert params.layers is None
    assert params.jitter is None
    assert not params.flips.any()


# ---- sampling by class

LABELS = np.repeat(np.arange(5), [500, 300, 150, 50, 0])
LABELS = np.concatenate([LABELS, np.full(3, 4)])  # 1,003 samples; the last class has three


def drawn(power, epoch=0, seed=7, labels=LABELS):
    plan = Plan(seed, len(labels), 48, 4, sampling=ClassSampling(labels, power))
    batches = list(plan.micro_batches(epoch, 0, 0, 1))
    indices = np.concatenate([batch.indices for batch in batches])
    copies = np.concatenate([batch.copies for batch in batches])
    return plan, indices, copies


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_an_epoch_draws_each_class_in_proportion_to_a_power_of_its_images(power):
    counts = np.bincount(LABELS)
    shares = counts**power / (counts**power).sum()
    for epoch in range(4):
        order = drawn(power, epoch)[0].order(epoch)
        times = np.bincount(LABELS[order], minlength=5)
        assert len(order) == len(LABELS)
        assert np.abs(times - shares * len(LABELS)).max() <= 1  # far inside binomial bounds
    if power == 1:
        assert sorted(order) == list(range(len(LABELS)))


def test_images_of_a_class_take_turns():
    plan, _, _ = drawn(0.0)
    times = np.bincount(plan.order(0), minlength=len(LABELS))
    for label in range(5):
        of_class = times[label == LABELS]
        assert of_class.max() - of_class.min() <= 1
    others = np.bincount(plan.order(1), minlength=len(LABELS))
    frequent = LABELS == 0
    assert (times[frequent] != others[frequent]).any()  # each epoch another part of a frequent class


def test_copies_of_an_image_have_numbers_and_so_other_augmentation():
    plan, indices, copies = drawn(0.0)
    pairs = list(zip(indices.tolist(), copies.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    batch = MicroBatch(0, 0, 0, np.full(3, 1002), np.arange(3))
    assert len(np.unique(plan.uniforms(batch, 4), axis=0)) == 3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sampling_does_not_depend_on_ranks_or_kills(world):
    plan, _, _ = drawn(0.5)
    alone = {b.identity: b for b in plan.micro_batches(3, 0, 0, 1)}
    again, _, _ = drawn(0.5)
    shared = {b.identity: b for rank in range(world) for b in again.micro_batches(3, 5 * 48, rank, world)}
    assert shared.keys() == {identity for identity in alone if identity[1] >= 5}
    for identity, batch in shared.items():
        assert np.array_equal(batch.indices, alone[identity].indices)
        assert np.array_equal(batch.copies, alone[identity].copies)


def test_rare_images_are_spread_over_the_epoch():
    _, indices, _ = drawn(0.0)
    rare = np.flatnonzero(LABELS[indices] == 4)
    assert abs(rare.mean() / len(indices) - 0.5) < 0.05


def test_sampling_needs_labels_and_no_repeats():
    with pytest.raises(ValueError, match="label for each sample"):
        Plan(0, 10, 2, 2, sampling=ClassSampling(np.zeros(9, int), 0.0))
    with pytest.raises(ValueError, match="no repeats"):
        Plan(0, 10, 2, 2, repeats=3, sampling=ClassSampling(np.zeros(10, int), 0.0))
