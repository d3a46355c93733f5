"""The report shows a run folder in any state, and runs no script but its own."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.pages import DOUBLE_IDS, EVIL, OUTSIDE, OVERLAPS, UNNAMED, ParsedPage
from helpers.report_runs import BEGIN, eventful, write_run
from torch._subclasses.fake_tensor import FakeTensorMode

from cmtrain.cli.main import main
from cmtrain.monitoring.report.headline import measure_times, newest_rows
from cmtrain.monitoring.report.page import render, report, sheet_uri, write_report
from cmtrain.step.evaluate import Answers, Evaluation, evaluate
from cmtrain.storage.run_record import RUN_FILES, read_run
from pipelines.spec import UNREADABLE, Batch, DataError


def page_of(*folders: Path) -> ParsedPage:
    return ParsedPage(render([read_run(folder) for folder in folders]))


# ---- what a run writes


def test_a_run_ends_with_its_report(make_job):
    job = make_job()
    result = job(nproc=2)
    page = ParsedPage((job.folder / result["report"]).read_text())
    assert f"Top-1 {100 * result['top1']:.1f} %" in page.words
    assert f"Top-1, EMA {100 * result['ema_top1']:.1f} %" in page.words
    assert "finished" in page.words
    assert "global_batch_size: 16" in page.words
    assert f"torch {torch.__version__.split('+')[0]}" in page.words
    assert any(tag == "img" and attributes["src"].startswith("data:image/") for tag, attributes in page.tags)
    # Every image counts once, over both ranks: the counts of the classes give the accuracy of the run.
    classes = json.loads((job.run / "classes.json").read_text())
    assert classes["classes"] == ["class0", "class1", "class2"]
    for weights, key in (("model", "top1"), ("ema", "ema_top1")):
        counts = classes["weights"][weights]
        assert sum(counts["images"]) == 31
        assert sum(counts["correct"]) / 31 == pytest.approx(result[key])
        assert np.array(counts["confusion"]).trace() == sum(counts["correct"])
    evaluations = [event for event in job.events() if event["event"] == "evaluated"]
    assert [event["step"] for event in evaluations] == [6, 12, 18]
    assert all(event["seconds"] > 0 for event in evaluations)


def test_a_report_that_cannot_be_written_costs_nothing_but_itself(make_job):
    job = make_job()
    (job.run / "report.html").mkdir(parents=True)
    assert job("--max-steps", "2")["state"] == "finished"
    assert "misses a record and goes on: report.html: Is a directory" in job.stderr.read_text()
    assert not list(job.run.glob(".report.html*"))


# ---- counting by class, on the device


def outcomes_by_numpy(logits, labels, num_classes):
    matrix = np.zeros((num_classes, num_classes), int)
    read = labels != UNREADABLE
    np.add.at(matrix, (labels[read], logits[read].argmax(1)), 1)
    return matrix


@pytest.mark.parametrize("num_classes", [2, 7, 100, 101])
def test_classes_are_counted_exactly(num_classes):
    rng = np.random.default_rng(num_classes)
    logits = rng.normal(size=(500, num_classes)).astype(np.float32)
    labels = rng.integers(-1, num_classes, 500)
    whole = torch.tensor(logits), torch.tensor(labels), torch.arange(500)
    batches = [Batch(*(values[part] for values in whole)) for part in (slice(130), slice(130, None))]
    result = evaluate(torch.nn.Identity(), batches, Accelerator(cpu=True), 500, num_classes)
    expected = outcomes_by_numpy(logits, labels, num_classes)
    assert result.class_images == expected.sum(1).tolist()
    assert result.class_correct == expected.diagonal().tolist()
    assert result.confusion == (expected.tolist() if num_classes <= 100 else None)
    assert result.num_unreadable == (labels == UNREADABLE).sum()


@pytest.mark.parametrize("num_classes", [10, 1000])
def test_counting_never_makes_the_host_wait(num_classes):
    """Under FakeTensorMode every .item() and bool() raises."""
    with FakeTensorMode():
        logits, numbers = torch.zeros(8, num_classes), torch.zeros(8, dtype=torch.int64)
        for label_sets in (None, torch.zeros(3, num_classes)):
            answers = Answers(8, num_classes, torch.device("cpu"), label_sets)
            answers.add(logits, numbers, numbers)


# ---- the verb


def test_the_verb_loads_no_torch_and_prints_the_path(tmp_path):
    write_run(tmp_path / "a")
    code = (
        "import sys\n"
        "from cmtrain.cli.main import main\n"
        f"code = main(['report', {str(tmp_path / 'a')!r}])\n"
        "print(code, [name for name in ('torch', 'nvidia', 'accelerate') if name in sys.modules])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    ).stdout
    assert out.splitlines() == [str(tmp_path / "a" / "report.html"), "0 []"]
    assert (tmp_path / "a" / "report.html").stat().st_size < 150_000


def test_a_folder_that_is_no_run_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, words in (("nowhere", "no such run folder"), ("empty", "not a run folder")):
        assert main(["report", str(tmp_path / folder)]) == 3
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
    assert main(["report"]) == 2
    assert list(tmp_path.rglob("*.html")) == []


def test_out_and_several_runs(tmp_path, capsys, monkeypatch):
    folders = [str(write_run(tmp_path / name, num_logs=20)) for name in ("a", "b")]
    assert main(["report", folders[0], "--out", str(tmp_path / "x.html")]) == 0
    assert not (tmp_path / "a" / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *folders]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "x.html"), "report.html"]
    assert "2 runs" in (tmp_path / "report.html").read_text()


# ---- what it shows


def test_events_are_listed_and_marked(tmp_path):
    run = write_run(tmp_path / "a", events=eventful())
    html = render([read_run(run)])
    page = ParsedPage(html)
    assert "1m 40s 2,500 rollback good step 2000 cause blocks.1.3.attn.proj: not finite" in page.words
    assert "4m 0s 6,000 checkpoint failed error No space left on device" in page.words
    assert "samples 0; 1; 2 and 96 more" in page.words
    assert html.count('class="mark rollback"') == html.count('class="mark failure"') == 7  # in every chart
    glyphs = {attributes.get("href") for tag, attributes in page.tags if tag == "use"}
    assert glyphs == {
        f"#glyph-{kind}" for kind in ("start", "bad", "spike", "rollback", "failure", "file", "end")
    }
    assert "evaluation 5 %" in page.words
    assert "3 1 rollback" in page.words


def test_a_bad_file_is_listed_once_over_all_starts(tmp_path):
    """Every start writes all files that it leaves out."""
    bad = [
        {"event": "bad_file", "path": f"{i}.jpg", "reason": "truncated", "kind": "truncated"}
        for i in (1, 2, 3)
    ]
    events = [
        {"event": "resumed", "restarts": 0, "model": "cmt_ti", "device": "cuda", "world_size": "1"},
        *bad,
    ]
    events = [event | {"time": BEGIN + start} for start in (10, 20, 30) for event in events]
    run = write_run(tmp_path / "a", events=events)
    page = page_of(run)
    for path in ("1.jpg", "2.jpg", "3.jpg"):
        assert page.words.count(f"path {path}") == 1
    assert "4 starts" in page.words
    assert "model cmt_ti on 1 GPU" in page.words
    assert "world size" not in page.words
    assert "restarts" not in page.words
    news = newest_rows(read_run(run), BEGIN + 40)
    assert [row["kind"] for row in news] == ["finished"] + ["resumed"] * 3 + ["bad file"] * 3 + ["started"]


@pytest.mark.parametrize(
    ("device", "world_size", "text"),
    [
        ("cuda", "1", "1 GPU"),
        ("cuda", "8", "8 GPUs"),
        ("cpu", "1", "1 process on the CPU"),
        ("cpu", "2", "2 processes on the CPU"),
    ],
)
def test_what_a_run_trains_on_in_words(tmp_path, device, world_size, text):
    events = [
        {"time": BEGIN, "event": "resumed", "precision": "fp16", "device": device, "world_size": world_size}
    ]
    page = page_of(write_run(tmp_path / "a", events=events))
    assert f"fp16 \u00b7 {text} " in page.words
    assert f"trained on {text}" in page.words


def test_a_flood_of_events_is_cut_with_a_note(tmp_path):
    flood = [
        {"time": BEGIN + i, "event": "bad_file", "path": f"{i}.jpg", "reason": "truncated"}
        for i in range(1000)
    ]
    page = page_of(write_run(tmp_path / "a", events=flood))
    assert "985 more events of this kind are in events.jsonl" in page.words
    assert "path 14.jpg" in page.words
    assert "path 15.jpg" not in page.words


def test_time_counts_only_while_a_process_ran(tmp_path):
    """Killed after 100 s, resumed an hour later from the step of second 50, and 100 s of work."""
    run = write_run(tmp_path / "a", num_logs=2)
    events = [
        {"time": BEGIN, "event": "started", "step": 0},
        {"time": BEGIN + 100, "event": "checkpoint", "step": 5},
    ]
    events += [
        {"time": BEGIN + 3600, "event": "resumed", "step": 5},
        {"time": BEGIN + 3700, "event": "finished"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    log = [
        {
            "step": 50,
            "time": BEGIN + 50.0,
            "images_per_second": 512.0,
            "data_wait_ratio": 0.1,
            "forward_ratio": 0.3,
        }
    ]
    log += [log[0] | {"step": 100, "time": BEGIN + 3690, "data_wait_ratio": 0.5}]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    (run / "status.json").write_text(json.dumps({"state": "finished", "updated": BEGIN + 3700}))
    times = measure_times(read_run(run))
    assert (times.num_starts, times.active_seconds) == (2, 200)
    assert times.end - times.begin == 3700
    assert (times.images, times.images_per_second) == (51_200, 512)
    assert times.data_wait_ratio == pytest.approx(0.3)
    shares = {share.name: share.seconds for share in times.shares}
    assert shares == pytest.approx(
        {"waiting for data": 30, "forward": 30, "rest of the step": 40, "start and the rest": 100}
    )


@pytest.mark.parametrize(
    ("expected", "text"), [(0.7, "70.0 % expected: reached"), (0.99, "99.0 % expected: missed")]
)
def test_the_expectation_is_reached_or_missed(tmp_path, expected, text):
    assert text in page_of(write_run(tmp_path / "a", expect={"top1": expected})).words


def test_a_run_that_fell_silent_is_not_called_running(tmp_path):
    run = write_run(tmp_path / "a", state="running")
    assert "running? " in page_of(run).words
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"updated": time.time()}))
    assert "running " in page_of(run).words
    assert "running?" not in page_of(run).words
    patient = write_run(tmp_path / "b", state="running", metrics={"stall_seconds": 1e9})
    assert "running?" not in page_of(patient).words


def test_classes_worst_first_and_what_they_are_taken_for(tmp_path):
    run = write_run(tmp_path / "a", num_classes=3, class_names=["cat", "dog", "eel"])
    confusion = [[8, 2, 0], [1, 4, 5], [0, 0, 10]]
    counts = {"images": [10, 10, 10], "correct": [8, 4, 10], "confusion": confusion}
    worse = {"images": [10, 10, 10], "correct": [0, 0, 0], "confusion": confusion}
    content = {"step": 1, "classes": ["cat", "dog", "eel"], "weights": {"model": worse, "ema": counts}}
    (run / "classes.json").write_text(json.dumps(content))
    words = page_of(run).words
    assert "dog 10 40.0 % eel 5 cat 10 80.0 % dog 2 eel 10 100.0 %" in words
    assert "dog eel 5 50.0 % cat dog 2 20.0 % dog cat 1 10.0 %" in words
    assert "weights: EMA" in words
    many = page_of(write_run(tmp_path / "b", num_classes=1000)).words
    assert "1000 classes, accuracy " in many
    assert "Confusion matrix" not in many


def test_pages_show_what_is_not_printable(tmp_path):
    """Marks that turn the order of letters round, and escapes, in names of files and classes."""
    evil = "a\u202egpj.exe\x1b]52;c;ZQ==\x07"
    run = write_run(tmp_path / "a", num_classes=3, class_names=["cat", "dog", evil])
    event = {
        "event": "bad_file",
        "time": time.time(),
        "step": 1,
        "path": evil,
        "reason": evil,
        "kind": "other",
    }
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps(event) + "\n" + json.dumps(event) + "\n")
    html = render([read_run(run)])
    assert not set("\u202e\x1b\x07") & set(html)
    assert html.count(r"a\u202egpj.exe\x1b]52;c;ZQ==\x07") > 3


def test_the_configuration_shows_what_is_not_default(tmp_path):
    html = render([read_run(write_run(tmp_path / "a", lr=0.0123, optim={"lr": 0.0123, "opt": "sgd"}))])
    assert "<b>  opt: sgd</b>" in html
    assert "<b>  lr: 0.0123</b>" in html
    assert "\n  nesterov: true\n" in html


def test_comparing_runs(tmp_path):
    folders = [
        write_run(tmp_path / name, lr=lr, num_logs=50) for name, lr in (("low", 1e-3), ("high", 9e-3))
    ]
    html = render([read_run(folder) for folder in folders])
    page = ParsedPage(html)
    differing = re.search(r"What differs A low B high (.*?) A low", page.words)[1]
    assert differing == "run.name low high optim.lr 0.001 0.009"
    legends = re.findall(r'<i class="c(\d)"></i>(\w) <b>', html)
    assert {("0", "A"), ("1", "B")} == set(legends)
    assert len(legends) == 2 * 7
    assert html.count("A EMA <b>") == 1


def test_a_chart_with_a_line_of_one_run_of_several_names_it(tmp_path):
    runs = [write_run(tmp_path / name, num_logs=50) for name in ("low", "high")]
    (runs[0] / "log.jsonl").write_text((runs[0] / "log.jsonl").read_text().replace('"grad_norm"', '"other"'))
    html = render([read_run(run) for run in runs])
    legend = re.search(r'Gradient norm</span>.*?<span class="legend">(.*?)</figcaption>', html, re.DOTALL)[1]
    assert re.findall(r'<i class="c(\d)"></i>(\w) <b>', legend) == [("1", "B")]


# ---- safety


def test_a_hostile_run_is_shown_and_not_obeyed(tmp_path):
    hostile = [
        {"time": BEGIN, "event": EVIL, EVIL: EVIL},
        {"time": BEGIN, "event": "rollback", "step": 9, "cause": EVIL},
    ]
    run = write_run(
        tmp_path / "a", class_names=[f"{EVIL}{i}" for i in range(10)], state=EVIL, reason=EVIL,
        run={"name": "a"}, events=hostile, data={"root": "<script>hacked=1</script>"},
    )  # fmt: skip
    folder = run.rename(tmp_path / EVIL.replace("/", ":"))
    (folder / "summary.csv").write_text(f"step,{EVIL.replace(',', '')},eval_top1\n5,0.5,0.5\n")
    for html in (render([read_run(folder)]), render([read_run(folder), read_run(folder)])):
        page = ParsedPage(html)
        assert html.count("<script") == 1
        assert [tag for tag, _ in page.tags].count("script") == 1
        for tag, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on")]
            assert tag not in ("iframe", "object", "embed", "link", "base", "form", "a")
            assert (attributes.get("src") or "data:image/").startswith("data:image/")
            assert (attributes.get("href") or "#glyph-").startswith("#glyph-")
        policy = next(attributes for tag, attributes in page.tags if "http-equiv" in attributes)["content"]
        assert policy.startswith(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
        )
        assert EVIL.replace("\u202e", r"\u202e") in page.text
        assert "49\u202e" not in page.text


# ---- whatever state the folder is in


@pytest.mark.parametrize("place", ["file/report.html", "folder"])
def test_a_report_that_cannot_be_written_is_one_line(tmp_path, place):
    run = write_run(tmp_path / "a", num_logs=20)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"^{tmp_path / place}: cannot be written: "):
        report([str(run)], str(tmp_path / place))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file", "folder"]


def test_damaged_rows_of_the_summary_are_reported(tmp_path):
    run = write_run(tmp_path / "a", num_logs=20)
    (run / "summary.csv").write_text((run / "summary.csv").read_text().replace(",", ";"))
    assert read_run(run).damage == ["summary.csv: 10 damaged rows left out"]


@pytest.mark.parametrize(
    "missing", [*RUN_FILES, "summary.csv", "classes.json", "augmented.png", "mistakes.png"]
)
@pytest.mark.parametrize("how", ["missing", "empty", "garbage", "wrong", "pipe"])
def test_a_file_that_is_missing_or_damaged_costs_only_itself(tmp_path, missing, how):
    run = write_run(tmp_path / "a", num_logs=20, events=eventful())
    top1 = f"Top-1 {100 * read_run(run).evaluations['eval_top1'][-1]:.1f} %"
    content = {
        "empty": b"",
        "garbage": b"\xff\xfe{]\x00,;\n" * 50,
        "wrong": b'[1, {"step": "x", "time": null}]\n3\n"x"\n',
    }
    (run / missing).unlink()
    if how == "pipe":
        os.mkfifo(run / missing)
    elif how != "missing":
        (run / missing).write_bytes(content[how])
    page = page_of(run)
    assert "Curves" in page.words
    if missing in RUN_FILES and (how != "empty" or missing.startswith(("status", "config"))):
        assert f"{missing}: " in page.words
    assert (top1 in page.words) == (missing != "summary.csv")


def test_a_log_cut_in_the_middle_of_a_line(tmp_path):
    run = write_run(tmp_path / "a", num_logs=50)
    content = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(content[: len(content) // 2 + 7])
    record = read_run(run)
    assert len(record.log["step"]) == 25
    assert record.damage == ["log.jsonl: 1 damaged line left out"]


def test_a_run_killed_before_its_first_log_point(tmp_path):
    run = write_run(tmp_path / "a")
    for name in ("log.jsonl", "summary.csv", "classes.json", "augmented.png"):
        (run / name).unlink()
    (run / "events.jsonl").write_text(json.dumps({"time": BEGIN, "event": "started", "step": 0}) + "\n")
    (run / "status.json").write_text(json.dumps({"state": "running", "step": 0, "updated": BEGIN}))
    assert "running?" in page_of(run).words
    assert "Steps" in page_of(run, run).words


def test_random_damage_never_stops_a_report(tmp_path):
    """Bytes of every file are overwritten, cut out and doubled; 25 folders."""
    run = write_run(tmp_path / "a", num_logs=10, events=eventful())
    names = sorted(path.name for path in run.iterdir())
    original = {name: (run / name).read_bytes() for name in names}
    rng, noise = np.random.default_rng(0), list(b'0123456789{}[]",:-.eEINx\x00\xff')
    for _ in range(25):
        for name, content in original.items():
            damaged = bytearray(content)
            for _ in range(rng.integers(0, 6)):
                place, length = int(rng.integers(len(damaged))), int(rng.integers(1, 20))
                kind = rng.integers(3)
                if kind == 0:
                    damaged[place : place + length] = bytes(rng.choice(noise, length).tolist())
                elif kind == 1:
                    del damaged[place : place + length]
                else:
                    damaged[place:place] = damaged[place : place + length]
            (run / name).write_bytes(damaged or b" ")
        assert "</html>" in render([read_run(run)])


def test_numbers_that_no_run_writes(tmp_path):
    run = write_run(tmp_path / "a", num_logs=5)
    wild = ["1e308", "-1e308", "NaN", "Infinity", "9" * 400, "true", '"x"', "[]", "null", "-0.0"]
    keys = ("loss", "lr", "grad_norm", "images_per_second", "time", "data_wait_ratio", "loss_scale")
    fields = [", ".join(f'"{key}": {v}' for key in keys) for v in wild]
    lines = [f'{{"step": {i}, {texts}}}' for i, texts in enumerate(fields)]
    lines += [f'{{"step": {v}, "loss": 1.0}}' for v in wild]
    (run / "log.jsonl").write_text("\n".join(lines))
    fields = (
        "step",
        "last_step",
        "exit_code",
        "reason",
        "best_top1",
        "best_step",
        "updated",
        "state",
        "result",
    )
    for value in wild:
        (run / "status.json").write_text("{" + ", ".join(f'"{name}": {value}' for name in fields) + "}")
        (run / "events.jsonl").write_text(f'{{"time": {value}, "event": "rollback", "step": {value}}}\n')
        assert "</html>" in render([read_run(run)])


def test_a_picture_that_is_none_and_one_that_is_large(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert sheet_uri(path) is None
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (1280, 1280, 3), np.uint8)).save(path)
    assert path.stat().st_size > 4_000_000
    assert len(sheet_uri(path)) < 1_000_000


def test_the_old_report_stays_when_the_new_one_fails(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    (run / "report.html").write_text("old")
    with pytest.raises(DataError):
        write_report([run, tmp_path / "none"], run / "report.html")

    def full_disk(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report([run], run / "report.html")
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".report.html*"))


@pytest.mark.slow
def test_half_a_million_log_points(tmp_path, figure):
    run = write_run(tmp_path / "a", num_logs=500_000, num_classes=1000)
    times = [time.process_time()]
    with (run / "log.jsonl").open() as log:
        deque(map(json.loads, log), maxlen=0)
    times.append(time.process_time())
    write_report([run], run / "report.html")
    times.append(time.process_time())
    reading, reporting = times[1] - times[0], times[2] - times[1]
    figure(f"a report of 500,000 log points takes {reporting / reading:.1f} times as long as to read them")
    assert reporting < 5 * reading
    assert (run / "report.html").stat().st_size < 300_000


# ---- in a browser


@pytest.mark.parametrize("width_px", [1280, 400])
def test_it_looks_right_in_a_browser(browser, tmp_path, width_px):
    """No errors, nothing wider than the window, no overlaps; light and dark, alone and compared."""
    long = "a-name-of-sixty-four-characters-which-is-the-longest-there-can-be"[:64]
    names = [f"n01440764 {'tench, Tinca tinca, a fish with a long name ' * 2}{i}" for i in range(20)]
    runs = [
        write_run(tmp_path / long, num_classes=20, class_names=names, events=eventful(), reason="x" * 300),
        write_run(tmp_path / "b", num_classes=100, lr=3.3e-5, seed=1),
        write_run(tmp_path / "c", num_logs=3, log_every_steps=123_457, num_classes=1000, seed=2),
    ]
    for page in ([runs[0]], [runs[1]], [runs[2]], runs):
        write_report(page, tmp_path / "page.html")
        for dark in (False, True):
            browser.open(tmp_path / "page.html", width_px=width_px, dark=dark)
            browser.evaluate("document.querySelectorAll('details').forEach(node => node.open = true)")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width_px
            matrix = "document.querySelector('.confusion, .heat')"
            if width_px == 1280 and browser.evaluate(f"!!{matrix}"):  # all of it, as wide as the page
                filled = f"{matrix}.getBoundingClientRect().width / {matrix}.parentNode.clientWidth"
                assert 0.99 < browser.evaluate(filled) < 1.01
            assert [browser.evaluate(script) for script in (OVERLAPS, OUTSIDE, UNNAMED, DOUBLE_IDS)] == [
                []
            ] * 4
            background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(16, 20, 24)" if dark else "rgb(255, 255, 255)")
            assert browser.complaints() == []


def test_no_hostile_script_runs_and_values_are_read_off_the_curves(browser, tmp_path):
    run = write_run(tmp_path / "a", reason=EVIL, class_names=[f"{EVIL}{i}" for i in range(10)])
    write_report([run], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    browser.open(tmp_path / "page.html", width_px=1280)
    assert browser.evaluate("typeof hacked") == "undefined"
    legend = (
        "[...document.querySelectorAll('figure:has(#lr) :is(.legend b, .at)')].map(node => node.textContent)"
    )
    before = browser.evaluate(legend)
    box = browser.evaluate(
        "JSON.parse(JSON.stringify(document.querySelector('#lr').getBoundingClientRect()))"
    )
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + box["width"] / 10, y=box["y"] + 20)
    at, value = browser.evaluate(legend)
    assert re.fullmatch(r"step (99\d|1,00\d)", at)
    assert float(value) == pytest.approx(4e-3, rel=0.03)  # the peak, after a tenth of the run
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert browser.evaluate(legend) == before
    # Were anything to slip through the escaping, the page's policy would stop it.
    (tmp_path / "page.html").write_text(html.replace("</main>", "<script>hacked = 1</script></main>"))
    browser.open(tmp_path / "page.html", width_px=1280)
    assert browser.evaluate("typeof hacked") == "undefined"
    assert "Content Security Policy" in "".join(browser.complaints())


def test_an_evaluation_without_counts_of_classes_has_defaults():
    assert dataclasses.asdict(Evaluation(0.5, 0.9, 1.0, 10))["confusion"] is None
