"""Build a network of a thousand parameters that overflows like a large one, and a Learner for it."""

import torch
from torch import nn

from cmtrain.step.evaluate import evaluate
from cmtrain.step.learner import Learner
from cmtrain.step.mixing import MixSpec
from cmtrain.step.optimizer import make_optimizer
from helpers.half import HalfAccelerator
from pipelines.spec import Batch

NUM_CLASSES = 4
# A factor for the images that exceeds a precision's range after the first convolution.
POISON = {"fp16": 3e6, "bf16": 3e38}


class Mini(nn.Module):
    """conv -> GELU -> BatchNorm as in CMT's stem, residual blocks without a last norm, a linear head."""

    def __init__(self, num_blocks=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        blocks = [
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
            for _ in range(num_blocks)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        x = self.norm(nn.functional.gelu(self.stem(x)))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.drop(x.mean((2, 3))))


def make_learner(opt="sgd", *, accelerator=None, model=None, protect=True, accumulation=1, **options):
    """Build a Learner of a Mini, with EMA; fp16 with a loss scale of 1024 unless `accelerator` differs."""
    torch.manual_seed(0)
    model = Mini() if model is None else model
    optimizer = make_optimizer(model, opt=opt, lr=0.05, weight_decay=1e-4, momentum=0.9, nesterov=True)
    defaults = {
        "ema_decay": 0.9,
        "spike_sigma": 6.0,
        "mixing": MixSpec(NUM_CLASSES),
        "clip_grad": None,
        "seed": 0,
    }
    return Learner(
        model, optimizer, accelerator or HalfAccelerator(2.0**10),
        protect=protect, accumulation=accumulation, **(defaults | options),
    )  # fmt: skip


def batch(number, poison=1.0, size=16, side=16):
    """Return noise images whose brightness depends on the class. The same number gives the same batch."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
    images = torch.randn(size, 3, side, side, generator=generator) * 0.3 + labels[:, None, None, None] - 1.5
    return Batch(images * poison, labels, torch.arange(size) + size * number)


def step(learner, number, lr=0.05, poison=1.0):
    """Do step `number` on its own batches, the last of them multiplied by `poison`."""
    turns = learner.accumulation
    batches = [batch(number * turns + turn, poison if turn == turns - 1 else 1.0) for turn in range(turns)]
    learner.step(iter(batches), number, lr)


def snapshot(learner):
    """Return a copy of everything that a step may change."""
    state = {f"model.{k}": v.clone() for k, v in learner.model.state_dict().items()}
    if learner.ema:
        state |= {f"ema.{k}": v.clone() for k, v in learner.ema.module.state_dict().items()}
    for i, slots in enumerate(learner.optimizer.state_dict()["state"].values()):
        state |= {f"optimizer.{i}.{k}": v.clone() for k, v in slots.items()}
    return state


def assert_same(a, b):
    """Assert that two snapshots are equal, bit for bit."""
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} differ: {different[:3]}"


def accuracy(learner, module, side=16):
    """Return (top-1, loss) on two batches that no step takes."""
    places = torch.arange(32).split(16)
    batches = [batch(10**6 + i, side=side)._replace(indices=places[i]) for i in range(2)]
    result = evaluate(module, batches, learner.accelerator, 32, NUM_CLASSES)
    return result.top1, result.loss
