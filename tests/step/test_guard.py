"""Test the guard, and EMA and optimizer, which obey its flag. test_learner.py has the whole step."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cmtrain.step.guard import Guard, running_statistics
from cmtrain.step.measure import StepBuffer
from cmtrain.step.optimizer import Ema, make_optimizer


class Net(nn.Module):
    """Two BatchNorms with a branch between them that can hide an inf."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.second = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.second(self.conv(self.first(x))).mean((2, 3))


def optimizer_of(model):
    return make_optimizer(
        model,
        opt="sgd",
        lr=0.1,
        weight_decay=0.01,
        momentum=0.9,
        nesterov=True,
        betas=(0.9, 0.999),
        eps=1e-8,
    )


def build():
    torch.manual_seed(0)
    model = Net()
    return model, Guard(model)


def batch(number):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def test_statistics_are_checked_even_where_gradients_hide_the_inf():
    model, guard = build()
    committed = guard.committed.clone()
    model(batch(0))
    model.second.running_var[2] = float("inf")
    guard.propose()
    go = guard.commit_or_restore(torch.tensor(True))
    assert bool(go)  # the other ranks do not know: optimizer and EMA go on together
    assert torch.equal(torch.cat(running_statistics(model)), committed)
    assert (int(guard.bad_steps), int(guard.restores)) == (0, 1)


def test_one_micro_batch_leaves_batchnorm_as_torch_would():
    model, guard = build()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    plain(batch(0))
    with guard.uncounted():
        model(batch(0))
    guard.propose()
    guard.commit_or_restore(torch.tensor(True))
    assert model.first.num_batches_tracked == plain.first.num_batches_tracked == 1
    for ours, theirs in zip(running_statistics(model), running_statistics(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_accumulation_commits_the_mean_of_the_proposals():
    """2 micro-batches on one rank leave what the mean over 2 ranks would be."""
    model, guard = build()
    ranks = []
    for index in range(2):
        rank = Net()
        rank.load_state_dict(model.state_dict())
        rank(batch(index))
        ranks.append(torch.cat(running_statistics(rank)))
    for index in range(2):
        model(batch(index))
        guard.propose()
    guard.commit_or_restore(torch.tensor(True))
    torch.testing.assert_close(torch.cat(running_statistics(model)), (ranks[0] + ranks[1]) / 2)


class Count(TorchDispatchMode):
    """Counts the calls of the dispatcher: one kernel each, or a few for a list of tensors."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_grow_with_depth():
    """Guard and record of a step, whose backward pass alone has thousands."""
    calls = []
    for depth in (2, 50):
        model = nn.Sequential(*[nn.BatchNorm2d(8) for _ in range(depth)])
        guard, buffer = Guard(model), StepBuffer(num_processes=1)
        loss, norm = torch.ones(()), torch.ones(())
        with Count() as count:
            guard.propose()
            guard.commit_or_restore(torch.isfinite(norm))
            buffer.add(loss, norm, [])
        calls.append(count.calls)
    print(f"\noperations of guard and record in a step: {calls[0]}")
    # Cutting the flat tensor into views is one call a call of split, whatever the number of pieces.
    assert calls[0] == calls[1] <= 24, calls


def test_a_model_without_batchnorm_is_fine():
    model = nn.Linear(2, 2)
    guard = Guard(model)
    guard.propose()
    assert not bool(guard.commit_or_restore(torch.tensor(False)))
    assert (int(guard.bad_steps), int(guard.restores)) == (1, 0)


def test_ema_follows_the_formula():
    model, _ = build()
    ema = Ema(model, 0.9)
    before = ema.module.conv.weight.clone()
    with torch.no_grad():
        model.conv.weight += 1
    ema.update(torch.tensor(True), 0)
    torch.testing.assert_close(ema.module.conv.weight, before + 0.1 * (model.conv.weight - before))


@pytest.mark.parametrize("ours", [True, False])
def test_a_skipped_first_step_of_fused_sgd_leaves_no_garbage_in_the_momentum(ours, monkeypatch):
    """torch creates the momentum at the first step from uninitialised memory; a skipped step keeps it."""

    def dirty(tensor, **options):
        return torch.full_like(tensor, 12345.0)

    model = nn.Linear(1, 1, bias=False)
    weight = model.weight
    optimizer = optimizer_of(model) if ours else torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    monkeypatch.setattr(torch, "empty_like", dirty)
    with torch.no_grad():
        weight.fill_(1.0)
    for found_inf in (1.0, 0.0):
        weight.grad = torch.ones(1, 1)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    if ours:  # Nesterov's first step with decay: 1 - 0.1 * (1 + 0.9) * (1 + 0.01)
        torch.testing.assert_close(weight.item(), 0.8081)
    else:
        assert weight.item() < -1000


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
