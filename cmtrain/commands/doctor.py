"""Find in seconds what would stop or slow a run on this machine, with advice (`cmtrain doctor`).

Nothing is simulated: data is opened and the run folder locked by the code of a run, and ranks meet as in a
run. Under a launcher every rank runs all checks, and the worst result of each check is shown. A check
returns a CheckResult, or raises the error that a run would end with.
"""

import json
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmtrain.config.schema import Config
from cmtrain.errors import EXIT_DATA, EXIT_DONE, ConfigError
from cmtrain.monitoring.machine import dali_packages, version_of
from cmtrain.processes.collectives import control_group, gather, leave_together
from cmtrain.processes.gpus import cuda_of_driver, newer_driver, packages_for, why_unusable
from cmtrain.processes.preflight import check_ranks
from cmtrain.storage.run_folder import RunLock
from cmtrain.training import build, loaders
from pipelines.decoder_probe import choose_decode
from pipelines.spec import DataError, Decode, Placement, visible

Severity = Literal["ok", "warn", "fail"]
COLOURS: dict[Severity, str] = {"ok": "green", "warn": "yellow", "fail": "red"}  # the gravest last

GIB = 2**30
MIN_SHARED_MEMORY_BYTES = GIB  # NCCL joins the GPUs of a host through it; Docker's default is 64 MiB
DALI_ADVICE = "install DALI from the requirements*.lock that fits the driver"


class CheckResult(NamedTuple):
    """Result of one check. `advice`: what to do about it, unless `found` already contains it."""

    verdict: Severity
    found: str
    advice: str = ""


def doctor(config: Config, *, as_json: bool) -> int:
    """Check this machine for a run of `config`, and print a table or a JSON object. Returns the exit code:
    0, or 3 when a check fails; no GPU is a warning. Raises DataError: ranks cannot meet.
    """
    timeout_seconds = config.train.collective_timeout_seconds
    try:  # as a run does, but a precision that the GPUs do not have is a result, and no end
        accelerator = build.make_accelerator("auto", timeout_seconds, checks_gpus=False)
        control = control_group(accelerator.num_processes, timeout_seconds)
    except RuntimeError as error:
        raise DataError(f"the ranks cannot meet: {' '.join(str(error).split())}") from error
    by_rank = gather(run_checks(config, accelerator, control), control)
    results = {check: worst([results[check] for results in by_rank]) for check in by_rank[0]}
    failed = any(result.verdict == "fail" for result in results.values())
    if accelerator.is_main_process:
        if as_json:
            rows = [{"check": check} | result._asdict() for check, result in results.items()]
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
        train, val = opened.train, opened.val
        found = f"{keys.root}: {len(train):,} training, {len(val):,} validation images"
        found += f", {len(train.class_names):,} classes"
        if bad := len(train.bad) + len(val.bad):
            found += f"; {bad:,} more cannot be read"
        return CheckResult("warn" if bad else "ok", found, "cmtrain data check lists them" if bad else "")

    run: dict[str, Callable[[], CheckResult]] = {
        "packages": packages,
        "driver": lambda: pairing(cuda_of_driver(), torch.version.cuda, dali_packages()),
        "GPUs": lambda: gpus(config.train.precision),
        "decode on the CPU": decode_on_cpu,
        "decode on the GPU": lambda: decode_on_gpu(device, keys.decode, keys.hw_decoder_load),
        "ranks": lambda: ranks(control, config, run_path, device),
        "shared memory": lambda: shared_memory(Path("/dev/shm")),  # noqa: S108 - only read
        "open files": open_files,
        "data": data,
        "run folder": lambda: run_folder(run_path, is_main=accelerator.is_main_process),
        "disk": lambda: disk(config, run_path, num_classes),
    }
    return {check: _result(function) for check, function in run.items()}


def worst(results: Sequence[CheckResult]) -> CheckResult:
    """Return the gravest of one check's results, by rank; of equally grave ones, the first rank's."""
    rank = max(range(len(results)), key=lambda rank: [*COLOURS].index(results[rank].verdict))
    return results[rank]._replace(found=f"rank {rank}: {results[rank].found}") if rank else results[0]


def _show(results: dict[str, CheckResult]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
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


def packages() -> CheckResult:
    """List the versions of the main packages; whether versions fit each other, `pip check` finds."""
    names = ["torch", "torchvision", "timm", "accelerate", *dali_packages()]
    found = ", ".join([f"Python {platform.python_version()}", *(f"{n} {version_of(n)}" for n in names)])
    found += "" if dali_packages() else ", no DALI installed"
    return CheckResult("ok", found)


def pairing(driver: int | None, torch_cuda: str | None, flavours: Sequence[str]) -> CheckResult:
    """Check that driver, torch and DALI fit. A driver runs every CUDA of its major version and older ones.
    `torch_cuda`: CUDA that torch was built with, such as 13.2; None for a build without.
    """
    if len(flavours) != 1:
        found = f"{' and '.join(flavours) or 'no DALI'} installed"
        return CheckResult("fail", found, "install exactly one of nvidia-dali-cuda130, -cuda120")
    flavour = flavours[0].removeprefix("nvidia-dali-cuda")
    built = f"torch for CUDA {torch_cuda or '(none)'}, DALI for CUDA {flavour[:-1]}"
    if driver is None:
        return CheckResult("warn", f"no NVIDIA driver; {built}", "training will run on the CPU")
    found = f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}, {built}"
    if torch_cuda is None:
        return CheckResult("fail", found, f"install {packages_for(driver)}")
    wanted = max(int(torch_cuda.split(".")[0]), int(flavour[:2]))
    if driver // 1000 < wanted:
        return CheckResult("fail", found, f"install {newer_driver(driver, wanted)}")
    return CheckResult("ok", found)


