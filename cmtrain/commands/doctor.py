"""Find in seconds what would stop or slow a run on this machine, with advice (`cmtrain doctor`).

Nothing is simulated: images go through the loaders of training, data is opened and the run folder locked by
the code of a run, and ranks meet as in a run. Under a launcher every rank runs all checks, and the worst
result of each check is shown.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmtrain.commands import doctor_checks as checks
from cmtrain.commands.doctor_checks import CheckResult, Severity
from cmtrain.config.schema import Config
from cmtrain.errors import EXIT_DATA, EXIT_DONE, ConfigError
from cmtrain.processes.collectives import control_group, gather, leave_together
from cmtrain.processes.gpus import cuda_of_driver
from cmtrain.training import build, loaders
from pipelines.spec import DataError, visible

COLOURS: dict[Severity, str] = {"ok": "green", "warn": "yellow", "fail": "red"}  # the gravest last
PLAIN_WIDTH = 160  # table width without a terminal


def doctor(config: Config, *, as_json: bool) -> int:
    """Check this machine for a run of `config`, and print a table or a JSON object.

    Returns the exit code: 0, or 3 when a check fails; no GPU is a warning. Raises DataError: the ranks that
    a launcher started cannot meet.
    """
    accelerator, control = _meet(config)
    by_rank = gather(run_checks(config, accelerator, control), control)
    results = {check: worst([results[check] for results in by_rank]) for check in by_rank[0]}
    failed = any(result.verdict == "fail" for result in results.values())
    if accelerator.is_main_process:
        if as_json:
            rows = [{"check": check} | asdict(result) for check, result in results.items()]
            sys.stdout.write(json.dumps({"ok": not failed, "checks": rows}, indent=1) + "\n")
        else:
            _show(results)
    leave_together()
    return EXIT_DATA if failed else EXIT_DONE


def run_checks(config: Config, accelerator: Accelerator, control: Any) -> dict[str, CheckResult]:
    """Run all checks on this rank; every rank runs the same ones in the same order."""
    run_path = Path(config.run.dir) / str(config.run.name)
    num_classes, keys, device = config.model.num_classes or 1000, config.data, accelerator.device

    def data() -> CheckResult:
        nonlocal num_classes
        opened = loaders.open_data(config, accelerator)
        num_classes = loaders.num_classes_of(config, opened.train)
        return checks.data(keys.root, opened)

    run: dict[str, Callable[[], CheckResult]] = {
        "packages": checks.packages,
        "driver": lambda: checks.pairing(cuda_of_driver(), torch.version.cuda, checks.dali_flavours()),
        "GPUs": lambda: checks.gpus(config.train.precision),
        "decode on the CPU": checks.decode_on_cpu,
        "decode on the GPU": lambda: checks.decode_on_gpu(device, keys.decode, keys.hw_decoder_load),
        "ranks": lambda: checks.ranks(control, config, run_path),
        "all-reduce": lambda: checks.all_reduce(accelerator),
        "shared memory": lambda: checks.shared_memory(Path("/dev/shm")),  # noqa: S108 - only read
        "open files": checks.open_files,
        "data": data,
        "run folder": lambda: checks.run_folder(run_path, is_main=accelerator.is_main_process),
        "disk": lambda: checks.disk(config, run_path, num_classes),
        "metrics port": lambda: checks.metrics_port(config, accelerator.local_process_index),
    }
    return {check: _result(function) for check, function in run.items()}


def worst(results: Sequence[CheckResult]) -> CheckResult:
    """Return the gravest of one check's results, by rank; of equally grave ones, the first rank's."""
    gravity = [*COLOURS]
    rank = max(range(len(results)), key=lambda rank: gravity.index(results[rank].verdict))
    return replace(results[rank], found=f"rank {rank}: {results[rank].found}") if rank else results[0]


def _show(results: dict[str, CheckResult]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "check", "found", "what to do"):
        table.add_column(column, no_wrap=column == "check", overflow="fold")
    for check, result in results.items():
        verdict = f"[{COLOURS[result.verdict]}]{result.verdict}[/]"
        table.add_row(verdict, check, escape(visible(result.found)), escape(visible(result.advice)))
    console.print(table)


def _result(check: Callable[[], CheckResult]) -> CheckResult:
    """Run `check`; an error is a result as well."""
    try:
        return check()
    except Exception as error:  # a broken installation raises anything
        kind = "" if isinstance(error, ConfigError | DataError) else f"{type(error).__name__}: "
        return CheckResult("fail", kind + " ".join(str(error).split()))


def _meet(config: Config) -> tuple[Accelerator, Any]:
    """Join the other ranks as a run does; a precision that the GPUs do not have is a result, and no end."""
    timeout_seconds = config.train.collective_timeout_seconds
    try:
        accelerator = build.make_accelerator("auto", timeout_seconds, checks_gpus=False)
        return accelerator, control_group(accelerator.num_processes, timeout_seconds)
    except RuntimeError as error:
        raise DataError(f"the ranks cannot meet: {' '.join(str(error).split())}") from error
