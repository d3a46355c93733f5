"""An inf anywhere poisons nothing: the BatchNorm transaction and what hangs on its flag."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from cmtrain.ema import Ema
from cmtrain.guard import Guard, running_statistics
from cmtrain.optim import make_optimizer


class Net(nn.Module):
    """Two BatchNorms with a branch between them that can hide an inf."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.second = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.second(self.conv(self.first(x))).mean((2, 3))


def optimizer_of(model, opt="sgd"):
    return make_optimizer(
        model, opt=opt, lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True, betas=(0.9, 0.999), eps=1e-8
    )


def one_step(model, guard, optimizer, ema, images):
    """What Learner does in fp32, on plain tensors."""
    optimizer.zero_grad()
    for image in images:
        model(image).square().sum().backward()
        guard.propose()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    go = guard.settle(torch.isfinite(norm))
    optimizer.found_inf = (~go).float()
    optimizer.step()
    ema.update(go)


def everything(model, ema, optimizer):
    """A copy of all that a step may change."""
    state = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    state |= {f"ema.{k}": v.clone() for k, v in ema.module.state_dict().items()}
    for i, slots in enumerate(optimizer.state_dict()["state"].values()):
        state |= {f"optimizer.{i}.{k}": v.clone() for k, v in slots.items()}
    return state


def build(opt="sgd", protect=True):
    torch.manual_seed(0)
    model = Net()
    return model, Guard(model, protect=protect), optimizer_of(model, opt), Ema(model, 0.9)


def batch(step, poison=None):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    if poison is not None:
        images[poison] = float("inf")
    return images


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_bad_step_changes_nothing_at_all(opt, accumulation, bad_step):
    model, guard, optimizer, ema = build(opt)
    for step in range(4):
        before = everything(model, ema, optimizer)
        images = [batch(10 * step + i) for i in range(accumulation)]
        if step == bad_step:
            images[-1] = batch(99, poison=1)
        one_step(model, guard, optimizer, ema, images)
        after = everything(model, ema, optimizer)
        if step == bad_step:
            for key in before:
                assert torch.equal(before[key], after[key]), key
        else:
            assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert (int(guard.bad_steps), int(guard.restores), int(guard.bad_steps_in_a_row)) == (1, 1, 0)


def test_without_the_guard_the_same_step_poisons_everything():
    model, guard, optimizer, ema = build(protect=False)
    one_step(model, guard, optimizer, ema, [batch(0, poison=1)])
    assert torch.isnan(model.first.running_var).any()
    assert torch.isnan(model.conv.weight).any()
    assert torch.isnan(ema.module.first.running_var).any()
    assert int(guard.bad_steps) == 1


def test_statistics_are_checked_even_where_gradients_hide_the_inf():
    model, guard, _, _ = build()
    committed = guard.committed.clone()
    model(batch(0))
    model.second.running_var[2] = float("inf")
    guard.propose()
    go = guard.settle(torch.tensor(True))
    assert bool(go)  # the other ranks know nothing of it: optimizer and EMA go on together
    assert torch.equal(torch.cat(running_statistics(model)), committed)
    assert (int(guard.bad_steps), int(guard.restores)) == (0, 1)


def test_a_healthy_run_is_bit_identical_with_and_without_the_guard():
    states = []
    for protect in (True, False):
        model, guard, optimizer, ema = build(protect=protect)
        for step in range(5):
            one_step(model, guard, optimizer, ema, [batch(2 * step), batch(2 * step + 1)])
        states.append(everything(model, ema, optimizer))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_one_micro_batch_leaves_batchnorm_as_torch_would():
    model, guard, _, _ = build()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    plain(batch(0))
    model(batch(0))
    guard.propose()
    guard.settle(torch.tensor(True))
    for ours, theirs in zip(running_statistics(model), running_statistics(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_accumulation_commits_the_mean_of_the_proposals():
    """2 micro-batches on one rank leave what the mean over 2 ranks would be."""
    model, guard, _, _ = build()
    ranks = []
    for index in range(2):
        rank = Net()
        rank.load_state_dict(model.state_dict())
        rank(batch(index))
        ranks.append(torch.cat(running_statistics(rank)))
    for index in range(2):
        model(batch(index))
        guard.propose()
    guard.settle(torch.tensor(True))
    torch.testing.assert_close(torch.cat(running_statistics(model)), (ranks[0] + ranks[1]) / 2)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_the_step_never_reads_the_device(opt, monkeypatch):
    """Under FakeTensorMode every .item() and bool() raises: no host synchronisation can hide."""
    monkeypatch.setattr("cmtrain.ema.copy.deepcopy", lambda model: Net())  # fake tensors cannot be copied deeply
    with FakeTensorMode():
        model, guard, optimizer, ema = build(opt)
        one_step(model, guard, optimizer, ema, [batch(0), batch(1)])


def test_the_proof_above_has_teeth():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.isfinite(torch.zeros(())))


def test_the_number_of_kernels_does_not_grow_with_depth():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    calls = []
    for depth in (2, 50):
        model = nn.Sequential(*[nn.BatchNorm2d(8) for _ in range(depth)])
        guard = Guard(model)
        with Count() as count:
            guard.propose()
            guard.settle(torch.tensor(True))
        calls.append(count.calls)
    # Cutting the flat tensor into views is one call a call of split, whatever the number of pieces.
    assert calls[0] == calls[1] < 40, calls


def test_a_model_without_batchnorm_is_fine():
    model = nn.Linear(2, 2)
    guard = Guard(model)
    guard.propose()
    assert not bool(guard.settle(torch.tensor(False)))
    assert (int(guard.bad_steps), int(guard.restores)) == (1, 0)


def test_ema_follows_the_formula():
    model, _, _, ema = build()
    before = ema.module.conv.weight.clone()
    with torch.no_grad():
        model.conv.weight += 1
    ema.update(torch.tensor(True))
    torch.testing.assert_close(ema.module.conv.weight, before + 0.1 * (model.conv.weight - before))


def test_a_skipped_first_step_of_fused_sgd_leaves_no_garbage_in_the_momentum():
    model = nn.Linear(4, 4)
    optimizer = optimizer_of(model)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(
        torch.equal(s["momentum_buffer"], torch.zeros_like(s["momentum_buffer"])) for s in optimizer.state.values()
    )


def test_pre_created_momentum_is_torch_sgd():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    a = optimizer_of(ours)
    b = torch.optim.SGD([{"params": [theirs.bias], "weight_decay": 0.0}, {"params": [theirs.weight], "weight_decay": 0.01}], lr=0.1, momentum=0.9, nesterov=True)  # fmt: skip  # noqa: E501
    for step in range(3):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(torch.randn(2, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_vectors_and_position_tables_are_not_decayed():
    class WithTable(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.table = nn.Parameter(torch.ones(4, 4))

        def no_weight_decay(self):
            return {"table"}

    model = WithTable()
    decayed = [p for g in optimizer_of(model).param_groups if g["weight_decay"] for p in g["params"]]
    assert len(decayed) == 1
    assert decayed[0] is model.weight
