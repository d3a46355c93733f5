"""Keep exactly the checkpoints that were promised, whenever the process that deletes is killed."""

import itertools
import json
import os
import shutil

import pytest
import torch
from helpers.crash import killed_before
from helpers.runs import FORKS

from cmtrain.storage.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    drop_old,
    load_checkpoint,
    load_newest,
    remove_leftovers,
    save_checkpoint,
)

KEEP, BEST, EVERY = 3, 77, 40


def save(root, step, *, best=-1, milestone=False, keep=KEEP):
    state = {"weight": torch.full((2,), float(step)), "progress": {"step": step}}
    path = save_checkpoint(root, step, state, {"best_step": best, "milestone": milestone})
    drop_old(root, keep)
    return path


def expected(step):
    """Of checkpoints 1..step, those that must be there."""
    newest = range(max(step - KEEP + 1, 1), step + 1)
    best = [BEST] if step >= BEST else [1]
    return sorted({*newest, *best, *range(EVERY, step + 1, EVERY)})


def save_one(root, step):
    save(root, step, best=BEST if step >= BEST else 1, milestone=step % EVERY == 0)


def test_200_saves_with_a_crash_in_deletions(tmp_path, figure, monkeypatch):
    """k = 3, the best in the middle, milestones; at two steps the process is killed while it deletes."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power fails here, and 1200 of them take a while
    for step in range(1, 201):
        if step in (100, 150):
            process = FORKS.Process(target=_killed_in_a_deletion, args=(tmp_path, step))
            process.start()
            process.join(60)
            assert process.exitcode == 0
            assert list(tmp_path.glob(".del-*"))
            remove_leftovers(tmp_path)
        else:
            save_one(tmp_path, step)
        assert checkpoint_steps(tmp_path) == expected(step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:09d}" for step in expected(200)]
    for step in expected(200):
        assert load_checkpoint(checkpoint_path(tmp_path, step)).state["progress"] == {"step": step}
    figure(f"retention: 200 saves, 2 kills in a deletion, kept {expected(200)}")


def _killed_in_a_deletion(root, step):
    """Kill a save of `step` when the doomed checkpoint has lost one of its two files."""
    copy = root.with_name("copy")
    for number in itertools.count():
        shutil.copytree(root, copy)
        assert killed_before(number, lambda: save_one(root, step)), "it was never killed in a deletion"
        if any(len(list(doomed.iterdir())) == 1 for doomed in root.glob(".del-*")):
            shutil.rmtree(copy)
            return
        shutil.rmtree(root)
        copy.rename(root)


def test_killed_at_every_change_of_the_file_system(tmp_path, figure):
    """A save that deletes one, killed before each of its changes: a usable checkpoint is always left."""
    process = FORKS.Process(target=_killed_everywhere, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    figure(f"crash points: {(tmp_path / 'summary').read_text()}")


def _killed_everywhere(folder):
    newest = []
    for number in range(1000):
        root = folder / str(number)
        save(root, 1, keep=1)
        killed = killed_before(number, lambda root=root: save(root, 2, keep=1))
        loaded = load_newest(root)
        assert loaded.rejected == ()
        assert loaded.state["weight"].tolist() == [float(loaded.state["progress"]["step"])] * 2
        newest.append(loaded.state["progress"]["step"])
        remove_leftovers(root)
        assert checkpoint_steps(root) in ([1], [2], [1, 2])
        save(root, 3, keep=1)  # and the next process goes on
        assert [p.name for p in root.iterdir()] == ["step-000000003"]
        if not killed:
            break
    assert newest == sorted(newest)  # once the new one is published, it is the newest for good
    assert newest[0] == 1
    assert number > 10
    summary = f"{number} kills survived, {newest.count(1)} before the new checkpoint was published"
    (folder / "summary").write_text(summary)


def test_the_best_that_exists_stays_when_a_better_one_could_not_be_written(tmp_path):
    save(tmp_path, 1, best=1, keep=1)
    for step in (3, 4):
        save(tmp_path, step, best=2, keep=1)  # step 2 was the best, and its checkpoint failed
    assert checkpoint_steps(tmp_path) == [1, 4]


def test_milestones_stay_when_the_setting_is_gone(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, milestone=step == 2, keep=1)
    assert checkpoint_steps(tmp_path) == [2, 5]


def test_one_whose_manifest_cannot_be_read_is_left_alone(tmp_path):
    (save(tmp_path, 1, milestone=True) / "manifest.json").write_text("{")
    for step in range(2, 6):
        save(tmp_path, step, keep=1)
    assert checkpoint_steps(tmp_path) == [1, 5]


@pytest.mark.parametrize("name", ["step-000000001", ".tmp-1-5", ".del-1-5"])
def test_no_deletion_follows_a_link_out(tmp_path, name):
    """In place of a checkpoint, and inside one."""
    outside, root = tmp_path / "outside", tmp_path / "checkpoints"
    outside.mkdir()
    (outside / "precious").write_text("x")
    for step in (2, 3, 4):
        save(root, step, keep=9)
    (root / "step-000000002" / "link").symlink_to(outside)
    (root / name).symlink_to(outside)
    assert checkpoint_steps(root) == [2, 3, 4]
    remove_leftovers(root)
    drop_old(root, 1)
    assert (outside / "precious").read_text() == "x"
    assert checkpoint_steps(root) == [4]
    assert os.path.lexists(root / name) == name.startswith("step")


def test_the_manifest_says_what_a_checkpoint_is_kept_for(tmp_path):
    manifest = json.loads((save(tmp_path, 7, best=7, milestone=True) / "manifest.json").read_text())
    assert (manifest["step"], manifest["meta"]) == (7, {"best_step": 7, "milestone": True})


def test_a_run_keeps_its_milestones(make_job):
    """Every third epoch is saved, and every second one kept for ever. The only evaluation is at the end."""
    job = make_job(
        schedule={"epochs": 4},
        evaluate={"every_epochs": 4},
        checkpoint={"every_epochs": 3, "milestone_every_epochs": 2, "keep": 1},
    )
    job()
    assert checkpoint_steps(job.run / "checkpoints") == [12, 24]
    assert [e["step"] for e in job.events() if e["event"] == "checkpoint"] == [12, 18, 24]
