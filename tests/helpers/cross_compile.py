"""Compile the Triton kernels of a CMT for GPUs that this machine lacks; test_fused_ffn.py runs it.

    python tests/helpers/cross_compile.py 80,90 fp16 46:165:40 ...

Its arguments: architectures, type, then sizes: channels : hidden channels : side.

Networks of these sizes run with kernels that only record their launches, and each launch is then compiled.
Prints a line of JSON for each architecture, size and launch: registers and spilled bytes of a thread, how
many of its loads and stores of device memory are 16 bytes wide, and how many only 2, and the instructions
that a hidden number costs in the longest loop. Loops of 46 channels are unrolled: others count too little.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from cmtrain.models import ffn_kernels
from cmtrain.models import ffn_operators as ops
from cmtrain.models.blocks import FeedForward, ResidualDepthwiseConv

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


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


def launches(dtype: str, channels: int, hidden: int, side: int) -> dict[str, Launches]:
    """Return the launches of each kernel, of both forms and the perception unit, trained and evaluated."""
    found = {}
    for name, kernel in list(vars(ffn_kernels).items()):
        if name.endswith("_kernel"):
            found[name.removesuffix("_kernel")] = Launches(kernel)
            setattr(ffn_kernels, name, found[name.removesuffix("_kernel")])
    ops.MIN_PROGRAMS = 1  # as with many images
    for network in (
        ResidualDepthwiseConv(channels, "fused"),
        FeedForward(channels, hidden, variant="paper", drop=0.0, kernel="fused"),
        FeedForward(channels, hidden, variant="reimpl", drop=0.0, kernel="fused"),
    ):
        x = torch.zeros(2, channels, side, side, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
            network(x.requires_grad_()).sum().backward()
            with torch.no_grad():
                network.eval()(x)
    return found


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
    sides = {"project": ("ROWS", "INNER"), "project_weight_grad": ("INNER", "COLUMNS")}.get(
        name, ("ROWS", "COLUMNS")
    )
    if "ROWS" in constants:
        numbers_of_a_thread = math.prod(constants[side] for side in sides) / (32 * num_warps)
        found["instructions"] = round(instructions(code) / numbers_of_a_thread, 1)
    return found


def instructions(code: str) -> int:
    """Count the instructions in one turn of the longest loop, or all of them without a loop."""
    places = [int(place, 16) for place in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", code, re.MULTILINE)]
    back = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/[^;]*\bBRA\b[^;]*\b0x([0-9a-f]+)", code, re.MULTILINE)
    loops = [(int(target, 16), int(place, 16)) for place, target in back if int(target, 16) < int(place, 16)]
    return max(
        (sum(first <= place <= last for place in places) for first, last in loops), default=len(places)
    )


def main() -> None:
    architectures, dtype, *sizes = sys.argv[1:]
    for size in sizes:
        for name, launched in launches(dtype, *map(int, size.split(":"))).items():
            for kinds, constants, options in launched.noted.values():
                for sm in map(int, architectures.split(",")):
                    kernel = compiled(launched.kernel, kinds, constants, options, sm)
                    forms = [
                        flag.lower()
                        for flag in ("TRAINING", "RESIDUAL", "SKIP", "PLAIN")
                        if constants.get(flag)
                    ]
                    what = {"kernel": name, "forms": forms, "sm": sm, "dtype": dtype, "size": size}
                    print(
                        json.dumps(what | usage(name, kernel, constants, options["num_warps"])), flush=True
                    )


if __name__ == "__main__":
    main()