def gpus(precision: str) -> CheckResult:
    """List the GPUs. Raises ConfigError for a precision that they do not have."""
    if why := why_unusable():
        return CheckResult("fail", why)
    build.check_precision(precision)
    if not torch.cuda.is_available():
        return CheckResult("warn", "none", "training will run on the CPU")
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = {f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in properties}
    return CheckResult("ok", f"{len(properties)} x {', '.join(sorted(names))}")


def decode_on_gpu(device: torch.device, decode: Decode = "auto", load: float | None = None) -> CheckResult:
    """Decode a batch of JPEGs of all kinds in a process of its own, and compare it with the CPU's."""
    if device.type != "cuda":
        return CheckResult("warn", "no GPU", "images will be decoded on the CPU")
    chosen, lines = choose_decode(Placement(device=device, decode=decode, threads=4, hw_decoder_load=load))
    right = [f"data.decode: {chosen} gives the CPU's pixels"] if chosen != "cpu" else []
    if lines:
        return CheckResult("warn", "; ".join([*lines, *right]), DALI_ADVICE)
    return CheckResult("ok", "".join(right) or "data.decode: cpu")


def decode_on_cpu() -> CheckResult:
    """Load DALI, which decodes."""
    import pipelines.loader  # noqa: F401

    return CheckResult("ok", "DALI loads")


def ranks(control: Any, config: Config, run_path: Path, device: torch.device) -> CheckResult:
    """Check that all ranks have the same code, configuration and run folder, and can add up."""
    if control is None:
        return CheckResult("ok", "one process; under the launcher of a run, all of its ranks are checked")
    check_ranks(control, config, run_path)
    dist.all_reduce(ones := torch.ones(1000, device=device))
    found = f"{dist.get_world_size()} on {len(set(gather(socket.gethostname(), control)))} host(s)"
    found += f": same code and configuration; {dist.get_backend()}'s sum of ones is {ones.max():g}"
    return CheckResult("fail" if (ones != dist.get_world_size()).any() else "ok", found)


def shared_memory(path: Path) -> CheckResult:
    size = shutil.disk_usage(path).total if path.is_dir() else 0
    if size < MIN_SHARED_MEMORY_BYTES:
        advice = "with several GPUs: docker run --shm-size 1g, or an emptyDir of medium Memory at /dev/shm"
        return CheckResult("warn", f"{size / GIB:.2g} GiB", advice)
    return CheckResult("ok", f"{size / GIB:.3g} GiB")


def open_files() -> CheckResult:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 1024:
        return CheckResult("warn", f"at most {soft:,}", f"ulimit -n {4096 if hard < 0 else min(hard, 4096)}")
    return CheckResult("ok", f"at most {soft:,}" if soft >= 0 else "no limit")


def run_folder(run_path: Path, *, is_main: bool) -> CheckResult:
    """Take the lock of the run folder, as a run does, and release it."""
    if is_main:
        with closing(RunLock(run_path)) as lock:
            lock.acquire()
    return CheckResult("ok", f"{run_path.absolute()} can be written, and is in use by nobody")


def checkpoint_bytes(config: Config, num_classes: int) -> int:
    """Return the size of a checkpoint: weights, their EMA, and the optimizer's moments of each parameter."""
    with torch.device("meta"):  # shapes without memory
        model = build.make_model(config, num_classes, "meta")
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = {"sgd": 1 if config.optim.momentum else 0, "lion": 1, "adan": 3}.get(config.optim.opt, 2)
    return weights * (2 if config.ema.decay else 1) + moments * parameters


def disk(config: Config, run_path: Path, num_classes: int) -> CheckResult:
    size = checkpoint_bytes(config, num_classes)
    checkpoint, total_epochs = config.checkpoint, config.schedule.epochs + config.schedule.cooldown_epochs
    count = checkpoint.keep + 2  # the best one, and the one that is being written
    if checkpoint.milestone_every_epochs:
        count += total_epochs // checkpoint.milestone_every_epochs
    place = run_path.absolute()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    found = f"{free / GIB:,.1f} GiB free, {count} checkpoints of {size / GIB:.2g} GiB"
    if free < count * size:
        return CheckResult("fail", found, "make room, set run.dir, or lower checkpoint.keep")
    return CheckResult("ok", found)
