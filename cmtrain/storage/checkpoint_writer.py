"""Write checkpoints in a background thread, while training goes on.

At a save the training thread only copies the state into host memory, on a GPU without waiting for the copy.
A second thread serialises, syncs, verifies and publishes it, and drops old checkpoints. A save waits for the
one before it. If storage hangs for more than PATIENCE_SECONDS, training goes on without that checkpoint, or
the other ranks, which wait in their next all-reduce, would give up. The last save has no such limit.
"""

import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from cmtrain.storage.checkpoint import drop_old, remove_leftovers, save_checkpoint

PATIENCE_SECONDS = 30.0

Copied = tuple[dict[str, Any], torch.cuda.Event | None]  # a state, complete after that event (None: already)


class Outcome(NamedTuple):
    """How the save of `step` ended, after `seconds`. `path` is None if it failed."""

    step: int
    path: Path | None
    seconds: float
    error: str = ""  # why there is no checkpoint; or, if there is one, why no old one was deleted
    num_bytes: int = 0  # a later save may drop the checkpoint before this is reported


class CheckpointWriter:
    """Saves under `root`, in the background."""

    def __init__(self, root: Path) -> None:
        self.root, self._copy = root, HostCopy()
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any], *, keep: int, last: bool) -> None:
        """Copy `state`, which may change afterwards, and begin to write it. The `last` save waits for its
        end. A failed write (a full disk) raises nothing: see `take_outcomes`. `keep`: see drop_old.
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
        """Wait for the write under way, at most `seconds` (None: no limit). Return whether it has ended."""
        if self._thread:
            self._thread.join(seconds)
        return not (self._thread and self._thread.is_alive())

    def take_outcomes(self) -> list[Outcome]:
        """Return the outcomes of the saves that have ended since the last call."""
        return [self._outcomes.pop(0) for _ in range(len(self._outcomes))]

    def _write(self, step: int, copied: Copied, meta: dict[str, Any], keep: int) -> None:
        begin, path, error, num_bytes = time.perf_counter(), None, "", 0
        try:
            state, arrived = copied
            if arrived:
                arrived.synchronize()
            remove_leftovers(self.root)
            path = save_checkpoint(self.root, step, state, meta)
            num_bytes = sum(file.stat().st_size for file in path.iterdir())
            drop_old(self.root, keep)
        except Exception as raised:  # every failure is reported, and none ends the run
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
        self._outcomes.append(Outcome(step, path, time.perf_counter() - begin, error, num_bytes))


class HostCopy:
    """Host memory for a state; pinned for tensors on a GPU, which then copies without the host waiting."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, state: dict[str, Any]) -> Copied:
        """Copy `state` over the copy before. On a GPU the copies are queued behind the work queued there."""
        buffers = iter(self._buffers)
        copied = tree_map_only(Tensor, lambda t: _copied(t.detach(), next(buffers, None)), state)
        self._buffers = [leaf for leaf in tree_leaves(copied) if isinstance(leaf, Tensor)]
        if not any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves(state)):
            return copied, None
        arrived = torch.cuda.Event()
        arrived.record()
        return copied, arrived


def _copied(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    """Return a copy of `tensor`, with its strides, in `buffer` if that has its shape, dtype and strides."""
    kind = tensor.shape, tensor.dtype, tensor.stride()
    if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != kind:
        buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=True)
