"""Count the bytes, kernels and floating-point operations of a model's passes, without a GPU.

Memory traffic bounds CMT (docs/performance.md), so a change to the model is measured by its bytes. The
passes run on fake tensors, and every operation is charged its reads and writes, so the counts never vary.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _python_dispatch, _pytree, flop_counter

from cmtrain.models.blocks import FusedPart

NO_KERNEL = {"_unsafe_view", "detach", "alias", "lift_fresh"}


class Call(NamedTuple):
    """An operation on a GPU. `alignment`: bytes, at most 16, at whose multiples all rows begin."""

    name: str
    library: str  # "aten", or "cmtrain" for our own kernels
    inputs: tuple[torch.Size, ...]
    outputs: tuple[torch.Size, ...]
    bytes: int
    alignment: int


@dataclass(frozen=True)
class Traffic:
    """Bytes per image and kernels of a pass over a batch. Operations that only view or allocate are none."""

    total_bytes: float
    calls: list[Call]


def count(
    model: nn.Module, *, image_px: int, batch: int = 256, dtype: torch.dtype = torch.float16
) -> Traffic:
    """Count the traffic of `model` on CUDA under autocast to `dtype` (none for float32).

    Counts forward and backward pass in train(), the forward pass in eval(); no loss, optimizer or cache. The
    model is not changed and may be on any device, also "meta". The GPU decides for an "auto" `ffn_kernel`.
    """
    counter = Counter()
    with FakeTensorMode():
        tensors = {name: _fake(parameter).requires_grad_() for name, parameter in model.named_parameters()}
        tensors |= {name: _fake(buffer) for name, buffer in model.named_buffers()}
        images = torch.empty(batch, 3, image_px, image_px, dtype=dtype).to(memory_format=torch.channels_last)
        with counter, AsOnCuda(), torch.set_grad_enabled(model.training):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = torch.func.functional_call(model, tensors, (images,))
            if model.training:
                logits.backward(torch.empty_like(logits))
    return Traffic(sum(call.bytes for call in counter.calls) / batch, counter.calls)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tree: Any) -> int:
    total = 0
    for tensor in _tensors(tree):  # an expanded side has stride 0: it is read once, then from a cache
        sides = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        total += math.prod(sides) * tensor.element_size()
    return total


class Counter(_python_dispatch.TorchDispatchMode):
    """Charges every kernel its inputs and outputs, and some kernels for reading an input more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if func.is_view or func.namespace in ("prim", "profiler") or name in NO_KERNEL or "empty" in name:
            return out
        amount = _bytes((args, kwargs, out))
        if name == "native_batch_norm":  # statistics first, then again to normalise
            amount += _bytes(args[0])
        elif name == "native_batch_norm_backward":  # likewise, of gradient and input
            amount += _bytes(args[:2])
        elif name == "convolution_backward":  # the gradients of input, weight and bias are three kernels
            amount += _bytes(args[0]) * (sum(args[-1]) - 1)
        elif not func._schema.returns:  # it writes into its inputs
            places = zip(func._schema.arguments, args, strict=False)
            amount += _bytes([arg for place, arg in places if place.is_write])
        tensors, given = _tensors((args, kwargs, out)), len(_tensors((args, kwargs)))
        pitches = [t.element_size() * side for t in tensors for side in t.stride() if side > 1]
        shapes = tuple(tensor.shape for tensor in tensors)
        call = name, func.namespace, shapes[:given], shapes[given:], amount, math.gcd(16, *pitches)
        self.calls.append(Call(*call))
        return out


class AsOnCuda(torch.overrides.TorchFunctionMode):
    """Makes fake tensors of the CPU behave like those of CUDA, whose fake backward needs a real device.
    The two autocasts differ in rules; those for normalisation, softmax and attention concern a CMT.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.__bool__):  # type: ignore[attr-defined]
            return True  # a step is good: timm's optimizers ask
        if torch.is_autocast_enabled("cpu"):
            if func in (F.layer_norm, torch.softmax, F.softmax, torch.Tensor.softmax):
                args = (args[0].float(), *args[1:])
            if func is F.scaled_dot_product_attention:
                return _efficient_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: float
) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    bias = None if attn_mask is None else attn_mask.to(dtype).expand(*q.shape[:3], k.shape[2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(q, k, v, bias, compute_log_sumexp=torch.is_grad_enabled(), **options)[0]


@torch.no_grad()
def training_flops_per_image(model: nn.Module, image_px: int) -> int:
    """Count the floating-point operations of forward and backward pass for one image; a multiply-add is two.

    The backward pass counts as two forward passes: torch's counter takes a grouped convolution's for a dense
    one's. Runs a copy forward, in evaluation: 0.3 s for cmt_ti at 160 px on one CPU core.
    """
    # The counter would follow gradients, which a view of a parameter cannot offer here.
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for part in copied.modules():
        if isinstance(part, FusedPart):  # the counter does not know the Triton operators
            part.kernel = "eager"
    parameter = next(copied.parameters())
    with flop_counter.FlopCounterMode(display=False) as counter:
        copied(torch.zeros(1, 3, image_px, image_px, device=parameter.device, dtype=parameter.dtype))
    return 3 * counter.get_total_flops()
