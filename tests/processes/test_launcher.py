"""The launcher by itself, with ranks that are a line of Python: which it ends, and what it returns."""

import subprocess
import sys
import time

import pytest

from cmtrain.processes.launcher import GRACE_SECONDS

LAUNCHER = """
import ctypes, os, signal, sys
from pathlib import Path
from cmtrain.processes.launcher import run_ranks
ctypes.CDLL(None).prctl(36, 1)  # adopt orphans, as process 1 does
rank = "import os, signal, sys, time; rank = int(os.environ['RANK']); " + sys.argv[2]
command = [sys.executable, "-c", rank]
code = run_ranks(command, 2, max_restarts=int(sys.argv[3]), run_path=Path(sys.argv[1]))
print("children:", Path(f"/proc/self/task/{os.getpid()}/children").read_text())
sys.exit(code)
"""


def start(folder, rank, max_restarts=0):
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder), rank, str(max_restarts)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder, rank, max_restarts=0):
    process = start(folder, rank, max_restarts)
    out, err = process.communicate(timeout=600)
    assert out.endswith("children: \n"), out  # a rank ended in the middle of a line may stand before it
    return process.returncode, err


@pytest.mark.parametrize(
    ("rank", "code"),
    [
        ("0", 0),
        ("rank or sys.exit(3)", 3),
        ("rank and sys.exit(2); time.sleep(99)", 2),
        ("rank and os.kill(os.getpid(), signal.SIGKILL); time.sleep(99)", 137),
        ("rank and os.kill(os.getpid(), signal.SIGSEGV); time.sleep(99)", 139),
        ("rank and os.kill(os.getpid(), signal.SIGUSR2); time.sleep(99)", 143),
        ("sys.exit(4)", 4),
        ("rank or sys.exit(5); time.sleep(1); sys.exit(5)", 5),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path, rank, code):
    assert run(tmp_path, rank)[0] == code


def test_a_final_exit_code_is_not_tried_again(tmp_path):
    for code in (2, 3, 4, 5, 130, 143):
        assert run(tmp_path, f"print('started', flush=True); sys.exit({code})", 3) == (code, "")
    code, error = run(tmp_path, "sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] != '2')", 3)
    assert (code, error.splitlines()) == (0, ["cmtrain: restart 1 of 3", "cmtrain: restart 2 of 3"])


def test_a_rank_that_ends_by_no_signal_is_killed(tmp_path):
    begin = time.monotonic()
    stubborn = "signal.signal(15, lambda *_: None); time.sleep(0.5); rank and sys.exit(7); "
    stubborn += "time.sleep(9999); time.sleep(9999)"
    code, _ = run(tmp_path, stubborn)
    assert code == 7
    assert time.monotonic() - begin > GRACE_SECONDS  # it was asked first


def test_adopted_children_are_reaped(tmp_path):
    """A rank leaves a grandchild behind that ends before the ranks do."""
    orphan = "os.fork() or (os.fork() and os._exit(0) or time.sleep(0.3) or os._exit(0)); "
    orphan += "os.wait(); time.sleep(1)"
    assert run(tmp_path, orphan)[0] == 0


def test_a_signal_reaches_every_rank_and_ends_the_restarts(tmp_path):
    rank = "signal.signal(10 + 2, lambda *_: sys.exit(1)); print('ready', flush=True); time.sleep(99)"
    process = start(tmp_path, rank, 3)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(12)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (1, "children: \n", "")
