"""Predictions are what evaluation computes: from the run, and from its exports (`cmtrain predict`)."""

import argparse
import csv
import json
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import torch
from helpers.images import write_tree
from helpers.runs import Forked, after_start
from helpers.tools import needs

from cmtrain.commands import predict as predict_command
from cmtrain.commands.export import make_trained_model
from cmtrain.commands.trained_model import open_trained
from cmtrain.training import build, loaders

NEEDS_ONNX = needs("onnx", "onnxruntime", "onnxscript")
SIZE = ("--data.image_px", "64", "--data.eval_resize_px", "64")
BATCH = ("--train.max_batch_per_gpu", "8")  # as make_job's; another batch may round differently


def predict(job, *arguments, code=0):
    """`cmtrain predict` in the job's folder: its JSON lines, and the lines of stderr."""
    process = Forked(["cmtrain", "predict", *map(str, arguments)], job.folder, {}, 1)
    out, err = process.communicate()
    assert process.returncode == code, err
    return [json.loads(line) for line in out.splitlines()], after_start(err)


def export(job, *arguments):
    process = Forked(["cmtrain", "export", "runs/job", *arguments], job.folder, {}, 1)
    _, err = process.communicate()
    assert process.returncode == 0, err


@pytest.fixture
def job(make_job):
    job = make_job(run={"name": "job"})
    job("--max-steps", "4")
    return job


def evaluated(job):
    """Files, labels and logits of the validation images, by the parts that `cmtrain eval` is made of."""
    trained = open_trained(str(job.run), [])
    model = make_trained_model(trained.config, trained.weights("ema"))
    accelerator = build.make_accelerator("fp32")
    place, _ = loaders.place_loaders(trained.config, accelerator)
    manifest = loaders.open_val(trained.config, trained.class_names)
    loader = loaders.make_eval_loader(trained.config, manifest, 8, accelerator, place)
    with torch.no_grad():
        logits = torch.cat([model(batch.images) for batch in loader.epoch(0)])
    loader.close()
    return [manifest.file(index) for index in range(len(manifest))], manifest.labels, logits


def named(rows):
    return [int(row["classes"][0].removeprefix("class")) for row in rows]


def test_every_prediction_is_that_of_the_evaluation(job, images):
    """From the run and from its export for timm bit for bit, with and without embeddings."""
    files, labels, logits = evaluated(job)
    export(job, "--out", "exported")
    for model in ("runs/job", "exported", "exported/model.safetensors"):
        rows, _ = predict(job, model, images / "val", *BATCH)
        assert [row["path"] for row in rows] == files
        assert named(rows) == logits.argmax(1).tolist()
        expected = logits.softmax(1).sort(descending=True).values
        assert torch.equal(torch.tensor([row["probabilities"] for row in rows]), expected)
        (job.folder / "e.npz").unlink(missing_ok=True)
        assert predict(job, model, images / "val", "--embeddings", "e.npz", *BATCH)[0] == rows
        with np.load(job.folder / "e.npz") as arrays:
            assert arrays["paths"].tolist() == files
            assert torch.equal(torch.from_numpy(arrays["logits"]), logits)
            features = torch.from_numpy(arrays["embeddings"])
    weights = open_trained(str(job.run), []).weights("ema").tensors
    again = torch.nn.functional.linear(features, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(again, logits)
    process = Forked(["cmtrain", "eval", "runs/job", "--weights", "ema"], job.folder, {}, 1)
    (result,) = json.loads(process.communicate()[0])["results"]
    assert result["top1"] == pytest.approx((np.array(named(rows)) == labels).mean())


@NEEDS_ONNX
def test_an_onnx_file_predicts_the_same(job, images):
    files, _, logits = evaluated(job)
    export(job, "--format", "onnx", "--out", "exported")
    for model in ("exported", "exported/model.onnx"):
        rows, _ = predict(job, model, images / "val")
        assert [row["path"] for row in rows] == files
        assert named(rows) == logits.argmax(1).tolist()
        shares = torch.tensor([row["probabilities"] for row in rows])
        torch.testing.assert_close(shares, logits.softmax(1).sort(descending=True).values, rtol=0, atol=1e-5)
    _, (line,) = predict(job, "exported", images / "val", "--embeddings", "e.npz", code=2)
    assert line.startswith("--embeddings: this model has logits alone")
    _, (line,) = predict(job, "exported", images / "val", *SIZE, code=2)
    assert line == "--data.image_px: an ONNX file has one image size; take the run"
    config = job.folder / "exported" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("32", "64"))
    _, (line,) = predict(job, "exported", images / "val", code=3)
    assert line == "exported/model.onnx: takes images of [3, 32, 32], and config.json says [3, 64, 64]"
    config.write_text(before)
    (job.folder / "exported" / "model.onnx").write_bytes(b"no model")
    _, (line,) = predict(job, "exported", images / "val", code=3)
    assert line.startswith("exported/model.onnx: ")
    config.write_text("{}")
    _, (line,) = predict(job, "exported", images / "val", code=3)
    assert line == "exported/config.json: not as `cmtrain export` writes it: KeyError: 'pretrained_cfg'"


