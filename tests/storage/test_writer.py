"""Training does not wait for a disk, and every failed save is reported, however slow or full the disk is."""

import itertools
import json
import os
import threading
import time

import pytest
import torch
from helpers.runs import FORKS, HURT

import cmtrain.storage.checkpoint_writer
from cmtrain.step.measure import StepReport
from cmtrain.storage.checkpoint import checkpoint_steps, load_newest
from cmtrain.storage.checkpoint_writer import CheckpointWriter, HostCopy
from cmtrain.storage.finite import FiniteCheck
from cmtrain.storage.run_folder import RunFolder
from cmtrain.training.run_logger import RunLogger
from cmtrain.training.saver import Saver


def state_of(value, count=3):
    tensors = [torch.full((4, 3), float(value)) for _ in range(count)]
    return {
        "model": {"weight": tensors[0]},
        "optimizer": {"state": {0: tensors}, "lr": 0.1},
        "progress": {"step": value},
    }


@pytest.fixture
def gate(monkeypatch):
    """Writes wait until it is set."""
    opened, save = threading.Event(), cmtrain.storage.checkpoint_writer.save_checkpoint

    def wait_and_save(*arguments):
        assert opened.wait(30)
        return save(*arguments)

    monkeypatch.setattr(cmtrain.storage.checkpoint_writer, "save_checkpoint", wait_and_save)
    return opened


def test_what_is_saved_is_the_state_at_the_save(tmp_path, gate):
    """Training goes on changing the very tensors in place while they are written."""
    writer, state = CheckpointWriter(tmp_path), state_of(1)
    writer.save(1, state, {}, keep=3, last=False)
    for tensor in state["optimizer"]["state"][0]:
        tensor.fill_(-1)
    gate.set()
    assert writer.wait(30)
    assert all((t == 1).all() for t in load_newest(tmp_path).state["optimizer"]["state"][0])
    (outcome,) = writer.take_outcomes()
    assert (outcome.step, outcome.path, outcome.error) == (1, tmp_path / "step-000000001", "")
    assert writer.take_outcomes() == []


def test_a_save_does_not_wait_for_its_write_and_the_last_one_does(tmp_path, gate):
    writer = CheckpointWriter(tmp_path)
    writer.save(1, state_of(1), {}, keep=3, last=False)
    assert checkpoint_steps(tmp_path) == []
    threading.Timer(0.2, gate.set).start()
    writer.save(2, state_of(2), {}, keep=3, last=True)
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_saves_in_quick_succession_are_all_there(tmp_path):
    writer = CheckpointWriter(tmp_path)
    for step in range(1, 9):
        writer.save(step, state_of(step), {}, keep=9, last=False)
    assert writer.wait(30)
    assert checkpoint_steps(tmp_path) == list(range(1, 9))
    assert [outcome.error for outcome in writer.take_outcomes()] == [""] * 8
    assert load_newest(tmp_path).state["model"]["weight"].tolist() == state_of(8)["model"]["weight"].tolist()


def make_saver(path):
    logger = RunLogger(
        path, rank=0, world_size=1, first_step=0, last_step=2, epochs=1, total_steps=2,
        address=None, stall_seconds=600,
    )  # fmt: skip
    logger.metrics.report(StepReport(2, 0, 1.0, 0.1, 1.0, 1.0, 0, 0, 0, 0, 0))
    return Saver(path, logger, keep=1), logger


def test_a_save_that_ends_late_does_not_hide_that_the_one_after_it_failed(tmp_path, gate):
    saver, logger = make_saver(tmp_path / "run")
    saver.save(state_of(1), 1, {}, FiniteCheck(), last=False)
    saver.save(state_of(2), 2, {}, FiniteCheck(nonfinite=("model.weight",)), last=False)
    gate.set()
    saver.close()
    logger.finish("failed", exit_code=3, reason="")
    assert saver.unsaved == "the model is not finite: model.weight"
    assert saver.saved_step == 1


