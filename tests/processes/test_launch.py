"""Ranks that fail are started again: the run goes on unchanged, or records truly why it does not."""

import json
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from helpers.runs import FAULTY, TWO, assert_nobody_is_left, failures, faults, logged, losses, wait_for

from cmtrain.processes import failure
from cmtrain.processes.collectives import leave_together, set_torch_defaults
from cmtrain.processes.failure import (
    Failure,
    archive_previous_attempt,
    cause_of,
    crash_loop,
    failed_steps,
    record_cause,
    write_failure,
)
from cmtrain.processes.gpus import num_visible
from cmtrain.processes.rank import report_failure
from cmtrain.storage.checkpoint import checkpoint_steps
from cmtrain.storage.run_folder import RunFolder, read_events, read_status

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2")

STEP_SECONDS = 5.0  # for a step that takes 0.1 s alone on a machine


@pytest.fixture
def undisturbed(make_job, memo=[]):  # noqa: B006
    """The losses of two ranks that nothing happens to."""
    if not memo:
        job = make_job("undisturbed")
        job(nproc=2)
        memo.append(losses(job))
    return memo[0]


@pytest.mark.parametrize(
    ("fault", "rank", "reason"),
    [
        ("kill", 0, "killed by SIGKILL"),
        pytest.param("segv", 1, "killed by SIGSEGV", marks=pytest.mark.slow),
        pytest.param("exception", 1, "ValueError: injected", marks=pytest.mark.slow),
        ("gil", 1, "hung: the step after step 9 took longer than 5 s"),
    ],
)
def test_cmtrain_starts_the_ranks_again(make_job, undisturbed, fault, rank, reason):
    job = make_job(checkpoint={"every_steps": 4}, train={"step_timeout_seconds": STEP_SECONDS})
    result = job(*TWO, "--max-restarts", "2", module=FAULTY, WARM="1", **faults(fault, rank=rank))
    assert result["state"] == "finished"
    assert losses(job) == undisturbed
    steps, reasons = zip(*failures(job), strict=True)
    assert set(steps) == {9}
    assert reason in reasons[-1]
    assert not list(job.run.glob("failed-rank*"))
    assert_nobody_is_left(job)


def test_without_restarts_the_exit_code_is_that_of_the_cause(make_job):
    job = make_job()
    job(*TWO, module=FAULTY, WARM="1", code=137, **faults("kill"))
    status = job.status()
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 137, 9)
    assert status["reason"].startswith("rank 1 on ")
    assert status["reason"].endswith("killed by SIGKILL")
    assert len(failures(job)) == 1  # rank 0 waited for the launcher's report, and used it
    assert_nobody_is_left(job)


def test_a_data_error_of_one_rank_ends_the_run_and_is_not_tried_again(make_job):
    job = make_job()
    job(*TWO, "--max-restarts", "2", module=FAULTY, WARM="1", code=3, **faults("data"))
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["reason"].startswith("rank 1 on ")
    assert status["reason"].endswith(": injected: the data is gone")
    assert "Traceback" not in job.stderr.read_text()
    assert [event["event"] for event in job.events()].count("started") == 1


def test_ranks_without_a_launcher_record_the_cause_too(make_job):
    """No launcher watches them: rank 0 loses contact, and waits for the report of rank 1."""
    job = make_job()
    job(nproc=2, module=FAULTY, code=3, **faults("data"))
    assert "injected: the data is gone" in job.status()["reason"]
    assert len(failures(job)) == 1
    leaderless = make_job("leaderless")
    process = leaderless.start(nproc=2, module=FAULTY, **faults("kill", rank=0))
    process.communicate()
    status = leaderless.status()
    assert (status["state"], status["step"]) == ("failed", 9)
    assert ": lost contact with another rank: " in status["reason"]
    assert "gloo" not in status["reason"]


def test_the_same_failure_three_times_in_a_row_is_not_tried_a_fourth_time(make_job):
    job = make_job()
    job(*TWO, "--max-restarts", "9", module=FAULTY, WARM="1", code=1, **faults("exception", step=2, times=9))
    assert [step for step, _ in failures(job)] == [2, 2, 2]
    error = job.stderr.read_text()
    assert "failed 3 times in a row after step 2, not restarted any more: rank 1 on " in error
    assert job.status()["reason"].endswith("ValueError: injected")
    # A person who starts it again has changed something.
    job(*TWO, module=FAULTY, WARM="1")


