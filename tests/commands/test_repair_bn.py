"""Repair NaN BatchNorm statistics in runs and in any trainer's files; refuse what is beyond repair."""

import argparse
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.runs import Forked, after_start
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cmtrain.cli.main import main
from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint

PLAIN = {"augment": {"color_jitter": None}, "mixing": {"mixup": 0, "cutmix": 0, "reprob": 0}}
LEARNING = PLAIN | {"schedule": {"epochs": 5}}
STATISTIC = "layer2.0.bn1.running_var"


def repair(job, *arguments, code=0, **environment):
    """`cmtrain repair-bn` in the job's folder. Returns its JSON line, or stderr where it is refused."""
    process = Forked(["cmtrain", "repair-bn", *arguments], job.folder, environment, 1)
    out, err = process.communicate()
    assert process.returncode == code, err
    return err if code else json.loads(out) | {"stderr": err}


def poison(path, root):
    """Write the checkpoint as a run without a guard leaves it after one forward pass with an inf."""
    loaded = load_checkpoint(path)
    for weights in ("model", "ema"):
        for name, value in loaded.state[weights].items():
            if "running_" in name:
                value.fill_(math.nan if name.endswith("var") else math.inf)
    return save_checkpoint(root, loaded.state["progress"]["step"], loaded.state, loaded.meta)


# --- runs ---


def test_a_run_is_repaired_and_continues(make_job, figure):
    job = make_job(**LEARNING)
    healthy = job()
    source = poison(checkpoint_path(job.run / "checkpoints", 30), job.folder / "poisoned" / "checkpoints")
    files = {file: file.read_bytes() for file in source.iterdir()}

    result = repair(job, "poisoned", "--config", str(job.config), "--batches", "12")

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
    num_poisoned = sum("running_" in name for name in old["model"]) * 2
    assert len(result["nonfinite_statistics"]) == num_poisoned
    assert healed.meta["repaired"]["batches"] == 12
    (was, now), (ema_was, ema_now) = result["top1"]["model"], result["top1"]["ema"]
    assert was < 0.5 < healthy["top1"]
    assert now > healthy["top1"] - 0.1
    assert ema_was < 0.5 < ema_now
    assert (
        f"{num_poisoned} BatchNorm statistics were not finite, model stem.norm1.running" in result["stderr"]
    )
    figure(
        f"repair-bn: {num_poisoned} statistics, top-1 {was:.3f} -> {now:.3f}, healthy {healthy['top1']:.3f}"
    )

    # another recipe
    job("--run.name", "new", "--resume", result["out"], "--schedule.epochs", "6", code=2)
    again = job("--run.name", "new", "--resume", result["out"])
    assert again["top1"] == pytest.approx(now)
    refusal = repair(job, "poisoned", "--config", str(job.config), code=3)
    assert "exists already; choose another --out" in refusal


def test_a_run_brings_its_own_configuration(make_job):
    job = make_job(**PLAIN)
    job("--max-steps", "2")
    job.config.unlink()
    poison(checkpoint_path(job.run / "checkpoints", 2), job.run / "repaired-later" / "checkpoints")
    result = repair(job, "runs/job", "--batches", "2", "--schedule.epochs", "9", "--out", "elsewhere")
    assert result["nonfinite_statistics"] == []  # a healthy run may be recomputed, too
    assert json.loads((job.folder / result["out"] / "manifest.json").read_text())["step"] == 2


def test_what_cannot_be_healed_is_refused(make_job):
    job = make_job()
    job("--max-steps", "2")
    config = ("--config", str(job.config))
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
        (line,) = after_start(repair(job, str(path), *config, code=3))
        assert f"{named} is not finite, and only BatchNorm statistics can be recomputed" in line
    assert "nowhere: no run and no checkpoint" in repair(job, "nowhere", code=3)
    assert "nowhere" in repair(job, "nowhere", *config, code=3)
    assert "does not fit model.name" in repair(job, "runs/job", "--model.variant", "reimpl", code=2)
    assert "the following arguments are required: RUN|FILE" in repair(job, code=2)
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    assert "one process" in repair(job, "runs/job", code=2, **ranks)
    assert not (job.run / "repaired").exists()


