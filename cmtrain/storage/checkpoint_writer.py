"""Writes checkpoints while training goes on.

At a save the training thread does no more than copy the state into host memory; a thread of its own serialises, syncs,
verifies, publishes and drops old ones. One write is under way at a time, so there is one copy, used again each time.
The thread tells nobody: how a write ended is fetched by the training thread, which alone writes to console, metrics and
run folder.

A save that comes while another one is being written waits for it, so that no checkpoint that was asked for is left out,
but for PATIENCE_SECONDS at most: where storage hangs, training goes on without that checkpoint, and says so, before
the other ranks, who wait in their next all-reduce, give the run up. The last save of a process has all the patience it
needs.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtrain.storage.checkpoint import drop_old, remove_leftovers, save_checkpoint
from cmtrain.storage.state_file import tensors_of

PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """How the save of `step` ended, after `seconds`. `path` is None where there is no checkpoint of it.

    `error`: why there is none; or, where there is one, why no old one was deleted. `num_bytes`: its size, known here
    because a later save may have dropped it before anybody hears of it.
    """

    step: int
    path: Path | None
    seconds: float
    error: str = ""
    num_bytes: int = 0


class CheckpointWriter:
    """Saves under `root`, in the background."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any], *, keep: int, last: bool) -> None:
        """Take a copy of `state` and begin to write it; if it is the `last`, return when it is published or has failed.

        A write that fails (a full disk) raises nothing: see `take_outcomes`.

        Args:
            state, meta: see checkpoint.save_checkpoint. The tensors of `state` may change as soon as this returns.
            keep: the newest checkpoints to keep; see retention.drop_old.
        """
        if not self.wait(None if last else PATIENCE_SECONDS):
            error = f"the one before is still being written after {PATIENCE_SECONDS:g} s of waiting"
            self._outcomes.append(Outcome(step, None, 0.0, error))
            return
        try:
            copied = self._copy.take(state)
        except (RuntimeError, MemoryError) as error:
            self._outcomes.append(Outcome(step, None, 0.0, f"no memory for a copy: {error}".splitlines()[0]))
            return
        self._thread = threading.Thread(target=self._write, args=(step, copied, meta, keep), daemon=True)
        self._thread.start()
        if last:
            self.wait(None)

    def wait(self, seconds: float | None) -> bool:
        """Wait for the write under way, for `seconds` at most, or for as long as it takes (None).

        Returns:
            Whether none is under way any more.
        """
        if self._thread:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def take_outcomes(self) -> list[Outcome]:
        """How the saves ended that have ended since the last call."""
        taken = []
        while self._outcomes:
            taken.append(self._outcomes.pop(0))
        return taken

    def _write(self, step: int, copied: "Copied", meta: dict[str, Any], keep: int) -> None:
        begin, path, error, num_bytes = time.perf_counter(), None, "", 0
        try:
            copied.wait()
            remove_leftovers(self.root)
            path = save_checkpoint(self.root, step, copied.state, meta)
            num_bytes = sum(file.stat().st_size for file in path.iterdir())
            drop_old(self.root, keep)
        except (
            Exception
        ) as raised:  # a checkpoint that fails must be told, whatever it was, and never end a run
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
        self._outcomes.append(Outcome(step, path, time.perf_counter() - begin, error, num_bytes))


@dataclass(frozen=True)
class Copied:
    """A state in host memory, once `wait` has returned."""

    state: dict[str, Any]
    arrived: torch.cuda.Event | None

    def wait(self) -> None:
        if self.arrived:
            self.arrived.synchronize()


class HostCopy:
    """Host memory for a state; pinned where the state is on a GPU, which then copies without the host waiting."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, state: dict[str, Any]) -> Copied:
        """Copy `state` over the copy before. Copies are queued on the device behind the work that is queued there."""
        pinned = any(tensor.is_cuda for tensor in tensors_of(state))
        used: dict[tuple[Any, ...], Tensor] = {}

        def copy(tree: Any, place: tuple[Any, ...]) -> Any:
            if isinstance(tree, Tensor):
                used[place] = _copied(tree.detach(), self._buffers.get(place), pinned)
                return used[place]
            if isinstance(tree, dict):
                return {key: copy(value, (*place, key)) for key, value in tree.items()}
            if isinstance(tree, list | tuple):
                return type(tree)(copy(value, (*place, index)) for index, value in enumerate(tree))
            return tree

        copied = copy(state, ())
        self._buffers = used
        event = torch.cuda.Event() if pinned else None
        if event:
            event.record()
        return Copied(copied, event)


def _copied(tensor: Tensor, buffer: Tensor | None, pinned: bool) -> Tensor:
    """A copy of `tensor`, with its strides, in `buffer` if that is of its kind."""
    kind = tensor.shape, tensor.dtype, tensor.stride()
    if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != kind:
        buffer = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return buffer.copy_(tensor, non_blocking=True)
