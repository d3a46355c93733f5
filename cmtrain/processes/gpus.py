"""Count the GPUs, and find out why torch cannot use them. Only the latter loads torch: a launcher does not.

A CPU is asked for by CUDA_VISIBLE_DEVICES="" (or -1), or by ACCELERATE_USE_CPU=1, which `accelerate launch
--cpu` sets. Without that, GPUs that torch cannot use are an error: nobody waits for a CPU by mistake.
"""

import ctypes
import itertools
import os
import warnings
from collections.abc import Iterable

DRIVERS = {13: 580, 12: 525}  # the first driver for each CUDA
LOCKS = {13: "requirements.lock", 12: "requirements-cuda120.lock"}  # with torch for each CUDA
OLDEST_OF_CUDA13 = (7, 5)  # compute capability of the oldest GPUs for which it makes code


def visible_gpus() -> int:
    """Return how many GPUs training would see, by NVML: CUDA would put a context into this process."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint()
    if library.nvmlInit_v2() != 0:
        return 0
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlShutdown()
    return num_visible(os.environ.get("CUDA_VISIBLE_DEVICES"), count.value)


def num_visible(devices: str | None, num_installed: int) -> int:
    """Return how many installed GPUs CUDA_VISIBLE_DEVICES leaves: those before the first invalid entry."""
    if devices is None:
        return num_installed

    def is_gpu(entry: str) -> bool:
        return entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < num_installed)

    return len(list(itertools.takewhile(is_gpu, map(str.strip, devices.split(",")))))


def cuda_of_driver() -> int | None:
    """Return the newest CUDA that the driver can run, 12040 for 12.4; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def newer_driver(driver: int, cuda: int) -> str:
    """Return what to install where the `driver`, as from cuda_of_driver, is too old for CUDA `cuda`."""
    wanted = f"a driver {f'>= {DRIVERS[cuda]}' if cuda in DRIVERS else f'for CUDA {cuda}'}"
    lock = LOCKS.get(driver // 1000)  # none for CUDA 11
    return f"{wanted}, or what {lock} lists" if lock else wanted


def packages_for(driver: int) -> str:
    """Return what to install for a `driver`, as from cuda_of_driver."""
    lock = LOCKS.get(min(driver // 1000, max(LOCKS)))
    return f"what {lock} lists" if lock else f"a driver >= {DRIVERS[12]} and what {LOCKS[12]} lists"


def has_code_for(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Return whether code for these `architectures`, as of torch.cuda.get_arch_list(), runs on a GPU.
    sm_86 is for 8.6 and later 8.x, compute_86 for 8.6 and all later GPUs, sm_90a for exactly 9.0.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        made_for = int(digits[:-1]), int(digits[-1])
        if capability == made_for:
            return True
        is_later = capability > made_for and not number.endswith("a")
        if is_later and (capability[0] == made_for[0] or (kind == "compute" and number == digits)):
            return True
    return False


def why_unusable() -> str:
    """Return in one line why torch cannot use the visible GPUs, with a remedy; "" if it can, or if none."""
    if visible_gpus() == 0:
        return ""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of several lines
        if torch.cuda.is_available():
            indices = range(torch.cuda.device_count())
            names = {torch.cuda.get_device_capability(i): torch.cuda.get_device_name(i) for i in indices}
            why = why_no_code(names, torch.cuda.get_arch_list(), torch.version.cuda)
        elif not (why := why_unavailable(torch.version.cuda, cuda_of_driver())):
            why = "cannot use the GPUs"
            try:
                torch.cuda.init()
            except Exception as error:  # CUDA's errors are of several types
                why = f"{why}: {' '.join(str(error).split())}"
    return f"torch {torch.__version__} {why}; set CUDA_VISIBLE_DEVICES= to use the CPU" if why else ""


def why_unavailable(torch_cuda: str | None, driver: int | None) -> str:
    """Return what torch, of torch.version.cuda, lacks to use a GPU of `driver`; "" if that is not known."""
    if torch_cuda is None:
        return f"is built without CUDA: install {packages_for(driver or 13000)}"
    if driver is None:
        return "finds no libcuda.so.1: a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    cuda = int(torch_cuda.split(".")[0])
    if driver // 1000 < cuda:
        has = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"needs CUDA {cuda}, and the driver is for {has}: install {newer_driver(driver, cuda)}"
    return ""


def why_no_code(names: dict[tuple[int, int], str], architectures: list[str], torch_cuda: str | None) -> str:
    """Return which GPU torch has no code for, of `names` by compute capability; "" if it has all."""
    for (major, minor), name in names.items():
        if architectures and not has_code_for((major, minor), architectures):
            lock = LOCKS[12 if (major, minor) < OLDEST_OF_CUDA13 else 13]
            is_known = lock != LOCKS.get(int((torch_cuda or "0").split(".")[0]))
            advice = f"install what {lock} lists" if is_known else "no requirements*.lock has it"
            return f"has no code for {name} (sm_{major}{minor}): {advice}"
    return ""
