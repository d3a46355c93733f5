"""Train many configurations, one after another or as SLURM jobs, and print a table (`cmtrain sweep`).

A row is a configuration file, and its run is the one of `cmtrain --config FILE`. So a sweep can be killed
and started again, in part or whole: finished rows are not repeated, and interrupted ones are resumed.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from cmtrain import errors
from cmtrain.config import schema, strict_yaml
from cmtrain.config.load import Overrides, find_configs, load_config
from cmtrain.errors import ConfigError
from cmtrain.monitoring.units import is_part, percent, state_name
from cmtrain.processes.failure import stop_signals
from cmtrain.storage import records, run_folder
from pipelines.spec import DataError, print_lines, visible

SBATCH = "docker/slurm/train.sbatch"

# The whole recipe in a minute on any machine: small photographs, small batches, a few steps.
DEMO_SCALE = [
    ("run.dir", "runs/sweep-demo"), ("data.root", "demo:photos"), ("data.fraction", "1.0"),
    ("data.image_px", "32"), ("data.eval_resize_px", "36"), ("train.global_batch_size", "16"),
    ("train.max_batch_per_gpu", "16"), ("train.log_every_steps", "1"),
]  # fmt: skip
DEMO_STEPS = 3
END_CODES = (errors.EXIT_CONFIG, errors.EXIT_DATA, errors.EXIT_INTERRUPTED, errors.EXIT_PREEMPTED)


class SweepRow(NamedTuple):
    """One configuration of a sweep. `changes`: settings of its own file; `command`: cmtrain's arguments."""

    number: int
    config: schema.Config
    changes: str
    command: tuple[str, ...]

    @property
    def run_path(self) -> Path:
        return Path(self.config.run.dir) / str(self.config.run.name)


def read_rows(
    files: Sequence[str], overrides: Overrides, select: str | None, scale: str | None, max_steps: int | None
) -> list[SweepRow]:
    """Read configuration files and folders of them as rows, numbered from 1 in the order given.
    `select`: row numbers to keep, such as "1,3-5"; None keeps all. `scale`: "demo" for DEMO_SCALE. Raises
    ConfigError: all mistakes of all rows, or two rows with one run folder.
    """
    paths = [path for file in files for path in find_configs(file)]
    numbers = _numbers(select, len(paths)) if select else range(1, len(paths) + 1)
    overrides = [*(DEMO_SCALE if scale == "demo" else []), *overrides]
    max_steps = max_steps or (DEMO_STEPS if scale == "demo" else None)
    rows, mistakes, seen = [], [], dict[Path, Path]()
    for number in numbers:
        path = paths[number - 1]
        try:
            resolved = load_config(path, overrides)
        except ConfigError as error:
            mistakes.append(str(error))
            continue
        command = ["--config", str(path), *(f"--{key}={value}" for key, value in overrides)]
        command += ["--max-steps", str(max_steps)] if max_steps else []
        changes = _changes(path, resolved.config, resolved.origins)
        row = SweepRow(number, resolved.config, changes, tuple(command))
        if row.run_path in seen:
            both = f"{path}: has the run folder {row.run_path}, as {seen[row.run_path]} has"
            raise ConfigError(f"{both}; sweep them apart")
        seen[row.run_path] = path
        rows.append(row)
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys("\n".join(mistakes).splitlines())))
    return rows


def train_rows(rows: Sequence[SweepRow], script: str | None) -> int:
    """Train the rows one after another here, or, with the job `script`, submit a SLURM job for each.

    Returns the exit code: 0, or that of the first row that failed. Expected divergence (`expect.diverges`)
    is no failure. The sweep continues after a row that diverges, misses its accuracy or crashes; missing
    data, a mistake and a stop request end it. Raises DataError: no SLURM, no such script, or a refused job.
    """
    if script and not (shutil.which("sbatch") and Path(script).is_file()):
        missing = f"{script}: no such file" if shutil.which("sbatch") else "sbatch: not found"
        raise DataError(f"{missing}; --jobs slurm needs it, and a job script such as the sources' {SBATCH}")
    failed = errors.EXIT_DONE
    for row in rows:
        if script and (run_folder.read_status(row.run_path) or {}).get("state") == "finished":
            print_lines(f"row {row.number}: {row.run_path} is finished")
            continue
        print_lines(f"row {row.number}: {row.run_path} ({row.changes})")
        command = command_of(row, script)
        code, is_stopped = _call(command if script else [sys.executable, "-m", *command])
        if is_stopped or code in END_CODES:
            return code
        if code and script:
            raise DataError(f"{shlex.join(command)}: exit code {code}")
        if code and not (code == errors.EXIT_DIVERGED and row.config.expect.diverges):
            print_lines(f"row {row.number}: exit code {code}")
            failed = failed or code
    return failed


