"""Records may be lost, damaged or unreadable: that costs the record, is reported, and never stops a run."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

import cmtrain.storage.records as records_module
from cmtrain.commands.status import current_status, describe, find_run
from cmtrain.processes.failure import (
    Failure,
    archive_previous_attempt,
    failed_steps,
    read_failures,
    record_cause,
)
from cmtrain.processes.watchdog import Watchdog
from cmtrain.storage.records import CORRUPT, Losses, read_json, remove_leftovers, replace_file, retried
from cmtrain.storage.run_folder import (
    SUMMARY_HEADER,
    RunFolder,
    read_events,
    read_finished,
    read_status,
    set_damaged_aside,
)
from cmtrain.storage.run_record import read_run
from pipelines.spec import DataError

DAMAGED = {
    "empty": b"",
    "zeros": bytes(100),
    "cut": b'{"state": "run',
    "not text": b"\xff\xfe\xfd",
    "a list": b"[1, 2]",
    "null": b"null",
    "deep": b"[" * 5_000,
}


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(records_module, "PAUSES_SECONDS", (0.0, 0.0))


def aside(folder):
    return sorted(path.name for path in folder.glob(f"{CORRUPT}*"))


def rows_of(path):
    return [line.split(",")[1] for line in path.read_text().splitlines()[1:]]


def a_table(folder):
    run = RunFolder(folder)
    for step in (10, 20, 30):
        run.log({"step": step})
        run.summary({"epoch": step // 10, "step": step, "eval_top1": 0.5})
        run.event("evaluated", step=step)
    return run


ODD_SUMMARIES = {
    "empty": (lambda text: b"", None),
    "zeros at the end": (lambda text: text + bytes(4), ["10", "20"]),
    "spreadsheet": (lambda text: text.replace(b",", b";"), None),
    "byte order mark": (lambda text: b"\xef\xbb\xbf" + text, None),
    "other columns": (lambda text: text.replace(b"train_loss", b"loss"), None),
    "no header": (lambda text: text.split(b"\n", 1)[1], None),
    "not text": (lambda text: text.replace(b",0.5,", b",\xff,", 1), ["20"]),
    "cut row": (lambda text: text.replace(b",0.5,,,,,,,\r\n", b"\r\n", 1), ["20"]),
    "words": (lambda text: text.replace(b"1,10,", b"one,10,", 1), ["20"]),
}


@pytest.mark.parametrize("how", ODD_SUMMARIES)
def test_a_damaged_table_is_set_aside_and_its_good_rows_stay(tmp_path, how):
    damage, kept = ODD_SUMMARIES[how]
    run, path = a_table(tmp_path), tmp_path / "summary.csv"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    (line,) = run.rewind(20)
    (name,) = aside(tmp_path)
    assert name in line
    assert line.startswith("summary.csv ")
    assert (tmp_path / name).read_bytes() == damaged
    assert (rows_of(path) if path.exists() else None) == kept
    run.summary({"epoch": 3, "step": 30})
    assert path.read_text().splitlines()[0] == SUMMARY_HEADER
    assert rows_of(path) == [*(kept or []), "30"]
    assert run.losses.counts == {}


def test_what_a_kill_or_an_editor_leaves_is_no_damage(tmp_path):
    run, path = a_table(tmp_path), tmp_path / "summary.csv"
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n") + b"\n4,40,0.")
    (tmp_path / "log.jsonl").write_text('{"step": 10}\n\n{"step": 20}')
    assert run.rewind(20) == []
    run.summary({"epoch": 3, "step": 30})
    run.log({"step": 30})
    assert rows_of(path) == ["10", "20", "30"]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        10,
        20,
        30,
    ]
    assert aside(tmp_path) == []


@pytest.mark.parametrize("line", [b"\xff\xff", b"[3]", b'{"step": "x"}', b'{"event": 3}', bytes(9)])
def test_damaged_lines_of_log_and_events(tmp_path, line):
    run = a_table(tmp_path)
    for name in ("log.jsonl", "events.jsonl"):
        path = tmp_path / name
        path.write_bytes(line + b"\n" + path.read_bytes())
    notes = [*set_damaged_aside(tmp_path), *run.rewind(30)]
    assert [note.split()[0] for note in notes] == ["events.jsonl", "log.jsonl"]
    assert len(aside(tmp_path)) == 2
    assert len(read_events(tmp_path)) == len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_table_is_rewound_on_a_full_disk(tmp_path, monkeypatch):
    run = a_table(tmp_path)

    def full(path, content, **how):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records_module, "replace_file", full)
    assert run.rewind(20) == []
    assert rows_of(tmp_path / "summary.csv") == ["10", "20"]


@pytest.mark.parametrize("how", [*DAMAGED, "a folder", "a dead link"])
@pytest.mark.parametrize("name", ["status.json", "classes.json", "failed-rank0.json", "config.yaml"])
def test_a_damaged_record_is_set_aside(tmp_path, name, how):
    if how == "a folder":
        (tmp_path / name).mkdir()
    elif how == "a dead link":
        (tmp_path / name).symlink_to(name)
    else:
        (tmp_path / name).write_bytes(DAMAGED[how])
    assert read_status(tmp_path) is None
    assert read_failures(tmp_path) == []
    (line,) = archive_previous_attempt(tmp_path)
    (kept,) = aside(tmp_path)
    assert line.startswith(f"{name}: ")
    assert kept in line
    assert "\n" not in line
    assert archive_previous_attempt(tmp_path) == ()


@pytest.mark.parametrize("place", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_in_the_place_of_stacks_is_put_away(tmp_path, place):
    """The watchdog would wait for the reader of a pipe."""
    place(tmp_path / "hang-rank0.txt")
    archive_previous_attempt(tmp_path)
    assert [name.startswith(".corrupt-hang-rank0.txt-") for name in os.listdir(tmp_path)] == [True]


def test_nothing_is_set_aside_that_the_machine_cannot_read(tmp_path, monkeypatch, no_pauses):
    a_table(tmp_path).status(state="running", step=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    real = records_module.read_bytes

    def unreadable(path, limit=0):
        if path.name == "status.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(records_module, "read_bytes", unreadable)
    damage = []
    assert read_json(tmp_path / "status.json", damage) is None
    assert damage == ["status.json: Input/output error"]
    assert set_damaged_aside(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_trouble_that_passes_is_tried_again(no_pauses):
    for number, attempts in ((errno.EIO, 3), (errno.EACCES, 3), (errno.ESTALE, 3), (errno.ENOENT, 1)):
        calls = []

        def work(number=number, calls=calls):
            calls.append(number)
            if len(calls) < 3:
                raise OSError(number, "trouble")
            return "done"

        if attempts == 3:
            assert retried(work) == "done"
        else:
            with pytest.raises(FileNotFoundError):
                retried(work)
        assert len(calls) == attempts


ODD_FIELDS = {
    "state": 7, "step": "five", "last_step": [], "updated": "now", "pid": "x", "host": 3, "reason": {},
    "loss": "low", "result": [1], "exit_code": "3", "eta_seconds": None, "best_top1": "x", "best_step": 3,
    "images_per_second": {}, "metrics_url": 5, "lost": 4, "of_a_newer_version": [1],
}  # fmt: skip


def test_fields_of_other_types_count_as_missing(tmp_path):
    sound = {"state": "running", "step": 3, "pid": 2**22 + 1, "host": "elsewhere", "updated": time.time()}
    for odd in [ODD_FIELDS, *({**sound, key: value} for key, value in ODD_FIELDS.items())]:
        (tmp_path / "status.json").write_text(json.dumps(odd))
        assert find_run(str(tmp_path)) == tmp_path
        assert describe(current_status(tmp_path))
        assert read_finished(tmp_path, "", None) is None
        read_run(tmp_path)
        record_cause(tmp_path)
    assert read_status(tmp_path)["of_a_newer_version"] == [1]
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(DataError, match=r"status.json: not JSON"):
        find_run(str(tmp_path))
    failed_steps([{"event": "failed", "step": "x"}, {"event": "resumed", "restarts": 1}])


def test_failures_of_a_newer_version_are_read(tmp_path):
    words = {"rank": 1, "world_size": 2, "reason": "gone", "of_a_newer_version": 1}
    (tmp_path / "failed-rank1.json").write_text(json.dumps(words))
    (tmp_path / "failed-rank2.json").write_text(json.dumps(words | {"rank": "two"}))
    (tmp_path / "hang-rankX.txt").write_text("stacks")
    (found,) = read_failures(tmp_path)
    assert (found.rank, found.reason) == (1, "gone")


def test_a_finished_run_without_its_configuration_is_not_finished(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    RunFolder(tmp_path).status(
        state="finished", last_step=3, total_steps=3, exit_code=0, result={"top1": 1.0},
        resume_from=str(tmp_path / "checkpoint"),
    )  # fmt: skip
    assert read_finished(tmp_path, "a: 1\n", None) is None
    for content, is_finished in ((b"a: 1\n", True), (b"\xff", False), (b"", False)):
        (tmp_path / "config.yaml").write_bytes(content)
        assert (read_finished(tmp_path, "a: 1\n", None) is not None) == is_finished


def test_a_lost_record_is_noted_once_and_counted(tmp_path, monkeypatch, no_pauses):
    run = RunFolder(tmp_path)
    for name in ("log.jsonl", "config.yaml", "classes.json", "status.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    for _ in range(3):
        run.log({"step": 1})
    run.write("config.yaml", "a: 1")
    run.write("classes.json", "{}")
    assert not run.status(state="finished", retries=True)
    news = run.losses.take_news()
    assert [line.partition(":")[0] for line in news] == [
        "log.jsonl",
        "config.yaml",
        "classes.json",
        "status.json",
    ]
    assert run.losses.take_news() == []
    assert run.losses.counts["log.jsonl: Is a directory"] == 3
    (tmp_path / "status.json" / "x").unlink()
    (tmp_path / "status.json").rmdir()
    assert run.status(state="finished", retries=True)
    assert read_status(tmp_path)["lost"] == run.losses.counts


def test_the_last_status_is_written_at_the_second_try(tmp_path, monkeypatch, no_pauses):
    run, attempts = RunFolder(tmp_path), []

    def unsure(path, content, *, durable):
        attempts.append(path)
        if len(attempts) == 1:
            raise OSError(errno.EIO, "Input/output error")
        return replace_file(path, content, durable=durable)

    monkeypatch.setattr("cmtrain.storage.run_folder.replace_file", unsure)
    assert run.status(state="finished", retries=True)
    assert read_status(tmp_path)["state"] == "finished"
    assert run.losses.counts == {}


def test_a_watchdog_without_its_file_watches_on(tmp_path):
    losses = Losses()
    (tmp_path / "hang-rank0.txt").mkdir()
    watchdog = Watchdog(tmp_path, 0, 1, timeout_seconds=60.0, losses=losses)
    watchdog.begin("step", 0)
    watchdog.close()
    assert losses.take_news()[0] == "hang-rank0.txt: Is a directory"


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run, targets = tmp_path / "run", tmp_path / ".targets"
    run.mkdir()
    targets.mkdir()
    doomed = [
        run / f".{name}.{gone.pid}"
        for name in ("status.json", "log.jsonl", "report.html", "failed-rank3.json")
    ]
    doomed += [run / f".status.json.{os.getpid()}", targets / f".run-0.json.{gone.pid}"]
    spared = [
        run / f".status.json.{os.getppid()}",
        run / ".notes.2024",
        run / ".lock",
        run / "status.json.7",
    ]
    spared += [targets / f".runs-0.json.{gone.pid}"]
    for path in [*doomed, *spared]:
        path.write_text("{}")
    set_damaged_aside(run)
    assert [path.name for path in doomed if path.exists()] == []
    assert [path.name for path in spared if not path.exists()] == []
    export = tmp_path / f".exported.{gone.pid}"
    export.mkdir()
    (export / "model.onnx").touch()
    remove_leftovers(tmp_path, "other")
    assert export.exists()
    remove_leftovers(tmp_path, "exported")
    assert not export.exists()


def test_a_failure_is_recorded_at_the_second_try(tmp_path, monkeypatch, no_pauses):
    RunFolder(tmp_path).status(state="running", step=3)
    attempts = []
    real = replace_file

    def unsure(path, content, **how):
        attempts.append(path.name)
        if attempts.count("status.json") == 1 and path.name == "status.json":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, content, **how)

    (tmp_path / "failed-rank0.json").write_text(json.dumps(vars(Failure(0, 1, "injected"))))
    monkeypatch.setattr("cmtrain.storage.run_folder.replace_file", unsure)
    record_cause(tmp_path)
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["reason"]) == ("failed", "injected")


def test_a_table_that_is_not_there_is_not_opened(tmp_path, monkeypatch):
    """So the first failure to open it is that of a row, which is reported."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    assert records_module.keep_lines(tmp_path / "summary.csv", bool) == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [("folder", "Is a directory"), ("no/x.json", "No such file"), ("/dev/full", "No space")],
)
def test_what_cannot_be_written_is_named_and_not_its_temporary_file(tmp_path, name, text):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=text) as caught:
        replace_file(tmp_path / name, "x")
    assert caught.value.filename == str(tmp_path / name)
