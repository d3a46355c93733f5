"""Predict how long a GPU takes for each kernel of a training step in half precision.

A kernel takes as long as the slowest of three: its bytes at the rate of a copy, its instructions at the rate
at which the multiprocessors issue them, its products at the rate of the matrix units; and at least
LAUNCH_SECONDS. No cache saves a byte. docs/performance.md has the source of every figure here.
"""

import collections
import math
from collections.abc import Iterable, Iterator
from typing import Any

from cmtrain.models.cost import Call

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
