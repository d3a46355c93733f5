"""A checkpoint exists whole or not at all; a damaged one is never loaded, nor silently passed over."""

import errno
import os
import resource

import pytest
import torch
from helpers.runs import flip

from cmtrain.storage.checkpoint import (
    checkpoint_steps,
    drop_old,
    find_checkpoint,
    load_newest,
    remove_leftovers,
    save_checkpoint,
)
from cmtrain.storage.state_file import CheckpointError

STATE = {"model": {"weight": torch.arange(6.0)}, "progress": {"step": 1}}


def save(root, step, *, keep=3, best=None):
    path = save_checkpoint(root, step, STATE | {"progress": {"step": step}}, {"best_step": best})
    drop_old(root, keep)
    return path


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}


def test_round_trip(tmp_path):
    path = save(tmp_path, 7)
    loaded = load_newest(tmp_path)
    assert loaded.path == path
    assert torch.equal(loaded.state["model"]["weight"], STATE["model"]["weight"])
    assert loaded.state["progress"] == {"step": 7}
    assert loaded.meta == {"best_step": None}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
def test_a_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path, damage, file):
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2) / file)
    loaded = load_newest(tmp_path)
    assert loaded.state["progress"] == {"step": 1}
    assert len(loaded.rejected) == 1
    assert checkpoint_steps(tmp_path) == [1]
    assert len(list(tmp_path.glob(".corrupt-2-*"))) == 1


def test_nothing_usable_is_an_error_and_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no usable checkpoint in .*: .*step-000000002.*sha256.*step-000000001"
    ):
        load_newest(tmp_path)


def test_and_the_next_start_is_none_either(tmp_path):
    """The damaged ones have been set aside by then: an empty-looking folder is not an empty one."""
    flip(save(tmp_path, 1) / "state.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no usable checkpoint in"):
            load_newest(tmp_path)


@pytest.mark.parametrize("name", [".del-3-17", "step-7", "notes.txt"])
def test_a_folder_that_is_not_empty_is_no_fresh_start(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / ".tmp-1-17").mkdir()
    with pytest.raises(CheckpointError, match=f"no usable checkpoint in .*, but {name}"):
        load_newest(tmp_path)


def test_another_runs_folder_is_read_and_not_changed(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "state.safetensors")
    assert load_newest(tmp_path, set_aside=False).state["progress"] == {"step": 1}
    assert checkpoint_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", [".", "checkpoints", "repaired", "config.yaml"])
def test_what_is_no_checkpoint_is_named_with_what_to_give_instead(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "repaired").mkdir()
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(CheckpointError, match="no checkpoint there; give a run folder, or a step-"):
        find_checkpoint(tmp_path / name)


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / ".tmp-1-17").mkdir()  # killed while the first one was written
    assert load_newest(tmp_path / "missing") is None
    assert load_newest(tmp_path) is None


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, keep=2, best=3 if step >= 3 else None)
    assert checkpoint_steps(tmp_path) == [3, 7, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000000003",
        "step-000000007",
        "step-000000008",
    ]


def test_a_full_disk_leaves_nothing_half_written_and_the_next_save_works(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint(tmp_path, 2, {"big": torch.zeros(10000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    save(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_what_a_killed_writer_left_is_removed_and_never_loaded(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / ".tmp-2-123"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path).state["progress"] == {"step": 1}
    remove_leftovers(tmp_path)
    assert not half.exists()


def test_what_could_run_code_is_not_saved(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    with pytest.raises(CheckpointError, match="model: cannot save a Evil"):
        save_checkpoint(tmp_path / "checkpoints", 1, {"model": Evil()}, {})
    assert not canary.exists()
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("cmtrain.storage.records.PAUSES_SECONDS", (0.0, 0.0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_trouble_of_the_machine_is_no_damage(tmp_path, monkeypatch, no_pauses, number):
    """Tried again; and if it stays, neither set aside nor passed over for an older one."""
    for step in (1, 2):
        save(tmp_path, step)
    real, failures = os.open, []

    def troubled(path, *flags, **how):
        if str(path).endswith("step-000000002/state.safetensors") and len(failures) < limit:
            failures.append(path)
            raise OSError(number, os.strerror(number), path)
        return real(path, *flags, **how)

    monkeypatch.setattr(os, "open", troubled)
    limit = 2
    assert load_newest(tmp_path).state["progress"] == {"step": 2}
    limit = 99
    with pytest.raises(OSError, match=os.strerror(number)):
        load_newest(tmp_path)
    monkeypatch.undo()
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_a_read_that_fails_is_no_damage(tmp_path, monkeypatch, no_pauses):
    save(tmp_path, 1)

    def broken(file, name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", broken)
    with pytest.raises(OSError, match="Input/output error"):
        load_newest(tmp_path)
    assert checkpoint_steps(tmp_path) == [1]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch, no_pauses):
    save(tmp_path, 1)

    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(PermissionError):
        load_newest(tmp_path)
