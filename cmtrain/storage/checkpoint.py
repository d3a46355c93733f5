"""Checkpoints that exist whole or not at all.

A checkpoint is a folder `step-000001234/` with `state.pt` (see state_file.py) and `manifest.json` (its size and sha256,
versions, configuration). It is written under a temporary name on the same file system, every file is synced and read
back, and one rename publishes it. Loading verifies the checksums, because neither torch.load nor safetensors notices a
flipped bit, and falls back to the one before, loudly.

accelerate's save_state is not used: it is not atomic, deletes the old before the new is written, and cannot be
verified. A newer `step-` folder is the newer checkpoint; there are no `latest` or `best` pointers that could lie. Which
ones are kept is retention.py's, writing them while training goes on is writer.py's.
"""

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmtrain.storage.state_file import CheckpointError, Digest, open_regular, read_state, verify, write_state

MAX_MANIFEST_BYTES = 2**20  # a full one has 4 kB
TEMPORARY, DOOMED, CORRUPT = ".tmp-", ".del-", ".corrupt-"
_NAME = re.compile(r"step-(\d{9})")
_MANIFEST = "manifest.json"
_STATE = "state.pt"


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint. `rejected`: one line for every newer one that failed verification."""

    path: Path
    state: dict[str, Any]
    meta: dict[str, Any]
    rejected: tuple[str, ...] = ()


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the published checkpoints under `root`, ascending. A symbolic link is none."""
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sorted(int(match[1]) for name in folders if (match := _NAME.fullmatch(name)))


def checkpoint_path(root: Path, step: int) -> Path:
    return root / f"step-{step:09d}"


def save_checkpoint(root: Path, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Path:
    """Publish `state` as the checkpoint of `step`.

    Args:
        root: the `checkpoints` folder; made if missing.
        state: nested dicts and lists of tensors, numbers, strings.
        meta: JSON values. retention.py reads two of them, `best_step` and `milestone`.

    Raises:
        OSError, RuntimeError, CheckpointError: the write failed (torch reports a full disk as RuntimeError), or what
            the disk gave back is not what was written. Nothing half-written stays behind, and no older checkpoint was
            touched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = checkpoint_path(root, step)
    temporary = root / f"{TEMPORARY}{step}-{os.getpid()}"
    try:
        temporary.mkdir()
        digest = write_state(temporary / _STATE, state)
        with open(temporary / _MANIFEST, "w") as file:
            files = {_STATE: {"bytes": digest.num_bytes, "sha256": digest.sha256}}
            json.dump({"step": step, "time": time.time(), "files": files, "meta": meta}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        verify(temporary / _STATE, digest)
        temporary.rename(final)
        _sync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_checkpoint(path: Path) -> Loaded:
    """Verify and load one checkpoint folder, onto the CPU.

    Raises:
        CheckpointError: it is damaged, not ours, or holds more than tensors and plain values of its own size.
        OSError: the machine cannot read it (permissions, too many open files), which is no fault of the checkpoint.
    """
    digest, meta = _read_manifest(path)
    return Loaded(path, read_state(path / _STATE, digest), meta)


def read_meta(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `meta`. Raises as load_checkpoint."""
    return _read_manifest(path)[1]


def load_newest(root: Path, *, set_aside: bool = True) -> Loaded | None:
    """The newest checkpoint under `root` that verifies, or None when there has never been one.

    A damaged one is renamed to `.corrupt-...` (unless `set_aside` is false, for a folder of another run), so that it is
    neither counted nor lost, and the one before is taken.

    Raises:
        CheckpointError: there were checkpoints, and none of them is usable. Starting from scratch would silently throw
            a run away; and so it would at the next start, when the damaged ones have been set aside.
        OSError: the machine cannot read one of them.
    """
    rejected: list[str] = []
    for step in reversed(checkpoint_steps(root)):
        path = checkpoint_path(root, step)
        try:
            return replace(load_checkpoint(path), rejected=tuple(rejected))
        except CheckpointError as error:
            rejected.append(str(error))
            if set_aside:
                path.rename(root / f"{CORRUPT}{step}-{time.time_ns()}")
    if rejected:
        raise CheckpointError(f"no usable checkpoint in {root}: " + "; ".join(rejected))
    if root.exists():
        # A writer that was killed before the first one was published leaves a temporary folder and nothing else.
        others = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith(TEMPORARY))
        if others:
            raise CheckpointError(f"no usable checkpoint in {root}, but {', '.join(others[:3])}")
    return None


def _read_manifest(path: Path) -> tuple[Digest, dict[str, Any]]:
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a symbolic link")
    with open_regular(path / _MANIFEST) as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    try:
        if len(text) > MAX_MANIFEST_BYTES:
            raise ValueError(f"more than {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(text)
        files, meta = manifest["files"], manifest["meta"]
        # One file of one name: nothing in a manifest is a path that could lead elsewhere.
        if list(files) != [_STATE] or not isinstance(meta, dict):
            raise ValueError(f"must describe {_STATE} and nothing else")
        digest = Digest(files[_STATE]["bytes"], files[_STATE]["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path / _MANIFEST}: not a manifest: {type(error).__name__}: {error}"
        ) from error
    return digest, meta


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(path: Path) -> Loaded:
    """Load the checkpoint folder `path`, or the newest usable checkpoint of the run folder `path`; changes neither.

    Raises:
        CheckpointError: there is none. OSError: the machine cannot read it.
    """
    run = (path / "checkpoints").is_dir()
    loaded = load_newest(path / "checkpoints", set_aside=False) if run else load_checkpoint(path)
    if loaded is None:
        raise CheckpointError(f"{path}: no checkpoint there")
    return loaded


def drop_old(root: Path, keep: int) -> None:
    """Delete all checkpoints under `root` but the newest `keep`, the best and the milestones.

    The best is the newest one whose meta says `best_step` is its own step: it was the best when it was saved. A
    milestone's meta says `milestone`. One whose manifest cannot be read is left alone: what it was kept for is unknown.

    Raises:
        OSError: a checkpoint could not be renamed; all others are as they were.
    """
    best_passed = False
    for newer, step in enumerate(reversed(checkpoint_steps(root))):
        try:
            meta = read_meta(checkpoint_path(root, step))
        except (CheckpointError, OSError):
            continue
        best = not best_passed and meta.get("best_step") == step
        best_passed = best_passed or best
        if newer >= keep and not best and not meta.get("milestone"):
            # Renamed first: a kill in the middle of the deletion must not leave a checkpoint that looks whole.
            doomed = root / f"{DOOMED}{step}-{os.getpid()}"
            checkpoint_path(root, step).rename(doomed)
            _delete(doomed)


def remove_leftovers(root: Path) -> None:
    """What a killed writer left behind. Only the process that holds the run's lock may call this."""
    for prefix in (TEMPORARY, DOOMED):
        for leftover in root.glob(f"{prefix}*"):
            _delete(leftover)


def _delete(path: Path) -> None:
    """Delete a folder of ours, and never what a symbolic link in its place, or in it, leads to."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        # rmtree holds on to the folders it descends into, so that a link put in their place is not followed, either.
        shutil.rmtree(path, ignore_errors=True)
