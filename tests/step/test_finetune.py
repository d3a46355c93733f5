"""Layer-wise learning rates are timm's; what is frozen keeps every bit, on any number of ranks."""

import copy
import os
import pickle
import socket

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from helpers.half import HalfAccelerator
from helpers.mini import Mini, accuracy, assert_same, batch, snapshot
from helpers.runs import FORKS, HANG_SECONDS
from timm.optim import param_groups_layer_decay

import cmtrain.models  # noqa: F401
from cmtrain.errors import ConfigError
from cmtrain.step.learner import Learner
from cmtrain.step.mixing import MixSpec
from cmtrain.step.optimizer import frozen_names, lr_scales, make_optimizer, set_frozen

ADAMW = {"opt": "adamw", "lr": 0.1, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8}
HOW = ADAMW | {"momentum": 0.9, "nesterov": True}


def learner_of(model, *, accelerator=None, accumulation=1, opt="adamw", layer_decay=1, **options):
    optimizer = make_optimizer(model, **HOW | {"opt": opt}, layer_decay=layer_decay)
    set_frozen(model, options.get("frozen", ()))
    return Learner(
        model, optimizer, accelerator or HalfAccelerator(1.0, "bf16"), ema_decay=0.9, protect=True,
        spike_sigma=6.0, mixing=MixSpec(4), accumulation=accumulation, clip_grad=1.0, seed=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["cmt_micro", "resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_learning_rates_of_every_parameter_are_timms_at_three_steps(name):
    size = {"img_size": 32} if name.startswith(("cmt", "vit")) else {}
    model = timm.create_model(name, num_classes=4, **size)
    learner = learner_of(model, layer_decay=0.7)
    kept = getattr(model, "no_weight_decay", set)()
    theirs = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(model, 0.05, kept, layer_decay=0.7)
        for parameter in group["params"]
    }
    assert len({scale for scale, _ in theirs.values()}) > 3
    for number, lr in enumerate((0.1, 0.05, 1e-6)):
        learner.step(iter([batch(number, side=32)]), number, lr)
        ours = {
            id(parameter): (group["lr"], group["weight_decay"])
            for group in learner.optimizer.param_groups
            for parameter in group["params"]
        }
        assert ours == {key: (lr * scale, decay) for key, (scale, decay) in theirs.items()}


def test_one_group_of_each_kind_without_it():
    optimizer = make_optimizer(Mini(), **HOW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]
    model = timm.create_model("resnet18")
    assert set(lr_scales(model, 1.0).values()) == {1.0}


def test_factors_multiply_those_of_the_layers():
    model = timm.create_model("cmt_micro", num_classes=4, img_size=32)
    scales = lr_scales(model, 0.5, ["head.*=10", "*.bias=0.5", "stem.conv1.weight=0"])
    layers = lr_scales(model, 0.5)
    for name, scale in scales.items():
        factor = 10 if name.startswith("head.") else 1
        factor *= 0.5 if name.endswith(".bias") else 1
        assert scale == layers[name] * factor * (name != "stem.conv1.weight"), name
    optimizer = make_optimizer(Mini(), **HOW, lr_factors=["head.*=10"])
    groups = {(group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups}
    assert groups == {(1.0, 0.0), (1.0, 0.05), (10.0, 0.0), (10.0, 0.05)}


@pytest.mark.parametrize(
    "factor", ["head.*", "head.*=fast", "heads.*=2", "head.*=-1", "head.*=inf", "head.*=nan"]
)
def test_a_factor_that_cannot_be_used_is_refused(factor):
    with pytest.raises(
        ConfigError, match=r"optim.lr_factors: .*: must be PATTERN=FACTOR, .*stem.weight=0.1"
    ):
        lr_scales(Mini(), 1.0, [factor])


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match=r"optim.layer_decay: Mini has no group_matcher"):
        make_optimizer(Mini(), **HOW, layer_decay=0.7)


def test_the_factors_survive_a_checkpoint():
    model, again = (timm.create_model("cmt_micro", num_classes=4, img_size=32) for _ in range(2))
    learner, other = learner_of(model, layer_decay=0.5), learner_of(again, layer_decay=0.5)
    learner.step(iter([batch(0, side=32)]), 0, 0.1)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for one in (learner, other):
        one.step(iter([batch(1, side=32)]), 1, 0.1)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- freezing


def take(learner, number, *, lr=0.1, poison=1.0, rank=0, ranks=1):
    """Do step `number` on batches of its own, shared by `ranks`."""
    turns = range(learner.accumulation)
    count = len(turns) * ranks
    batches = [batch(number * count + turn * ranks + rank, poison, size=8, side=32) for turn in turns]
    learner.step(iter(batches), number, lr)


def frozen_state(learner):
    """What of model and EMA is frozen, by name, copied."""
    states = {kind: module.state_dict() for kind, module in learner.weights.items()}
    return {(k, n): state[n].clone() for k, state in states.items() for n in state if n in learner.frozen}


CASES = {
    "cmt_micro": ("backbone", "adamw"),
    "cmt_micro patterns": (["stem.*", "stages.[01].*"], "sgd"),
    "test_resnet": ("backbone", "sgd"),
    "test_resnet patterns": (["conv1.*", "bn1.*", "layer1.*"], "adamw"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_frozen_is_the_same_bit_for_bit_after_twenty_steps(case):
    """Seven micro-batches a step, because the mean of seven equal numbers is not that number."""
    name, (freeze, opt) = case.split()[0], CASES[case]
    model = timm.create_model(name, num_classes=4, **({"img_size": 32} if name == "cmt_micro" else {}))
    for batchnorm in filter(lambda m: hasattr(m, "running_mean"), model.modules()):
        batchnorm.running_mean.uniform_(0.1, 1)
    learner = learner_of(model, opt=opt, accumulation=7, frozen=frozen_names(model, freeze))
    before, head = frozen_state(learner), model.get_classifier().weight.clone()
    moving = {n: t.clone() for n, t in model.state_dict().items() if n not in learner.frozen}
    for number in range(20):
        take(learner, number, poison=torch.inf if number == 1 else 1.0)
        assert all((p.grad is None) == (n in learner.frozen) for n, p in model.named_parameters())
        if number == 3:  # an evaluation between two steps
            accuracy(learner, model, side=32)
    after = frozen_state(learner)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(key[1].endswith("running_var") for key in before)
    assert not torch.equal(head, model.get_classifier().weight)
    own = model.state_dict()
    assert not any(torch.equal(t, own[n]) for n, t in moving.items() if n.endswith("running_mean"))
    assert learner.report(20, 0, 0.1, reset=True).bad_steps == 1


def test_unfrozen_at_an_epoch_is_the_same_after_a_resume_at_any_step():
    def fresh(first):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=4)
        frozen = frozen_names(model, "backbone") if first < 3 else ()
        return learner_of(model, frozen=frozen, unfreeze_step=3, layer_decay=0.8)

    states = []
    whole = fresh(0)
    for number in range(6):
        states.append(copy.deepcopy(whole.state_dict()))
        moved = whole.model.layer1[0].conv1.weight.clone()
        take(whole, number, lr=0.01)
        assert torch.equal(moved, whole.model.layer1[0].conv1.weight) == (number < 3)
    assert whole.model.layer1[0].bn1.training
    for first in (1, 3, 4):
        resumed = fresh(first)
        resumed.load_state_dict(states[first])
        for number in range(first, 6):
            take(resumed, number, lr=0.01)
        assert_same(snapshot(resumed), snapshot(whole))
        assert resumed.guard.state_dict() == whole.guard.state_dict()


def test_wrong_patterns_are_refused():
    model = timm.create_model("resnet18", num_classes=4)
    assert "fc.weight" not in frozen_names(model, "backbone")
    assert frozen_names(model, ["bn1.*"]) == {f"bn1.{n}" for n in model.bn1.state_dict()}
    model.layer1.requires_grad_(False)  # as some models of timm have it: they stay so
    assert not any(n.startswith("layer1.") and "weight" in n for n in frozen_names(model, "backbone"))
    with pytest.raises(ConfigError, match=r"model.freeze: stem.. matches no parameter; one is conv1.weight"):
        frozen_names(model, ["conv1.*", "stem.*"])
    with pytest.raises(ConfigError, match=r"model.freeze: nothing is left to train"):
        frozen_names(model, ["*"])


def test_a_compiled_model_is_unfrozen_as_well():
    model = Mini()
    learner = learner_of(model, frozen=frozen_names(model, "backbone"), unfreeze_step=2)
    model.compile(backend="aot_eager")
    for number in range(4):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        take(learner, number, lr=0.01)
        after = model.state_dict()
        for name in ("stem.weight", "norm.weight", "norm.running_mean"):
            assert torch.equal(before[name], after[name]) == (number < 2), name
        assert not torch.equal(before["head.weight"], after["head.weight"])


def _train(rank, port, folder):
    """One of two ranks: the backbone is frozen for three of six steps."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    wrapper = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[wrapper], mixed_precision="bf16")
    torch.manual_seed(0)
    model = Mini()
    frozen = frozen_names(model, "backbone")
    learner = learner_of(model, accelerator=accelerator, accumulation=2, frozen=frozen, unfreeze_step=3)
    states = [frozen_state(learner)]
    for number in range(6):
        take(learner, number, lr=0.01, rank=rank, ranks=2)
        states.append(frozen_state(learner) if learner.frozen else snapshot(learner))
    gradients = [p.grad.clone() for p in model.parameters()]
    learner.average_over_ranks()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps((states, gradients, snapshot(learner))))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_unfreeze_together_and_stay_the_same(tmp_path):
    """Parameters without a gradient keep nobody waiting, and unfrozen ones are reduced over the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=_train, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG_SECONDS)
        assert process.exitcode == 0
    (states, gradients, end), (_, other_gradients, other_end) = (
        pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)
    )
    assert all(torch.equal(states[0][key], states[3][key]) for key in states[0])
    assert not torch.equal(states[4]["model.stem.weight"], states[0]["model", "stem.weight"])
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
    assert_same(end, other_end)
