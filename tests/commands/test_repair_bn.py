"""A checkpoint poisoned by an unguarded run is healed, and one that is beyond healing is refused."""

import json
import math

import pytest
import torch
from helpers.runs import Forked

from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint

LEARNING = {
    "schedule": {"epochs": 5}, "augment": {"color_jitter": None}, "mixing": {"mixup": 0, "cutmix": 0, "reprob": 0},
}  # fmt: skip


def repair(job, *arguments, code=0, **environment):
    """`cmtrain repair-bn` on the job's configuration. Returns its JSON line, or what it said on stderr."""
    command = ["cmtrain", "repair-bn", "--config", str(job.config), *arguments]
    process = Forked(command, job.folder, environment, 1)
    out, err = process.communicate()
    assert process.returncode == code, err
    return err if code else json.loads(out) | {"stderr": err}


def poison(path, root):
    """The checkpoint as a run without a guard leaves it: what an inf does to BatchNorm in one forward pass."""
    loaded = load_checkpoint(path)
    for weights in ("model", "ema"):
        for name, value in loaded.state[weights].items():
            if "running_" in name:
                value.fill_(math.nan if name.endswith("var") else math.inf)
    return save_checkpoint(root, loaded.state["progress"]["step"], loaded.state, loaded.meta)


def test_poisoned_statistics_are_healed_and_the_run_goes_on(make_job, figure):
    job = make_job(**LEARNING)
    healthy = job()
    source = poison(checkpoint_path(job.run / "checkpoints", 30), job.folder / "poisoned" / "checkpoints")
    files = {file: file.read_bytes() for file in source.iterdir()}

    result = repair(job, "--checkpoint", "poisoned", "--batches", "12")

    assert files == {file: file.read_bytes() for file in source.iterdir()}
    repaired = job.folder / "poisoned" / "repaired"
    assert checkpoint_steps(repaired) == [30]
    healed = load_checkpoint(checkpoint_path(repaired, 30))
    old, new = load_checkpoint(source).state, healed.state
    for weights in ("model", "ema"):
        for name, value in new[weights].items():
            assert value.isfinite().all()
            touched = "running_" in name or "num_batches" in name
            assert touched or torch.equal(value, old[weights][name])
    assert new["optimizer"].keys() == old["optimizer"].keys()
    num_sick = sum("running_" in name for name in old["model"]) * 2
    assert len(result["nonfinite_statistics"]) == num_sick
    assert healed.meta["repaired"]["batches"] == 12
    (was, now), (ema_was, ema_now) = result["top1"]["model"], result["top1"]["ema"]
    assert was < 0.5 < healthy["top1"]
    assert now > healthy["top1"] - 0.1
    assert ema_was < 0.5 < ema_now
    assert "BatchNorm statistics were not finite" in result["stderr"]
    figure(f"repair-bn: {num_sick} statistics, top-1 {was:.3f} -> {now:.3f}, healthy {healthy['top1']:.3f}")

    job(
        "--run.name", "new", "--resume", result["checkpoint"], "--schedule.epochs", "6", code=2
    )  # another recipe
    again = job("--run.name", "new", "--resume", result["checkpoint"])
    assert again["top1"] == pytest.approx(now)
    assert "exists already; choose another --out" in repair(job, "--checkpoint", "poisoned", code=3)


def test_what_cannot_be_healed_is_refused(make_job):
    job = make_job()
    job("--max-steps", "2")
    loaded = load_checkpoint(checkpoint_path(job.run / "checkpoints", 2))
    changes = {
        "head.weight": lambda state: state["model"]["head.weight"][0, 0].fill_(math.inf),
        "ema stem.conv1.weight": lambda state: state["ema"]["stem.conv1.weight"][0, 0].fill_(math.nan),
        "optimizer exp_avg 0": lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(math.nan),
    }
    for named, change in changes.items():
        state = load_checkpoint(loaded.path).state
        change(state)
        path = save_checkpoint(job.folder / named.replace(" ", "-"), 2, state, loaded.meta)
        (line,) = repair(job, "--checkpoint", str(path), code=3).splitlines()
        assert f"{named} is not finite, and only BatchNorm statistics can be recomputed" in line
    assert "--checkpoint nowhere: " in repair(job, "--checkpoint", "nowhere", code=3)
    assert "optim.lr: 0.002 -> 0.001" in repair(
        job, "--checkpoint", str(loaded.path), "--optim.lr", "1e-3", code=2
    )
    assert "--checkpoint is missing" in repair(job, code=2)
    assert "one process" in repair(job, "--checkpoint", str(loaded.path), code=2, WORLD_SIZE="2")
    assert not (job.run / "repaired").exists()
    # A healthy one may be recomputed, too.
    result = repair(job, "--checkpoint", "runs/job", "--batches", "2", "--out", "elsewhere")
    assert result["nonfinite_statistics"] == []
    assert json.loads((job.folder / result["checkpoint"] / "manifest.json").read_text())["step"] == 2
