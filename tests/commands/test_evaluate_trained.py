"""Evaluate a run as it did itself, and with other sizes and images (`cmtrain eval`)."""

import csv
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.images import write_tree
from helpers.runs import Forked, flip
from PIL import Image

from cmtrain.cli.main import main
from cmtrain.commands.trained_model import open_trained
from cmtrain.config.load import load_config
from cmtrain.config.schema import sizes_of
from cmtrain.errors import ConfigError
from cmtrain.step.evaluate import evaluate
from cmtrain.training.loaders import open_val
from pipelines.preview import TILE_PX
from pipelines.spec import UNREADABLE, Batch


def run_eval(job, *arguments, code=0):
    """`cmtrain eval` in the job's folder: its JSON line (and stderr), or stderr where it is refused."""
    process = Forked(["cmtrain", "eval", *arguments], job.folder, {}, 1)
    out, err = process.communicate()
    assert process.returncode == code, err
    return json.loads(out) | {"stderr": err} if out else err


@pytest.fixture
def trained(make_job):
    job = make_job(run={"name": "job", "seed": 1})
    return job, job("--max-steps", "8")


def test_an_older_checkpoint_is_never_taken_in_silence(trained, capsys):
    """An export of a model that is an epoch older than its report looks the same."""
    job, _ = trained
    older, newest = sorted((job.run / "checkpoints").iterdir())[-2:]
    assert open_trained(str(job.run), []).checkpoint.path == newest
    assert capsys.readouterr().err == ""
    flip(newest / "state.safetensors")
    assert open_trained(str(job.run), []).checkpoint.path == older
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("checkpoint rejected: ")
    assert newest.name in line
    assert line.endswith(f"; taking {older.name} instead")


