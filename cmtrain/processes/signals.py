"""What surrounds the training loop in a process: torch's settings, signals, and what all ranks agree on."""

import datetime
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cmtrain.errors import EXIT_CONFIG, EXIT_DATA, EXIT_ERROR, EXIT_INTERRUPTED, ConfigError
from cmtrain.processes.failure import STOP_SIGNALS, Failure, cause_of, conclude, leave_word, words_left
from cmtrain.processes.rank import LAUNCHER_GONE, is_lost_contact, num_restarts
from pipelines.spec import DataError

T = TypeVar("T")

# Launchers and terminals may both deliver one Ctrl-C; a person's second one comes later.
SECOND_CTRL_C_SECONDS = 2.0

# How long a rank that lost contact waits for the word of the one that failed.
WORD_SECONDS = 2.0


class Stopped(Exception):  # noqa: N818
    """A stop signal was agreed on in the middle of something that can be done again."""


class StopRequest:
    """Turns a stop signal into a decision that every rank takes at the same step boundary.

    The handler only sets a flag: a checkpoint written inside a handler may catch the state in the middle of a step. A
    second SIGINT stops at once; repeated SIGTERM or SIGUSR2 change nothing, because launchers deliver them twice. The
    launcher's death counts as SIGTERM. SIGHUP is left alone where nohup has switched it off.

    With several ranks the flags are combined over `group`, which is not the device's, so that the device is never
    synchronised for it. The reduction of one step is waited for at the next, which hides its latency and delays a stop
    by one step.

    `decision` is the signal agreed on so far, 0 for none; it does not change any more once it is set.
    """

    def __init__(self, group: Any) -> None:
        self.received, self.decision = 0, 0
        self.received_at = 0.0
        self.group = group
        self.launcher = os.getppid()
        self.pending: tuple[Any, torch.Tensor] | None = None
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in (*STOP_SIGNALS, LAUNCHER_GONE) if not _is_switched_off(number)]
            self.previous = {number: signal.signal(number, self._receive) for number in wanted}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == LAUNCHER_GONE:
            if os.getppid() == self.launcher:
                return
            number = signal.SIGTERM
        if number == self.received == signal.SIGINT and now - self.received_at > SECOND_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.received_at = number, now

    def agreed(self) -> int:
        """The signal to stop for, 0 for none; equal on all ranks. Call once a step, on every rank."""
        if self.group is None:
            self.decision = self.decision or self.received
            return self.decision
        self._wait()
        flag = torch.tensor([self.received], dtype=torch.int32)
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return self.decision

    def interrupting(self, items: Iterator[T], num_agreements: int) -> Iterator[T]:
        """Pass `items` on; between two of the first `num_agreements`, which all ranks have, a stop signal ends it.

        Raises:
            Stopped: on all ranks after the same item.
        """
        for number, item in enumerate(items):
            yield item
            if number < num_agreements and self.agreed():
                raise Stopped

    def _wait(self) -> None:
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            self.pending = None
            self.decision = self.decision or int(flag.item())

    def close(self) -> None:
        """Finish the reduction in flight and give the signals back."""
        self._wait()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def _is_switched_off(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def set_torch_defaults(run_path: Path) -> None:
    """What torch should do when ranks hang or die, where the user has not said otherwise; before the group is joined.

    A collective that times out ends the process, and its flight recorder (the last 20,000 collectives) goes to
    `nccl-rank<r>` in the run folder. The first name of each is today's.
    """
    defaults = {
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"): "3",
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_ON_TIMEOUT"): "1",
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "20000",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(run_path.absolute() / "nccl-rank"),
    }
    for names, value in defaults.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def join_torchrun(backend: str, timeout: datetime.timedelta) -> None:
    """Join the process group, where torchrun would hand every attempt the same store.

    Otherwise ranks read addresses that died with the attempt before: without this, one of three restarts after a killed
    rank used up all attempts (torch 2.15; pytorch issue 135712). A prefix for each attempt keeps them apart, as does
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    store_of_attempt = dist.PrefixStore(f"attempt-{num_restarts()}", store)
    dist.init_process_group(backend, store=store_of_attempt, rank=rank, world_size=world_size, timeout=timeout)


def control_group(num_processes: int, timeout_seconds: float) -> Any:
    """A gloo group of all ranks for what the host has to say, None for a single process."""
    if num_processes == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))


def tell_failure(error: BaseException, run_path: Path, *, rank: int, world_size: int, step: int) -> Failure:
    """Leave word of what ended this rank after `step` steps, and find out what ended the run.

    The cause is printed by the rank that has it, and status.json tells it from then on, whichever rank is left.

    Returns:
        The cause, which is another rank's where this one only lost contact.
    """
    lost = is_lost_contact(error)
    reason = _in_one_line(error)
    if lost:  # without gloo's own source file and its guesses
        reason = f"lost contact with another rank: {re.sub(r'^.*?[]] ', '', reason).split('. This is')[0]}"
    failure = Failure(rank, world_size, reason, _exit_code_of(error), step, lost)
    leave_word(run_path, failure)
    deadline = time.monotonic() + WORD_SECONDS
    while lost and all(word.lost_contact for word in words_left(run_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    cause = cause_of(words_left(run_path)) or failure
    conclude(run_path)
    if cause.rank == rank != 0:  # rank 0 says it as the run's last word
        sys.stderr.write(f"{cause.said()}\n")
    return cause


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, DataError | ConfigError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _exit_code_of(error: BaseException) -> int:
    codes = {KeyboardInterrupt: EXIT_INTERRUPTED, DataError: EXIT_DATA, ConfigError: EXIT_CONFIG}
    return codes.get(type(error), EXIT_ERROR)


def agree_on(finding: str | None) -> str:
    """One line for all ranks out of what each of them found, named by rank; for all ranks together."""
    if not (dist.is_available() and dist.is_initialized()):
        return finding or "every value of the last forward pass was finite"
    findings: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    named = [f"rank {rank}: {line}" for rank, line in enumerate(findings) if line]
    return named[0] if named else "every value of the last forward pass was finite on all ranks"


def gather(mine: T, group: Any) -> list[T]:
    """What each rank gives, by rank, on every rank; `group` None is a single process."""
    if group is None:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def cores_per_process(num_local_processes: int) -> int:
    """CPU cores this process may count on: its affinity mask, shared with the host's other ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_local_processes)


def leave_together() -> None:
    """Leave the process group once every rank is done with it: who leaves early makes the others fail at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
