"""Shared fixtures: small trees of real JPEG files, and the program started as a user starts it."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser import CHROMIUM, Browser
from PIL import Image

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# One thread each: several ranks on few cores spin at each other's barriers otherwise. The proxy setting keeps
# requests to the metrics port on this machine.
os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
if not Path("/dev/nvidiactl").exists():  # before anything imports Triton, which without a GPU can only interpret
    os.environ["TRITON_INTERPRET"] = "1"

# nohup and a shell's `&` switch these off for all that is started, and here it is tested what they do.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Processes forked from one that has imported everything: each is a process of its own with its own signals and exit
# code, without the five seconds of imports. Tests that are about starting use a real command line instead.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cmtrain.train", "cmtrain.cli"])


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

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
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


def _become(command: list[str], folder: Path, environment: dict[str, str], outputs: tuple[Path, Path]) -> None:
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


def write_tree(root: Path, num_train: int, num_val: int, num_classes: int = 3, side: int = 48) -> Path:
    """<root>/{train,val}/<class>/*.jpg: classes differ in colour and direction, so that a tiny model can learn them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    for split, count in (("train", num_train), ("val", num_val)):
        for index in range(count):
            label = index % num_classes
            wave = np.sin(8 * np.pi * (x if label % 2 else y) + rng.uniform(0, 6))
            pixels = np.stack([wave * (1.0 if channel == label else 0.3) for channel in range(3)], -1)
            pixels = np.clip(128 + 80 * pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
            path = root / split / f"class{label}" / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=92)
    return root


@pytest.fixture
def figure(record_property):
    """figure(text): what a test has measured or counted. Listed after the tests, whichever process ran them."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    figures = [text for report in reports for name, text in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        for text in figures:
            terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """96 training and 31 validation JPEGs in 3 classes: 31 is no multiple of anything."""
    return write_tree(tmp_path_factory.mktemp("images"), 96, 31)


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
        self, *arguments: str, nproc: int = 1, module: str = "cmtrain", launcher: Sequence[str] = (), **environment: str
    ) -> "Forked | subprocess.Popen[str]":
        """Start the program: forked, or by a `launcher` such as ("-m", "torch.distributed.run", ...) of Python."""
        command = [module, "--config", str(self.config), *arguments]
        if not launcher:
            return Forked(command, self.folder, environment, nproc)
        return subprocess.Popen(
            [sys.executable, *launcher, *command],
            cwd=self.folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *arguments: str, code: int = 0, **how: Any) -> dict:
        """Run to the end, check the exit code, return the JSON line of stdout (or {})."""
        process = self.start(*arguments, **how)
        out, err = process.communicate(timeout=240)
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


@pytest.fixture
def make_job(tmp_path, images):
    """make_job("name", section={...}) -> Job: cmt_micro on `images`, 32 px, 6 steps an epoch, 3 epochs."""

    def make(name: str = "a", **sections: dict) -> Job:
        cache = {"cache_dir": str(tmp_path / "cache")}
        config = {
            "run": {"seed": 1},
            "model": {"name": "cmt_micro", "drop_path_rate": 0.1, "drop_rate": 0.1},
            "data": {"root": str(images), "image_px": 32, "eval_resize_px": 36, "threads": 1} | cache,
            "augment": {"color_jitter": 0.2},
            "mixing": {"mixup": 0.2, "cutmix": 0.5, "mixup_prob": 0.5, "smoothing": 0.1, "reprob": 0.1},
            "optim": {"lr": 2e-3, "weight_decay": 0.05, "clip_grad": 5.0},
            "schedule": {"epochs": 3, "warmup_epochs": 1},
            "train": {"global_batch_size": 16, "max_batch_per_gpu": 8, "log_every_steps": 2, "precision": "fp32"},
            "ema": {"decay": 0.9},
            "metrics": {"enabled": False},
        }  # fmt: skip
        for section, values in sections.items():
            config[section] = config.get(section, {}) | values
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "job.yaml").write_text(yaml.safe_dump(config))
        return Job(folder)

    return make


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