def test_what_cannot_be_read_is_named_and_the_rest_is_predicted(job, images):
    good = sorted((images / "val" / "class0").iterdir())[:3]
    folder = job.folder / unicodedata.normalize("NFD", "fünf Hütten 家")
    folder.mkdir()
    for number, path in enumerate(good):
        shutil.copy(path, folder / f"é{number}.JPG")
    (folder / "é1.JPG").write_bytes(b"\xff\xd8\xff\xe0 no photograph")
    (folder / "cut.jpg").write_bytes(good[0].read_bytes()[:-200])
    (folder / "notes.heic").write_bytes(b"ignored")
    arguments = ("job", folder, "gone.jpg", "--top", "2")
    _, lines = predict(job, *arguments, code=3)
    assert lines == [f"{folder}: ignored: 1 .heic", "gone.jpg: no such file or folder"]
    (job.folder / "gone.jpg").symlink_to("nowhere")
    rows, lines = predict(job, *arguments, "--csv", "out.csv", code=3)
    assert rows == []
    lines = [line for line in lines if "libjpeg" not in line and not line.startswith("loading ")]
    assert [line.partition(": ")[0] for line in lines[1:-1]] == [
        f"{folder}/é1.JPG",
        "gone.jpg",
        f"{folder}/cut.jpg",
    ]
    assert lines[0] == f"{folder}: ignored: 1 .heic"
    assert lines[-1] == "3 of 5 images cannot be read"
    header, *table = csv.reader((job.folder / "out.csv").read_text().splitlines())
    assert header == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row[0] for row in table] == [f"{folder}/é0.JPG", f"{folder}/é2.JPG"]
    rows, _ = predict(job, "job", folder / "é0.JPG", "--top", "99", "--jsonl", "out.jsonl", "--json")
    assert [json.loads(line) for line in (job.folder / "out.jsonl").read_text().splitlines()] == rows
    assert len(rows[0]["classes"]) == 3
    _, (line,) = predict(job, "job", folder, "--jsonl", "out.jsonl", code=2)
    assert line == "--jsonl: out.jsonl: exists, and is no result to replace; give another name"
    _, (line,) = predict(job, "job", folder, "--csv", "both", "--embeddings", "./both", code=2)
    assert line == "--csv, --jsonl and --embeddings: two of them name one file"
    # Nothing is written of nothing
    rows, lines = predict(job, "job", folder / "cut.jpg", "--csv", "none.csv", code=3)
    assert rows == []
    assert f"{folder}/cut.jpg: image file is truncated" in lines[-2]
    assert not (job.folder / "none.csv").exists()
    rows, lines = predict(job, "job", folder / "é1.JPG", code=3)
    assert lines == [f"{folder}/é1.JPG: Truncated File Read", "1 of 1 images cannot be read"]


def test_a_person_gets_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    rows = [
        {"path": "a.jpg", "classes": ["cat", "dog"], "probabilities": [0.987, 0.013]},
        {"path": "long\nname.jpg", "classes": ["dog", "cat"], "probabilities": [0.5, 0.5]},
    ]
    options = argparse.Namespace(csv=None, jsonl=None, embeddings=None, json=False)
    predict_command._write(rows, [], options)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a.jpg           cat 98.7 %, dog 1.3 %",
        r"long\nname.jpg  dog 50.0 %, cat 50.0 %",
    ]


def test_a_run_without_class_names_takes_those_of_its_images(job, images, tmp_path):
    (job.run / "classes.json").unlink()
    image = images / "val" / "class1" / "0001.jpg"
    (row,), _ = predict(job, "job", image)
    assert sorted(row["classes"]) == ["class0", "class1", "class2"]
    root = write_tree(tmp_path / "gone", 0, 3)
    _, (line,) = predict(job, "job", image, "--data.root", root, code=3)
    assert f"{root}/train: no such folder" in line