# --- any trainer's files ---


@pytest.fixture(scope="module")
def resnet(images):
    """A timm resnet18, trained for a few steps by a loop of its own."""
    paths = sorted((images / "train").rglob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(path).resize((32, 32))) for path in paths])
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    batch = (batch - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / 0.225
    labels = torch.tensor([int(path.parent.name[-1]) for path in paths])
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(14):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
    return model


def weights(resnet, prefix="", *, poisoned=True):
    """state_dict of the model under `prefix`, with a NaN in one running_var."""
    state = {f"{prefix}{name}": tensor.clone() for name, tensor in resnet.state_dict().items()}
    if poisoned:
        state[f"{prefix}{STATISTIC}"][3] = math.nan
    return state


@pytest.fixture
def job(make_job):
    return make_job(**LEARNING, model={"name": "resnet18"})


def repair_file(job, name, *arguments, code=0):
    return repair(job, name, "--config", str(job.config), "--batches", "12", *arguments, code=code)


def check_healed(result, label, old, new, prefix=""):
    was, now = result["top1"][label]
    assert was < 0.5 < 0.9 < now
    printed = f"{label}: top-1 {100 * was:.1f} % before (its outputs were NaN), {100 * now:.1f} % after\n"
    assert printed in result["stderr"]
    assert f"{label} {STATISTIC}" in result["nonfinite_statistics"]
    assert list(new) == list(old)
    for name, value in new.items():
        assert value.dtype == old[name].dtype
        assert value.isfinite().all()
        touched = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert touched != torch.equal(value, old[name]), name
    assert new[f"{prefix}bn1.num_batches_tracked"] == 12


def test_a_bare_state_dict(job, resnet):
    state = weights(resnet)
    torch.save(state, job.folder / "x.pth")
    before = (job.folder / "x.pth").read_bytes()
    result = repair_file(job, "x.pth")
    assert result["out"] == "x-repaired.pth"
    check_healed(result, "model", state, torch.load(job.folder / "x-repaired.pth"))
    assert f"x.pth: 1 BatchNorm statistics were not finite, model {STATISTIC} first" in result["stderr"]
    assert (job.folder / "x.pth").read_bytes() == before
    # The default never overwrites; a name that is given does, even the input's.
    assert "x-repaired.pth exists already" in repair_file(job, "x.pth", code=2)
    repair_file(job, "x.pth", "--out", "x.pth")
    assert torch.load(job.folder / "x.pth")[STATISTIC].isfinite().all()
    assert not list(job.folder.glob(".x*"))


def test_a_training_checkpoint_keeps_its_other_entries(job, resnet):
    optimizer = torch.optim.SGD(resnet.parameters(), 0.1, momentum=0.9).state_dict()
    state, arguments = weights(resnet), argparse.Namespace(lr=0.1, model="resnet18")
    content = {"epoch": 3, "state_dict": state, "optimizer": optimizer, "args": arguments, "best": 71.5}
    torch.save(content, job.folder / "x.pt")
    result = repair_file(job, "x.pt", "--out", "new.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        new = torch.load(job.folder / "new.pt")
    check_healed(result, "state_dict", state, new.pop("state_dict"))
    assert list(content) == ["epoch", "state_dict", "optimizer", "args", "best"]
    assert new == {key: value for key, value in content.items() if key != "state_dict"}


def test_model_and_ema_are_both_repaired_under_any_prefix(job, resnet):
    content = {"model": weights(resnet, "module._orig_mod."), "ema": weights(resnet, "module.")}
    content["ema"]["n_averaged"] = torch.tensor(7)  # as torch's AveragedModel keeps it
    torch.save(content, job.folder / "x.bin")
    result = repair_file(job, "x.bin")
    new = torch.load(job.folder / "x-repaired.bin")
    assert new["ema"].pop("n_averaged") == content["ema"].pop("n_averaged")
    check_healed(result, "model", content["model"], new["model"], "module._orig_mod.")
    check_healed(result, "ema", content["ema"], new["ema"], "module.")


def test_safetensors_keep_their_metadata(job, resnet):
    state = weights(resnet)
    state = {key: value.half() if "conv" in key else value for key, value in sorted(state.items())}
    save_file(state, job.folder / "x.safetensors", {"format": "pt", "epoch": "3"})
    result = repair_file(job, "x.safetensors")
    new = load_file(job.folder / "x-repaired.safetensors")
    check_healed(result, "model", {key: state[key] for key in new}, new)
    with safe_open(job.folder / "x-repaired.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "3"}


def test_mistakes_about_a_file_are_one_line_and_write_nothing(job, resnet, monkeypatch, capsys):
    state = weights(resnet, poisoned=False)
    torch.save(state, job.folder / "x.pth")
    torch.save({key: value for key, value in state.items() if "running" not in key}, job.folder / "none.pth")
    torch.save(weights(resnet) | {"conv1.weight": state["conv1.weight"] * math.inf}, job.folder / "inf.pth")
    torch.save([state], job.folder / "list.pth")
    torch.save(resnet, job.folder / "module.pth")
    torch.save(state | {"fc.weight": torch.ones(2, 512), "fc.bias": torch.ones(2)}, job.folder / "two.pth")
    (job.folder / "damaged.pth").write_bytes((job.folder / "x.pth").read_bytes()[:-1000])
    (job.folder / "damaged.safetensors").write_bytes(b"\xff" * 100)

    def files():
        return sorted(path.name for path in job.folder.iterdir() if path.suffix != ".txt")

    before = files()
    monkeypatch.chdir(job.folder)

    def refused(name, *arguments, code, config=("--config", "job.yaml")):
        assert main(["repair-bn", name, *config, "--batches", "1", *arguments]) == code
        (line,) = after_start(capsys.readouterr().err)
        assert files() == before
        return line

    line = refused("x.pth", "--model.name", "resnet50", code=2)
    assert (
        "x.pth: model does not fit model.name resnet50: layer1.0.conv1.weight is (64, 64, 3, 3) in the"
        in line
    )
    assert line.endswith(
        "(64, 64, 1, 1) in the model; set model.name, its options and data.image_px as in training"
    )
    assert "has no BatchNorm; set it to the model in x.pth" in refused(
        "x.pth",
        "--model.name",
        "mixer_s32_224",
        "--data.image_px",
        "224",
        "--data.eval_resize_px",
        "224",
        code=2,
    )
    assert "unknown" in refused("x.pth", "--model.nam", "resnet50", code=2)
    assert "none.pth: has no BatchNorm statistics to repair" in refused("none.pth", code=3)
    assert "inf.pth: model conv1.weight is not finite, and only BatchNorm" in refused("inf.pth", code=3)
    assert "list.pth: cannot be read: holds a list, not a state_dict" in refused("list.pth", code=3)
    assert "module.pth: holds a timm.models.resnet.ResNet, which could run code" in refused(
        "module.pth", code=3
    )
    assert "two.pth: model has 2 classes, the data 3; set data.root" in refused("two.pth", code=2)
    assert "damaged.pth: cannot be read: " in refused("damaged.pth", code=3)
    assert "damaged.safetensors: cannot be read: " in refused("damaged.safetensors", code=3)
    assert "gone.pth: no such file" in refused("gone.pth", code=3)
    assert "must end in .pth" in refused("x.pth", "--out", "x.safetensors", code=2)
    assert "choose another --out" in refused("x.pth", "--out", "nowhere/x.pth", code=2)
    assert "x.pth needs its model and data" in refused("x.pth", code=2, config=())
