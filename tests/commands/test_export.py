"""An exported model computes what was trained, in a process without the run; or nothing is exported."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers.runs import Forked, after_start, flip
from helpers.tools import needs
from safetensors import SafetensorError

import cmtrain.commands.export
from cmtrain.commands.export import (
    crop_pct_of,
    largest_difference,
    make_trained_model,
    missing_packages,
    to_timm,
)
from cmtrain.commands.trained_model import open_trained
from cmtrain.config.load import load_config
from cmtrain.errors import ConfigError
from cmtrain.storage.checkpoint import load_newest, save_checkpoint
from pipelines.spec import DataError

NEEDS_ONNX = needs("onnx", "onnxruntime", "onnxscript")
LOAD = {
    "timm": "import timm, cmtrain; model = timm.create_model('local-dir:out', pretrained=True).eval()",
    "torch-export": "model = torch.export.load('out/model.pt2').module()",
    "onnx": "import onnxruntime; session = onnxruntime.InferenceSession('out/model.onnx')\n"
    "model = lambda x: torch.from_numpy(session.run(['logits'], {'images': x.numpy()})[0])",
}


def export(job, *arguments, code=0):
    """`cmtrain export` in the job's folder: its JSON line, or stderr where it is refused."""
    process = Forked(["cmtrain", "export", *arguments], job.folder, {}, 1)
    out, err = process.communicate()
    assert process.returncode == code, err
    return err if code else json.loads(out) | {"stderr": err}


@pytest.fixture
def job(make_job):
    job = make_job(run={"name": "job", "seed": 1})
    job("--max-steps", "2")
    return job


def expected_logits(job, kind, images):
    trained = open_trained(str(job.run), [])
    with torch.no_grad():
        return make_trained_model(trained.config, trained.weights(kind))(images)


@pytest.mark.parametrize("name", ["timm", "torch-export", pytest.param("onnx", marks=NEEDS_ONNX)])
def test_a_fresh_process_gets_the_same_logits(job, name):
    result = export(job, "runs/job", "--format", name, "--out", "out")
    assert result["weights"] == "ema"
    assert result["max_difference"][name] <= 1e-5
    images = torch.randn(5, 3, 32, 32)
    torch.save(images, job.folder / "images.pt")
    program = f"import torch\n{LOAD[name]}\n"
    program += "with torch.no_grad(): torch.save(model(torch.load('images.pt')), 'logits.pt')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=job.folder, check=True, timeout=600)
    logits = torch.load(job.folder / "logits.pt")
    torch.testing.assert_close(logits, expected_logits(job, "ema", images), rtol=0, atol=1e-5)


def test_timm_knows_how_to_feed_it(job):
    job(
        "--run.name",
        "reimpl",
        "--model.variant",
        "reimpl",
        "--data.eval_interpolation",
        "bilinear",
        "--max-steps",
        "1",
    )
    export(job, "reimpl", "--weights", "model", "--out", "out")
    config = json.loads((job.folder / "out" / "config.json").read_text())
    assert config["label_names"] == ["class0", "class1", "class2"]
    assert config["num_classes"] == 3
    preprocessing = config["pretrained_cfg"]
    assert preprocessing["input_size"] == [3, 32, 32]
    assert math.floor(32 / preprocessing["crop_pct"]) == 36
    assert preprocessing["interpolation"] == "bilinear"
    assert preprocessing["mean"] == [0.485, 0.456, 0.406]
    card = (job.folder / "out" / "README.md").read_text()
    assert "| weights | model, after 1 steps |" in card
    assert "  variant: reimpl" in card
    assert "| top-1 | " in card
    assert "&" not in card
    settings = card.split("```yaml\n")[1].split("```")[0]
    (job.folder / "card.yaml").write_text(settings)
    assert (
        load_config(job.folder / "card.yaml").config
        == load_config(job.run.parent / "reimpl" / "config.yaml").config
    )
    modes = {path.stat().st_mode & 0o777 for path in (job.folder / "out").iterdir()}
    assert len(modes) == 1


