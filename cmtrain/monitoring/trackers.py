"""TensorBoard, W&B and MLflow, by way of accelerate: they are told what log.jsonl and summary.csv are told.

Nothing here knows one of them from another. A tracker that fails during a run (a server that went away) is told of once
and left alone from then on: the run folder has everything, and a run is worth more than its mirror.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cmtrain.config.strict_yaml import emit
from cmtrain.errors import ConfigError
from pipelines.spec import DataError

PROJECT = "cmtrain"
MAX_ERROR_CHARACTERS = 300
FOLDER_NAME = "trackers"  # in the run folder, for those that write files


class Trackers:
    """The trackers of a run, on its rank 0; elsewhere they do nothing.

    Args:
        accelerator: made with `tracker_options`.
        config: by dotted key, for the trackers' own tables of hyperparameters.

    Raises:
        DataError: one of them cannot start, for want of a login or a server.
    """

    def __init__(self, accelerator: Accelerator, run_name: str, config: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        self.enabled = accelerator.is_main_process and bool(accelerator.log_with)
        if not self.enabled:
            return
        values = {
            key: value if isinstance(value, int | float | str) else emit(value)
            for key, value in config.items()
        }
        names = {"wandb": {"name": run_name}, "mlflow": {"run_name": run_name}}
        try:
            accelerator.init_trackers(PROJECT, values, init_kwargs=names)
        except Exception as error:  # each of them has errors of its own
            raise DataError(
                f"metrics.trackers: cannot start: {_line(error)}; leave it out to run without"
            ) from error

    def log(self, values: Mapping[str, Any], step: int) -> str:
        """Pass on the numbers among `values`. Returns why that failed, "" if it did not."""
        if not self.enabled:
            return ""
        numbers = {
            key: value for key, value in values.items() if key not in ("step", "time") and _is_finite(value)
        }
        try:
            self.accelerator.log(numbers, step=step)
        except Exception as error:
            self.enabled = False
            return f"metrics.trackers: no more from here on: {_line(error)}"
        return ""

    def close(self) -> str:
        """Let them write what they still hold. Returns why that failed, "" if it did not."""
        if not self.enabled:
            return ""
        self.enabled = False
        try:
            # Not accelerate's end_training: it would also leave the process group, which other ranks still need.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        except Exception as error:
            return f"metrics.trackers: not ended in order: {_line(error)}"
        return ""


def tracker_options(names: Sequence[str], run_folder: Path) -> dict[str, Any]:
    """What Accelerator must be made with.

    Raises:
        ConfigError: a package is missing; accelerate itself would go on without a word.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(missing)
        raise ConfigError(
            f"metrics.trackers: not installed: {', '.join(missing)}; pip install 'cmtrain[{extras}]', or leave it out"
        )
    return {"log_with": list(names), "project_dir": run_folder / FOLDER_NAME} if names else {}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _line(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[: MAX_ERROR_CHARACTERS - 3] + "..."
