"""A process that hangs is ended, and its stacks are written down."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import ROOT, faults, losses, wait_for

from cmtrain.processes.watchdog import C_TIMER_SECONDS, Watchdog

FAULTY = str(ROOT / "tests" / "helpers" / "faulty_train.py")
STEP_SECONDS = 4.0  # for a step that takes 0.1 s alone on a machine


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_hang_ends_with_its_stacks(make_job, nproc):
    job = make_job(checkpoint={"every_steps": 4}, train={"step_timeout_seconds": STEP_SECONDS})
    job(nproc=nproc, module=FAULTY, code=1, **faults("sleep", rank=nproc - 1))
    status = job.status()
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 9, 1)
    assert "hung: the step after step 9 took longer than 4 s" in status["reason"]
    for text in ((job.run / f"hang-rank{nproc - 1}.txt").read_text(), job.stderr.read_text()):
        assert "in sleep" in text
        assert "in step" in text
    assert len([event for event in job.events() if event["event"] == "failed"]) == 1


def test_a_hang_that_holds_the_interpreters_lock_ends_too_and_the_next_start_reports_it(make_job):
    undisturbed, job = make_job("undisturbed"), make_job("job", train={"step_timeout_seconds": STEP_SECONDS})
    undisturbed()
    job(module=FAULTY, code=1, **faults("gil", rank=0))
    assert "in gil" in (job.run / "hang-rank0.txt").read_text()
    job()
    (failed,) = [event for event in job.events() if event["event"] == "failed"]
    assert failed["reason"] == "hung without an error report; see its stacks in hang-rank0.txt"
    assert "the attempt before failed: hung without an error report" in job.stderr.read_text()
    assert losses(job) == losses(undisturbed)
    assert [path.name for path in job.run.glob("*hang*")] == ["old-hang-rank0.txt"]


def test_a_run_that_is_paused_for_longer_than_a_step_may_take_ends_and_loses_nothing(make_job):
    """As `docker pause` and `scontrol suspend` do; for the timers it is a hang."""
    undisturbed, job = make_job("undisturbed"), make_job("job", train={"step_timeout_seconds": STEP_SECONDS})
    undisturbed()
    process = job.start(module=FAULTY, **faults("freeze", rank=0))
    stat = Path("/proc", str(process.processes[0].pid), "stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", process)
    time.sleep(STEP_SECONDS + 2 * C_TIMER_SECONDS)
    os.kill(process.processes[0].pid, signal.SIGCONT)
    process.communicate(timeout=600)
    assert process.returncode == 1
    assert "most recent call first" in (job.run / "hang-rank0.txt").read_text()
    job()
    (failed,) = [event for event in job.events() if event["event"] == "failed"]
    assert failed["reason"].startswith("hung")
    assert losses(job) == losses(undisturbed)


WATCHED = """
import sys, time
from pathlib import Path
from cmtrain.storage.run_folder import RunFolder
from cmtrain.processes.watchdog import Watchdog
path = Path(sys.argv[1])
RunFolder(path).status(state="running", step=0)
watchdog = Watchdog(path, 0, 1, timeout_seconds=0.5)
for number, seconds in enumerate(map(float, sys.argv[2:])):
    watchdog.begin("step", number)
    time.sleep(seconds)
"""


def watched(folder, *seconds):
    return subprocess.run(
        [sys.executable, "-c", WATCHED, folder, *map(str, seconds)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_step_that_takes_too_long_ends_the_process(tmp_path):
    late = watched(tmp_path, 0, 9999)
    assert late.returncode == 1
    reason = json.loads((tmp_path / "status.json").read_text())["reason"]
    assert "the step after step 1 took longer than 0.5 s" in reason


def test_the_first_time_may_take_three_times_as_long(tmp_path):
    watchdog = Watchdog(tmp_path, 0, 1, timeout_seconds=60)
    limits = []
    for phase in ("step", "step", "evaluation", "step", "evaluation"):
        watchdog.begin(phase, 0)
        limits.append(watchdog.limit_seconds)
    watchdog.close()
    assert limits == [180, 60, 180, 60, 60]
    assert not (tmp_path / "hang-rank0.txt").exists()


def test_each_item_has_the_whole_time(tmp_path):
    watchdog = Watchdog(tmp_path, 0, 1, timeout_seconds=60)
    deadlines = []
    for _ in watchdog.over(iter(range(3)), "evaluation", 7):
        deadlines.append(watchdog.deadline)
    watchdog.close()
    assert deadlines[1] < deadlines[2]
    assert deadlines[0] > deadlines[2]  # the first may take longer


def test_no_watchdog(tmp_path):
    watchdog = Watchdog(tmp_path / "run", 0, 1, timeout_seconds=None)
    assert list(watchdog.over(iter("ab"), "evaluation", 0)) == ["a", "b"]
    watchdog.close()
    assert not (tmp_path / "run").exists()