def test_ranks_do_not_outlive_their_parent(make_job):
    job = make_job(
        schedule={"epochs": 400}, checkpoint={"every_epochs": 400}, evaluate={"every_epochs": 400}
    )
    process = job.start(*TWO, module=FAULTY, WARM="1")
    wait_for(lambda: logged(job, 4), process)
    process.kill()
    assert_nobody_is_left(job)
    assert job.status()["state"] == "preempted"
    assert checkpoint_steps(job.run / "checkpoints")


def test_mistakes_are_found_before_anything_is_started_and_printed_once(make_job):
    job = make_job()
    job("--nproc", "3", code=2)
    lines = job.stderr.read_text().splitlines()
    assert lines[-1].startswith("train.global_batch_size: 16 does not split over 3 processes")
    job(*TWO, "--data.root", "NOWHERE", module=FAULTY, WARM="1", code=3)
    assert sum("NOWHERE" in line for line in job.stderr.read_text().splitlines()) == 1
    job(*TWO, "--model.name", "cmt_tiny", module=FAULTY, WARM="1", code=2)
    assert sum("cmt_tiny" in line for line in job.stderr.read_text().splitlines()) == 1
    job(*TWO, code=2, nproc=2)
    assert "a launcher has started this process" in job.stderr.read_text()
    assert not (job.folder / "runs").exists()


def test_divergence_is_agreed_on_and_not_tried_again(make_job):
    job = make_job(guard={"rollback_after_bad_steps": 2}, optim={"lr": 1e30, "clip_grad": None})
    job(*TWO, "--max-restarts", "2", module=FAULTY, WARM="1", code=4)
    assert (job.status()["state"], job.status()["exit_code"]) == ("diverged", 4)
    assert [event["event"] for event in job.events()].count("started") == 1
    assert_nobody_is_left(job)


def test_a_finished_run_ends_at_once(make_job):
    """The same command again: no torch, no ranks, the same result."""
    job = make_job()
    result = job(*TWO, module=FAULTY, WARM="1")
    program = (
        "import sys; from cmtrain.cli.main import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'numpy', 'nvidia'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "--config", str(job.config), "--nproc", "2"]
    again = subprocess.run(command, cwd=job.folder, capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(again.stdout) == result
    job("--schedule.epochs", "4", code=2)  # but another recipe is another run
    (job.run / "checkpoints").rename(job.run / "kept")
    assert job("--max-steps", "2")["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "segv", "exception", "gil"])
def test_torchrun_starts_the_ranks_again(make_job, undisturbed, fault):
    job = make_job(checkpoint={"every_steps": 4}, train={"step_timeout_seconds": STEP_SECONDS})
    shared_store = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"
    }  # torchrun's default, which the rest of the tests avoid
    job(launcher=TORCHRUN, module=FAULTY, **shared_store, **faults(fault))
    assert losses(job) == undisturbed
    assert {step for step, _ in failures(job)} == {9}
    begin, end = (
        next(e["time"] for e in job.events() if e["event"] == kind) for kind in ("failed", "resumed")
    )
    print(f"{fault}: resumed after {end - begin:.1f} s")


@pytest.mark.slow
def test_torchrun_does_not_restart_in_vain(make_job):
    job = make_job()
    launcher = [*TORCHRUN[:-1], "4"]
    job(launcher=launcher, module=FAULTY, code=1, **faults("exception", step=2, times=9))
    assert [step for step, _ in failures(job)] == [2, 2, 2]
    assert "failed 3 times in a row after step 2" in job.stderr.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("fault", ["kill", "segv", "exception", "gil"])
def test_ten_times_each(make_job, undisturbed, fault, turn):
    job = make_job(checkpoint={"every_steps": 4}, train={"step_timeout_seconds": STEP_SECONDS})
    job(*TWO, "--max-restarts", "2", module=FAULTY, WARM="1", **faults(fault, rank=turn % 2, step=7 + turn))
    assert losses(job) == undisturbed
    assert_nobody_is_left(job)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN])