def command_of(row: SweepRow, script: str | None) -> list[str]:
    """Return the command that trains `row`, or submits the job `script` for it.
    Such a job begins when earlier ones of the same row have ended, and finds what they did.
    """
    if script is None:
        return ["cmtrain", *row.command]
    name = f"--job-name=cmtrain-{row.config.run.name}"
    return ["sbatch", name, "--dependency=singleton", script, *row.command]


COLUMNS = ("row", "run", "differs in", "published", "measured", "difference", "state", "source")
NUMBERS = ("row", "published", "measured", "difference")


def table(rows: Sequence[SweepRow]) -> str:
    """Return published and measured top-1 of every row as Markdown, the difference in points."""
    rule = ["---:" if name in NUMBERS else "---" for name in COLUMNS]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [COLUMNS, rule, *map(_cells, rows)])


def _cells(row: SweepRow) -> list[str]:
    expect, status = row.config.expect, run_folder.read_status(row.run_path) or {}
    state, result = _state(row, status), status.get("result") or {}
    # As the run itself reports: of model and EMA the better one.
    reached = [top1 for key in ("top1", "ema_top1") if records.is_number(top1 := result.get(key))]
    published = "diverged" if expect.diverges else "" if expect.top1 is None else percent(expect.top1, 2)
    measured, difference = "not a whole run" if is_part(status) else "-", ""
    if state == "finished" and reached:
        measured = percent(max(reached), 2)
        difference = "" if expect.top1 is None else f"{100 * (max(reached) - expect.top1):+.2f} points"
    found = row.changes, published, measured, difference, state, expect.source or ""
    return [visible(cell) for cell in (row.number, row.run_path.name, *found)]


def _state(row: SweepRow, status: dict[str, Any]) -> str:
    if not status:
        return "not started"
    state, step, total = state_name(status), status.get("step") or 0, status.get("total_steps")
    try:
        old = load_config(row.run_path / "config.yaml").config
        if schema.recipe_changes(old.model_dump(mode="json"), row.config):
            return f"{state}, of another recipe"
    except ConfigError:
        return f"{state}, of an unknown recipe"
    return state if not total or step == total else f"{state}, step {step:,} of {total:,}"


def _changes(path: Path, config: schema.Config, origins: Mapping[str, str]) -> str:
    """Return the settings of the row's own file, without its name: `attention_bias relative, lr 1.6`."""
    changes = []
    for key, origin in origins.items():
        section, name = key.split(".")
        if origin.rpartition(":")[0] == str(path) and section not in ("run", "expect"):
            changes.append(f"{name} {strict_yaml.emit(getattr(getattr(config, section), name))}")
    return ", ".join(changes) or "as its base"


def _numbers(select: str, last: int) -> list[int]:
    """Return the row numbers in `select`: [1, 3, 4, 5] for "1,3-5"."""
    chosen: set[int] = set()
    for part in select.split(","):
        if not (found := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)):
            raise ConfigError(f"--rows: must be numbers and ranges of them, such as 1,3-5, got {select}")
        numbers = range(int(found[1]), int(found[2] or found[1]) + 1)
        if not numbers or numbers[0] < 1 or numbers[-1] > last:
            raise ConfigError(f"--rows: {part}: there are rows 1 to {last}")
        chosen.update(numbers)
    return sorted(chosen)


def _call(command: Sequence[str]) -> tuple[int, bool]:
    """Run a command, and forward stop signals to it. Return its exit code, and whether one came."""
    received, running = list[int](), list[subprocess.Popen[bytes]]()

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        for process in running:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        running.append(subprocess.Popen(command))  # noqa: S603 - our own program
        for number in received:  # before there was a process
            running[0].send_signal(number)
        code = running[0].wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code, bool(received)
