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
from cmtrain.training import build
from pipelines.spec import DataError


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
        return [kind for kind in ("model", "ema") if kind in self.checkpoint.state]

    def weights(self, kind: str) -> Weights:
        """Return the weights of `kind`. Raises DataError: there are none, or they are not finite."""
        path = self.checkpoint.path
        weights = Weights(path, kind, state_of(self.checkpoint.state, kind, path))
        check_finite(weights)
        return weights


def open_trained(place: str, overrides: Overrides) -> Trained:
    """Open `place`: a run folder, the name of one below runs/, or a checkpoint folder in a run folder.

    Newer checkpoints that are damaged are named on stderr. Raises ConfigError: wrong overrides; DataError:
    no run or no usable checkpoint there.
    """
    run, path = find_run(place)
    loaded = read_checkpoint(path)
    config = _config_of(run / "config.yaml", loaded, overrides)
    build.import_modules(config.run.imports)
    return Trained(run, config, loaded, _class_names(run))


def read_checkpoint(path: Path) -> Loaded:
    """Load a checkpoint as find_checkpoint does. Raises DataError: there is none, or none of a run."""
    try:
        loaded = find_checkpoint(path)
        _ = loaded.state["progress"]["step"], loaded.state["optimizer"]["state"]
    except (CheckpointError, OSError) as error:
        raise DataError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{loaded.path}: no checkpoint of a run") from error
    sys.stderr.writelines(f"{line}\n" for line in loaded.warnings)
    return loaded


def _config_of(path: Path, loaded: Loaded, overrides: Overrides) -> Config:
    """Return the configuration in `path` with `overrides`; where it is damaged, the checkpoint's copy."""
    try:
        load_config(path)
    except ConfigError as error:
        what = f"taking the configuration that is in {loaded.path.name}"
        sys.stderr.write(f"{path} is missing or damaged; {what}\n")
        try:
            saved = to_yaml(Config.model_validate(loaded.meta["config"]))
        except (KeyError, ValueError):
            raise error from None
        with tempfile.TemporaryDirectory() as folder:
            (copy := Path(folder, f"{path.parent.name}.yaml")).write_text(saved)
            return load_config(copy, overrides).config
    return load_config(path, overrides).config


def _class_names(run: Path) -> tuple[str, ...]:
    """Return the class names of a run; () if it was not evaluated yet, or, with a line, if damaged."""
    damage: list[str] = []
    names = (read_json(run / CLASSES_NAME, damage) or {}).get("classes", [])
    if not isinstance(names, list):
        damage.append(f"{CLASSES_NAME}: names no classes")
    sys.stderr.writelines(f"{run}: {line}; going on without class names\n" for line in damage)
    return () if damage else tuple(map(str, names))
