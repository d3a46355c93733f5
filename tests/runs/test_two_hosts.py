"""Two hosts: network namespaces joined by a cable, each with a name of its own, a launcher and two ranks."""

import os
import subprocess
import sys
import time

import pytest
from helpers.runs import (
    HANG_SECONDS,
    ROOT,
    assert_nobody_is_left,
    assert_same_state,
    failures,
    logged,
    losses,
    wait_for,
)
from helpers.tools import need_root, needs

from cmtrain.storage.checkpoint import checkpoint_steps

HOSTS = ("cmtrain-a", "cmtrain-b")
CABLE = ("cmtrain-eth-a", "cmtrain-eth-b")
HEAD = "10.77.0.1"
FAULTY = str(ROOT / "tests" / "helpers" / "faulty_train.py")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def need_hosts():
    need_root()
    probe = "ip link add cmtrain-probe type veth && ip link del cmtrain-probe"
    if subprocess.run(["unshare", "--net", "--uts", "sh", "-c", probe], capture_output=True).returncode:
        pytest.skip("needs a kernel that makes veth pairs")


STARTED: list[subprocess.Popen] = []
pytestmark = [pytest.mark.slow, needs("ip")]


@pytest.fixture
def cable():
    """The two hosts, connected: cable("down") cuts them off, cable("up") connects them again."""
    need_hosts()
    for host in HOSTS:
        ip("netns", "add", host)
    try:
        ip(
            "link",
            "add",
            CABLE[0],
            "netns",
            HOSTS[0],
            "type",
            "veth",
            "peer",
            "name",
            CABLE[1],
            "netns",
            HOSTS[1],
        )
        for host, end, address in zip(HOSTS, CABLE, ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            ip("-n", host, "address", "add", address, "dev", end)
            ip("-n", host, "link", "set", end, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield lambda state: ip("-n", HOSTS[0], "link", "set", CABLE[0], state)
    finally:
        while STARTED:  # nothing, unless the test has failed
            with STARTED.pop() as process:
                process.kill()
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False)


def start(job, module="cmtrain", at_the_second=None, **environment):
    """One launcher a host, with two ranks each, as on a cluster."""
    processes = []
    for number, (host, end) in enumerate(zip(HOSTS, CABLE, strict=True)):
        # gloo takes the address of the host's name, unless an interface is set.
        variables = (
            os.environ
            | {"GLOO_SOCKET_IFNAME": end}
            | environment
            | ((at_the_second or {}) if number else {})
        )
        command = [
            "ip",
            "netns",
            "exec",
            host,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {host}; exec "$@"',
            "sh",
        ]
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
        command += ["--node_rank", str(number), "--master_addr", HEAD, "--master_port", "29500"]
        command += ["-m"] * (module == "cmtrain") + [module, "--config", str(job.config)]
        with (job.folder / f"{host}.txt").open("w") as log:
            processes.append(
                subprocess.Popen(command, cwd=job.folder, env=variables, stdout=log, stderr=log)
            )
        STARTED.append(processes[-1])
    return processes


def exit_codes(processes, seconds=HANG_SECONDS):
    for process in processes:
        process.wait(seconds)
    return [process.returncode for process in processes]


def errors_of(job):
    return [(job.folder / f"{host}.txt").read_text() for host in HOSTS]


def test_two_hosts_train_what_one_does(make_job, cable):
    one, two = make_job("one"), make_job("two")
    one(nproc=4)
    assert exit_codes(start(two, module=FAULTY, WEIGHTS="yes")) == [0, 0], errors_of(two)
    assert losses(two) == losses(one)
    assert_same_state(two, one)
    assert len({(two.folder / f"weights-rank{rank}").read_text() for rank in range(4)}) == 1


def test_a_cable_that_is_pulled_costs_time_and_nothing_else(make_job, cable):
    """Two seconds without it nobody notices; more than collective_timeout_seconds end the run, which then
    resumes.
    """
    sections = {
        "schedule": {"epochs": 12},
        "checkpoint": {"every_steps": 4},
        "evaluate": {"every_epochs": 12},
    }
    sections |= {"train": {"collective_timeout_seconds": 20.0}}
    one, two = make_job("one", **sections), make_job("two", **sections)
    hosts = start(two)
    wait_for(lambda: logged(two, 8), hosts[0])
    cable("down")
    time.sleep(2)
    cable("up")
    step = two.log()[-1]["step"]
    wait_for(lambda: logged(two, step + 4), hosts[0])
    cable("down")
    began = time.monotonic()
    assert exit_codes(hosts) == [1, 1]
    print(f"cut off: ended after {time.monotonic() - began:.1f} s")
    assert_nobody_is_left(two)
    status = two.status()
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "lost contact with another rank" in status["reason"]
    kept = checkpoint_steps(two.run / "checkpoints")[-1]
    assert kept >= status["step"] - 4 >= step - 4
    cable("up")
    assert exit_codes(start(two)) == [0, 0], errors_of(two)
    assert [failed_after for failed_after, _ in failures(two)] == [status["step"]]
    # DDP orders its buckets again after the first step of a process, and with more than two ranks sums in
    # that order: only what began in the same step is equal to the bit.
    one("--max-steps", str(kept), nproc=4)
    one(nproc=4)
    assert losses(two) == losses(one)
    assert_same_state(two, one)


def test_a_host_with_another_configuration_is_refused(make_job, cable):
    job = make_job()
    odd = {"ODD_OPTION": "--optim.lr=1e-3"}
    assert exit_codes(start(job, module=FAULTY, at_the_second=odd)) == [1, 1]
    for text in errors_of(job):
        (line,) = [line for line in text.splitlines() if line.startswith("optim.lr")]
        assert line.startswith("optim.lr is 0.001 for rank 2 on cmtrain-b, ")
        assert line.endswith(" for rank 0 on cmtrain-a; start all ranks alike")
    assert not (job.folder / "runs").exists()