def test_a_frozen_rank(make_job, undisturbed, launcher):
    """SIGSTOP stops its watchdog, too; the other rank's fires. torchrun kills after 30 s, cmtrain after
    5."""
    job = make_job(checkpoint={"every_steps": 4}, train={"step_timeout_seconds": STEP_SECONDS})
    arguments = () if launcher else (*TWO, "--max-restarts", "2")
    job(*arguments, launcher=launcher, module=FAULTY, WARM="1", **faults("freeze"))
    assert losses(job) == undisturbed
    assert_nobody_is_left(job)


@pytest.mark.slow
def test_a_finished_job_ends_well_twenty_times(make_job):
    for turn in range(20):
        job = make_job(f"job{turn}", schedule={"epochs": 1, "warmup_epochs": 0})
        job(*TWO, "--max-restarts", "3", "--max-steps", "2", module=FAULTY, WARM="1")
        assert [event["event"] for event in job.events()].count("started") == 1


@pytest.mark.parametrize(
    ("devices", "installed", "visible"),
    [(None, 8, 8), ("", 8, 0), ("0,1", 8, 2), ("3, 5", 8, 2), ("0,9,1", 8, 1), ("-1", 8, 0),
     ("GPU-8932f937", 8, 1), ("MIG-a, MIG-b", 1, 2), ("0,1", 0, 0)],
)  # fmt: skip
def test_visible_gpus(devices, installed, visible):
    assert num_visible(devices, installed) == visible


def test_the_cause_is_the_first_failure_that_is_no_consequence():
    lost = Failure(0, 3, "lost contact", step=12, lost_contact=True, time=5.0)
    gone = Failure(2, 3, "killed by SIGKILL", exit_code=137, time=6.0)
    late = Failure(1, 3, "ValueError", time=7.0)
    assert cause_of([]) is None
    assert cause_of([lost]) == lost
    cause = cause_of([late, lost, gone])
    assert (cause.rank, cause.exit_code, cause.step) == (2, 137, 12)


def test_ranks_that_fail_together_are_recorded_once(tmp_path):
    def reasons(failure):
        write_failure(tmp_path, failure)
        record_cause(tmp_path)
        return [event["reason"] for event in read_events(tmp_path)]

    RunFolder(tmp_path).status(state="running", step=9)
    recorded = ["rank 2 on a: lost contact"]
    assert reasons(Failure(2, 3, "lost contact", lost_contact=True, host="a", time=7.0)) == recorded
    recorded += ["rank 1 on a: hung"]
    assert reasons(Failure(1, 3, "hung", host="a", time=6.0)) == recorded
    assert reasons(Failure(0, 3, "hung", host="a", time=5.0)) == recorded
    assert read_status(tmp_path)["reason"] == recorded[-1]
    recorded += ["rank 0 on a: the data is gone"]  # the earliest failure decides how the run ends
    assert reasons(Failure(0, 3, "the data is gone", exit_code=3, host="a", time=4.0)) == recorded
    assert read_status(tmp_path)["exit_code"] == 3


