"""Save, load, find and delete checkpoints, each of which exists whole or not at all.

A checkpoint is a folder `step-000001234/` with `state.safetensors` (see state_file.py) and `manifest.json`
(size, sha256, versions, configuration). It is written under a temporary name, synced, read back and renamed.
accelerate's save_state is not atomic, cannot be verified, and deletes the old checkpoint first.
"""

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from cmtrain.storage.records import CORRUPT, reason_of, replace_file, retried
from cmtrain.storage.state_file import CheckpointError, Digest, open_regular, read_state, verify, write_state
from pipelines.atomic import delete, new_folder

MAX_MANIFEST_BYTES = 2**20  # a full one has 4 kB
TEMPORARY, DOOMED = ".tmp-", ".del-"
_MANIFEST, _STATE = "manifest.json", "state.safetensors"


class Loaded(NamedTuple):
    """A verified checkpoint. `rejected`: one line for every newer one that failed verification."""

    path: Path
    state: dict[str, Any]
    meta: dict[str, Any]
    rejected: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines for the user: every damaged newer checkpoint, and that this one is taken."""
        return tuple(f"checkpoint rejected: {why}; taking {self.path.name} instead" for why in self.rejected)


def checkpoint_steps(root: Path) -> list[int]:
    """Return the steps of checkpoints under `root`, ascending, without links. Raises OSError: unreadable."""
    try:
        with os.scandir(root) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name[5:]) for name in found if re.fullmatch(r"step-\d{9}", name, re.ASCII))


def checkpoint_path(root: Path, step: int) -> Path:
    return root / f"step-{step:09d}"


def save_checkpoint(root: Path, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Path:
    """Publish `state`, as state_file takes it, as the checkpoint of `step` in the folder `root`.
    `meta`: JSON; drop_old reads `best_step` and `milestone`. Raises OSError, CheckpointError: `state` cannot
    be saved, the write failed, or the disk returns other bytes. No half-written checkpoint is left.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = checkpoint_path(root, step)
    temporary = root / f"{TEMPORARY}{step}-{os.getpid()}"
    with new_folder(final, temporary):
        digest = write_state(temporary / _STATE, state)
        files = {_STATE: {"bytes": digest.num_bytes, "sha256": digest.sha256}}
        manifest = {"step": step, "time": time.time(), "files": files, "meta": meta}
        replace_file(temporary / _MANIFEST, json.dumps(manifest, indent=1), durable=True)
        with open_regular(temporary / _STATE) as file:
            verify(file, temporary / _STATE, digest)
    return final


def load_checkpoint(path: Path) -> Loaded:
    """Verify and load one checkpoint folder, onto the CPU. Raises as read_state."""
    digest, meta = retried(read_manifest, path)
    return Loaded(path, retried(read_state, path / _STATE, digest), meta)


def load_newest(root: Path, *, set_aside: bool = True) -> Loaded | None:
    """Load the newest checkpoint under `root` that verifies; return None if there has never been one.

    A damaged one is renamed to `.corrupt-...`, neither counted nor lost, and the one before it is tried.
    `set_aside` false, for the folder of another run: nothing is renamed. Raises CheckpointError: none is
    usable; to start from scratch would silently throw a run away. OSError: the machine cannot read one.
    """
    rejected: list[str] = []
    for step in reversed(retried(checkpoint_steps, root)):
        path = checkpoint_path(root, step)
        try:
            return load_checkpoint(path)._replace(rejected=tuple(rejected))
        except CheckpointError as error:
            rejected.append(str(error))
            if set_aside:
                retried(path.rename, root / f"{CORRUPT}{step}-{time.time_ns()}")
    if rejected:
        raise CheckpointError(f"no usable checkpoint in {root}: " + "; ".join(rejected))
    # A writer that was killed before it published its first checkpoint leaves a temporary folder only.
    names = sorted(path.name for path in root.iterdir()) if root.exists() else []
    if others := [name for name in names if not name.startswith(TEMPORARY)]:
        raise CheckpointError(f"no usable checkpoint in {root}, but {', '.join(others[:3])}")
    return None


def find_checkpoint(path: Path) -> Loaded:
    """Load the checkpoint folder `path`, or the newest usable one of the run folder `path`; change neither.
    Raises CheckpointError: there is none. OSError: the machine cannot read it.
    """
    if retried((path / "checkpoints").is_dir):
        loaded = load_newest(path / "checkpoints", set_aside=False)
    else:
        loaded = load_checkpoint(path) if (path / _MANIFEST).exists() else None
    if loaded is None:
        what = "no checkpoint there; give a run folder, or a step-... folder of its checkpoints"
        raise CheckpointError(f"{path}: {what}")
    return loaded


def drop_old(root: Path, keep: int) -> None:
    """Delete all checkpoints under `root` but the newest `keep`, the best and the milestones.
    The best is the newest whose meta has its own step as `best_step`. A milestone's has `milestone`. One
    with an unreadable manifest may be either, and is kept. Raises OSError: one cannot be renamed.
    """
    found_best = False
    for num_newer, step in enumerate(reversed(checkpoint_steps(root))):
        try:
            _, meta = read_manifest(checkpoint_path(root, step))
        except (CheckpointError, OSError):
            continue
        is_best = not found_best and meta.get("best_step") == step
        found_best = found_best or is_best
        if num_newer >= keep and not is_best and not meta.get("milestone"):
            # Renamed first: a kill in the middle of the deletion must leave nothing that looks whole.
            doomed = root / f"{DOOMED}{step}-{os.getpid()}"
            checkpoint_path(root, step).rename(doomed)
            delete(doomed)


def remove_leftovers(root: Path) -> None:
    """Delete what a killed writer left behind. Only the process that holds the run's lock may call this."""
    for leftover in [*root.glob(f"{TEMPORARY}*"), *root.glob(f"{DOOMED}*")]:
        with contextlib.suppress(OSError):
            delete(leftover)


def read_manifest(path: Path) -> tuple[Digest, dict[str, Any]]:
    """Return the digest of the state file, and the `meta` that save_checkpoint was given."""
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
        raise CheckpointError(f"{path / _MANIFEST}: not a manifest: {reason_of(error)}") from error
    return digest, meta
