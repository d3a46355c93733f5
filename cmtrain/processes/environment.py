"""Keep variables of the environment from deciding what a run computes, and check those of launchers.

accelerate, torch and timm take defaults from the environment, perhaps left over from another job. Such
variables are removed before they are loaded, with one line for those that ask for something.
"""

import os
import sys
import tempfile

from cmtrain.processes.rank import ACCELERATE_LAUNCH, PARENT, RESTARTS
from pipelines.spec import DataError, print_lines

IGNORED_PREFIXES = ("ACCELERATE_", "FSDP_", "FP8_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "TIMM_")
IGNORED = (
    "FORK_LAUNCHED", "USE_TORCH_XLA",
    # Precision of products and convolutions
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE", "TRITON_F32_DEFAULT", "TORCHINDUCTOR_USE_FAST_MATH",
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG", "TORCHINDUCTOR_FREEZING",
    # Whether and how a model is compiled
    "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TORCHDYNAMO_SUPPRESS_ERRORS", "TORCH_COMPILE_BACKEND",
    "TORCH_COMPILE_OVERRIDE_BACKENDS", "TORCHINDUCTOR_CUDAGRAPHS", "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM", "TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE",
    # A NaN ends the process, which the guard would survive
    "TORCH_NCCL_NAN_CHECK", "TORCH_DIST_NAN_CHECK",
)  # fmt: skip
# Kept where they have a value that can be read: they say which cores and what to print.
SWITCHES = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE")
KEPT = ("ACCELERATE_LOG_LEVEL", *ACCELERATE_LAUNCH)  # the launch is known by them; build.py gives others
TRUE, FALSE = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")  # of accelerate
ASKS_NOTHING = ("", "none", "default", *FALSE)

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# How many processes srun or mpirun have started. accelerate reads those of MPI before WORLD_SIZE.
MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
NUM_TASKS = ("SLURM_STEP_NUM_TASKS", *(f"{prefix}SIZE" for prefix in MPI))
ADVICE = "unset them, or use a launcher, which sets all: cmtrain --nproc, torchrun, accelerate launch"


def ignore_variables() -> None:
    """Remove the variables that would change what a run computes, with one line on those that ask for it."""
    ignored = []
    for name, value in sorted(os.environ.items()):
        low = value.strip().lower()
        if name == "ACCELERATE_USE_CPU" and low in TRUE:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # which torch, DALI and child processes obey
        elif name == "OMP_NUM_THREADS":  # OpenMP also takes a list, which accelerate cannot read
            if number(value):
                continue
            ignored.append(f"{name}={value!a}")
        elif name in SWITCHES and low in (*TRUE, *FALSE):
            continue
        elif name.startswith(IGNORED_PREFIXES) or name in IGNORED:
            is_one = low == "1" and name == "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
            if low not in ASKS_NOTHING and not is_one and name != "ACCELERATE_LOG_LEVEL":
                ignored.append(f"{name}={value!a}")
        else:
            continue
        if name not in KEPT:
            del os.environ[name]
    if ignored and os.environ.get("LOCAL_RANK", "0") == "0" and PARENT not in os.environ:
        what = f"variables of the environment are ignored, the configuration decides: {', '.join(ignored)}"
        print_lines(what)


def check_imports() -> None:
    """Raise DataError where an import of DALI or torch would fail."""
    if sys.flags.optimize > 1:
        raise DataError("PYTHONOPTIMIZE=2 (python -OO) removes docstrings, which DALI needs; unset it")
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    try:
        os.makedirs(cache or tempfile.gettempdir(), exist_ok=True)  # as torch does
    except OSError as error:
        name = f"TORCHINDUCTOR_CACHE_DIR={cache!a}" if cache else "TMPDIR"
        raise DataError(f"{name}: {error.strerror}; set it to a folder that can be written") from error


def check_launcher() -> None:
    """Raise DataError unless a launcher's variables are all set and agree, or none of them is set.
    An empty one counts as not set. Without them srun and mpirun must have started one process only.
    """
    for name in (*RANKS, *MEETING, PARENT, RESTARTS):
        if not os.environ.get(name, "-").strip():
            del os.environ[name]
    parent = os.environ.get(PARENT)
    if parent is not None and parent != str(os.getppid()):
        raise DataError(f"{PARENT}={parent!a}: that is not the process that started this one; unset it")
    numbers: dict[str, int] = {}
    for name in [name for name in (*RANKS, RESTARTS) if name in os.environ]:
        if (found := number(os.environ[name])) is None:
            raise DataError(f"{name}={os.environ[name]!a}: must be a whole number; {ADVICE}")
        numbers[name] = found
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    if not numbers.keys() & alone:
        if started := [name for name in NUM_TASKS if (number(os.environ.get(name)) or 1) > 1]:
            what = f"{started[0]}={os.environ[started[0]]}: several processes"
            advice = "start one per host, or set them as docker/slurm/train.sbatch does"
            raise DataError(f"{what}, but RANK, LOCAL_RANK and WORLD_SIZE are not set; {advice}")
    elif "WORLD_SIZE" in numbers and all(numbers.get(name, value) == value for name, value in alone.items()):
        os.environ.pop("LOCAL_RANK", None)  # by which accelerate would look for a group to join
    else:
        _check_ranks(numbers)
    for name in [name for name in os.environ if name.startswith(MPI)]:
        del os.environ[name]


def _check_ranks(numbers: dict[str, int]) -> None:
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", *MEETING)
    found = [f"{name}={os.environ[name]!a}" for name in (*RANKS, *MEETING) if name in os.environ]
    if missing := [name for name in needed if name not in os.environ]:
        raise DataError(f"half a launcher: {', '.join(found)}, but no {', '.join(missing)}; {ADVICE}")
    rank, local_rank, world_size = (numbers[name] for name in needed[:3])
    if rank >= world_size or not local_rank < numbers.get("LOCAL_WORLD_SIZE", world_size) <= world_size:
        raise DataError(f"ranks that contradict one another: {', '.join(found)}; {ADVICE}")
    port = number(os.environ["MASTER_PORT"])
    if port is None or not 0 < port < 2**16:
        raise DataError(f"MASTER_PORT={os.environ['MASTER_PORT']!a}: must be a port, 1..65535; {ADVICE}")


def number(text: str | None) -> int | None:
    """Return the whole number >= 0 that `text` is, None if it is none."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 10 else None
