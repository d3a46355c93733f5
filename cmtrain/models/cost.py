"""Count the bytes, kernels and operations of a model's passes, and predict their time, without a GPU.

Memory traffic bounds CMT (docs/performance.md), so a change to the model is measured by its bytes. The
passes run on fake tensors, and every operation is charged its reads and writes, so the counts never vary.
"""

import collections
import copy
import math
from collections.abc import Callable, Iterable, Iterator
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


class Traffic(NamedTuple):
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


# Per second: bytes of a copy, read and written; instructions of 32 threads: multiprocessors, which issue 4 a
# cycle, times cycles; operations of a matrix product.
DEVICES = {
    "h100": (3.0e12, 132 * 4 * 1.755e9, 798e12), "h200": (4.3e12, 132 * 4 * 1.755e9, 798e12),
    "a100": (1.7e12, 108 * 4 * 1.41e9, 250e12), "l40s": (0.73e12, 142 * 4 * 2.52e9, 290e12),
}  # fmt: skip
LAUNCH_SECONDS = 2.5e-6
TENSORS_OF_A_LAUNCH = 128  # of an operation on lists of them

# A thread's instructions of our kernels, for each number of the widest tensor; more for each channel of the
# narrowest; how many of these channels a program takes. Machine code for sm_90, fp16, CMT-Ti's four stages.
INSTRUCTIONS = {
    "expand": (36, 0.045, 9999), "depthwise": (82, 0, 9999), "depthwise plain": (41, 0, 9999),
    "project": (26, 0, 128), "weight_grad": (25, 0, 9999), "project_grad": (34, 0.16, 9999),
    "depthwise_grad": (80, 0, 9999), "depthwise_grad plain": (58, 0, 9999), "expand_grad": (63, 0, 9999),
    "norm": (14.8, 0, 9999), "norm_grad": (20.5, 0, 9999),
}  # fmt: skip
# Instructions of torch's LayerNorm for a row: not vectorised, vectorised
NORM_INSTRUCTIONS = {"native_layer_norm": (2880, 1040), "native_layer_norm_backward": (800, 700)}
TAP_INSTRUCTIONS = 10 / 32  # of a library's depth-wise convolution, for each tap of a number
PRODUCT_SHARES = {16: 1.0, 8: 0.9, 4: 0.7, 2: 0.4}  # of the rates, by bytes at whose multiples rows begin
FEW_CHANNELS_SHARE = 1 / 3  # that a convolution reaches whose channels are no multiple of 8
SLOW = "known slow: "

# kernel, bytes, instructions, operations of a product, share of the rates that it reaches, path
Work = tuple[str, float, float, float, float, str]


def predict_rows(calls: Iterable[Call], rates: Iterable[float], share: float = 1.0) -> list[dict[str, Any]]:
    """Return a row for each kernel and its sizes, the dearest first, at a `share` of a GPU's `rates`.

    In half precision. A kernel takes as long as the slowest of three: its bytes at the rate of a copy, its
    instructions at the rate at which the multiprocessors issue them, its products at the rate of the matrix
    units; and at least LAUNCH_SECONDS. No cache saves a byte. docs/performance.md has each figure's source.
    `sizes`: of its two largest tensors. `ms`: of all its `launches`, predicted. `bound`: what takes them.
    `path`: how a library computes it, if that matters.
    """
    rows, (copied, issued, multiplied) = [], (share * rate for rate in rates)
    for call, times in collections.Counter(calls).items():
        largest = sorted({*call.inputs, *call.outputs}, key=math.prod)[-2:]
        sizes = ", ".join("x".join(map(str, shape)) for shape in largest)
        launches = math.ceil(len(call.inputs + call.outputs) / TENSORS_OF_A_LAUNCH)
        for kernel, moved, instructions, flops, reached, path in _works(call):
            seconds = {
                "bytes": moved / copied / reached, "instructions": instructions / issued,
                "matrix units": flops / multiplied / reached, "launch": LAUNCH_SECONDS * launches,
            }  # fmt: skip
            bound = max(seconds, key=lambda what: seconds[what])
            rows.append({
                "kernel": kernel, "sizes": sizes, "launches": times * launches, "mb": times * moved / 1e6,
                "instructions": times * instructions, "ms": 1000 * times * seconds[bound], "bound": bound,
                "path": path,
            })  # fmt: skip
    return sorted(rows, key=lambda row: -row["ms"])


def _works(call: Call) -> Iterator[Work]:
    name, moved = call.name, call.bytes
    if call.library == "cmtrain":
        form = name if any(len(shape) == 1 for shape in call.inputs) else f"{name} plain"
        known = INSTRUCTIONS.get(form, INSTRUCTIONS.get(name))
        instructions, path = 0.0, "instructions not known"
        if known:
            rows, _ = call.inputs[0]
            matrices = [shape for shape in call.inputs + call.outputs if len(shape) == 2]
            # A patch of a map is a row, too: its tensor has more rows, of fewer numbers.
            channels, *_, width = sorted(math.prod(s) // rows for s in matrices if s[0] % rows == 0)
            of_a_number = (known[0] + known[1] * channels) * math.ceil(channels / known[2])
            instructions, path = rows * _up(width, 32) * of_a_number / 32, ""
        yield f"{name}_kernel", moved, instructions, 0, 1, path
    elif name in NORM_INSTRUCTIONS:
        *sides, width = call.inputs[0]
        path = f"{SLOW}512 threads for a row" if width % 4 else "128 threads for a row"
        yield name, moved, math.prod(sides) * NORM_INSTRUCTIONS[name][width % 4 == 0], 0, 1, path
    elif name in ("mm", "addmm", "bmm", "baddbmm"):
        (*batch, rows, inner), (*_, columns) = call.inputs[-2:]
        flops = 2 * math.prod(batch) * _up(rows, 64) * _up(columns, 64) * _up(inner, 32)
        share, path = PRODUCT_SHARES[call.alignment], f"rows at multiples of {call.alignment} bytes"
        yield name, moved, 0, flops, share, f"{SLOW * (share < 0.5)}{path}" if share < 1 else ""
    elif "convolution" in name:
        yield from _convolution(call, name.endswith("backward"))
    else:
        yield name, moved, 0, 0, 1, ""


def _convolution(call: Call, is_backward: bool) -> Iterator[Work]:
    images, weight = call.inputs[is_backward:][:2]
    result = call.inputs[0] if is_backward else call.outputs[0]
    (out_channels, inner, *window), numbers = weight, math.prod(result)
    if inner == 1 < images[1]:
        asked = numbers * math.prod(window) * TAP_INSTRUCTIONS, 0.0
    else:
        side = _up(math.prod(window) * _up(inner, 8), 32)
        asked = 0.0, 2 * side * _up(out_channels, 64) * numbers / out_channels
    few = images[1] % 8 or out_channels % 8
    how = (FEW_CHANNELS_SHARE, f"{SLOW}channels are no multiple of 8") if few else (1.0, "")
    if not is_backward:
        yield call.name, call.bytes, *asked, *how
    for gradient in call.outputs if is_backward else ():
        of, other = {images: ("input", weight), weight: ("weight", images)}.get(gradient, ("bias", (0,)))
        moved = 2 * sum(map(math.prod, (result, other, gradient)))
        yield f"{call.name}: {of}", moved, *((0.0, 0.0, 1.0, "") if of == "bias" else (*asked, *how))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