def test_it_reports_what_the_run_reported(trained):
    job, result = trained
    reported = run_eval(
        job, "runs/job", "--per-class", "classes.csv", "--confusion", "matrix.csv", "--json", "again.json"
    )
    model, ema = reported["results"]
    assert (model["weights"], ema["weights"]) == ("model", "ema")
    for key in ("top1", "top5", "loss"):
        assert model[key] == pytest.approx(result[key], abs=1e-6)
        assert ema[key] == pytest.approx(result[f"ema_{key}"], abs=1e-6)
    assert (reported["step"], model["num_images"], model["image_px"], model["resize_px"]) == (8, 31, 32, 36)
    stderr = reported.pop("stderr")
    assert f"{100 * model['top1']:5.2f} %" in stderr
    assert json.loads((job.folder / "again.json").read_text()) == reported
    rows = list(csv.DictReader((job.folder / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == ["class0", "class1", "class2"] * 2
    assert sum(int(row["correct"]) for row in rows if row["weights"] == "ema") == round(31 * ema["top1"])
    header, *matrix = csv.reader((job.folder / "matrix.csv").read_text().splitlines())
    assert header[1:] == ["class0", "class1", "class2"]
    best = max(model["top1"], ema["top1"])
    assert sum(int(row[place + 1]) for place, row in enumerate(matrix)) == round(31 * best)
    run_eval(job, "runs/job", "--expect", "1.0", code=5)
    run_eval(job, "job", "--expect", "0.0", "--weights", "ema")


def test_mistakes_are_saved_the_most_confident_first(trained, images):
    job, _ = trained
    row = run_eval(job, "job", "--weights", "model", "--save-wrong", "wrong")["results"][0]
    header, *rows = csv.reader((job.folder / "wrong" / "mistakes.csv").read_text().splitlines())
    assert header == ["path", "true", "predicted", "probability"]
    assert len(rows) == round(31 * (1 - row["top1"])) > 0
    probabilities = [float(probability) for *_, probability in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 1 / 3 <= probabilities[-1] <= probabilities[0] <= 1
    for path, true, predicted, _ in rows:
        assert path.startswith(f"{images}/val/{true}/")
        assert predicted != true
    columns = math.ceil(math.sqrt(len(rows)))
    with Image.open(job.folder / "wrong" / "mistakes.png") as sheet:
        assert sheet.size[0] == columns * TILE_PX
        first = np.asarray(sheet)[:TILE_PX:4, :TILE_PX:4]
    with Image.open(rows[0][0]) as image:  # 48 px, so that a crop of the middle is almost alike
        middle = np.asarray(image.resize((36, 36)).crop((2, 2, 34, 34)))
    assert np.abs(first.astype(int) - middle).mean() < 20
    line = "--save-wrong wrong: exists already; choose another folder"
    assert line in run_eval(job, "job", "--save-wrong", "wrong", code=2)
    job("--run.name", "good", "--schedule.epochs", "30")
    assert run_eval(job, "good", "--save-wrong", "none", "--weights", "model")["results"][0]["top1"] == 1
    assert os.listdir(job.folder / "none") == ["mistakes.csv"]


def test_several_sizes_at_once(trained):
    job, _ = trained
    reported = run_eval(job, "runs/job", "--weights", "model", "--resize-px", "64,72", "--image-px", "32,64")
    sizes = [(row["image_px"], row["resize_px"]) for row in reported["results"]]
    assert sizes == [(32, 64), (64, 72)]
    assert len({row["loss"] for row in reported["results"]}) == 2


def test_sizes_keep_the_runs_proportion():
    config = load_config("configs/full_in1k.yaml").config
    assert sizes_of(config, (), ()) == [(160, 184)]
    assert sizes_of(config, (224,), ()) == [(224, 258)]
    assert sizes_of(config, (), (184, 182)) == [(160, 184), (160, 182)]
    with pytest.raises(ConfigError, match="--image-px: must be multiples of 32, got 100"):
        sizes_of(config, (100,), ())
    assert sizes_of(config, (64, 96), (72, 108)) == [(64, 72), (96, 108)]
    assert sizes_of(config, (64, 96), (128,)) == [(64, 128), (96, 128)]
    message = "--image-px has 3 sizes and --resize-px 2: give one for each, or several for one"
    with pytest.raises(ConfigError, match=message):
        sizes_of(config, (64, 96, 128), (72, 108))
    with pytest.raises(ConfigError, match="--resize-px: 182 is less than the image side 224"):
        sizes_of(config, (160, 224), (182,))


def test_images_from_elsewhere_by_name_or_by_number(trained, tmp_path):
    job, _ = trained
    root = write_tree(tmp_path / "other", 0, 12)
    (by_name,) = run_eval(job, "runs/job", "--weights", "ema", "--folder", str(root / "val"))["results"]
    for name in ("class0", "class1", "class2"):
        (root / "val" / name).rename(root / "val" / name[-1])
    (by_number,) = run_eval(job, "runs/job", "--weights", "ema", "--folder", str(root / "val"))["results"]
    assert by_name == by_number
    assert by_name["num_images"] == 12
    (root / "val" / "2").rename(root / "val" / "3")
    line = run_eval(job, "runs/job", "--folder", str(root / "val"), code=3)
    assert "/val/3: not one of the 3 training classes; 2 of 3 folders are (0, 1), 1 such: 3" in line
    assert "no such folder" in run_eval(job, "runs/job", "--folder", "nowhere", code=3)


def test_only_the_classes_that_images_have_may_compete(trained, tmp_path):
    job, _ = trained
    val = write_tree(tmp_path / "other", 0, 60) / "val"
    command = ["cmtrain", "predict", "runs/job", "--top", "3", str(val)]
    answers = [
        (row["path"].split("/")[-2], row["classes"])
        for row in map(json.loads, Forked(command, job.folder, {}, 1).communicate()[0].splitlines())
    ]
    absent = next(classes[0] for true, classes in answers if classes[0] != true)
    shutil.rmtree(val / absent)
    others = [(true, classes) for true, classes in answers if true != absent]
    right = sum(true == next(name for name in classes if name != absent) for true, classes in others)
    how = "--weights", "ema", "--folder", str(val)
    (among_two,) = run_eval(job, "runs/job", *how, "--present-classes")["results"]
    (among_all,) = run_eval(job, "runs/job", *how)["results"]
    assert among_two["top1"] == right / len(others) > among_all["top1"]


def test_the_training_images_need_not_be_there(trained, tmp_path):
    job, result = trained
    config = load_config(job.run / "config.yaml").config
    shutil.copytree(f"{config.data.root}/val", tmp_path / "moved" / "val")
    reported = run_eval(job, "runs/job", "--data.root", str(tmp_path / "moved"))
    assert reported["results"][0]["top1"] == pytest.approx(result["top1"], abs=1e-6)


def test_names_are_taken_before_numbers(tmp_path):
    """Digits are classes whose names are numbers, and 10 comes before 2 in their order."""
    names = ("0", "1", "10", "2")
    root = write_tree(tmp_path, 0, 4, num_classes=2) / "val"
    (root / "class0").rename(root / "10")
    (root / "class1").rename(root / "2")
    data = {"cache_dir": str(tmp_path / "cache"), "max_bad_fraction": 0.1, "multi_label": False}
    config = SimpleNamespace(data=SimpleNamespace(**data))
    assert set(open_val(config, names, str(root)).labels.tolist()) == {2, 3}
    assert main(["data", "pack", str(root.parent), str(tmp_path / "packed")]) == 0
    assert set(open_val(config, names, str(tmp_path / "packed" / "val")).labels.tolist()) == {2, 3}


def test_ranked_classes_lie_at_their_images_place():
    logits = torch.randn(7, 6)
    batches = [
        Batch(logits[indices], torch.zeros(len(indices), dtype=torch.long), torch.tensor(indices))
        for indices in ([4, 0, 2], [6, 1, 5, 3])
    ]
    how = {"accelerator": Accelerator(cpu=True), "num_images": 7, "num_classes": 6}
    result = evaluate(torch.nn.Identity(), batches, **how)
    assert torch.equal(result.ranked, logits.topk(5).indices)
    torch.testing.assert_close(result.confidence, logits.softmax(1).amax(1))
    batches[0].labels[1] = UNREADABLE
    result = evaluate(torch.nn.Identity(), batches, **how)
    assert result.ranked[0].tolist() == [-1] * 5


def test_what_cannot_be_evaluated_is_refused_in_one_line(trained):
    job, _ = trained
    job("--run.name", "plain", "--ema.decay", "null", "--max-steps", "1")
    assert "it has no ema weights" in run_eval(job, "runs/plain", "--weights", "ema", code=3)
    assert len(run_eval(job, "runs/plain")["results"]) == 1
    assert "the following arguments are required: RUN" in run_eval(job, code=2)
    assert "must be a share 0..1" in run_eval(job, "runs/job", "--expect", "75", code=2)
    assert "--image-px: must be a whole number" in run_eval(job, "runs/job", "--image-px", "big", code=2)
    assert "--optim.lrr" in run_eval(job, "runs/job", "--optim.lrr", "1", code=2)


def test_a_run_without_its_records_is_opened_by_what_its_checkpoint_holds(trained, capsys):
    job, _ = trained
    overrides = [("data.image_px", "64"), ("data.eval_resize_px", "64")]
    path, whole = job.run / "config.yaml", open_trained(str(job.run), overrides)
    for content in (b"", b"\xff", b"model: [1", None):
        path.unlink() if content is None else path.write_bytes(content)
        assert open_trained(str(job.run), overrides).config == whole.config
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line
        assert line.endswith("; taking the configuration that is in step-000000008")
        with pytest.raises(ConfigError, match="image_px"):
            open_trained(str(job.run), [("data.image_px", "x")])
        capsys.readouterr()
    for content in (b"", b"[]", b'{"classes": 3}'):
        (job.run / "classes.json").write_bytes(content)
        assert open_trained(str(job.run), []).class_names == ()
        assert "classes.json: " in capsys.readouterr().err
