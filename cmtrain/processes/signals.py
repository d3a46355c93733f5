"""Turn a stop signal into one decision that all ranks take at the same step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cmtrain.processes import failure, rank

T = TypeVar("T")

SECOND_CTRL_C_SECONDS = 2.0  # launchers and terminals may deliver one Ctrl-C twice; a person's comes later


class Stopped(Exception):  # noqa: N818
    """A stop signal was agreed on in the middle of something that can be done again."""


class StopRequest:
    """The stop signal of a run. A second SIGINT stops at once. The end of the launcher counts as SIGTERM.

    Repeated SIGTERM or SIGUSR2 change nothing, because launchers deliver them twice. Ranks combine their
    flags over the host's `group`, and wait for the reduction of a step at the next one. `decision`: the
    signal agreed on, 0 for none yet; it then stays. `saved_step`: of the newest checkpoint, by the trainer.
    """

    def __init__(self, group: Any) -> None:
        self.received, self.received_at, self.decision = 0, 0.0, 0
        self.saved_step = 0
        self.group, self.launcher = group, os.getppid()
        self.pending: tuple[Any, torch.Tensor] | None = None
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            wanted = [*failure.stop_signals(), rank.LAUNCHER_GONE]
            self.previous = {number: signal.signal(number, self._receive) for number in wanted}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == rank.LAUNCHER_GONE:
            if os.getppid() == self.launcher:
                return
            number = signal.SIGTERM
        if number == self.received == signal.SIGINT and now - self.received_at > SECOND_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.received_at = number, now
            if number == signal.SIGINT and rank.is_first_rank() and rank.PARENT not in os.environ:
                with suppress(OSError):  # no print: this may interrupt one
                    os.write(2, f"\n{rank.answer_to_ctrl_c(self.saved_step)}\n".encode())

    def agreed(self) -> int:
        """Return the signal to stop for, 0 for none, equal on all ranks. Call it once per step, on each."""
        if self.group is None:
            self.decision = self.decision or self.received
            return self.decision
        self._wait()
        flag = torch.tensor([self.received], dtype=torch.int32)
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return self.decision

    def interrupting(self, items: Iterator[T], num_agreements: int) -> Iterator[T]:
        """Pass `items` on until a stop signal; ranks agree after each of the first `num_agreements` items.
        Raises Stopped: on all ranks after the same item.
        """
        for number, item in enumerate(items):
            yield item
            if number < num_agreements and self.agreed():
                raise Stopped

    def close(self) -> None:
        """Finish the reduction in flight and restore the handlers."""
        self._wait()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _wait(self) -> None:
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            self.pending = None
            self.decision = self.decision or int(flag.item())
