"""Which checkpoints stay: the newest few, the best one, and the milestones.

What a checkpoint is worth stands in its own manifest, written with it. So a setting that changes later never deletes
what was promised to be kept, and the best one is the best of those that really exist: where writing the best failed,
the best before it stays.
"""

import contextlib
import os
import shutil
from pathlib import Path

from cmtrain.storage.checkpoint import DOOMED, TEMPORARY, checkpoint_path, checkpoint_steps, read_meta
from cmtrain.storage.state_file import CheckpointError


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
