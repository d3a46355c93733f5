"""Set torch up for a run, join the process group, gather values over the ranks, and leave together."""

import datetime
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cmtrain.processes.rank import num_restarts
from pipelines.spec import DataError, print_lines

T = TypeVar("T")

LINE_SECONDS, POLL_SECONDS = 8.0, 0.1


def set_torch_defaults(run_path: Path) -> None:
    """Set what torch does when ranks hang or die, unless the user has set it; before the group is joined.
    A collective that times out ends the process. Its flight recorder (the last 20,000 collectives) goes to
    `nccl-rank<r>` in the run folder. Each variable has today's name first, and an older one.
    """
    defaults = {
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"): "3",
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_ON_TIMEOUT"): "1",
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "20000",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): f"{run_path.absolute()}/nccl-rank",
    }
    for names, value in defaults.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def set_cuda_math(precision: str) -> None:
    """Set how this process computes on CUDA: fp32 exactly, or in TF32 for "tf32"; convolutions by trial.
    torch's default lets cuDNN's convolutions in fp32 use TF32, also under autocast.
    """
    # cuDNN times its algorithms at the first pass of each shape, once in a process: training has one shape,
    # evaluation that and the one of its last, smaller batch, both the same at every evaluation.
    torch.backends.cudnn.benchmark = True
    tf32 = precision == "tf32"
    with warnings.catch_warnings():
        # torch has two interfaces to these settings. Its compiler reads the older one, which raises unless
        # both agree (pytorch issue 166387), and only the older one sets both.
        warnings.filterwarnings("ignore", "Please use the new API", UserWarning)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    cudnn: Any = torch.backends.cudnn
    for backend in (cudnn, cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul):
        backend.fp32_precision = "tf32" if tf32 else "ieee"


def join(backend: str, timeout: datetime.timedelta) -> None:
    """Join the process group of all ranks, and name those that are waited for.

    A prefix gives each attempt a store of its own: torchrun's serves all attempts, and ranks would read
    addresses that died with the attempt before (torch 2.15; pytorch issue 135712). Raises DataError: a rank
    did not come within `timeout`, or the address cannot be used.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    missing = list(range(world_size))
    place = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
    deadline, next_line = time.monotonic() + timeout.total_seconds(), time.monotonic() + LINE_SECONDS

    def wait(what: str) -> None:
        nonlocal next_line
        now = time.monotonic()
        if now > deadline:
            raise DataError(f"{what}, which did not come in time (train.collective_timeout_seconds)")
        if now > next_line:
            print_lines(f"{what}; gives up in {deadline - now:.0f} s")
            next_line = now + LINE_SECONDS
        time.sleep(POLL_SECONDS)

    try:
        # Find rank 0
        while not is_host:
            try:
                socket.create_connection((address, port), timeout=2).close()
                break
            except OSError:  # also a name that is not known yet
                wait(f"rank {rank} of {world_size} waits for rank 0 at {place}")

        # Meet the others
        how: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
        store = dist.TCPStore(address, port, is_master=is_host, timeout=timeout, **how)
        own = dist.PrefixStore(f"attempt-{num_restarts()}", store)
        own.set(f"rank-{rank}", "here")
        while missing := [other for other in missing if not own.check([f"rank-{other}"])]:
            names = f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
            wait(f"rank {rank} of {world_size} waits at {place} for rank {names}")
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistError as error:
        raise DataError(f"ranks cannot meet at {place}: {' '.join(str(error).split())[:200]}") from error


def control_group(num_processes: int, timeout_seconds: float) -> Any:
    """Return a gloo group of all ranks for values of the host; None for a single process."""
    if num_processes == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))


def gather(mine: T, group: Any) -> list[T]:
    """Return every rank's value, by rank, on every rank; `group` None is a single process."""
    if group is None:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def any_rank(mine: bool, group: Any) -> bool:
    """Return whether `mine` is true on any rank; `group` None is a single process."""
    flag = torch.tensor(int(mine))
    if group is not None:
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag)


def leave_together() -> None:
    """Leave the process group after all ranks have come here: one that leaves early fails the others."""
    if dist.is_available() and dist.is_initialized():
        # NCCL wants to be given the GPU, and gloo not.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()
