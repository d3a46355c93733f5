"""Where a run runs: what a person asks first when two runs differ."""

import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "accelerate", "timm", "numpy")
DALI_FLAVOURS = ("cuda130", "cuda120", "cuda110")


def environment() -> dict[str, str]:
    """Host, hardware and versions, by name, for the event `environment`."""
    found = {"host": socket.gethostname(), "system": platform.platform(), "cores": str(os.cpu_count())}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus of this host": str(torch.cuda.device_count())}
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    found |= {"Python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    for flavour in DALI_FLAVOURS:
        try:
            found["DALI"] = f"{version(f'nvidia-dali-{flavour}')} ({flavour})"
        except PackageNotFoundError:
            continue
    return found