def test_nothing_is_exported_that_is_not_whole(job):
    before = sorted(os.listdir(job.folder))

    def refused(*arguments, code):
        (line,) = after_start(export(job, *arguments, code=code))
        assert sorted(os.listdir(job.folder)) == before
        return line

    assert "runs: exists already" in refused("runs/job", "--out", "runs", code=2)
    assert "the following arguments are required: --out" in refused("runs/job", code=2)
    assert "the following arguments are required: RUN" in refused("--out", "out", code=2)
    assert "nowhere: no run" in refused("nowhere", "--out", "out", code=3)
    assert "not for timm's layout" in refused("runs/job", "--out", "out", "--fold-bn", code=2)
    assert "does not fit this model" in refused(
        "runs/job", "--out", "out", "--model.variant", "reimpl", code=2
    )
    if missing_packages():
        assert "pip install 'cmtrain[export]'" in refused(
            "runs/job", "--out", "out", "--format", "all", code=3
        )
    loaded = load_newest(job.run / "checkpoints")
    loaded.state["ema"]["stem.norm1.running_var"][0] = math.nan
    save_checkpoint(job.run / "checkpoints", 3, loaded.state, loaded.meta)
    line = refused("runs/job", "--out", "out", code=3)
    assert "ema stem.norm1.running_var not finite" in line
    assert "cmtrain repair-bn" in line
    export(job, str(loaded.path), "--out", "out")  # an older checkpoint by its own path


def test_a_format_that_differs_leaves_nothing_behind(job, monkeypatch):
    monkeypatch.setattr(cmtrain.commands.export, "TOLERANCE", -1.0)
    before = sorted(os.listdir(job.folder))
    with pytest.raises(DataError, match="--format timm: its logits differ by"):
        cmtrain.commands.export.export(
            open_trained(str(job.run), []),
            formats=["timm"],
            out=str(job.folder / "out"),
            kind=None,
            fold_bn=False,
        )
    assert sorted(os.listdir(job.folder)) == before


def test_a_format_that_computes_something_else_is_noticed():
    sample = torch.randn(3, 4)
    assert largest_difference(torch.sin, torch.sin, sample) == 0
    assert largest_difference(torch.sin, lambda x: torch.sin(x) + 1e-3 * (len(x) == 3), sample) > 9e-4
    assert math.isnan(largest_difference(torch.sin, lambda x: torch.sin(x) * math.nan, sample))


def test_batchnorm_folded_for_inference(job):
    result = export(job, "runs/job", "--format", "torch-export", "--fold-bn", "--out", "out")
    assert 0 < result["max_difference"]["torch-export"] <= 1e-4
    norms = [
        key for key in torch.export.load(job.folder / "out" / "model.pt2").state_dict if "running_var" in key
    ]
    kept = [key for key in load_newest(job.run / "checkpoints").state["model"] if "running_var" in key]
    assert 0 < len(norms) < len(kept) / 2


def test_every_evaluation_size_survives_the_crop_share():
    for image_px in range(32, 385, 32):
        for resize_px in range(image_px, 2 * image_px):
            assert math.floor(image_px / crop_pct_of(image_px, resize_px)) == resize_px


@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error: No space left on device"), RuntimeError("PytorchStreamWriter failed")],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(job, monkeypatch, error):
    """safetensors and torch have errors of their own for it."""

    def full(*arguments, **how):
        raise error

    monkeypatch.setattr(cmtrain.commands.export, "save_for_hf", full)
    trained = open_trained(str(job.run), [])
    out = job.folder / "out"
    with pytest.raises(DataError, match=f"^--out {out}: cannot be written: .*{error}"):
        cmtrain.commands.export.export(trained, formats=["timm"], out=str(out), kind=None, fold_bn=False)
    assert [path.name for path in job.folder.iterdir() if "out" in path.name] == ["stdout.txt"]


def test_the_json_line_names_what_was_rejected(job, capsys):
    root = job.run / "checkpoints"
    loaded = load_newest(root)
    newest = save_checkpoint(root, 3, loaded.state, loaded.meta)
    flip(newest / "state.safetensors")
    trained, out = open_trained(str(job.run), []), str(job.folder / "out")
    cmtrain.commands.export.export(trained, formats=["timm"], out=out, kind=None, fold_bn=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["checkpoint"] == str(loaded.path)
    assert printed["rejected"] == [f"{newest}/state.safetensors: sha256 differs from the manifest's"]


def test_a_model_that_timm_cannot_describe_is_refused_in_one_line(tmp_path):
    config = load_config("configs/demo.yaml").config
    with pytest.raises(ConfigError, match=r"Linear has no pretrained_cfg, which an export needs; build it"):
        to_timm(tmp_path, torch.nn.Linear(2, 2), config, ())
