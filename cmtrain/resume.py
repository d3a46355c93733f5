"""Where a run starts: at step 0, or at a checkpoint that belongs to this configuration and this data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cmtrain.checkpoint import CheckpointError, Loaded, checkpoint_steps, load_checkpoint, load_newest
from cmtrain.config import Config
from cmtrain.errors import ConfigError
from pipelines.spec import DataError

# What may differ between the run that wrote a checkpoint and the run that goes on from it without changing what is
# learned. (train.max_batch_per_gpu may, because another number of GPUs is allowed to need another accumulation.)
FREE_SECTIONS = ("guard", "checkpoint", "evaluate", "metrics", "expect")
FREE_KEYS = (
    "run.name", "run.dir", "data.root", "data.decode", "data.hw_decoder_load", "data.threads", "data.prefetch_batches",
    "data.cache_dir", "data.max_bad_fraction", "train.max_batch_per_gpu", "train.log_every_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The first step to do, and the checkpoint it follows (None: from scratch). `notes`: lines the user should see."""

    step: int = 0
    checkpoint: Loaded | None = None
    notes: tuple[str, ...] = ()


def choose_start(run_path: Path, resume: str, config: Config, fingerprint: str, *, is_main: bool) -> Start:
    """Decide on rank 0, and make every rank start from the same checkpoint.

    Args:
        run_path: the run folder, which need not exist.
        resume: `auto` (newest checkpoint of the run folder, else from scratch), `never` (from scratch; refused if
            there are checkpoints), `force` (as auto, but configuration and data may have changed), or the path of a
            checkpoint or run folder to go on from.
        fingerprint: of the training manifest.

    Raises:
        ConfigError: the checkpoint belongs to another configuration or to other data, or `never` would mix two runs.
        DataError: no usable checkpoint where there should be one.
    """
    start, error = Start(), None
    if is_main:
        try:
            start = _choose(run_path, resume, config, fingerprint)
        except (ConfigError, DataError) as raised:
            error = raised
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        path = start.checkpoint.path if start.checkpoint else None
        shared: list[Any] = [path, start.step, error]
        dist.broadcast_object_list(shared, src=0)
        path, step, error = shared
        if not is_main and error is None:
            start = Start(step, _load(path) if path else None)
    if error is not None:
        raise error
    return start


def _choose(run_path: Path, resume: str, config: Config, fingerprint: str) -> Start:
    checkpoints = run_path / "checkpoints"
    if resume == "never":
        if checkpoint_steps(checkpoints):
            raise ConfigError(f"--resume never: {run_path} already holds checkpoints; choose another --run.name")
        return Start()
    try:
        loaded = load_newest(checkpoints)
        if resume not in ("auto", "force") and loaded is None:
            loaded = _load_from(Path(resume))
    except CheckpointError as error:
        raise DataError(f"{error}; move the folder away to start from scratch") from error
    if loaded is None:
        return Start()
    changes = _changes(loaded.meta, config, fingerprint)
    if changes and resume != "force":
        raise ConfigError(
            f"{loaded.path} was made with another recipe: {'; '.join(changes)}; "
            "choose another --run.name, or --resume force to go on with the new recipe"
        )
    notes = [f"checkpoint rejected: {line}" for line in loaded.rejected] + [f"recipe changed: {c}" for c in changes]
    return Start(loaded.state["progress"]["step"], replace(loaded, rejected=()), tuple(notes))


def _load_from(path: Path) -> Loaded:
    loaded = load_newest(path / "checkpoints") if (path / "checkpoints").is_dir() else load_checkpoint(path)
    if loaded is None:
        raise CheckpointError(f"--resume {path}: no checkpoint there")
    return loaded


def _load(path: Path) -> Loaded:
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        raise DataError(f"{error}; run.dir must be on a file system that all nodes share") from error


def _changes(meta: dict[str, Any], config: Config, fingerprint: str) -> list[str]:
    """What differs from the recipe and data of a checkpoint, one `key: old -> new` each."""
    old, new = _recipe(meta["config"]), _recipe(config.model_dump(mode="json"))
    changes = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    if meta["fingerprint"] != fingerprint:
        changes.append("the training images (fingerprint) changed")
    return changes


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    flat = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
    return {
        key: value for key, value in flat.items() if key.split(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS
    }
