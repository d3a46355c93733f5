"""Compile the Triton kernels of a CMT for GPUs that are not there; run by test_fused_ffn.py.

    python tests/cross_compile.py fp16 46:165:40 ...     element type, then channels : hidden channels : side of the map

Prints a JSON line for each architecture, size, kernel and form of the network: registers and spilled bytes of
a thread, and how many of its loads and stores of device memory are 16 bytes wide, and how many only 2.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from cmtrain.models import ffn_kernels
from cmtrain.models import ffn_operators as k

# The kind of every argument that is not a constant: element type, fp32 or a number.
FLOATS = {
    "means",
    "m2s",
    "scale",
    "skip_scale",
    "shift",
    "bias",
    "slope",
    "offset",
    "sums",
    "gamma",
    "beta",
    "d",
    "e",
    "mean",
    "inverse",
}
NUMBERS = {"rows": "i32", "parts": "i32", "rows_a_part": "i32", "eps": "fp32"}
KERNELS = {
    name.removesuffix("_kernel"): kernel for name, kernel in vars(ffn_kernels).items() if name.endswith("_kernel")
}


def forms(kernel: triton.JITFunction) -> list[str]:
    """Of the network, the paper's and the seed's; "plain" is the perception unit."""
    by_form = {"SKIP", "RESIDUAL"} & set(kernel.arg_names)
    return [*(("paper", "seed") if by_form else ("both",)), *(("plain",) if "PLAIN" in kernel.arg_names else ())]


VARIANTS = [(name, form) for name, kernel in KERNELS.items() for form in forms(kernel)]
FP32_OUTPUT = {"normalise", "normalise_grad", "project_weight_grad"}
FP32_WEIGHT = {"depthwise", "depthwise_grad"}


def signature(name: str, dtype: str, constants: dict) -> dict[str, str]:
    kinds = {}
    for argument in KERNELS[name].arg_names:
        wide = argument in FLOATS or (argument == "out" and name in FP32_OUTPUT)
        wide |= argument == "weight" and name in FP32_WEIGHT
        kinds[argument] = NUMBERS.get(argument, "*fp32" if wide else f"*{dtype}")
        if argument in constants:
            kinds[argument] = "constexpr"
    return kinds


def compiled(
    name: str, form: str, architecture: int, dtype: str, channels: int, hidden: int, side: int
) -> CompiledKernel:
    matrix = any(argument == "INNER" for argument in KERNELS[name].arg_names)
    plain = form == "plain"
    constants = {
        "C": channels, "H": channels if plain else hidden, "P": channels if plain else k.padded(hidden),
        "HEIGHT": side, "WIDTH": side, "PLAIN": plain,
        "TRAINING": not plain, "SKIP": form == "seed", "RESIDUAL": form != "seed",
        "PRECISION": "tf32", "ROWS": k.ROWS, "COLUMNS": k.GEMM_COLUMNS if matrix else k.MAP_COLUMNS,
        "INNER": k.GEMM_INNER, "TILES": k.MAX_TILES, "PARTS": k.ROWS, "SUMS": k.SUMS, "SUMS_PADDED": k.SUMS_PADDED,
    }  # fmt: skip
    constants = {argument: value for argument, value in constants.items() if argument in KERNELS[name].arg_names}
    kinds = signature(name, dtype, constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind.startswith("*")}
    indices = {(KERNELS[name].arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(KERNELS[name], kinds, indices, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=k.LAUNCH)


def usage(kernel: CompiledKernel) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", told).groups())
    accesses = re.findall(r"(?:ld|st)\.global\S*?\.(v\d\.)?b(\d+)", kernel.asm["ptx"])
    sizes = [int(bits) * int(vector[1:-1] if vector else 1) // 8 for vector, bits in accesses]
    return {"registers": registers, "spilled_bytes": stack, "vectors": sizes.count(16), "scalars": sizes.count(2)}


def main() -> None:
    dtype, *sizes = sys.argv[1:]
    for size in sizes:
        channels, hidden, side = map(int, size.split(":"))
        for architecture in (80, 90):
            for name, form in VARIANTS:
                found = usage(compiled(name, form, architecture, dtype, channels, hidden, side))
                what = {"kernel": name, "form": form, "sm": architecture, "dtype": dtype, "size": size}
                print(json.dumps(what | found), flush=True)


if __name__ == "__main__":
    main()
