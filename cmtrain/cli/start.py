"""Say at once what starts, and refuse what can be found without torch, which takes seconds to load."""

import importlib.util
import os
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cmtrain import __version__
from cmtrain.config.load import Overrides, load_config
from cmtrain.config.schema import Config, another_recipe, recipe_changes
from cmtrain.errors import ConfigError
from cmtrain.processes import environment, rank
from cmtrain.storage import records, run_folder
from cmtrain.training.schedule import plan_steps, split_batch
from pipelines.spec import DataError, print_lines

if TYPE_CHECKING:
    from cmtrain.training.loaders import Data  # with numpy: help and mistakes answer without it


def announce(what: str, start: str = f"cmtrain {__version__}: ") -> None:
    """Print the first line of a verb, on the first rank or in the process that starts the ranks."""
    if rank.is_first_rank() and rank.PARENT not in os.environ:
        print_lines(start + what)


def loading() -> None:
    """Print that libraries are loaded, before the import that takes seconds. Raises DataError: it cannot."""
    environment.check_imports()
    announce("loading torch and DALI ...", start="")


def check_run(config: Config, resume: str, world_size: int) -> None:
    """Refuse a run whose batch, data, folder or checkpoint cannot be used, as its start would do later.
    For the process that starts ranks, or is the only one. A checkpoint is looked at, not verified. Raises
    ConfigError: a batch that does not split, or another recipe. DataError: data, weights, or run folder.
    """
    run_path = Path(config.run.dir) / str(config.run.name)
    _split(config, world_size)
    check_places(config)
    with closing(run_folder.RunLock(run_path)) as lock:
        lock.acquire()
    newest = _newest_manifest(run_path)
    if resume == "never" and newest:
        held = f"{run_path} already holds checkpoints"
        raise ConfigError(f"--resume never: {held}; choose another --run.name")
    if resume not in ("auto", "force", "never") and not newest:
        if not Path(resume).exists():
            raise DataError(f"--resume {resume}: no such checkpoint or run folder")
        newest = _newest_manifest(Path(resume))
    if newest and resume != "force":
        changes: list[str] = []
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged, as the start finds out
            changes = recipe_changes((records.read_json(newest) or {})["meta"]["config"], config)
        if changes:
            raise another_recipe(newest.parent, changes)
    begins_with = config.model.init_from
    if begins_with and not newest and (why := run_folder.why_no_weights(Path(begins_with))):
        raise DataError(f"model.init_from: {begins_with}: {why}")


def _split(config: Config, world_size: int) -> tuple[int, int]:
    """Return micro-batch size and accumulation. Raises ConfigError: the batch cannot be split."""
    sizes = config.train.global_batch_size, config.train.max_batch_per_gpu, world_size
    is_cmt = config.model.name.startswith("cmt_")  # of other models it is known when they are built
    return split_batch(*sizes, has_batchnorm=is_cmt)


def check_places(config: Config, *, trains: bool = True) -> None:
    """Raise DataError where folders or lists of images are not there, as their opening would."""
    from cmtrain.training import loaders

    loaders.check_places(config, trains=trains)


def open_data(config: Config, world_size: int) -> "Data":
    """Open the images of a run. Raises ConfigError, DataError: unusable, or too few for the batch."""
    from cmtrain.training import loaders

    try:
        has_dali = importlib.util.find_spec("nvidia.dali") is not None
    except ImportError:
        has_dali = False
    if not has_dali:
        import pipelines.dali  # noqa: F401 - raises DataError; not after a first look at all files
    data = loaders.open_data(config)
    loaders.num_classes_of(config, data.train)
    plan_steps(config, len(data.train), world_size)
    return data


def check_trained(place: str, overrides: Overrides) -> Config | None:
    """Return the configuration of the run at `place`, None where open_trained takes a checkpoint's."""
    path = run_folder.find_run(place)[0] / "config.yaml"
    try:
        load_config(path)
    except ConfigError:
        return None
    return load_config(path, overrides).config


def check_repair(place: str, config: Config | None, overrides: Overrides) -> None:
    """Refuse a run, file or data that is not there. Raises ConfigError, DataError: as repair_bn."""
    path = Path(place)
    if path.suffix in run_folder.WEIGHTS_SUFFIXES and not path.exists():
        raise DataError(f"{place}: no such file")
    if not path.is_file() and config is None:
        config = check_trained(place, overrides)
    if config is not None:
        check_places(config)


def _newest_manifest(place: Path) -> Path | None:
    """Return the manifest of the newest checkpoint in a run folder, or of a checkpoint folder."""
    found = sorted([*place.glob("checkpoints/step-*/manifest.json"), *place.glob("manifest.json")])
    return found[-1] if found else None


def describe_plan(config: Config) -> str:
    """Describe a run as far as it is known before its data is: model, epochs, learning rate and batch."""
    size, plan = config.train.global_batch_size, config.schedule
    variant = f" ({config.model.variant})" if config.model.name.startswith("cmt_") else ""
    lines = [
        f"run      {config.run.dir}/{config.run.name}",
        f"data     {config.data.root}, {config.data.image_px} px",
        f"model    {config.model.name}{variant}",
        f"epochs   {plan.epochs}, warm-up {plan.warmup_epochs:g}, cool-down {plan.cooldown_epochs}",
        f"lr       {plan.warmup_lr:g} -> {config.optim.lr:g} -> {plan.min_lr:g} ({config.optim.opt})",
        f"steps    (training images // {size}) per epoch",
    ]
    # A launcher sets the number of processes; without one, show what would happen on one node.
    given = os.environ.get("WORLD_SIZE", "")
    launched = int(given) if given.isascii() and given.isdecimal() else 0
    for world_size in [launched] if launched else [1, 2, 4, 8]:
        try:
            micro_batch_size, accumulation = _split(config, world_size)
            split = f"{world_size} x {accumulation} x {micro_batch_size}"
            lines.append(f"batch    {size} = {split} (processes x accumulation x images)")
        except ConfigError as error:
            if launched:
                raise
            lines.append(f"batch    {error}")
    return "\n".join(lines) + "\n"
