"""Shared fixtures: small trees of real JPEG files, and the program started as a user starts it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# One thread each: several ranks on few cores spin at each other's barriers otherwise. The proxy setting keeps
# requests to the metrics port on this machine.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


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

    def command(self, *arguments: str, nproc: int = 1, module: str = "cmtrain") -> list[str]:
        python = [sys.executable]
        if nproc > 1:
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        target = [module] if module.endswith(".py") else ["-m", module]
        return [*python, *target, "--config", str(self.config), *arguments]

    def start(self, *arguments: str, nproc: int = 1, module: str = "cmtrain") -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*arguments, nproc=nproc, module=module),
            cwd=self.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *arguments: str, nproc: int = 1, module: str = "cmtrain", code: int = 0) -> dict:
        """Run to the end, check the exit code, return the JSON line of stdout (or {})."""
        process = self.start(*arguments, nproc=nproc, module=module)
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
