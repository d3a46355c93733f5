"""Describe the machine that a run is on: versions and hardware."""

import contextlib
import os
import platform
import socket
from importlib import metadata
from pathlib import Path

import torch

DALI_PACKAGES = ("nvidia-dali-cuda110", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


def environment() -> dict[str, str]:
    """Return host, hardware and versions by name, for the event `environment`."""
    found = {"host": socket.gethostname(), "system": platform.platform(), "cores": str(os.cpu_count())}
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        model = models[0].partition(": ")[2] if models else platform.machine()
        found["CPU"] = f"{model}, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus of this host": str(torch.cuda.device_count())}
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    found |= {"Python": platform.python_version()}
    found |= {name: version_of(name) for name in ("torch", "accelerate", "timm", "numpy")}
    for name in dali_packages():
        found["DALI"] = f"{version_of(name)} ({name.removeprefix('nvidia-dali-')})"
    return found


def version_of(package: str) -> str:
    """Return the version of a package, "missing" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def dali_packages() -> list[str]:
    """Return the DALI packages that are installed: one, if all is well."""
    return [name for name in DALI_PACKAGES if version_of(name) != "missing"]
