"""Test the measurements of a step: phases, waiting, FLOPs, and the size of the model's numbers."""

import itertools
import time
import warnings

import guard
import pytest
import timm
import torch
from helpers.mini import batch, make_learner
from torch import nn

import cmtrain.models  # noqa: F401
from cmtrain.models.blocks import FeedForward
from cmtrain.models.cost import training_flops_per_image
from cmtrain.step import measure
from cmtrain.step.measure import MAX_PENDING_STEPS, PHASES, Phases, Stopwatch, extremes


def slow_batches(waited):
    """Yield a batch every 0.2 s, a wait that belongs to no phase. Append the seconds to `waited`."""
    for number in itertools.count():
        begin = time.perf_counter()
        time.sleep(0.2)
        waited.append(time.perf_counter() - begin)
        yield batch(number)


def test_the_phases_of_a_step_add_up_to_its_time_without_waiting_for_data():
    learner = make_learner("adamw", accumulation=3)
    waited = []
    batches = slow_batches(waited)
    learner.step(batches, 0, 1e-3)
    learner.phases.pop_finished()
    waited.clear()
    begin = time.perf_counter()
    learner.step(batches, 1, 1e-3)
    wall = time.perf_counter() - begin
    (seconds,) = learner.phases.pop_finished()
    assert tuple(seconds) == PHASES
    assert min(seconds.values()) > 0
    assert len(waited) == 3
    assert 0.5 < sum(seconds.values()) / (wall - sum(waited)) <= 1
    assert learner.phases.pop_finished() == []


def test_waiting_counts_the_time_until_each_batch_of_a_lap():
    """The first batch, for which a pipeline is built, is in a lap of its own, as in a run."""
    waited, clock = [], Stopwatch()
    batches = clock.waiting(slow_batches(waited))
    next(batches)
    assert clock.lap()[1] > 0
    next(batches)
    next(batches)
    seconds, counted = clock.lap()
    assert 0.5 < sum(waited[1:]) / counted <= 1
    assert counted <= seconds < sum(waited)
    assert clock.lap()[1] == 0


class FakeEvent:
    """A CUDA event. The device has passed `passed` of the `recorded` ones, a millisecond apart."""

    recorded = 0
    passed = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.recorded += 1
        self.number = FakeEvent.recorded

    def query(self):
        return self.number <= FakeEvent.passed

    def elapsed_time(self, end):
        assert self.query(), "would be an error on a GPU"
        assert end.query(), "would be an error on a GPU"
        return float(end.number - self.number)


@pytest.fixture
def gpu_phases(monkeypatch):
    monkeypatch.setattr(measure.torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "recorded", 0)
    monkeypatch.setattr(FakeEvent, "passed", 0)
    return Phases(torch.device("cuda"))


def step(phases, micro_batches=1):
    for _ in range(micro_batches):
        for phase in ("", "forward", "backward"):
            phases.begin(phase)
    phases.begin("optimizer")
    phases.end_step()


def test_events_are_read_when_the_device_has_passed_them_and_never_waited_for(gpu_phases):
    step(gpu_phases)  # marks 1 to 5
    assert gpu_phases.pop_finished() == []
    step(gpu_phases, micro_batches=2)  # 6 to 13
    FakeEvent.passed = 5
    assert gpu_phases.pop_finished() == [{"forward": 0.001, "backward": 0.001, "optimizer": 0.001}]
    FakeEvent.passed = 12
    assert gpu_phases.pop_finished() == []
    step(gpu_phases)
    FakeEvent.passed = 18
    two = {"forward": 0.002, "backward": 0.002, "optimizer": 0.001}
    assert gpu_phases.pop_finished() == [two, {"forward": 0.001, "backward": 0.001, "optimizer": 0.001}]


def test_the_oldest_steps_are_dropped_where_nobody_reads_them(gpu_phases):
    for _ in range(3 * MAX_PENDING_STEPS):
        step(gpu_phases)
    FakeEvent.passed = FakeEvent.recorded
    assert len(gpu_phases.pop_finished()) == MAX_PENDING_STEPS


@pytest.mark.parametrize("variant", ["paper", "reimpl"])
@pytest.mark.parametrize("bias", ["none", "relative", "pairwise"])
@pytest.mark.parametrize("absolute", [False, True])
def test_flops_of_every_kind_of_position(variant, bias, absolute):
    options = {"variant": variant, "attention_bias": bias, "absolute_position": absolute}
    model = timm.create_model("cmt_micro", num_classes=4, **options)
    assert training_flops_per_image(model, 32) == training_flops_per_image(timm.create_model(
        "cmt_micro", num_classes=4, variant=variant, attention_bias="none"), 32)  # fmt: skip


@pytest.mark.parametrize(("name", "px"), [("cmt_ti", 160), ("cmt_xs", 192), ("cmt_s", 224), ("cmt_b", 256)])
def test_flops_are_the_same_with_either_kernel(name, px):
    """Torch's counter does not know the Triton operators: without help it counts a third."""
    flops = {}
    for kernel in ("eager", "fused"):
        model = timm.create_model(name, img_size=px, ffn_kernel=kernel)
        flops[kernel] = training_flops_per_image(model, px)
        assert {part.kernel for part in model.modules() if isinstance(part, FeedForward)} == {kernel}
    assert flops["fused"] == flops["eager"]


def test_flops_are_three_forward_passes_and_counting_changes_nothing():
    torch.manual_seed(0)
    model = timm.create_model("cmt_micro", num_classes=4, img_size=32, drop_rate=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    flops = training_flops_per_image(model, 32)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (
        training_flops_per_image(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), 32)
        == 3 * 2 * 3072 * 10
    )
    assert (
        training_flops_per_image(timm.create_model("cmt_micro", num_classes=4, img_size=64), 64) > 3 * flops
    )


def numbers_of(model):
    return {name: value.item() for name, value in extremes(model).items()}


def test_extremes_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    nn.init.constant_(model[0].weight, 1.0)  # 12 of them
    nn.init.constant_(model[2].weight, 2.0)  # 8 of them, and 4 ones and 4 zeros of BatchNorm
    model[1].running_mean[2], model[1].running_var[1] = -7.0, 5.0
    norm = (12 + 8 * 4 + 4) ** 0.5
    assert numbers_of(model) == {
        "bn_mean_abs_max": 7.0,
        "bn_var_max": 5.0,
        "weight_norm": pytest.approx(norm),
    }
    model[1].running_var[3] = torch.inf
    assert extremes(model)["bn_var_max"].item() == torch.inf
    model[1].running_mean[0] = torch.nan
    assert extremes(model)["bn_mean_abs_max"].isnan()
    without = numbers_of(nn.Linear(1, 1, bias=False))
    assert (without["bn_mean_abs_max"], without["bn_var_max"]) == (0, 0)


def test_a_report_holds_the_extremes_of_the_model():
    learner = make_learner("adamw")
    batches = iter([batch(0), batch(1)])
    for number in range(2):
        learner.step(batches, number, 1e-3)
    report = learner.report(2, 0, 1e-3, reset=True)
    expected = numbers_of(learner.model)
    assert {name: getattr(report, name) for name in expected} == expected
    assert min(expected.values()) > 0


def test_waiting_for_the_device_is_an_error_in_the_block_and_nowhere_else(monkeypatch):
    """Torch warns once, after it set the mode; a warning is an error here, and the mode must not stay."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(KeyError), guard.no_host_sync():
        raise KeyError(modes.copy())
    assert modes == ["error", "default"]
