"""A release is complete, and works in an empty environment and from any folder."""

import json
import os
import subprocess
import sysconfig
import tarfile
import venv
import zipfile

import pytest
from helpers.runs import ROOT
from helpers.tools import find, needs

from cmtrain import __version__

UV = find("uv")
pytestmark = [pytest.mark.slow, needs("uv")]


def call(folder, *command):
    """Return stdout of a command that has to succeed; nothing of this checkout is on its path."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=clean, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build as `make dist` does: the wheel from the unpacked source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [
        UV,
        "build",
        "--build-constraints",
        "docker/build.lock",
        "--require-hashes",
        "--out-dir",
        folder,
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if "Failed to fetch" in built.stderr:
        pytest.skip("the build backend comes from the package index, which cannot be reached")
    assert built.returncode == 0, built.stderr
    return folder


def sources(*folders):
    """Return the files in these folders of the checkout, without those that Python leaves."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_holds_both_packages_and_the_configurations(dist):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configurations = {name.replace("configs/", "cmtrain/_configs/", 1) for name in sources("configs")}
    information = {name for name in names if name.startswith(f"cmtrain-{__version__}.dist-info/")}
    assert names - information == sources("cmtrain", "pipelines") | configurations


def test_the_source_archive_can_be_built_tested_and_made_an_image_of(dist):
    with tarfile.open(dist / f"cmtrain-{__version__}.tar.gz") as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert names >= sources("cmtrain", "pipelines", "configs", "docker", "docs", "tests")
    files = {
        "Makefile",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "benchmarks/gpu.sh",
        ".dockerignore",
    }
    assert names >= files | {path.name for path in ROOT.glob("requirements*.lock")}


def test_the_wheel_trains_from_an_empty_folder(dist, tmp_path):
    """Uses the dependencies of this environment below an empty one."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    call(tmp_path, UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "layer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    here, cmtrain = tmp_path / "empty", python.with_name("cmtrain")
    here.mkdir()
    for module in ("cmtrain", "pipelines"):
        found = call(here, python, "-c", f"import {module}; print({module}.__file__)")
        assert found.startswith(str(site))
    assert call(here, cmtrain, "--version") == f"cmtrain {__version__}\n"
    out = call(
        here, cmtrain, "--config", "configs/demo.yaml", "--max-steps", "2", "--metrics.enabled", "false"
    )
    assert json.loads(out)["step"] == 2
    assert (here / "runs" / "demo" / "checkpoints" / "step-000000002").is_dir()
