"""Say at once what starts, and refuse what can be found without torch, which takes seconds to load."""

import importlib.util
import os
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cmtrain import __version__
from cmtrain.cli.arguments import help_page
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
        raise ConfigError(f"--resume never: {run_path} already holds checkpoints; choose another --run.name")
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


def _newest_manifest(place: Path) -> Path | None:
    """Return the manifest of the newest checkpoint in a run folder, or of a checkpoint folder."""
    found = sorted([*place.glob("checkpoints/step-*/manifest.json"), *place.glob("manifest.json")])
    return found[-1] if found else None


def describe_plan(config: Config) -> str:
    """Describe a run as far as it is known before its data is: model, epochs, learning rate and batch."""
    variant = f" ({config.model.variant})" if config.model.name.startswith("cmt_") else ""
    text = help_page("plan").format(**dict(config), variant=variant)
    # A launcher sets the number of processes; without one, show what would happen on one node.
    launched = environment.number(os.environ.get("WORLD_SIZE"))
    for world_size in [launched] if launched else [1, 2, 4, 8]:
        try:
            micro_batch_size, accumulation = _split(config, world_size)
            split = f"{world_size} x {accumulation} x {micro_batch_size} (processes x accumulation x images)"
            text += f"batch    {config.train.global_batch_size} = {split}\n"
        except ConfigError as error:
            if launched:
                raise
            text += f"batch    {error}\n"
    return text
