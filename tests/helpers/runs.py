"""Start the program as a user does, and read what a run left behind."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmtrain import __version__
from cmtrain.storage.checkpoint import load_newest

ROOT = Path(__file__).parents[2]


SHARED = ROOT.parent / "shared"


def after_start(err: str) -> list[str]:
    """Lines of stderr after those with which every verb starts (tests/cli/test_start.py is about those)."""
    lines = err.splitlines()
    started = bool(lines) and lines[0].startswith(f"cmtrain {__version__}: ")
    lines = lines[started:]
    return lines[bool(lines) and lines[0] == "loading torch and DALI ..." :]


# Bounds only what would never end. It judges nothing: on a busy machine the imports alone take minutes.
HANG_SECONDS = 600


# Processes forked from one that has imported everything: each is a process of its own with its own signals
# and exit code, without the five seconds of imports. Tests that are about starting use a real command line
# instead.
FORKS = multiprocessing.get_context("forkserver")


class Forked:
    """The program in one or more forked processes; what subprocess.Popen offers, as far as tests need it."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], nproc: int) -> None:
        self.outputs = folder / "stdout.txt", folder / "stderr.txt"
        for path in self.outputs:
            path.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(nproc):
            ranks = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
            }
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (command, folder, environment | (ranks if nproc > 1 else {}), self.outputs)
            self.processes.append(FORKS.Process(target=_become, args=arguments))
            self.processes[-1].start()

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else max(codes, key=abs)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def communicate(self, timeout: float = HANG_SECONDS) -> tuple[str, str]:
        for process in self.processes:
            process.join(timeout)
            assert process.exitcode is not None, f"still running; {self.outputs[1].read_text()}"
        return self.outputs[0].read_text(), self.outputs[1].read_text()

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _become(
    command: list[str], folder: Path, environment: dict[str, str], outputs: tuple[Path, Path]
) -> None:
    """Turn this process into the program `command`, which begins with a module or a script."""
    os.chdir(folder)
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__")


@dataclass(frozen=True)
class Job:
    """A configuration file in a folder of its own, and what a run of it left behind."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "job"

    def start(
        self,
        *arguments: str,
        nproc: int = 1,
        module: str = "cmtrain",
        launcher: Sequence[str] = (),
        **environment: str,
    ) -> "Forked | subprocess.Popen[str]":
        """Start the program: forked, or by a `launcher` such as ("-m", "torch.distributed.run", ...) of
        Python.
        """
        command = [module, "--config", str(self.config), *arguments]
        if not launcher:
            return Forked(command, self.folder, environment, nproc)
        return subprocess.Popen(
            [sys.executable, *launcher, *command],
            cwd=self.folder, env=os.environ | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str, code: int = 0, **how: Any) -> dict:
        """Run to the end, check the exit code, return the JSON line of stdout (or {})."""
        process = self.start(*arguments, **how)
        out, err = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{out}\n{err}"
        self.stderr.write_text(err)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {}

    @property
    def stderr(self) -> Path:
        return self.folder / "stderr.txt"

    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "log.jsonl").read_text().splitlines()]

    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]


POISONED = str(ROOT / "tests" / "helpers" / "poisoned_train.py")


LOSSES = ("step", "epoch", "loss", "lr", "grad_norm", "bad_steps")


def losses(job):
    return [tuple(record[key] for key in LOSSES) for record in job.log()]


def tensors(tree, prefix=""):
    """Flatten nested dicts and lists to {dotted name: leaf}."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list | tuple)
        else None
    )
    if items is None:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in tensors(value, f"{prefix}.{key}").items()}


def final_state(job):
    return tensors(load_newest(job.run / "checkpoints").state)


def assert_same_state(a, b):
    a, b = final_state(a), final_state(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, f"{key}: {value} != {b[key]}"


def wait_for(condition, process, seconds=HANG_SECONDS):
    """Wait by progress, never by time: on a busy machine the imports alone take many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)


def logged(job, step):
    return (job.run / "log.jsonl").exists() and any(
        f'"step": {s},' in (job.run / "log.jsonl").read_text() for s in range(step, 99)
    )


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


FAULTY = str(ROOT / "tests" / "helpers" / "faulty_train.py")


TWO = ("--nproc", "2")


def faults(fault, *, rank=1, step=9, times=1):
    return {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEP": str(step), "FAULT_TIMES": str(times)}


def alive_in(folder):
    """Processes whose working directory is `folder`, zombies excepted."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append(f"{process.name}: {(process / 'cmdline').read_text()}")
        except OSError:
            continue
    return found


def assert_nobody_is_left(job, seconds=HANG_SECONDS):
    deadline = time.monotonic() + seconds
    while left := alive_in(job.folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def failures(job):
    return [(event["step"], event["reason"]) for event in job.events() if event["event"] == "failed"]


HURT = str(ROOT / "tests" / "helpers" / "hurt_train.py")


def flip(path):
    """One bit, in the middle of the tensors or of the manifest's checksum."""
    data = bytearray(path.read_bytes())
    place = data.index(b'"sha256"') + 20 if path.suffix == ".json" else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)