def test_ranks_that_lose_contact_at_one_moment_are_recorded_once(tmp_path, monkeypatch):
    """Both have read the status before either writes it, unless one waits for the other."""
    folder = RunFolder(tmp_path)
    folder.status(state="running", step=12)
    folder.event("started")
    for rank in (0, 1):
        write_failure(tmp_path, Failure(rank, 2, "lost contact with another rank", lost_contact=True))
    both_have_read = threading.Barrier(2, timeout=0.3)

    def read_together(path):
        status = read_status(path)
        with suppress(threading.BrokenBarrierError):
            both_have_read.wait()
        return status

    monkeypatch.setattr(failure, "read_status", read_together)
    ranks = [threading.Thread(target=record_cause, args=(tmp_path,)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [event["event"] for event in read_events(tmp_path)] == ["started", "failed"]


def test_the_next_start_records_how_a_run_ended(tmp_path):
    assert archive_previous_attempt(tmp_path / "new") == ()
    folder = RunFolder(tmp_path)
    folder.status(state="running", step=40)
    assert archive_previous_attempt(tmp_path) == (
        "the attempt before failed: ended without an error report: killed, or the machine went down",
    )
    status = read_status(tmp_path)
    assert (status["state"], status["step"]) == ("failed", 40)
    # A hang in C leaves nothing but its stacks.
    RunFolder(tmp_path).status(state="running", step=50, reason=None)
    (tmp_path / "hang-rank1.txt").write_text("Timeout (0:00:04)!")
    (tmp_path / "hang-rank0.txt").touch()
    assert archive_previous_attempt(tmp_path) == (
        "the attempt before failed: rank 1: hung without an error report; see its stacks in hang-rank1.txt",
    )
    assert (tmp_path / "old-hang-rank1.txt").exists()
    assert archive_previous_attempt(tmp_path) == ()
    # What has ended well is left alone, whatever came after.
    RunFolder(tmp_path).status(state="finished", reason="top-1 0.9")
    write_failure(tmp_path, Failure(1, 2, "killed by SIGABRT", exit_code=134))
    assert archive_previous_attempt(tmp_path) == ()
    assert read_status(tmp_path)["state"] == "finished"
    assert not list(tmp_path.glob("failed-rank*"))


def test_a_full_disk_does_not_hide_the_failure(tmp_path, monkeypatch):
    RunFolder(tmp_path).status(state="running", step=1)

    def full(file, mode="r", **options):
        if "w" in mode:
            raise OSError(28, "No space left on device")
        return open(file, mode, **options)

    monkeypatch.setattr("pipelines.atomic.open", full, raising=False)
    write_failure(tmp_path, Failure(0, 1, "OSError: no space"))
    assert record_cause(tmp_path, has_ended=True).reason.startswith("ended without an error report")


def test_a_crash_loop_is_the_same_step_three_times_in_one_launch(tmp_path):
    def attempts(*steps):
        return [event for number, step in enumerate(steps) for event in (
            {"event": "resumed" if number else "started", "step": 0, "restarts": number, "time": 0},
            {"event": "failed", "step": step, "time": 0}, {"event": "failed", "step": step, "time": 0},
        )]  # fmt: skip

    assert failed_steps(attempts(4, 5, 5)) == [4, 5, 5]
    assert failed_steps(attempts(4, 5) + attempts(7)) == [7]  # a person started it again
    for steps, loop in (
        ((5, 5), False),
        ((5, 5, 5), True),
        ((5, 6, 5), True),
        ((5, 5, 7), False),
        ((9, 5, 5, 5), True),
    ):
        (tmp_path / "events.jsonl").write_text(
            "".join(json.dumps(e) + "\n" for e in attempts(*steps)) + '{"ev'
        )
        assert bool(crash_loop(tmp_path)) == loop, steps


def test_torchs_settings_are_defaults(tmp_path, monkeypatch):
    environment = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    monkeypatch.setattr("os.environ", environment)
    set_torch_defaults(tmp_path / "run")
    assert environment == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "run" / "nccl-rank"),
    }


@pytest.mark.parametrize(("backend", "device_ids"), [("nccl", [3]), ("gloo", None)])
def test_ranks_leave_by_a_barrier_on_their_own_gpu(backend, device_ids, monkeypatch):
    """NCCL warns of a barrier that names none."""
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "barrier", lambda **options: calls.append(options))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    leave_together()
    assert calls == [{"device_ids": device_ids}, "left"]


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_printed_once(make_job):
    job = make_job()
    once = (*TORCHRUN[:-1], "0")  # and not again at every restart
    process = job.start("--optim.lr", "none", launcher=once, module=FAULTY)
    _, err = process.communicate(timeout=600)
    assert sum("optim.lr" in line for line in err.splitlines()) == 1


@pytest.mark.parametrize("lost", [True, False])
def test_a_rank_that_lost_contact_waits_for_the_report_of_the_cause(tmp_path, lost):
    RunFolder(tmp_path).status(state="running", step=1)
    error = RuntimeError("[/x/gloo/pair.cc:1] Connection closed by peer") if lost else KeyError("x")
    if lost:  # another failure is the cause only if it came first, and on a busy machine it might
        failed = Failure(1, 2, "killed by SIGKILL", exit_code=137)
        threading.Timer(0.5, write_failure, (tmp_path, failed)).start()
    cause = report_failure(error, tmp_path, rank=0, world_size=2, step=7)
    assert cause.rank == (1 if lost else 0)
    assert cause.step == 7
    assert read_status(tmp_path)["reason"] == cause.describe()
