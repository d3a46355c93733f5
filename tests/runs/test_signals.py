"""Stop signals, however the run was started: a checkpoint, the true exit code, no process left."""

import os
import signal
import subprocess
import time
from contextlib import suppress

import pytest
from helpers.runs import (
    HANG_SECONDS,
    ROOT,
    TWO,
    assert_nobody_is_left,
    assert_same_state,
    faults,
    logged,
    losses,
    wait_for,
)

from cmtrain.processes.signals import SECOND_CTRL_C_SECONDS
from cmtrain.storage.checkpoint import checkpoint_steps

FAULTY = str(ROOT / "tests" / "helpers" / "faulty_train.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "-m")  # fmt: skip
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR2: 143, signal.SIGHUP: 143}
LONG = {"schedule": {"epochs": 400}, "checkpoint": {"every_epochs": 400}, "evaluate": {"every_epochs": 400}}


# Not everywhere may a test make a process namespace.
MAY_UNSHARE = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode == 0
AS_PROCESS_1 = pytest.mark.skipif(not MAY_UNSHARE, reason="needs a process namespace of its own")


def send(pid, number):
    """The signal, twice: launchers, shells and impatient people do."""
    os.kill(pid, number)
    time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def assert_stopped(job, process, number):
    """`process` ends, the run is preempted at the step it was at, and can go on from there.

    "preempted" says that it waited for nothing: not for the last epoch, nor for the end of an evaluation.
    """
    process.communicate(timeout=HANG_SECONDS)
    assert_nobody_is_left(job)
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("preempted", CODES[number])
    assert checkpoint_steps(job.run / "checkpoints")[-1] == status["step"]
    assert status["resume_from"].endswith(f"step-{status['step']:09d}")


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        *(((), number) for number in CODES),
        (TWO, signal.SIGTERM),
        (TWO, signal.SIGINT),
        pytest.param(TWO, signal.SIGUSR2, marks=pytest.mark.slow),
        pytest.param(TWO, signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_signals_to_cmtrain(make_job, arguments, number):
    job = make_job(**LONG)
    process = job.start(*arguments, module=FAULTY, WARM="1")
    wait_for(lambda: logged(job, 4), process)
    send(process.processes[0].pid, number)
    assert_stopped(job, process, number)
    assert process.returncode == CODES[number]


@AS_PROCESS_1
@pytest.mark.parametrize(("arguments", "number"), [((), signal.SIGTERM), (TWO, signal.SIGUSR2)])
def test_signals_to_process_1_of_a_container(make_job, arguments, number):
    job = make_job(**LONG)
    process = job.start(*arguments, module=FAULTY, WARM="1", PROCESS_1="1")
    wait_for(lambda: logged(job, 4), process)
    send(int((job.folder / "process1").read_text()), number)
    assert_stopped(job, process, number)
    assert process.returncode == CODES[number]


@AS_PROCESS_1
def test_process_1_can_be_stopped_before_training_begins(make_job):
    """The kernel keeps from process 1 what it has no handler for: without one it would train on."""
    job = make_job(**LONG)
    process = job.start(module=FAULTY, PROCESS_1="1", SLOW_START="1")
    wait_for(lambda: (job.folder / "slow").exists(), process)
    os.kill(int((job.folder / "process1").read_text()), signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 143
    assert not job.run.exists()


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (TORCHRUN, signal.SIGTERM),
        pytest.param(ACCELERATE, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(ACCELERATE, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(ACCELERATE, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_signals_to_other_launchers(make_job, launcher, number):
    """accelerate with one process passes nothing on, and nobody passes SIGKILL on: the ranks notice its
    death.
    """
    job = make_job(**LONG)
    process = job.start(launcher=launcher)
    wait_for(lambda: logged(job, 4), process)
    send(process.pid, number)
    if number == signal.SIGKILL or launcher == ACCELERATE:
        number = signal.SIGTERM
    assert_stopped(job, process, number)


ONE_OR_TWO = pytest.mark.parametrize("arguments", [pytest.param((), marks=pytest.mark.slow), TWO])


@ONE_OR_TWO
def test_a_signal_during_a_checkpoint(make_job, arguments):
    job = make_job(schedule={"epochs": 400})
    process = job.start(*arguments, module=FAULTY, WARM="1", SLOW_CHECKPOINT="1")
    wait_for(lambda: (job.folder / "slow").exists(), process)
    send(process.processes[0].pid, signal.SIGTERM)
    assert_stopped(job, process, signal.SIGTERM)


@ONE_OR_TWO
def test_a_signal_ends_an_evaluation_and_the_resumed_run_makes_it_up(make_job, arguments):
    """Otherwise the signal would have to wait for it: here 16 s with one process, and 8 s with two."""
    undisturbed, job = make_job("undisturbed"), make_job("job")
    undisturbed(*arguments, module=FAULTY, WARM="1")
    process = job.start(*arguments, module=FAULTY, WARM="1", SLOW_EVALUATION="1")
    wait_for(lambda: (job.folder / "slow").exists(), process)
    send(process.processes[0].pid, signal.SIGTERM)
    assert_stopped(job, process, signal.SIGTERM)
    assert checkpoint_steps(job.run / "checkpoints") == [6]
    assert not (job.run / "summary.csv").exists()
    job(*arguments, module=FAULTY, WARM="1")
    assert losses(job) == losses(undisturbed)
    assert (job.run / "summary.csv").read_text() == (undisturbed.run / "summary.csv").read_text()
    assert_same_state(job, undisturbed)


@pytest.mark.parametrize("arguments", [(), TWO])
def test_ctrl_c_answers_at_once_and_a_second_one_stops_now(make_job, arguments):
    """Step 10 takes 1000 s: the first Ctrl-C must not wait for it to answer, the second one not at all."""
    job = make_job(checkpoint={"every_steps": 4})
    fault = faults("sleep", rank=0, step=9)
    process = job.start(*arguments, module=FAULTY, WARM="1", SAVE_AT_ONCE="1", **fault)
    wait_for(lambda: logged(job, 8) and job.status().get("resume_from", "").endswith("8"), process)
    time.sleep(1)
    os.kill(process.processes[0].pid, signal.SIGINT)
    answer = "Ctrl-C: stopping after this step and saving; Ctrl-C again stops now, to go on from step 8\n"
    wait_for(lambda: answer in process.outputs[1].read_text(), process)
    time.sleep(SECOND_CTRL_C_SECONDS + 0.5)
    os.kill(process.processes[0].pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    reason = "stopped at once by a second Ctrl-C at step 9, not saved"
    status = job.status()
    assert (status["state"], status["exit_code"], process.returncode) == ("preempted", 130, 130)
    assert status["reason"] == f"{reason}; run the same command to continue from step 8"
    assert err.count(answer) == err.count(reason) == 1
    assert "Traceback" not in err
    assert_nobody_is_left(job)
