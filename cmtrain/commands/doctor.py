"""`cmtrain doctor`: what would stop or slow a run on this machine, found in seconds and told with what to do.

Nothing is simulated: images go through the loaders of training, data is opened and the run folder locked by the code
that a run uses, and ranks meet as they do in a run. Under a launcher every rank looks, and of each check the worst
finding is shown.
"""

import json
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
from cmtrain.commands.doctor_checks import Finding, Verdict
from cmtrain.config.schema import Config
from cmtrain.errors import EXIT_DATA, EXIT_DONE, ConfigError
from cmtrain.processes.collectives import control_group, gather, leave_together
from cmtrain.training import build
from pipelines.spec import DataError

VERDICTS: tuple[Verdict, ...] = ("ok", "warn", "fail")
SHOWN_IN = {"ok": "green", "warn": "yellow", "fail": "red"}

PLAIN_WIDTH = 160  # of the table where there is no terminal


def doctor(config: Config, *, as_json: bool) -> int:
    """Check this machine for a run of `config`, and print a table or a JSON object.

    Returns:
        The exit code: 0, or 3 when a check fails. No GPU is a warning.

    Raises:
        DataError: the ranks that a launcher started cannot meet.
    """
    accelerator, control = _meet(config)
    mine = examine(config, accelerator, control)
    findings = [worst(same) for same in zip(*gather(mine, control), strict=True)]
    if accelerator.is_main_process:
        if as_json:
            sys.stdout.write(as_text(findings))
        else:
            _show(findings)
    leave_together()
    return EXIT_DATA if any(finding.verdict == "fail" for finding in findings) else EXIT_DONE


def examine(config: Config, accelerator: Accelerator, control: Any) -> list[Finding]:
    """All checks, as this rank sees them; the same ones in the same order on every rank."""
    run_path = Path(config.run.dir) / str(config.run.name)
    num_classes = config.model.num_classes or 1000

    def data() -> Finding:
        nonlocal num_classes
        opened = build.open_data(config, accelerator)
        num_classes = build.num_classes_of(config, opened.train)
        return checks.data(opened)

    looks: dict[str, Callable[[], Finding]] = {
        "packages": checks.packages,
        "driver": lambda: checks.pairing(
            checks.cuda_of_driver(), torch.version.cuda, checks.dali_flavours()
        ),
        "GPUs": lambda: checks.gpus(config.train.precision),
        "decode on the CPU": lambda: checks.decode("decode on the CPU", torch.device("cpu"), "cpu"),
        "decode on the GPU": lambda: checks.decode_on_gpu(accelerator.device),
        "ranks": lambda: checks.ranks(control, config, run_path),
        "all-reduce": lambda: checks.all_reduce(accelerator),
        "shared memory": lambda: checks.shared_memory(Path("/dev/shm")),  # noqa: S108 - it is looked at, not written to
        "open files": checks.open_files,
        "data": data,
        "run folder": lambda: checks.run_folder(run_path, is_main=accelerator.is_main_process),
        "disk": lambda: checks.disk(config, run_path, num_classes),
        "metrics port": lambda: checks.metrics_port(config, accelerator.local_process_index),
    }
    return [_look(check, look) for check, look in looks.items()]


def worst(same: Sequence[Finding]) -> Finding:
    """The gravest of one check's findings, by rank; where they are equally grave, the first rank's."""
    rank = max(range(len(same)), key=lambda rank: (VERDICTS.index(same[rank].verdict), -rank))
    return replace(same[rank], found=f"rank {rank}: {same[rank].found}") if rank else same[0]


def as_text(findings: Sequence[Finding]) -> str:
    """One JSON object: `ok`, and a list of `checks`."""
    ok = all(finding.verdict != "fail" for finding in findings)
    return json.dumps({"ok": ok, "checks": [asdict(finding) for finding in findings]}, indent=1) + "\n"


def _show(findings: Sequence[Finding]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "check", "found", "what to do"):
        table.add_column(column, no_wrap=column == "check", overflow="fold")
    for finding in findings:
        verdict = f"[{SHOWN_IN[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(verdict, finding.check, escape(finding.found), escape(finding.advice))
    console.print(table)


def _look(check: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds; an error is a finding, too."""
    try:
        return look()
    except (ConfigError, DataError) as error:
        return Finding(check, "fail", " ".join(str(error).split()))
    except Exception as error:  # whatever a broken installation raises
        return Finding(check, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _meet(config: Config) -> tuple[Accelerator, Any]:
    """Join the other ranks as a run does; fp16 without a GPU is a finding, not a reason to stop here."""
    timeout_seconds = config.train.collective_timeout_seconds
    precision = config.train.precision if torch.cuda.is_available() else "auto"
    try:
        accelerator = build.make_accelerator(precision, timeout_seconds)
        return accelerator, control_group(accelerator.num_processes, timeout_seconds)
    except RuntimeError as error:
        raise DataError(f"the ranks cannot meet: {' '.join(str(error).split())}") from error
