"""Send the numbers of log.jsonl and summary.csv to TensorBoard, W&B, MLflow and others, through accelerate.

A tracker that fails during a run (its server went away) is a loss as of a record, and then left alone.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cmtrain.config.strict_yaml import emit
from cmtrain.errors import ConfigError
from cmtrain.storage.records import is_number, reason_of
from pipelines.spec import DataError


class Trackers:
    """The trackers of a run on rank 0; they do nothing on other ranks.
    `accelerator`: made with tracker_options. `config`: by dotted key, for tables of hyperparameters. Raises
    DataError: a tracker cannot start, because a login or a server is missing.
    """

    def __init__(self, accelerator: Accelerator, run_name: str, config: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        self.enabled = accelerator.is_main_process and bool(accelerator.log_with)
        if not self.enabled:
            return
        values = {key: v if isinstance(v, int | float | str) else emit(v) for key, v in config.items()}
        names = {"wandb": {"name": run_name}, "mlflow": {"run_name": run_name}}
        try:
            accelerator.init_trackers("cmtrain", values, init_kwargs=names)
        except Exception as error:  # each tracker has exceptions of its own
            what = f"cannot start: {reason_of(error)}; leave it out to run without"
            raise DataError(f"metrics.trackers: {what}") from error

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the finite numbers among `values`. After an error, which it raises, nothing more is logged."""
        numbers = {key: v for key, v in values.items() if key not in ("step", "time") and is_number(v)}
        if self.enabled:
            try:
                self.accelerator.log(numbers, step=step)
            except Exception:
                self.enabled = False
                raise

    def close(self) -> None:
        """Let the trackers write what they still hold. Raises what they raise."""
        if self.enabled:
            self.enabled = False
            # accelerate's end_training would also leave the process group, which other ranks still need.
            for tracker in self.accelerator.trackers:
                tracker.finish()


def tracker_options(names: Sequence[str], run_folder: Path) -> dict[str, Any]:
    """Return the options that an Accelerator with the trackers `names` needs, with a folder for their files.
    Raises ConfigError: a package is missing; accelerate itself would silently leave the tracker out.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        remedy = f"pip install {' '.join(missing)}, or leave it out"
        raise ConfigError(f"metrics.trackers: not installed: {', '.join(missing)}; {remedy}")
    return {"log_with": list(names), "project_dir": run_folder / "trackers"} if names else {}
