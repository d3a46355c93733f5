"""Describe the machine that a run is on: versions and hardware, GPU identity, GPU memory."""

import os
import platform
import socket
from importlib import metadata

import torch

PACKAGES = ("torch", "accelerate", "timm", "numpy")
DALI_PACKAGES = ("nvidia-dali-cuda110", "nvidia-dali-cuda120", "nvidia-dali-cuda130")

MEMORY_KINDS = {
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
    "peak": "allocated_bytes.all.peak",
}


def environment() -> dict[str, str]:
    """Return host, hardware and versions by name, for the event `environment`."""
    found = {"host": socket.gethostname(), "system": platform.platform(), "cores": str(os.cpu_count())}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus of this host": str(torch.cuda.device_count())}
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    found |= {"Python": platform.python_version()}
    found |= {name: version_of(name) for name in PACKAGES}
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


def gpu_identity(device: torch.device) -> tuple[str, str] | None:
    """Return UUID (as DCGM and nvidia-smi write it) and model of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"GPU-{str(properties.uuid).removeprefix('GPU-')}", properties.name


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Return bytes of torch's allocator by MEMORY_KINDS, without waiting for the GPU; empty for a CPU."""
    if device.type != "cuda":
        return {}
    statistics = torch.cuda.memory_stats(device)
    return {kind: statistics.get(key, 0) for kind, key in MEMORY_KINDS.items()}
