"""`make setup` takes the lock file that fits the driver and the GPUs, or refuses in one line."""

import os
import re
import subprocess
import sys
import zipfile

import pytest
from helpers.runs import ROOT

V100, H100 = "7.0", "9.0"
OLD, NEW = "CUDA Version: {}", "CUDA UMD Version: {}"


def make_setup(tmp_path, banner, *capabilities, arguments=(), **variables):
    """Run `make setup` with an nvidia-smi that reports this; without a banner there is none."""
    if banner:
        smi = tmp_path / "nvidia-smi"
        listed = "\\n".join(capabilities)
        smi.write_text(
            f'#!/bin/sh\ncase "$*" in *compute_cap*) printf "{listed}\\n";; *) echo "| {banner}  |";; esac\n'
        )
        smi.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"} | variables
    command = ["make", "-C", str(ROOT), f"VENV={tmp_path}/venv", "PYTHON=python3", *arguments, "setup"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("banner", "capabilities", "lock"),
    [
        (OLD.format("13.0"), [V100], "requirements-cuda120.lock"),  # driver 580 still drives a V100
        (OLD.format("13.0"), [H100, V100], "requirements-cuda120.lock"),
        (OLD.format("13.0"), [H100], "requirements.lock"),
        (NEW.format("13.3"), [H100], "requirements.lock"),  # as driver 610 prints it
        (NEW.format("12.9"), [H100], "requirements-cuda120.lock"),
        (OLD.format("12.2"), [H100], "requirements-cuda120.lock"),
        (OLD.format("13.0"), ["[N/A]"], "requirements.lock"),
        (None, [], "requirements.lock"),
    ],
)
def test_the_lock_fits_driver_and_gpu(tmp_path, banner, capabilities, lock):
    run = make_setup(tmp_path, banner, *capabilities, arguments=("-n",))
    assert run.returncode == 0, run.stderr
    assert f"-r {lock}" in run.stdout


def test_a_driver_that_no_lock_fits_is_refused_and_leaves_nothing(tmp_path):
    run = make_setup(tmp_path, OLD.format("11.4"), V100)  # driver 470
    assert run.returncode == 2
    assert run.stderr.startswith("the NVIDIA driver is for CUDA 11: install driver 525 or newer")
    assert not (tmp_path / "venv").exists()
    asked = make_setup(tmp_path, OLD.format("11.4"), V100, arguments=("-n", "LOCK=requirements.lock"))
    assert "-r requirements.lock" in asked.stdout


def test_all_that_is_installed_has_a_hash(tmp_path):
    """What has none is built here, without the network and by what has one."""
    run = make_setup(tmp_path, None, arguments=("-n",))
    installs = [line for line in run.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 3
    hashed = [line for line in installs if "--require-hashes -r " in line]
    (built,) = set(installs) - set(hashed)
    assert built.endswith("--no-deps --no-build-isolation --offline -e .")
    assert installs[0].endswith("--require-hashes -r docker/build.lock")  # before anything is built or run
    names = re.findall(r"^([\w-]+)==", (ROOT / "docker" / "build.lock").read_text(), re.MULTILINE)
    assert {"uv", "hatchling", "editables"} <= set(names)


def test_a_tool_that_was_tampered_with_is_refused(tmp_path):
    """The right names and versions, other content. This Python's venv holds a pip, and nothing more."""
    pins = re.findall(r"^([\w-]+)==(\S+)", (ROOT / "docker" / "build.lock").read_text(), re.MULTILINE)
    for name, version in pins:
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(tmp_path / f"{stem}-py3-none-any.whl", "w") as wheel:
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
    python = tmp_path / "python"
    pip = f'#!/bin/sh\\nexec {sys.executable} -m pip "$@"\\n'
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
        f'mkdir -p "$3/bin"; printf \'{pip}\' > "$3/bin/pip"; chmod +x "$3/bin/pip"\n'
    )
    python.chmod(0o755)
    mirror = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    installed = tmp_path / "installed"
    run = make_setup(tmp_path, None, arguments=(f"PYTHON={python}",), PIP_TARGET=str(installed), **mirror)
    assert run.returncode == 2
    assert "DO NOT MATCH THE HASHES" in run.stderr
    assert not installed.exists()
    assert not (tmp_path / "venv" / ".installed").exists()


@pytest.mark.parametrize(
    ("version", "lock", "needed"),
    [
        ((3, 10, 14), "requirements.lock", "3.11 or newer"),
        ((3, 10, 14), "requirements-cuda110.lock", "3.11 or 3.12"),
        ((3, 13, 0), "requirements-cuda110.lock", "3.11 or 3.12"),  # DALI 1.34 has no wheels for it
        ((3, 11, 0), "requirements-cuda110.lock", None),
        ((3, 12, 9), "requirements-cuda110.lock", None),
        ((3, 13, 0), "requirements-cuda120.lock", None),
        ((3, 14, 1), "requirements.lock", None),
    ],
)
def test_a_python_without_wheels_is_refused_in_one_line(tmp_path, version, lock, needed):
    """A Python that reports this version, and can do no more than that: its venv fails."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = -c ] && exec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n'
        "echo no venv >&2; exit 9\n"
    )
    python.chmod(0o755)
    run = make_setup(tmp_path, None, arguments=(f"PYTHON={python}", f"LOCK={lock}"))
    assert run.returncode == 2
    first, *_ = run.stderr.splitlines()
    if needed:
        assert first == f"{python}: Python {needed} is needed; name one, as in: make setup PYTHON=python3.12"
    else:
        assert first == "no venv"
    assert ("installing" in run.stdout) == (needed is None)
    assert not (tmp_path / "venv").exists()
