"""Train on pictures of two digits each, and get the same answers from every verb."""

import csv
import json

import numpy as np
import pytest
from helpers.runs import Forked
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from cmtrain.config.load import load_config

NUM_IMAGES = {"train": 240, "val": 60}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pictures of up to two digits 0 to 4, and lists with their labels; some have none."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    digits = load_digits(n_class=5)
    pixels = (digits.images * 15.9).astype(np.uint8)
    for split, count in NUM_IMAGES.items():
        (root / split).mkdir()
        rows = []
        for number in range(count):
            canvas, names = np.zeros((32, 32), np.uint8), set[str]()
            for side in (0, 16):
                if rng.random() < 0.8:
                    chosen = rng.integers(len(pixels))
                    drawn = Image.fromarray(pixels[chosen]).resize((16, 16))
                    canvas[8:24, side : side + 16] = np.asarray(drawn)
                    names.add(f"digit {digits.target[chosen]}")
            Image.fromarray(canvas).convert("RGB").save(root / split / f"{number:03}.png")
            rows.append([f"{split}/{number:03}.png", ";".join(sorted(names, reverse=True)) or "-"])
        with (root / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return root


@pytest.fixture
def job(make_job, pairs):
    lists = {"train_list": "train.csv", "val_list": "val.csv", "multi_label": True}
    return make_job(
        run={"name": "job"}, data={"root": str(pairs)} | lists, schedule={"epochs": 4},
        augment={"color_jitter": None, "hflip": 0.0, "scale": [0.7, 1.0]},
        mixing={"mixup": 0.2, "cutmix": 0.0, "smoothing": 0.05, "class_weights": "auto"},
        model={"drop_path_rate": 0.0, "drop_rate": 0.0}, optim={"lr": 5e-3}, ema={"decay": None},
    )  # fmt: skip


def run(job, *arguments):
    """A verb in the job's folder: its JSON lines."""
    process = Forked(["cmtrain", *map(str, arguments)], job.folder, {}, 1)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def lines(path):
    return path.read_text().splitlines()


def log_of(job, name):
    return [json.loads(line) for line in lines(job.folder / "runs" / name / "log.jsonl")]


def truth_of(pairs):
    rows = csv.reader(lines(pairs / "val.csv"))
    return {str(pairs / name): set(label.split(";")) - {"-"} for name, label in rows}


def test_every_verb_has_the_same_answers(job, pairs):
    result, names = job(), [f"digit {number}" for number in range(5)]

    # As scikit-learn's from the predicted probabilities.
    answers, truth = run(job, "predict", "job", pairs / "val", "--top", "5"), truth_of(pairs)
    assert len(answers) == NUM_IMAGES["val"]
    scores = [dict(zip(row["classes"], row["probabilities"], strict=True)) for row in answers]
    probabilities = np.array([[row[name] for name in names] for row in scores])
    is_of = np.array([[name in truth[row["path"]] for name in names] for row in answers])
    assert result["map"] == pytest.approx(average_precision_score(is_of, probabilities), abs=1e-6)
    assert result["map"] > is_of.mean() + 0.15

    # Thresholds, from the run's record to the export's answers.
    entry = json.loads((job.run / "classes.json").read_text())
    thresholds = entry["weights"]["model"]["thresholds"]
    assert entry["classes"] == names
    for row, shares in zip(answers, probabilities, strict=True):
        assert set(row["labels"]) == {names[k] for k in range(5) if shares[k] >= thresholds[k]}
    run(job, "export", "runs/job", "--out", "export")
    assert "| digit 3 |" in (job.folder / "export" / "README.md").read_text()
    exported = run(job, "predict", "export", pairs / "val", "--top", "5")
    assert [row["labels"] for row in exported] == [row["labels"] for row in answers]
    run(job, "predict", "job", pairs / "val" / "000.png", "--csv", "one.csv")
    head, row = csv.reader(lines(job.folder / "one.csv"))
    assert head[:3] == ["path", "labels", "class_1"]
    assert row[1] == (";".join(answers[0]["labels"]) or "-")

    # Evaluated again, with its mistakes.
    (again,) = run(job, "eval", "job", "--save-wrong", "wrong", "--per-class", "classes.csv")
    assert again["results"][0]["map"] == pytest.approx(result["map"], abs=1e-6)
    wrong = list(csv.DictReader(lines(job.folder / "wrong" / "mistakes.csv")))
    top1 = {row["path"]: row["classes"][0] for row in answers}
    sure = {row["path"] for row in answers if row["probabilities"][0] >= 0.5}
    missed = {path for path, name in top1.items() if name not in truth[path]}
    assert {row["path"] for row in wrong} == {path for path in missed if truth[path] or path in sure}
    assert all(set(row["true"].split(";")) - {"-"} == truth[row["path"]] for row in wrong)

    likeliest = {row["path"]: row["probabilities"][0] for row in answers}
    assert all(float(row["probability"]) == pytest.approx(likeliest[row["path"]], abs=1e-5) for row in wrong)

    # The records of the run.
    rows = list(csv.DictReader(lines(job.run / "summary.csv")))
    assert float(rows[-1]["eval_map"]) == pytest.approx(result["map"])
    assert "Mean average precision" in (job.run / "report.html").read_text()
    assert job.status()["reason"].startswith("mAP ")
    events = [event for event in job.events() if event["event"] == "evaluated"]
    assert [event["map"] for event in events] == [float(row["eval_map"]) for row in rows]
    best = max(rows, key=lambda row: float(row["eval_map"]))
    assert job.status()["best_step"] == int(best["step"])


def test_packed_on_two_ranks_and_resumed_it_is_the_same_run(job, pairs):
    packed = job.folder / "packed"
    lists = ("--train-list", "train.csv", "--val-list", "val.csv")
    run(job, "data", "pack", pairs, packed, *lists, "--multi-label")
    places = ("--data.root", str(packed), "--data.train_list", "null", "--data.val_list", "null")
    job(*places, "--max-steps", "6", "--run.name", "whole")
    job(*places, "--max-steps", "3", "--run.name", "parts")
    job(*places, "--max-steps", "6", "--run.name", "parts", nproc=2)
    whole, parts = ({row["step"]: row["loss"] for row in log_of(job, name)} for name in ("whole", "parts"))
    assert [parts[step] for step in whole] == pytest.approx(list(whole.values()), rel=0.02)
    last = json.loads((job.folder / "runs" / "parts" / "status.json").read_text())["result"]
    (again,) = run(job, "eval", "parts", "--json")  # in one process
    assert last["map"] == pytest.approx(again["results"][0]["map"], abs=1e-6)
    assert (job.folder / "runs" / "parts" / "mistakes.png").exists()
    older = str(next(iter((job.folder / "runs" / "parts" / "checkpoints").glob("*3"))))
    answers = run(job, "predict", older, pairs / "val" / "000.png")
    likely = zip(answers[0]["classes"], answers[0]["probabilities"], strict=True)
    assert answers[0]["labels"] == sorted(name for name, probability in likely if probability >= 0.5)
    run(job, "data", "stats", "--config", "job.yaml", *places)
    run(job, "data", "preview", "--config", "job.yaml", *places, "--out", "sheet.png")


def test_the_measure_needs_several_labels(job):
    job("--data.multi_label", "false", "--evaluate.best", "map", code=2)
    assert "--evaluate.best: " in job.stderr.read_text()


@pytest.mark.parametrize(
    ("sets", "best", "measure"), [("true", "null", "map"), ("false", "null", "top1"), ("true", "f1", "f1")]
)
def test_the_default_measure_is_map_where_there_are_several_labels(sets, best, measure):
    changes = [("data.multi_label", sets), ("evaluate.best", best)]
    assert load_config("configs/demo.yaml", changes).config.best_measure == measure