def test_a_checkpoint_that_the_next_one_drops_is_still_reported(tmp_path):
    saver, logger = make_saver(tmp_path / "run")
    for step in (1, 2):
        saver.save(state_of(step), step, {}, FiniteCheck(), last=step == 2)
    saver.close()
    logger.finish("finished", exit_code=0, reason="")
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [1, 2]
    size = logger.metrics.registry.get_sample_value(
        "cmtrain_checkpoint_size_bytes", {"run": "run", "rank": "0"}
    )
    assert size == sum(
        file.stat().st_size for file in (tmp_path / "run/checkpoints/step-000000002").iterdir()
    )


def test_where_storage_hangs_a_save_is_given_up_and_reported(tmp_path, gate, monkeypatch):
    monkeypatch.setattr(cmtrain.storage.checkpoint_writer, "PATIENCE_SECONDS", 0.05)
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2):
        writer.save(step, state_of(step), {}, keep=3, last=False)
    (outcome,) = writer.take_outcomes()
    assert (outcome.step, outcome.path) == (2, None)
    assert "still being written" in outcome.error
    threading.Timer(0.2, gate.set).start()
    writer.save(3, state_of(3), {}, keep=3, last=True)  # the last one has patience
    assert checkpoint_steps(tmp_path) == [1, 3]
    assert load_newest(tmp_path).state["progress"] == {"step": 3}


def test_host_memory_is_used_again_and_layouts_stay():
    copy = HostCopy()
    state = {
        "a": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "b": [torch.zeros(()), (1, None, "x")],
    }
    first = copy.take(state)[0]
    assert first["a"].is_contiguous(memory_format=torch.channels_last)
    assert first["b"][1] == (1, None, "x")
    pointer = first["a"].data_ptr()
    state["a"] += 1
    second = copy.take(state)[0]
    assert second["a"].data_ptr() == pointer
    assert torch.equal(second["a"], state["a"])
    grown = copy.take({"a": torch.zeros(5)})[0]
    assert grown["a"].tolist() == [0.0] * 5


