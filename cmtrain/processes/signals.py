"""Turn a stop signal into one decision that all ranks take at the same step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cmtrain.processes.failure import STOP_SIGNALS
from cmtrain.processes.rank import LAUNCHER_GONE

T = TypeVar("T")

# Launchers and terminals may both deliver one Ctrl-C; a person's second one comes later.
SECOND_CTRL_C_SECONDS = 2.0


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
