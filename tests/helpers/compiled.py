"""Run cross_compile.py, in a process of its own: the tests' has Triton's interpreter."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable

import pytest

from cmtrain.models.cost import INSTRUCTIONS
from helpers.runs import ROOT


def compiled_for_gpus(
    sm: str, dtype: str, *sizes: tuple[int, ...], kernels: Iterable[str] = ()
) -> list[dict]:
    """Return what cross_compile.py prints, of `kernels` alone if there are any."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "cross_compile.py"), sm, dtype]
    command += [":".join(map(str, size)) for size in sizes]
    only = os.environ | {"ONLY_KERNELS": ",".join(kernels)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=only).stdout
    print(printed)
    return [json.loads(line) for line in printed.splitlines()]


def predicted_kernels(found: list[dict], channels: int) -> set[str]:
    """Compare the instructions of cost.py with those of trained forms; return the kernels compared.

    The table has one figure for all forms and widths, so it may be 15 % off.
    """
    costs: dict[str, list[float]] = {}
    for kernel in found:
        forms = kernel["forms"]
        if kernel["kernel"] not in ("expand", "depthwise") or {"training", "plain"} & set(forms):
            name = f"{kernel['kernel']} plain" if "plain" in forms else kernel["kernel"]
            costs.setdefault(name, []).append(kernel.get("instructions", 0.0))
    compared = costs.keys() & INSTRUCTIONS.keys()
    for name in compared:
        fixed, of_a_channel, _ = INSTRUCTIONS[name]
        expected = sum(costs[name]) / len(costs[name])
        assert fixed + of_a_channel * channels == pytest.approx(expected, rel=0.15), (name, costs[name])
    return compared
