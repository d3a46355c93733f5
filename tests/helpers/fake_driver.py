"""Build a fake NVIDIA driver: its libraries count GPUs and report a version, and torch cannot use them."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.tools import find, need

NVML = """
int nvmlInit_v2(void) {{ return 0; }}
int nvmlShutdown(void) {{ return 0; }}
int nvmlDeviceGetCount_v2(unsigned *count) {{ *count = {gpus}; return 0; }}
"""
CUDA = "int cuDriverGetVersion(int *version) {{ *version = {cuda}; return 0; }}"


def fake_driver(folder: Path, *, gpus: int, cuda: int) -> dict[str, str]:
    """Return the environment of a process that finds this driver; `cuda` is 11040 for CUDA 11.4."""
    need("cc")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    for name, source in {"libnvidia-ml.so.1": NVML, "libcuda.so.1": CUDA}.items():
        path = folder / f"{name}.c"
        path.write_text(source.format(gpus=gpus, cuda=cuda))
        subprocess.run([find("cc"), "-shared", "-fPIC", "-o", folder / name, path], check=True)
    before = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{folder}:{before}" if before else str(folder)}
