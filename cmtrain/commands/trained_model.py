"""Open a finished run for eval, export and repair-bn: its configuration, checkpoint and class names."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cmtrain.config.load import Overrides, load_config
from cmtrain.config.schema import Config, to_yaml
from cmtrain.errors import ConfigError
from cmtrain.storage.checkpoint import Loaded, find_checkpoint
from cmtrain.storage.records import read_json
from cmtrain.storage.run_folder import CLASSES_NAME, find_run
from cmtrain.storage.state_file import CheckpointError
from cmtrain.storage.weights import Weights, check_finite, state_of
from pipelines.spec import DataError

KINDS = ("model", "ema")


@dataclass(frozen=True)
class Trained:
    """A run folder `run` and what it learned. `config`: as trained, with overrides.

    `class_names`: one for each output; () if the run folder has none.
    """

    run: Path
    config: Config
    checkpoint: Loaded
    class_names: tuple[str, ...]

    @property
    def step(self) -> int:
        return int(self.checkpoint.state["progress"]["step"])

    @property
    def kinds(self) -> list[str]:
        """Kinds of weights in the checkpoint: `model`, and `ema` if the run had one."""
        return [kind for kind in KINDS if kind in self.checkpoint.state]

    def weights(self, kind: str) -> Weights:
        """Return the weights of `kind`. Raises DataError: there are none, or they are not finite."""
        path = self.checkpoint.path
        weights = Weights(path, kind, state_of(self.checkpoint.state, kind, path))
        check_finite(weights)
        return weights


def open_trained(place: str, overrides: Overrides) -> Trained:
    """Open `place`: a run folder, the name of one below runs/, or a checkpoint folder in a run folder.

    Newer checkpoints that are damaged are named on stderr.

    Raises:
        ConfigError: wrong overrides. DataError: no run or no usable checkpoint there.
    """
    run, path = find_run(place)
    try:
        loaded = find_checkpoint(path)
        loaded.state["progress"]["step"]
    except (CheckpointError, OSError) as error:
        raise DataError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{loaded.path}: no checkpoint of a run") from error
    sys.stderr.writelines(f"{line}\n" for line in loaded.warnings)
    return Trained(run, _config_of(run, loaded, overrides), loaded, _class_names(run))


def _config_of(run: Path, loaded: Loaded, overrides: Overrides) -> Config:
    """Return the configuration of a run with `overrides`; where its file is damaged, the checkpoint's copy.

    Raises ConfigError: wrong overrides.
    """
    try:
        load_config(run / "config.yaml")
    except ConfigError as error:
        line = f"{run / 'config.yaml'} is missing or damaged"
        sys.stderr.write(f"{line}; taking the configuration that is in {loaded.path.name}\n")
        try:
            saved = to_yaml(Config.model_validate(loaded.meta["config"]))
        except (KeyError, ValueError):
            raise error from None
        with tempfile.TemporaryDirectory() as folder:
            (copy := Path(folder, f"{run.name}.yaml")).write_text(saved)
            return load_config(copy, overrides).config
    return load_config(run / "config.yaml", overrides).config


def _class_names(run: Path) -> tuple[str, ...]:
    """Return the class names of a run; () if it was not evaluated yet, or, with a line, if damaged."""
    damage: list[str] = []
    record = read_json(run / CLASSES_NAME, damage)
    names = (record or {}).get("classes", [])
    if not isinstance(names, list):
        damage.append(f"{CLASSES_NAME}: names no classes")
    sys.stderr.writelines(f"{run}: {line}; going on without class names\n" for line in damage)
    return () if damage else tuple(map(str, names))
