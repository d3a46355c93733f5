"""Shared fixtures: small trees of real JPEG files, and the program started as a user starts it."""

from pathlib import Path

import pytest
import yaml
from helpers import tools
from helpers.browser import Browser
from helpers.images import write_tree
from helpers.runs import FORKS, Job

FORKS.set_forkserver_preload(["helpers.warm", "helpers.runs"])


def pytest_addoption(parser):
    parser.addoption(
        "--tools-required", action="store_true", help="fail what would be skipped for want of a tool"
    )


def pytest_configure(config):
    tools.required = config.getoption("--tools-required")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        tools.need(*mark.args)


@pytest.fixture
def figure(record_property):
    """figure(text): what a test has measured or counted. Listed after the tests, whichever process ran
    them.
    """
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    figures = [text for report in reports for name, text in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        for text in figures:
            terminalreporter.write_line(text)
    if skips := tools.count_skips(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section("skipped")
        for line in skips:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """96 training and 31 validation JPEGs in 3 classes: 31 is no multiple of anything."""
    return write_tree(tmp_path_factory.mktemp("images"), 96, 31)


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
            "train": {"global_batch_size": 16, "max_batch_per_gpu": 8, "log_every_steps": 2}
            | {"precision": "fp32"},
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
    tools.need("chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
