"""The image builds with `make image` and runs as in docs/clusters.md, by podman without a registry.

The image stays in podman's storage, so that another run of these tests builds only what has changed since.
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers.runs import HANG_SECONDS, ROOT, after_start
from helpers.tools import need_root, needs

from cmtrain import __version__
from cmtrain.storage.checkpoint import load_newest

IMAGE, BASE = "localhost/cmtrain-test", "localhost/cmtrain-test-base"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP = [Path(name).expanduser() for name in ("/etc/pip.conf", "~/.config/pip/pip.conf", "~/.pip/pip.conf")]
USER = 10001

# Inside a container or without systemd, podman has no limits above its own, no cgroups by systemd and no
# timer for health checks; it would warn of these with every command.
PODMAN = ["podman", "--cgroup-manager=cgroupfs", "--runtime=runc", "--log-level=fatal"]
NESTED = ["--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]
HARDENED = ["--read-only", "--tmpfs=/tmp:exec", "--cap-drop=ALL", "--security-opt=no-new-privileges"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200), needs("podman", "runc", "debootstrap")]


def make_base(folder):
    """Build Debian with Python, from its packages, with the certificates that this machine trusts."""
    packages = "--include=python3,python3-venv,ca-certificates"
    subprocess.run(
        ["debootstrap", "--variant=minbase", packages, "bookworm", folder], check=True, capture_output=True
    )
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, folder / CERTIFICATES.relative_to("/"))
    with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as archive:
        command = ["podman", "import", "-q", "-", BASE]
        subprocess.run(command, check=True, capture_output=True, stdin=archive.stdout)
    assert archive.returncode == 0
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    need_root()
    if subprocess.run(["podman", "image", "exists", BASE]).returncode:
        make_base(tmp_path_factory.mktemp("base"))
    began = time.monotonic()
    build = ["--isolation=chroot", "--layers", f"--build-arg=BASE_IMAGE={BASE}"]
    build += [f"--secret=id=pip,src={path}" for path in PIP if path.exists()][:1]
    options = {
        "DOCKER": "podman",
        "IMAGE": IMAGE,
        "TARGET": "cpu",
        "LOCK": "requirements.lock",
        "BUILD": " ".join(build),
    }
    command = ["make", "-C", ROOT, "image", *(f"{name}={value}" for name, value in options.items())]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    size = inspect(IMAGE)["Size"]
    print(f"\nbuilt in {time.monotonic() - began:.0f} s: {size / 1e9:.2f} GB")
    return IMAGE


def inspect(name):
    (found,) = json.loads(
        subprocess.run(["podman", "inspect", name], check=True, capture_output=True).stdout
    )
    return found


def run(image, *arguments, options=(), code=0):
    """Run to the end in the foreground, and return stdout and stderr."""
    done = subprocess.run(
        [*PODMAN, "run", "--rm", *NESTED, *HARDENED, *options, image, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


@contextlib.contextmanager
def container(image, runs, *arguments):
    """Start a container in the background that writes to the folder `runs`; yields its name."""
    command = [*PODMAN, "run", "--detach", *NESTED, *HARDENED, f"--volume={runs}:/runs", image, *arguments]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield name
    finally:
        subprocess.run([*PODMAN, "rm", "--force", "--time=0", name], check=False, capture_output=True)


def wait_for_step(run_path, step, name, seconds=HANG_SECONDS):
    deadline = time.monotonic() + seconds
    while (
        not (run_path / "log.jsonl").exists()
        or f'"step": {step},' not in (run_path / "log.jsonl").read_text()
    ):
        assert inspect(name)["State"]["Running"], subprocess.run(
            ["podman", "logs", name], capture_output=True
        ).stderr
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def runs(tmp_path):
    """Return a folder that the image's user, who does not exist here, may write to."""
    for folder in tmp_path.parents:
        if folder.owner() == "root" and folder.is_relative_to("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o011)
    folder = tmp_path / "runs"
    folder.mkdir()
    os.chown(folder, USER, USER)
    return folder


def test_training_is_stopped_and_goes_on(image, runs):
    job, run_path = ("--config", "configs/demo.yaml"), runs / "demo"
    with container(image, runs, *job) as name:
        wait_for_step(run_path, 66, name)
        assert subprocess.run([*PODMAN, "healthcheck", "run", name]).returncode == 0
        began = time.monotonic()
        subprocess.run([*PODMAN, "stop", "--time=120", name], check=True, capture_output=True)
        print(f"\nended {time.monotonic() - began:.1f} s after podman stop")
        assert inspect(name)["State"]["ExitCode"] == 143
    status = json.loads((run_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 143)
    assert load_newest(run_path / "checkpoints").state["progress"]["step"] == status["step"]
    assert {path.stat().st_uid for path in runs.rglob("*")} == {USER}

    out, _ = run(image, *job, options=[f"--volume={runs}:/runs"])
    result = json.loads(out.splitlines()[-1])
    print(f"trained to top-1 {result['top1']:.4f} in {result['train_seconds']:.0f} s")
    assert (result["state"], result["step"]) == ("finished", 550)
    assert result["top1"] > 0.97
    events = [json.loads(line) for line in (run_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [status["step"]]


def test_a_mistake_is_a_line_and_an_exit_code(image):
    _, err = run(image, "--config", "configs/full_in1k.yaml", "--optim.lr", "-1", code=2)
    assert len(after_start(err)) == 1
    _, err = run(image, "--config", "configs/full_in1k.yaml", "--train.precision", "auto", code=3)
    assert "/data" in err
    assert len(after_start(err)) == 1


def test_any_user_may_run_it(image):
    out, _ = run(image, "doctor", "--config", "configs/demo.yaml", "--json", options=["--user=4321:4321"])
    verdicts = {finding["check"]: finding["verdict"] for finding in json.loads(out)["checks"]}
    assert (
        verdicts["packages"]
        == verdicts["decode on the CPU"]
        == verdicts["data"]
        == verdicts["run folder"]
        == "ok"
    )


def test_the_labels_of_the_image(image):
    config = inspect(image)["Config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["tini", "--", "cmtrain"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Volumes"] == {"/runs": {}}
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert run(image, "--version") == (f"cmtrain {__version__}\n", "")
    assert run(image)[0].startswith("usage: cmtrain")
    left_out = (
        "import importlib.util as u\n"
        "print([n for n in ('pytest', 'mypy', 'ruff', 'requests') if u.find_spec(n)])"
    )
    assert run(image, "-c", left_out, options=["--entrypoint=python"])[0] == "[]\n"
