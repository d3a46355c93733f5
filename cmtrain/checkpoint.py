"""Checkpoints that exist whole or not at all.

A checkpoint is a folder `step-000001234/` with `state.pt` (tensors and plain values, loaded with weights_only=True) and
`manifest.json` (size and sha256 of every file, versions, configuration). It is written under a temporary name on the
same file system, every file is synced, and one rename publishes it. Loading verifies the checksums, because neither
torch.load nor safetensors notices a flipped bit, and falls back to the one before, loudly.

accelerate's save_state is not used: it is not atomic, deletes the old before the new is written, and cannot be
verified. A newer `step-` folder is the newer checkpoint; there are no `latest` or `best` pointers that could lie.
"""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{9})")
_MANIFEST = "manifest.json"
_STATE = "state.pt"


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why, in one line."""


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint. `rejected`: one line for every newer one that failed verification."""

    path: Path
    state: dict[str, Any]
    meta: dict[str, Any]
    rejected: tuple[str, ...] = ()


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the published checkpoints under `root`, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for entry in root.iterdir() if (match := _NAME.fullmatch(entry.name)))


def checkpoint_path(root: Path, step: int) -> Path:
    return root / f"step-{step:09d}"


def save_checkpoint(root: Path, step: int, state: dict[str, Any], meta: dict[str, Any], *, keep: int) -> Path:
    """Publish `state` as the checkpoint of `step`, then drop all but the newest `keep` and the one `meta` calls best.

    Args:
        root: the `checkpoints` folder; made if missing.
        state: nested dicts and lists of tensors, numbers, strings.
        meta: JSON values; `meta["best_step"]`, if there, names a checkpoint that is never dropped.

    Raises:
        OSError, RuntimeError: the write failed (torch reports a full disk as RuntimeError). Nothing half-written stays
            behind, and no older checkpoint was touched.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    final = checkpoint_path(root, step)
    if final.exists():
        return final
    temporary = root / f".tmp-{step}-{os.getpid()}"
    try:
        temporary.mkdir()
        with open(temporary / _STATE, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        files = {_STATE: {"bytes": (temporary / _STATE).stat().st_size, "sha256": _sha256(temporary / _STATE)}}
        with open(temporary / _MANIFEST, "w") as file:
            json.dump({"step": step, "time": time.time(), "files": files, "meta": meta}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        temporary.rename(final)
        _sync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _drop_old(root, keep, meta.get("best_step"))
    return final


def load_checkpoint(path: Path) -> Loaded:
    """Verify and load one checkpoint folder, onto the CPU.

    Raises:
        CheckpointError: it is damaged, not ours, or holds more than tensors and plain values.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        expected = manifest["files"][_STATE]
        size = (path / _STATE).stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path / _STATE}: {size} bytes, the manifest says {expected['bytes']}")
        if _sha256(path / _STATE) != expected["sha256"]:
            raise CheckpointError(f"{path / _STATE}: sha256 differs from the manifest's")
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        return Loaded(path, state, manifest["meta"])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def load_newest(root: Path) -> Loaded | None:
    """The newest checkpoint under `root` that verifies, or None when there is none at all.

    A damaged one is renamed to `.corrupt-...`, so that it is neither counted nor lost, and the one before is taken.

    Raises:
        CheckpointError: there are checkpoints, and none of them is usable. Starting from scratch would silently throw
            a run away.
    """
    rejected: list[str] = []
    for step in reversed(checkpoint_steps(root)):
        path = checkpoint_path(root, step)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            rejected.append(str(error))
            path.rename(root / f".corrupt-{step}-{time.time_ns()}")
            continue
        return Loaded(loaded.path, loaded.state, loaded.meta, tuple(rejected))
    if rejected:
        raise CheckpointError(f"no usable checkpoint in {root}: " + "; ".join(rejected))
    return None


def _remove_leftovers(root: Path) -> None:
    """What a killed writer left behind."""
    for pattern in (".tmp-*", ".del-*"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _drop_old(root: Path, keep: int, best_step: int | None) -> None:
    for step in checkpoint_steps(root)[:-keep]:
        if step != best_step:
            # Renamed first: a kill in the middle of the deletion must not leave a checkpoint that looks whole.
            doomed = root / f".del-{step}-{os.getpid()}"
            checkpoint_path(root, step).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
