"""Two trainers never write to one run folder, and a dead one does not block the next."""

import errno
import fcntl
import os
import signal
import socket

import pytest
from helpers.runs import logged, wait_for

from cmtrain.storage.run_folder import RunLock
from pipelines.spec import DataError


def test_a_second_trainer_is_refused_until_the_first_is_dead(make_job):
    job = make_job(schedule={"epochs": 400})
    first = job.start()
    wait_for(lambda: logged(job, 4), first)
    files = {path: path.read_bytes() for path in (job.run / "config.yaml", job.run / "augmented.png")}
    job("--optim.lr", "1e-3", code=3)
    printed = job.stderr.read_text()  # the first one writes there, too
    assert printed.count(f"in use by process {first.processes[0].pid} on {socket.gethostname()}") == 1
    assert "Traceback" not in printed
    assert files == {path: path.read_bytes() for path in files}
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (job.run / ".lock").exists()  # stale, and no obstacle
    resumed = [e["event"] for e in job.events()]
    job("--max-steps", "6" if "checkpoint" not in resumed else str(job.log()[-1]["step"] + 6))
    assert not (job.run / ".lock").exists()
    assert job.status()["state"] == "finished"


def test_of_two_ranks_only_the_first_locks(make_job):
    job = make_job()
    job("--max-steps", "2", nproc=2)
    assert job.status()["state"] == "finished"


def test_refused_on_every_rank_at_once(make_job):
    """Rank 1 does not wait for a rank 0 that was refused."""
    job = make_job()
    lock = RunLock(job.run)
    lock.acquire()
    job("--max-steps", "2", nproc=2, code=3)
    assert job.stderr.read_text().count(f"in use by process {os.getpid()}") == 2
    lock.close()
    assert not (job.folder / "runs").exists()


def test_held_freed_and_taken_over(tmp_path):
    folder = tmp_path / "runs" / "a"
    first, second = RunLock(folder), RunLock(folder)
    first.acquire()
    with pytest.raises(
        DataError, match=rf"a is in use by process {os.getpid()} on {socket.gethostname()}; "
    ):
        second.acquire()
    second.close()  # what it does not hold it does not free
    with pytest.raises(DataError):
        second.acquire()
    first.close()
    second.acquire()
    second.close()
    assert list(tmp_path.iterdir()) == []  # where nothing was written, nothing stays


def test_what_was_written_stays(tmp_path):
    lock = RunLock(tmp_path / "a")
    lock.acquire()
    (tmp_path / "a" / "log.jsonl").write_text("x")
    lock.close()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["log.jsonl"]


def test_deleted_between_open_and_flock(tmp_path, monkeypatch):
    """The last holder deletes the file that we have just opened: a lock on a deleted file excludes no
    other."""
    flock, path = fcntl.flock, tmp_path / ".lock"

    def late(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert path.exists()
    with pytest.raises(DataError):
        RunLock(tmp_path).acquire()
    lock.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize(
    ("host", "pid", "taken"), [(None, 1, True), (None, 2**30, False), ("elsewhere", 1, False)]
)
def test_without_flock_the_process_is_looked_for(tmp_path, monkeypatch, number, host, pid, taken):
    def no_locks(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / ".lock").write_text(f'{{"host": "{host or socket.gethostname()}", "pid": {pid}}}')
    lock = RunLock(tmp_path)
    if taken:
        with pytest.raises(DataError, match="process 1 on"):
            lock.acquire()
    else:
        lock.acquire()
        with pytest.raises(DataError, match=f"process {os.getpid()} on"):
            RunLock(tmp_path).acquire()
        lock.close()
        assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("content", ["", "null", "[1]", '{"pid": "x"}', "\0\0"])
def test_whatever_the_file_holds(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.close()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / "precious").read_text() == "x"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        RunLock(tmp_path / "runs" / "a").acquire()
