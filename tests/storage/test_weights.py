"""Weights of another resolution and class count start a run; wrong and hostile files are refused before it
starts."""

import argparse
import json
import os
import pickle

import pytest
import timm
import torch
from helpers.runs import after_start, flip
from safetensors.torch import save_file

from cmtrain.errors import ConfigError
from cmtrain.models import to_reference_state_dict
from cmtrain.storage.checkpoint import load_newest, save_checkpoint
from cmtrain.storage.weights import Weights, fit, num_classes_in, read_weights, start_from
from pipelines.spec import DataError

QUIET = {
    "augment": {"color_jitter": None, "scale": [0.6, 1.0]},
    "mixing": {"mixup": 0, "cutmix": 0, "reprob": 0},
}


def micro(image_px=32, num_classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model("cmt_micro", img_size=image_px, num_classes=num_classes, **options)


def contiguous(model):
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_digits_help_photographs_at_another_size(make_job, figure):
    digits = make_job(
        "digits",
        data={"root": "demo:digits", "eval_resize_px": 32},
        schedule={"epochs": 3, "warmup_epochs": 1},
        evaluate={"every_epochs": 3},
        train={"global_batch_size": 64, "max_batch_per_gpu": 64},
        model={"drop_path_rate": 0, "drop_rate": 0},
        ema={"decay": None},
        **QUIET,
    )
    base = digits()
    photos = {
        "data": {"root": "demo:photos", "image_px": 64, "eval_resize_px": 72},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
        "train": {"global_batch_size": 64, "max_batch_per_gpu": 64},
        "ema": {"decay": None},
    }
    model = {"drop_path_rate": 0, "drop_rate": 0}
    tuned = make_job("tuned", model=model | {"init_from": str(digits.run)}, **photos, **QUIET)
    fine = tuned("--max-steps", "12")
    scratch = make_job("scratch", model=model, **photos, **QUIET)("--max-steps", "12")
    printed = tuned.stderr.read_text()
    assert "model.init_from: model weights of " in printed
    assert "new classifier head: 12 classes (the weights have 10)" in printed
    assert "4 position tables resized" in printed
    assert fine["step"] == scratch["step"]
    assert fine["top1"] > scratch["top1"] + 0.05
    figure(f"digits {base['top1']:.3f}; photographs: {fine['top1']:.3f}, from scratch {scratch['top1']:.3f}")


def test_a_resumed_run_goes_on_from_its_own_checkpoint(make_job):
    first = make_job("first")
    first("--max-steps", "2")
    second = make_job("second", model={"init_from": str(first.run)})
    second("--max-steps", "2")
    assert "init_from" in second.stderr.read_text()
    source = load_newest(first.run / "checkpoints").state["model"]["stem.conv1.weight"]
    before = load_newest(second.run / "checkpoints").state["model"]["stem.conv1.weight"]
    assert (before - source).abs().max() < 0.1 * source.abs().max()  # two steps of warm-up away
    for path in (first.run / "checkpoints").iterdir():  # what it started from is no longer needed
        path.rename(path.with_name(f"gone-{path.name}"))
    second("--max-steps", "4")
    assert second.status()["step"] == 4
    assert "init_from" not in second.stderr.read_text()
    second("--max-steps", "6", "--model.init_from", "null", code=2)  # part of the recipe
    assert "model.init_from: " in second.stderr.read_text()


def test_what_it_starts_from_is_found_wanting_before_anything_is_written(make_job, tmp_path):
    job = make_job()
    job("--model.init_from", "nowhere", code=3)
    (line,) = after_start(job.stderr.read_text())
    assert line.startswith(
        "model.init_from: nowhere: no such file or folder; weights are a run, a checkpoint, "
    )
    assert not (job.folder / "runs").exists()


def test_the_head_stays_where_the_classes_are_as_many():
    old, new = micro(seed=0), micro(64, seed=1)
    (note,) = fit(new, old.state_dict(), keeps_head=False)
    assert note == "4 position tables resized, stages.0.bias.table first"
    assert torch.equal(new.head.weight, old.head.weight)
    kept = micro(num_classes=5, seed=2)
    fresh = kept.head.weight.clone()
    assert fit(kept, old.state_dict(), keeps_head=False) == [
        "new classifier head: 5 classes (the weights have 3)"
    ]
    assert torch.equal(kept.head.weight, fresh)
    assert torch.equal(kept.stem.conv1.weight, old.stem.conv1.weight)
    with pytest.raises(
        ConfigError, match=r"head.weight is .3, 256. in the weights and .5, 256. in the model"
    ):
        fit(micro(num_classes=5), old.state_dict(), keeps_head=True)


def test_every_place_that_weights_lie_in(make_job, tmp_path):
    job = make_job()
    job("--max-steps", "2")
    (checkpoint,) = (job.run / "checkpoints").iterdir()
    averages = load_newest(job.run / "checkpoints").state["ema"]
    tensors = {name: tensor.contiguous() for name, tensor in averages.items()}
    (tmp_path / "export").mkdir()
    save_file(tensors, tmp_path / "export" / "model.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "export" / "model.safetensors")
    for place in (job.run, checkpoint, "export", "export/model.safetensors", "link.safetensors"):
        weights = read_weights(str(tmp_path / place))
        assert weights.kind == ("ema" if "runs" in str(place) else "model")
        assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in tensors.items())


def test_other_models_and_damaged_files_are_refused_in_one_line(tmp_path):
    tensors = contiguous(micro())

    def refusal(change, error=DataError):
        file = tmp_path / "x.safetensors"
        change(file)
        with pytest.raises(error) as caught:
            start_from(str(file), micro())
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"model.init_from: {file}")
        return line

    broken = tensors | {
        "stem.norm1.running_var": torch.full_like(tensors["stem.norm1.running_var"], torch.nan)
    }
    assert "running_var not finite; " in refusal(lambda f: save_file(broken, f))
    assert "cmtrain repair-bn" in refusal(lambda f: save_file(broken, f))
    assert "holds no weights" in refusal(lambda f: save_file({}, f))
    other = contiguous(timm.create_model("resnet18"))
    assert " is missing in the weights" in refusal(lambda f: save_file(other, f), ConfigError)
    reimpl = contiguous(micro(variant="reimpl"))
    assert "in the model" in refusal(lambda f: save_file(reimpl, f), ConfigError)
    assert ": cannot be read: " in refusal(lambda f: f.write_bytes(pickle.dumps({"a": 1})))
    huge = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    assert ": cannot be read: " in refusal(lambda f: f.write_bytes(len(huge).to_bytes(8, "little") + huge))
    (tmp_path / "x.safetensors").unlink()
    assert "not a regular file" in refusal(os.mkfifo)
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"neither a folder nor a weights file"):
        read_weights(str(tmp_path / "weights.npz"))


