"""Compile the Triton kernels of a CMT for GPUs that this machine lacks; tests of the kernels run it.

    python tests/helpers/cross_compile.py 80,90 fp16 46:165:40 46 ...

Its arguments: architectures, type, then sizes: channels : hidden channels : side for a perception unit and
feed-forward networks, channels alone for the other parts. ONLY_KERNELS in the environment names the kernels
to compile, separated by commas; without it all are.

Networks of these sizes run with kernels that only record their launches, and each launch is then compiled.
Prints a line of JSON for each architecture, size and launch: registers and spilled bytes of a thread, how
many of its loads and stores of device memory are 16 bytes wide, and how many only 2, and the instructions
that a place of a tile costs in the longest loop. Loops of 46 channels are unrolled: others count too
little.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from timm.layers import DropPath
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from cmtrain.models import ffn_kernels, linear_kernels, norm_kernels
from cmtrain.models import ffn_operators as ops
from cmtrain.models.blocks import (
    Attention,
    BlockOptions,
    ChannelNorm,
    FeedForward,
    PatchConv,
    ResidualDepthwiseConv,
    Stem,
)

FLAGS = (
    "TRAINING", "RESIDUAL", "SKIP", "PLAIN", "GELU", "BACKWARD", "BIAS", "PIXELS", "DEPTHWISE", "PATCH",
    "HEIGHT"
)  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*i1"}


class Launches:
    """Replaces a kernel: records each kind of launch, and computes nothing."""

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel = kernel
        self.noted: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> "Launches":
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        names = self.kernel.arg_names
        constants = {name: options.pop(name) for name in names if name in options}
        kinds = {name: kind_of(value) for name, value in zip(names, arguments, strict=False)}
        kinds |= dict.fromkeys(constants, "constexpr")
        self.noted[repr((kinds, constants))] = kinds, constants, options


def kind_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return KINDS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launches(dtype: str, channels: int, *ffn: int) -> dict[str, Launches]:
    """Return the launches of each kernel, of all forms, trained and evaluated. ffn: hidden width, side."""
    found = {}
    for module in ffn_kernels, linear_kernels, norm_kernels:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                real = kernel.kernel if isinstance(kernel, Launches) else kernel  # of the size before
                found[name.removesuffix("_kernel")] = Launches(real)
                setattr(module, name, found[name.removesuffix("_kernel")])
    ops.MIN_PROGRAMS = norm_kernels.MIN_PROGRAMS = 1  # as with many images
    side = ffn[1] if ffn else 64
    x = torch.zeros(2, channels, side, side, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
    x.requires_grad_()
    with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
        for run, network in of_ffn(channels, ffn[0]) if ffn else others(channels):
            run(network, x).sum().backward()
            with torch.no_grad():
                run(network.eval(), x)
    return {name: launched for name, launched in found.items() if launched.noted}


def of_ffn(channels: int, hidden: int) -> list[tuple[Callable, torch.nn.Module]]:
    def add(network: FeedForward, x: torch.Tensor) -> torch.Tensor:
        return network(x, x, DropPath(0.5).train(network.training))

    return [
        (run, FeedForward(channels, hidden, variant=variant, drop=0.0, kernel="fused"))
        for variant in ("paper", "reimpl")
        for run in (lambda network, x: network(x), add)
    ] + [(lambda network, x: network(x), ResidualDepthwiseConv(channels, "fused"))]


def others(channels: int) -> list[tuple[Callable, torch.nn.Module]]:
    """Return the other parts: of a width alone."""

    def attend(network: Attention, x: torch.Tensor) -> torch.Tensor:
        tokens = x.permute(0, 2, 3, 1)
        drop_path = DropPath(0.5).train(network.training)
        return network(tokens, None, tokens, drop_path)

    options = [BlockOptions("paper", True, 0.0, drop, "fused") for drop in (0.0, 0.1)]
    heads = next(heads for heads in (8, 4, 2, 1) if channels % heads == 0)
    return [
        (lambda network, x: torch.add(*network.with_input(x)), ChannelNorm(channels, 1e-6, "fused")),
        (lambda network, x: network(x), ChannelNorm(channels, 1e-6, "fused")),
        *((attend, Attention(channels, heads, 2, each)) for each in options),
        (lambda network, x: network(x), PatchConv(channels, 2 * channels, 2, kernel="fused")),
        (lambda network, x: network(x), Stem(channels, 16, "fused")),
        (lambda network, x: network(x[:, :3].detach()), Stem(3, 16, "fused")),
    ]


def compiled(
    kernel: triton.JITFunction,
    kinds: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    sm: int,
) -> CompiledKernel:
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    ordered = {name: kinds[name] for name in kernel.arg_names}
    aligned = {
        places[name]: [["tt.divisibility", 16]] for name, kind in kinds.items() if kind.startswith("*")
    }
    source = ASTSource(kernel, ordered, {places[name]: value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def usage(name: str, kernel: CompiledKernel, constants: dict[str, Any], num_warps: int) -> dict[str, float]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, code = (
            subprocess.run(
                [TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
    accesses = re.findall(r"(?:ld|st)\.global\S*?\.(v\d\.)?b(\d+)", kernel.asm["ptx"])
    sizes = [int(bits) * int(vector[1:-1] if vector else 1) // 8 for vector, bits in accesses]
    found = {
        "registers": registers,
        "spilled_bytes": stack,
        "vectors": sizes.count(16),
        "scalars": sizes.count(2),
    }
    sides = {
        "norm": ("CHUNKS", "ROWS", "COLUMNS"),
        "norm_grad": ("CHUNKS", "ROWS", "COLUMNS"),
        "project": ("ROWS", "INNER"),
        "expand_grad": ("ROWS", "INNER"),
        "weight_grad": ("INNER", "COLUMNS"),
    }.get(name, ("ROWS", "COLUMNS"))
    if "ROWS" in constants:
        numbers_of_a_thread = math.prod(constants[side] for side in sides) / (32 * num_warps)
        found["instructions"] = round(instructions(code) / numbers_of_a_thread, 1)
    return found


def instructions(code: str) -> int:
    """Count the instructions in one turn of the longest loop that holds none, or all without a loop."""
    places = [int(place, 16) for place in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", code, re.MULTILINE)]
    back = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/[^;]*\bBRA\b[^;]*\b0x([0-9a-f]+)", code, re.MULTILINE)
    loops = [(int(target, 16), int(place, 16)) for place, target in back if int(target, 16) < int(place, 16)]
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= start and end < last for start, end in loops)
    ]
    return max(
        (sum(first <= place <= last for place in places) for first, last in inner), default=len(places)
    )


def main() -> None:
    architectures, dtype, *sizes = sys.argv[1:]
    only = list(filter(None, os.environ.get("ONLY_KERNELS", "").split(",")))
    for size in sizes:
        for name, launched in launches(dtype, *map(int, size.split(":"))).items():
            if only and name not in only:
                continue
            for kinds, constants, options in launched.noted.values():
                for sm in map(int, architectures.split(",")):
                    kernel = compiled(launched.kernel, kinds, constants, options, sm)
                    forms = [flag.lower() for flag in FLAGS if constants.get(flag)]
                    what = {"kernel": name, "forms": forms, "sm": sm, "dtype": dtype, "size": size}
                    print(
                        json.dumps(what | usage(name, kernel, constants, options["num_warps"])), flush=True
                    )


if __name__ == "__main__":
    main()
