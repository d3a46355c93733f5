"""What surrounds the training loop in a process: signals, and what all ranks agree on at a step boundary."""

import os
import signal
import threading
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# SIGUSR2 is what batch systems send before the time limit (SIGUSR1 clashes with NCCL's tooling).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Turns a stop signal into a decision that every rank takes at the same step boundary.

    The handler only sets a flag: a checkpoint written inside a handler may catch the state in the middle of a step. A
    second SIGINT stops at once; repeated SIGTERM or SIGUSR2 change nothing, because launchers deliver them twice.

    With several ranks the flags are combined over a gloo group of their own, so that the device is never synchronised
    for it. The reduction of one step is waited for at the next, which hides its latency and delays a stop by one step.
    """

    def __init__(self, num_processes: int) -> None:
        self.received = 0
        self.group: Any = dist.new_group(backend="gloo") if num_processes > 1 else None
        self.pending: tuple[Any, torch.Tensor] | None = None
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def agreed(self) -> int:
        """The signal to stop for, 0 for none; equal on all ranks. Call once a step, on every rank."""
        if self.group is None:
            return self.received
        decision = self._wait()
        flag = torch.tensor([self.received], dtype=torch.int32)
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return decision

    def _wait(self) -> int:
        if self.pending is None:
            return 0
        work, flag = self.pending
        work.wait()
        self.pending = None
        return int(flag.item())

    def close(self) -> None:
        """Finish the reduction in flight and give the signals back."""
        self._wait()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def agree_on(finding: str | None) -> str:
    """One line for all ranks out of what each of them found, named by rank; for all ranks together."""
    if not (dist.is_available() and dist.is_initialized()):
        return finding or "every value of the last forward pass was finite"
    findings: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    named = [f"rank {rank}: {line}" for rank, line in enumerate(findings) if line]
    return named[0] if named else "every value of the last forward pass was finite on all ranks"


def gather_lists(mine: list[T], group: Any) -> list[list[T]]:
    """The lists of all ranks, by rank, on every rank; `group` None is a single process."""
    if group is None:
        return [mine]
    lists: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(lists, mine, group=group)
    return lists


def cores_per_process(num_local_processes: int) -> int:
    """CPU cores this process may count on: its affinity mask, shared with the host's other ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_local_processes)


def leave_together() -> None:
    """Leave the process group once every rank is done with it: who leaves early makes the others fail at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
