"""Count the kernels that a whole training step launches on CUDA, on fake tensors.

An operation is one kernel, as in cmtrain/models/cost.py; views and allocations are none. An operation on
lists of tensors is one kernel for each group of tensors and of their chunks. LIMITS has the largest groups,
from ATen/native/cuda/MultiTensorApply.cuh. If the layouts of one pair differ, each tensor has a kernel.
torch.cat is one kernel for each 128 tensors.
"""

import collections
from functools import partial
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cmtrain.models  # noqa: F401
from cmtrain.models.cost import NO_KERNEL, AsOnCuda, _fake
from cmtrain.step.mixing import MixSpec
from helpers.half import HalfAccelerator
from helpers.mini import make_learner
from pipelines.spec import Batch

# By CUDA version: most tensors with one list of them, two, ... five, and most chunks, of 65,536 numbers.
LIMITS = {12: ((110, 64, 48, 36, 30), 320), 13: ((770, 448, 336, 252, 210), 2240)}
CHUNK, MAX_CAT = 65536, 128


def launches(name, args, cuda):
    """Return how many kernels the operation `name` is."""
    if name in ("cat", "stack"):
        return -(-len(args[0]) // MAX_CAT)
    lists = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], Tensor)]
    if not lists or not name.startswith(("_foreach", "_fused", "_amp_foreach")):
        return 1
    first, is_fused = lists[0], name.startswith("_fused")
    if not is_fused and any(
        a.stride() != b.stride() for other in lists[1:] for a, b in zip(first, other, strict=True)
    ):
        return len(first)
    num_lists = len(lists) - ("adam" in name)  # the steps are not cut into chunks
    num_lists += name in ("_foreach_sub", "_foreach_add", "_foreach_mul", "_foreach_div")  # the results
    num_chunks = sum(-(-t.numel() // CHUNK) for t in first)
    max_tensors, max_chunks = LIMITS[cuda]
    parts = max(-(-len(first) // max_tensors[num_lists - 1]), -(-num_chunks // max_chunks))
    return 2 * parts + 1 if name == "_foreach_norm" else parts  # a sum for each part, and zeros


class Launches(TorchDispatchMode):
    """Counts kernels by `phase` and operation."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda, self.phase, self.counts = cuda, "", collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._overloadpacket.__name__
        is_none = function.is_view or function.namespace in ("prim", "profiler") or name in NO_KERNEL
        if not is_none and "empty" not in name:
            self.counts[self.phase, name] += launches(name, args, self.cuda)
        return out

    def by_phase(self):
        totals = collections.Counter()
        for (phase, _), count in self.counts.items():
            totals[phase] += count
        return totals


class _Accelerator(HalfAccelerator):
    def autocast(self):
        return torch.autocast("cpu", self.dtype)


def step_launches(
    name="cmt_ti", *, opt="adamw", accumulation=1, clip_grad=5.0, cuda=13, image_px=160, **options
):
    """Return the Launches of a second step: phases "forward", "backward" and "optimizer", with the guard."""
    counter = Launches(cuda)
    with torch.device("meta"):
        models = [timm.create_model(name, num_classes=1000, **options) for _ in range(2)]
        models = [model.to(memory_format=torch.channels_last).train() for model in models]
    with FakeTensorMode():
        for module in (module for model in models for module in model.modules()):
            for key, tensor in module._parameters.items():
                module._parameters[key] = None if tensor is None else nn.Parameter(_fake(tensor))
            for key, tensor in module._buffers.items():
                module._buffers[key] = None if tensor is None else _fake(tensor)
        # Fake tensors cannot be copied deeply.
        with patch("cmtrain.step.optimizer.copy.deepcopy", lambda _: models[1]):
            learner = make_learner(
                opt, model=models[0], accelerator=_Accelerator(2.0**10), accumulation=accumulation,
                clip_grad=clip_grad, mixing=MixSpec(1000, mixup=0.8, smoothing=0.1),
            )  # fmt: skip
        learner.phases.begin = partial(setattr, counter, "phase")
        propose = learner.guard.propose
        learner.guard.propose = lambda: (learner.phases.begin("optimizer"), propose())
        images = torch.empty(64, 3, image_px, image_px, dtype=learner.accelerator.dtype)
        labels = torch.empty(64, dtype=torch.int64)
        micro = Batch(images.to(memory_format=torch.channels_last), labels, labels)
        for parameter in learner.parameters:
            parameter.grad = torch.empty_like(parameter)
        learner.optimizer.step()  # the first one makes the optimizer's state
        with counter, AsOnCuda():
            learner.step(iter([micro] * accumulation), 0, 1e-3)
    return counter
