"""Run cross_compile.py, in a process of its own: the tests' has Triton's interpreter."""

import json
import subprocess
import sys

from helpers.runs import ROOT


def compiled_for_gpus(sm: str, dtype: str, *sizes: tuple[int, ...]) -> list[dict]:
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "cross_compile.py"), sm, dtype]
    command += [":".join(map(str, size)) for size in sizes]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(printed)
    return [json.loads(line) for line in printed.splitlines()]
