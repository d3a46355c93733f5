"""Choose where a run starts: at step 0, or at a checkpoint of this configuration and this data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from cmtrain.config.schema import Config, another_recipe, recipe_changes
from cmtrain.errors import ConfigError
from cmtrain.processes import collectives, failure
from cmtrain.step.learner import Learner
from cmtrain.step.measure import StepReport
from cmtrain.storage import checkpoint as storage
from cmtrain.storage.records import retried
from cmtrain.storage.run_folder import RunLock, read_status
from cmtrain.storage.state_file import CheckpointError
from cmtrain.storage.weights import misfit, shape_of
from pipelines.spec import DataError


@dataclass(frozen=True)
class Start:
    """The first step to take, the checkpoint before it (None: from scratch), and lines for the user."""

    step: int = 0
    checkpoint: storage.Loaded | None = None
    notes: tuple[str, ...] = ()


def choose_start(
    lock: RunLock, resume: str, config: Config, fingerprint: str, val_fingerprint: str, control: Any = None
) -> Start:
    """Choose on rank 0, which takes the `lock`, and make every rank start from the same checkpoint.

    `resume`: `auto` (newest checkpoint of the run folder, else from scratch), `never` (from scratch; refused
    if there are checkpoints), `force` (as auto, but configuration and data may have changed), or the path of
    a checkpoint or run to begin from if the run folder has none. Another `val_fingerprint` is only a note.
    `control`: a group of all ranks. Raises ConfigError: another configuration, other data, or `never` would
    mix two runs. DataError: no usable checkpoint where there should be one, or the run folder is in use.
    """
    start, error = Start(), None
    is_main = control is None or dist.get_rank(control) == 0
    if is_main:
        try:
            lock.acquire()
            start = _choose(lock.folder, resume, config, fingerprint, val_fingerprint)
        except (ConfigError, DataError) as raised:
            error = raised
    path = start.checkpoint.path if start.checkpoint else None
    path, step, error = collectives.gather((path, start.step, error), control)[0]
    if not is_main and error is None:
        try:
            start = Start(step, storage.load_checkpoint(path) if path else None)
        except (CheckpointError, OSError) as raised:
            error = DataError(f"{raised}; run.dir must be on a file system that all nodes share")
    if error is not None:
        raise error
    return start


def _choose(run_path: Path, resume: str, config: Config, fingerprint: str, val_fingerprint: str) -> Start:
    checkpoints = run_path / "checkpoints"
    saved = (read_status(run_path) or {}).get("resume_from")
    try:
        lost = failure.archive_previous_attempt(run_path)
        if resume == "never":
            if retried(storage.checkpoint_steps, checkpoints):
                held = f"{run_path} already holds checkpoints"
                raise ConfigError(f"--resume never: {held}; choose another --run.name")
            return Start(notes=lost)
        loaded = storage.load_newest(checkpoints)
        storage.remove_leftovers(checkpoints)  # not before: they may be all that is left of a run
    except CheckpointError as error:
        raise DataError(f"{error}; to start from scratch all the same, use --resume never") from error
    except OSError as error:
        what = f"{error.filename or run_path}: {error.strerror or error}"
        raise DataError(f"{what}; no checkpoint was changed, run the same command again") from error
    if resume not in ("auto", "force") and loaded is None:
        try:
            loaded = storage.find_checkpoint(Path(resume))
        except (CheckpointError, OSError) as error:
            raise DataError(f"--resume {resume}: {error}") from error
    if loaded is None:
        gone = f"{saved}, which an earlier start saved, is gone: training begins from scratch"
        return Start(notes=(*lost, gone) if saved else lost)
    changes = changes_since(loaded, config, fingerprint)
    if changes and resume != "force":
        raise another_recipe(loaded.path, changes)
    notes = [*lost, *loaded.warnings, *(f"recipe changed: {change}" for change in changes)]
    if loaded.meta.get("val_fingerprint", val_fingerprint) != val_fingerprint:
        what = f"the validation images or classes are others than at {loaded.path.name}"
        then = "earlier accuracies do not compare, and the search for the best one begins again"
        notes.append(f"{what}: {then}")
    return Start(loaded.state["progress"]["step"], loaded, tuple(notes))


def changes_since(loaded: storage.Loaded, config: Config, fingerprint: str) -> list[str]:
    """Return what changed since a checkpoint, one `key: old -> new` each. Raises DataError: not of a run."""
    meta = loaded.meta
    try:
        changes = recipe_changes(meta["config"], config)
        same_data = meta["fingerprint"] == fingerprint
        StepReport(**meta["report"])
        if not {"best_top1", "best_step"} <= meta.keys() or not loaded.state["progress"]["step"] >= 0:
            raise ValueError("best_top1, best_step or the step is missing")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{loaded.path}: no checkpoint of a run: {type(error).__name__}: {error}") from error
    return changes if same_data else [*changes, "the training images or class weights (fingerprint) changed"]


def restore(learner: Learner, checkpoint: storage.Loaded) -> None:
    """Load `checkpoint` into `learner`. Raises ConfigError: it does not fit, as with `--resume force`."""
    if (problem := _misfit(learner, checkpoint.state)) is None:
        try:
            learner.load_state_dict(checkpoint.state)
            return
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    raise ConfigError(f"{checkpoint.path} does not fit this model: {problem}")


def _misfit(learner: Learner, state: dict[str, Any]) -> str | None:
    """Return the first tensor of `state` that does not fit; torch checks no shapes in an optimizer."""
    for weights, module in learner.weights.items():
        saved, wanted = state.get(weights), module.state_dict()
        if not isinstance(saved, dict):
            return f"it has no {weights} weights"
        if name := misfit(wanted, saved, [*wanted, *saved]):
            shapes = f"{shape_of(saved, name)} in the checkpoint and {shape_of(wanted, name)} in the model"
            return f"{weights} {name} is {shapes}"
    try:
        parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
        for index, values in state["optimizer"]["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape not in ((), parameters[index].shape):
                    shape = tuple(parameters[index].shape)
                    return f"optimizer {name} {index} is {tuple(value.shape)} and its parameter {shape}"
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        return f"its optimizer state is not one: {type(error).__name__}: {error}"
    return None