class Touch:
    """Would write a file if its pickle ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_could_run_code_is_refused_in_one_line(tmp_path):
    file = tmp_path / "x.pth"
    for content in ({"state_dict": micro().state_dict(), "args": Touch(tmp_path / "ran")}, micro()):
        torch.save(content, file)
        with pytest.raises(DataError) as caught:
            start_from(str(file), micro())
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"model.init_from: {file}: holds a ")
        assert line.endswith(", which could run code; save the state_dict alone")
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"no pickle", pickle.dumps([1])):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"model.init_from: .*x.pth: cannot be read: [A-Z][A-Za-z]+: ?"):
            start_from(str(file), micro())
    torch.save({"epoch": 3}, file)
    with pytest.raises(DataError, match="it holds no weights"):
        start_from(str(file), micro())


def trained(name, **options):
    torch.manual_seed(7)
    return timm.create_model(name, num_classes=3, **options)


def averaged(state):
    """The file of torchvision's trainer: its average is an AveragedModel of a DistributedDataParallel."""
    ema = {"n_averaged": torch.tensor(5)} | {f"module.{name}": tensor for name, tensor in state.items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {"model": other, "model_ema": ema, "epoch": 3, "args": argparse.Namespace(lr=0.1)}


FORMS = {
    "bare.pth": lambda state: state,
    "timm.pth.tar.pth": lambda state: {"arch": "resnet18", "state_dict": state, "epoch": 3},
    "ddp.pt": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    "compiled.bin": lambda state: {"ema": {f"module._orig_mod.{name}": t for name, t in state.items()}},
    "torchvision.pth": averaged,
    "old.pth": lambda state: {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("file", FORMS)
def test_files_of_other_trainers_start_a_run(tmp_path, file):
    source, model = trained("resnet18"), timm.create_model("resnet18", num_classes=5)
    fresh = model.fc.weight.clone()
    torch.save(FORMS[file](source.state_dict()), tmp_path / file)
    found, head = start_from(str(tmp_path / file), model)
    assert found == f"model.init_from: model weights of {tmp_path / file}"
    assert head == "model.init_from: new classifier head: 5 classes (the weights have 3)"
    wanted, own = source.state_dict(), model.state_dict()
    assert all(torch.equal(own[name], wanted[name]) for name in own if not name.startswith("fc."))
    assert torch.equal(model.fc.weight, fresh)


def test_all_classifiers_of_a_model_are_new_or_kept(tmp_path):
    source = trained("deit_tiny_distilled_patch16_224", img_size=32)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=32)
    fresh = model.head_dist.weight.clone()
    assert start_from(str(tmp_path / "x.pth"), model)[1].endswith("head: 5 classes (the weights have 3)")
    assert torch.equal(model.head_dist.weight, fresh)
    weights = read_weights(str(tmp_path / "x.pth"))
    assert fit(source, weights.tensors, keeps_head=True) == []
    assert num_classes_in(weights, "deit_tiny_distilled_patch16_224") == 3


def test_the_classes_of_a_model_that_timm_does_not_know_are_those_of_its_last_layer(tmp_path):
    tensors = {
        "a.weight": torch.ones(8, 3, 1, 1),
        "last.weight": torch.ones(7, 8),
        "last.bias": torch.ones(7),
    }
    assert num_classes_in(Weights(tmp_path, "model", tensors), "my_tiny") == 7
    with pytest.raises(DataError, match=r"it has no fc.weight, the classifier of resnet18"):
        num_classes_in(Weights(tmp_path, "model", tensors), "resnet18")
    with pytest.raises(DataError, match=r"it has no head.weight, the classifier of my_tiny"):
        num_classes_in(Weights(tmp_path, "model", {"bias": torch.ones(7)}), "my_tiny")


@pytest.mark.parametrize("num_classes", [3, 5])
@pytest.mark.parametrize("variant", ["paper", "reimpl"])
def test_both_references_files_start_a_run(tmp_path, variant, num_classes):
    source = trained("cmt_micro", variant=variant, img_size=32)
    model = micro(64, num_classes, seed=1, variant=variant)
    torch.save({"model": to_reference_state_dict(source)}, tmp_path / "x.pth")
    lines = start_from(str(tmp_path / "x.pth"), model)
    assert lines[1:] == (num_classes == 5) * [
        "model.init_from: new classifier head: 5 classes (the weights have 3)"
    ]
    names = ["stem.conv1.weight", "stages.3.blocks.0.attn.proj.weight", *["head.weight"][: num_classes == 3]]
    own, wanted = model.state_dict(), source.state_dict()
    assert all(torch.equal(own[name], wanted[name]) for name in names)
    other = micro(variant="reimpl" if variant == "paper" else "paper")
    with pytest.raises(ConfigError, match=rf"model.init_from: .*x.pth: .*is of variant='{variant}'"):
        start_from(str(tmp_path / "x.pth"), other)


def test_options_of_cmt_are_refused_for_other_models(make_job):
    job = make_job()
    job("--model.name", "resnet18", "--model.variant", "reimpl", code=2)
    (line,) = after_start(job.stderr.read_text())
    assert "model.variant (reimpl) is an option of CMT only, and does not fit model.name (resnet18)" in line


def test_a_start_from_an_older_checkpoint_names_both(tmp_path):
    """As export does; the newest one of the run is damaged."""
    older, newest = (
        save_checkpoint(tmp_path / "checkpoints", step, {"model": contiguous(micro())}, {})
        for step in (1, 2)
    )
    assert "rejected" not in " ".join(start_from(str(tmp_path), micro(seed=1)))
    flip(newest / "state.safetensors")
    first, second = start_from(str(tmp_path), micro(seed=1))
    assert first.startswith(f"model.init_from: checkpoint rejected: {newest}/state.safetensors: sha256")
    assert first.endswith(f"; taking {older.name} instead")
    assert second == f"model.init_from: model weights of {older}"


@pytest.mark.parametrize("place", ["run", "export"])
def test_a_head_of_other_classes_is_named(tmp_path, place):
    """As many classes in another order, or others, would otherwise start as each other without a word."""
    if place == "run":
        save_checkpoint(tmp_path / "checkpoints", 1, {"model": contiguous(micro())}, {})
        (tmp_path / "classes.json").write_text(json.dumps({"classes": ["cat", "dog", "owl"]}))
    else:
        save_file(contiguous(micro()), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"label_names": ["cat", "dog", "owl"]}))
    line = start_from(str(tmp_path), micro(seed=1), ["cat", "owl", "dog"])[-1]
    assert line.startswith("model.init_from: the classifier head is of other classes")
    assert line.endswith("output 1 was dog and is now owl")
    for names in (["cat", "dog", "owl"], []):
        assert "of other classes" not in " ".join(start_from(str(tmp_path), micro(seed=1), names))
