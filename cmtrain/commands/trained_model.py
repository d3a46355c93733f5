"""Open a finished run, or an export of one: its configuration, weights and class names."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from cmtrain.config.load import Overrides, load_config
from cmtrain.config.schema import CMT_OPTIONS, Config, defaults, flatten
from cmtrain.errors import ConfigError
from cmtrain.step.evaluate import THRESHOLD
from cmtrain.storage import records, run_folder, run_record, state_file
from cmtrain.storage.checkpoint import Loaded, find_checkpoint
from cmtrain.storage.weights import Weights, check_finite, state_of
from cmtrain.training import build
from pipelines.spec import DataError, print_lines


class Trained(NamedTuple):
    """A run folder and what it learned."""

    run: Path
    config: Config  # as trained, with overrides
    checkpoint: Loaded
    class_names: tuple[str, ...]  # one for each output; () if the run folder has none
    thresholds: dict[str, list[float]]  # by kind of weights, see Evaluation; {} where an image has one class

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
        return check_finite(Weights(path, kind, state_of(self.checkpoint.state, kind, path)))


def open_trained(place: str, overrides: Overrides) -> Trained:
    """Open `place`: a run folder, the name of one below runs/, or a checkpoint folder in a run folder.
    Names damaged newer checkpoints on stderr. Raises ConfigError: wrong overrides. DataError: no checkpoint.
    """
    run, path = run_folder.find_run(place)
    loaded = read_checkpoint(path)
    file = run / "config.yaml"
    try:
        load_config(file)
    except ConfigError:  # the checkpoint has a copy
        print_lines(f"{file} is missing or damaged; taking the configuration that is in {loaded.path.name}")
        config = config_in(loaded.meta, overrides)
    else:
        config = load_config(file, overrides).config
    build.import_modules(config.run.imports)
    return Trained(run, config, loaded, *_classes(run, int(loaded.state["progress"]["step"])))


def read_checkpoint(path: Path) -> Loaded:
    """Load a checkpoint as find_checkpoint does. Raises DataError: there is none, or none of a run."""
    try:
        loaded = find_checkpoint(path)
        _ = loaded.state["progress"]["step"], loaded.state["optimizer"]["state"], loaded.meta["config"]
    except (state_file.CheckpointError, OSError) as error:
        raise DataError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{loaded.path}: no checkpoint of a run") from error
    print_lines(*loaded.warnings)
    return loaded


def config_in(meta: dict[str, Any], overrides: Overrides) -> Config:
    """Return the configuration in a checkpoint's meta, with `overrides`. Raises ConfigError."""
    stated = {key: json.dumps(value) for key, value in (defaults() | flatten(meta["config"])).items()}
    return load_config("configs/small.yaml", [*stated.items(), *overrides]).config


def read_export(path: Path, overrides: Overrides) -> tuple[Config, list[str], list[float]]:
    """Return configuration, with `overrides`, class names ([]: unknown) and thresholds in a config.json.
    Raises ConfigError: wrong overrides. DataError: `path` cannot be read, or is not by `cmtrain export`.
    """
    try:
        content = records.load_json(path)
        prepared, options = content["pretrained_cfg"], content.get("model_args", {})
        side = prepared["input_size"][-1]
        settings = {f"model.{key}": options[key] for key in CMT_OPTIONS if key in options}
        settings |= {"model.name": content["architecture"], "train.precision": "fp32", "data.image_px": side}
        settings |= {"data.eval_resize_px": math.floor(side / prepared["crop_pct"])}
        settings |= {"data.eval_interpolation": prepared["interpolation"]}
        settings |= {f"data.{key}": prepared[key] for key in ("mean", "std")}
        settings["data.multi_label"] = content.get("multi_label", False)
        stated = [(key, json.dumps(value)) for key, value in settings.items()]
        config = load_config("configs/small.yaml", [*stated, *overrides]).config
        return config, content.get("label_names", []), list(map(float, content.get("thresholds", [])))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{path}: not as `cmtrain export` writes it: {records.reason_of(error)}") from error


def _classes(run: Path, step: int) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """Return class names and thresholds of a run; none before an evaluation, or, with a line, if damaged.
    Thresholds are those of an evaluation at `step`; of another step's weights there are none.
    """
    damage: list[str] = []
    names, counts, evaluated = run_record.read_classes(run / run_folder.CLASSES_NAME, damage)
    print_lines(*(f"{run}: {line}; going on without class names" for line in damage))
    thresholds = {kind: count.thresholds for kind, count in counts.items() if count.thresholds}
    if thresholds and evaluated != step:
        print_lines(f"{run}: its thresholds are of step {evaluated}, not {step}; taking {THRESHOLD}")
        thresholds = {}
    return tuple(names), thresholds