def test_a_write_that_fails_is_an_outcome(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    writer = CheckpointWriter(tmp_path / "checkpoints")
    writer.save(1, state_of(1), {}, keep=3, last=True)
    (outcome,) = writer.take_outcomes()
    assert outcome.path is None
    assert "FileExistsError" in outcome.error


def test_a_disk_that_returns_something_else_is_found_out(tmp_path, monkeypatch):
    """A bit that flips between memory and disk: the file is not what was written, and is not published."""
    fadvise = os.posix_fadvise

    def flip(descriptor, *arguments):
        with open(f"/proc/self/fd/{descriptor}", "r+b") as file:
            file.seek(200)
            byte = file.read(1)[0]
            file.seek(200)
            file.write(bytes([byte ^ 1]))
        fadvise(descriptor, *arguments)

    monkeypatch.setattr(os, "posix_fadvise", flip)
    writer = CheckpointWriter(tmp_path)
    writer.save(1, state_of(1), {}, keep=3, last=True)
    (outcome,) = writer.take_outcomes()
    assert "sha256 differs" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_its_checkpoints_and_nothing_else(make_job, figure):
    plain, full = make_job("plain"), make_job("full")
    plain()
    full("--checkpoint.every_steps", "3", module=HURT, FULL="3,6,9", code=0)
    assert [r["loss"] for r in full.log()] == [r["loss"] for r in plain.log()]
    failed = [e for e in full.events() if e["event"] == "checkpoint_failed"]
    assert [e["step"] for e in failed] == [3, 6, 9]
    assert checkpoint_steps(full.run / "checkpoints")[-2:] == [15, 18]
    assert not list((full.run / "checkpoints").glob(".tmp-*"))
    assert full.status()["state"] == "finished"
    figure(f"full disk: {len(failed)} checkpoints failed, run finished, error: {failed[0]['error']}")


def test_a_run_whose_last_checkpoint_failed_is_not_finished(make_job):
    job = make_job()
    job(module=HURT, FULL="18", code=3)
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "its checkpoint is missing" in status["reason"]
    assert status["resume_from"].endswith("step-000000012")
    job()  # there is room again: the same command does the rest once more
    assert (job.status()["state"], job.status()["exit_code"]) == ("finished", 0)
    assert [r["step"] for r in job.log()] == list(range(2, 19, 2))


@pytest.mark.slow
def test_a_slow_disk_does_not_slow_the_steps(make_job, figure):
    """Every fsync takes two seconds longer, and a checkpoint has four; no step waits for half of that."""
    job = make_job(train={"log_every_steps": 1}, evaluate={"every_epochs": 3})
    job("--checkpoint.every_steps", "10", "--checkpoint.every_epochs", "3", module=HURT, SLOW="2")
    times = {record["step"]: record["time"] for record in job.log()}
    first, second = [e for e in job.events() if e["event"] == "checkpoint"]
    assert (first["step"], second["step"]) == (10, 18)
    assert first["seconds"] > 8
    laps = [times[step] - times[step - 1] for step in range(11, 19)]
    assert max(laps) < first["seconds"] / 2
    figure(f"slow disk: checkpoint {first['seconds']:.1f} s, longest of 8 steps beside it {max(laps):.2f} s")


def test_a_save_costs_the_step_a_copy(tmp_path):
    """160 MB: the share that the training thread waits for of what a write on that thread would take."""
    state = {"model": {str(n): torch.randn(500, 500) for n in range(160)}}
    writer = CheckpointWriter(tmp_path)
    shares = []
    for step in range(1, 5):
        begin = time.perf_counter()
        writer.save(step, state, {}, keep=1, last=False)
        waited = time.perf_counter() - begin
        assert writer.wait(60)
        shares.append(waited / (time.perf_counter() - begin))
    assert min(shares[1:]) < 0.4  # about 0.1 alone on the machine


def test_a_read_only_folder_fails_like_a_full_disk(tmp_path):
    process = FORKS.Process(target=_save_as_nobody, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert checkpoint_steps(tmp_path / "checkpoints") == [1]


def _save_as_nobody(folder):
    """root may write anywhere, so become the user nobody, in a new process and by relative paths."""
    os.chdir(folder)
    writer = CheckpointWriter(folder.relative_to(folder) / "checkpoints")
    writer.save(1, state_of(1), {}, keep=1, last=True)
    os.chmod(folder, 0o755)
    os.chmod("checkpoints", 0o555)
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)
    for step, last in ((2, False), (3, True)):
        writer.save(step, state_of(step), {}, keep=1, last=last)
    errors = [outcome.error for outcome in writer.take_outcomes()]
    assert errors[0] == ""
    assert ["PermissionError" in error for error in errors[1:]] == [True, True]
    assert [entry.name for entry in os.scandir("checkpoints")] == ["step-000000001"]


def test_a_record_that_does_not_fit_is_not_half_written(tmp_path, monkeypatch):
    """The disk fills up in the middle of a line: the line is taken back, and the next one is whole."""
    folder = RunFolder(tmp_path)
    folder.event("before")
    sizes = itertools.count()
    real_open = open

    class Full:
        """Takes ten bytes, and then no more."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if next(sizes):
                raise OSError(28, "No space left on device")
            return self.file.write(data[:10])

    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Full(real_open(*args, **kwargs)))
    folder.event("lost")
    monkeypatch.undo()
    assert list(folder.losses.counts) == ["events.jsonl: No space left on device"]
    folder.event("after")
    assert [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [
        "before",
        "after",
    ]


def test_a_run_that_cannot_say_how_it_ended_has_exit_code_3(tmp_path, capsys):
    (tmp_path / "run" / "status.json" / "in the way").mkdir(parents=True)
    logger = RunLogger(
        tmp_path / "run", rank=0, world_size=1, first_step=0, last_step=2, epochs=1, total_steps=2,
        address=None, stall_seconds=600,
    )  # fmt: skip
    assert logger.finish("finished", exit_code=0, reason="top-1 90 %") == 3
    lines = capsys.readouterr().err.splitlines()
    assert any(
        line.endswith("the run misses a record and goes on: status.json: Is a directory") for line in lines
    )
    assert any("status.json does not say how the run ended" in line for line in lines)
    (tmp_path / "run" / "status.json" / "in the way").rmdir()
    (tmp_path / "run" / "status.json").rmdir()
    assert logger.finish("finished", exit_code=5, reason="top-1 90 %") == 5
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 5
