"""Find what some tests use beside Python; skip those without it, or fail them: --tools-required."""

import importlib.util
import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

MAKE = "make setup"  # with the `dev` extra
# How to get each. A name with a dot, or in MODULES, is a Python package.
SOURCES = {
    "prometheus": "sudo apt install prometheus",
    "promtool": "sudo apt install prometheus",
    "amtool": "sudo apt install prometheus-alertmanager",
    "chromium": "sudo apt install chromium",
    "cc": "sudo apt install gcc libc6-dev",
    "podman": "sudo apt install podman",
    "runc": "sudo apt install runc",
    "debootstrap": "sudo apt install debootstrap",
    "ip": "sudo apt install iproute2",
    "uv": MAKE,
    "shellcheck": MAKE,
    "hadolint": MAKE,
    "check-jsonschema": MAKE,
    "nvidia.dali": MAKE,
    "onnx": MAKE,
    "onnxruntime": MAKE,
    "onnxscript": MAKE,
    "grafana_foundation_sdk": MAKE,
    "kubeflow_trainer_api": MAKE,
}
MODULES = ("onnx", "onnxruntime", "onnxscript", "grafana_foundation_sdk", "kubeflow_trainer_api")
OTHER_NAMES = {"chromium": ("chromium-browser", "google-chrome")}
WITHOUT = "without "

required = False  # --tools-required


def find(tool: str) -> str | None:
    """Return the path of a program, also of one that is installed beside this Python; None: not here."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return next(
        filter(None, (shutil.which(name, path=path) for name in (tool, *OTHER_NAMES.get(tool, ())))), None
    )


def _is_here(tool: str) -> bool:
    if "." not in tool and tool not in MODULES:
        return find(tool) is not None
    try:
        return importlib.util.find_spec(tool) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def need(*tools: str) -> None:
    """Skip the test, fixture or module that calls this on a machine without all `tools`."""
    for tool in tools:
        how = SOURCES[tool]
        if not _is_here(tool) and required:
            pytest.fail(f"{WITHOUT}{tool}: {how}", pytrace=False)
        if not _is_here(tool):
            pytest.skip(f"{WITHOUT}{tool}: {how}", allow_module_level=True)


def needs(*tools: str) -> pytest.MarkDecorator:
    """Mark a test that needs `tools`; they are looked for when it is its turn."""
    return pytest.mark.needs(*tools)


def need_root() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root")


def count_skips(reports: Iterable[Any]) -> list[str]:
    """Return a line for each reason to skip: those for want of a tool first, the most frequent first."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    ordered = sorted(reasons.items(), key=lambda item: (not item[0].startswith(WITHOUT), -item[1]))
    return [f"{n} skipped{' ' if text.startswith(WITHOUT) else ': '}{text}" for text, n in ordered]
