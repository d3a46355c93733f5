"""Show runs that train, ended, hang or were killed, and refuse others (`cmtrain status`, `watch`)."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers.runs import free_port, logged, wait_for
from rich.console import Console

from cmtrain.cli.main import main
from cmtrain.commands.status import SILENT_SECONDS, current_status
from cmtrain.storage.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
    """A run folder as a run that is at step 1200 of 3600 writes it, in this process."""
    folder = RunFolder(tmp_path / "runs" / "r")
    folder.status(
        state="running", step=1200, last_step=3600, metrics_url=None, exit_code=None, reason=None,
        result=None, host=socket.gethostname(), loss=2.5, eta_seconds=4000,
        images_per_second=812.4, data_wait_ratio=0.034,
        best_top1=0.4312, best_step=1000, resume_from="runs/r/checkpoints/step-000001000",
    )  # fmt: skip
    return folder


def change(folder, **fields):
    path, new = folder.path / "status.json", folder.path / "status.json.new"
    new.write_text(json.dumps(json.loads(path.read_text()) | fields))
    new.replace(path)  # a watcher that runs meanwhile reads the old or the new one, as it would of a run


def printed(capsys, *arguments, code=0):
    assert main(arguments) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_that_is_training(run, capsys):
    lines = printed(capsys, "status", "runs/r").splitlines()
    assert lines[0] == "runs/r: running, step 1,200 of 3,600"
    assert "speed    812 images/s, 3 % of the time waiting for data" in lines
    assert "left     1h 6m" in lines
    assert "best     top-1 43.1 % at step 1,000" in lines
    assert printed(capsys, "status", "r").splitlines()[0] == lines[0]  # its name will do


def test_a_run_that_was_killed_is_noticed(run, capsys):
    pid = dead_process()
    change(run, pid=pid)
    advice = f"process {pid} is gone; run the same command to continue"
    first = printed(capsys, "status", "r").splitlines()[0]
    assert first == f"runs/r: claims to run, step 1,200 of 3,600, but {advice}"
    facts = json.loads(printed(capsys, "status", "r", "--json"))
    assert (facts["alive"], facts["state"], facts["step"]) == (False, "running", 1200)


def test_a_run_on_another_host_is_believed_until_it_is_silent(run, capsys):
    change(run, pid=dead_process(), host="elsewhere")
    assert current_status(run.path).alive is None
    assert "running, step" in printed(capsys, "status", "r")
    change(run, updated=time.time() - SILENT_SECONDS - 60)
    assert "claims to run, step 1,200 of 3,600, but has written nothing for 11m" in printed(
        capsys, "status", "r"
    )


@pytest.mark.parametrize(
    ("config", "limit_seconds"),
    [
        ("metrics:\n  stall_seconds: 3600.0\n", 3600),
        ("metrics:\n  stall_seconds: 400\n", 400),
        ("metrics:\n  stall_seconds: often\n", SILENT_SECONDS),
        ("metrics: 7\n", SILENT_SECONDS),
        ("\x00", SILENT_SECONDS),
    ],
)
def test_how_long_a_run_may_be_silent_is_its_own_setting(run, config, limit_seconds):
    (run.path / "config.yaml").write_text(config)
    change(run, host="elsewhere", updated=time.time() - limit_seconds + 300)
    assert current_status(run.path).warning == ""
    change(run, updated=time.time() - limit_seconds - 10)
    assert "has written nothing for" in current_status(run.path).warning


def test_a_port_that_belongs_to_another_run_by_now_is_not_believed(run, metrics_server):
    change(run, pid=dead_process(), metrics_url=metrics_server(pid=os.getpid(), host=socket.gethostname()))
    assert (current_status(run.path).alive, current_status(run.path).now) == (False, None)
    change(run, pid=os.getpid())
    status = current_status(run.path)
    assert (status.alive, status.step) == (True, 1300)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://", "http://127.0.0.1:1/metrics", 7, "http://[/", "x" * 9999]
)
def test_whatever_url_is_written_there_does_no_harm(run, url):
    change(run, metrics_url=url)
    assert current_status(run.path).now is None


def test_a_stalled_run_is_reported(run, metrics_server, capsys):
    change(run, metrics_url=metrics_server(pid=os.getpid(), host=socket.gethostname(), stalled=True))
    assert "but no step finished for 15m 0s" in printed(capsys, "status", "r")


@pytest.fixture
def metrics_server():
    """metrics_server(**facts) -> URL of a run that reports step 1300."""
    from cmtrain.monitoring.http_server import Exporter, Page

    servers = []

    def start(*, stalled=False, **facts):
        now = {
            "rank": 0,
            "state": "train",
            "step": 1300,
            "seconds_since_progress": 900.0,
            "stalled": stalled,
        }
        page = Page("application/json", json.dumps(facts | {"now": now}).encode())
        servers.append(Exporter({"/status.json": lambda: page}, "127.0.0.1", free_port()))
        return f"{servers[-1].url}/metrics"

    yield start
    for server in servers:
        server.close()


def test_an_ended_run(run, capsys):
    change(run, state="finished", step=3600, reason="top-1 0.4400", exit_code=0, pid=dead_process())
    lines = printed(capsys, "status", "r").splitlines()
    assert lines[0] == "runs/r: finished, step 3,600 of 3,600: top-1 0.4400"
    assert not any(line.startswith(("left", "watch")) for line in lines)
    assert printed(capsys, "watch", "r").startswith("finished, step 3,600 of 3,600: top-1 0.4400")


def test_a_run_that_max_steps_ended_has_not_finished(run, capsys):
    change(run, state="finished", step=3600, total_steps=10_800, reason="top-1 12.0 %", pid=dead_process())
    line = "ended by --max-steps, step 3,600 of 10,800: top-1 12.0 %"
    assert printed(capsys, "status", "r").splitlines()[0] == f"runs/r: {line}"
    assert printed(capsys, "watch", "r").startswith(line)


@pytest.mark.parametrize("verb", ["status", "watch"])
def test_no_such_run(run, capsys, verb):
    assert printed(capsys, verb, "rr", code=3) == "rr: no such run; did you mean runs/r?\n"
    line = printed(capsys, verb, "/nowhere", code=3)
    assert line == "/nowhere: no such run; a run is a folder with a status.json, such as runs/demo\n"
    assert printed(capsys, verb, "x" * 5000, code=3).startswith("xxx")


def test_status_and_watch_of_a_real_run(make_job, capsys):
    port = free_port()
    job = make_job(schedule={"epochs": 4000}, metrics={"enabled": True, "port": port})
    process = job.start("--evaluate.every_epochs", "4000", "--checkpoint.every_epochs", "4000")
    wait_for(lambda: logged(job, 2), process)
    written = job.status()["step"]
    wait_for(lambda: current_status(job.run).step > written, process)
    assert current_status(job.run).alive
    assert current_status(job.run).now["state"] == "train"
    watcher = threading.Thread(target=main, args=(["watch", str(job.run)],))
    watcher.start()
    shown = []
    wait_for(lambda: shown.append(capsys.readouterr().out) or "".join(shown).count("\n") >= 2, process)
    process.kill()
    process.communicate()
    watcher.join(60)
    assert not watcher.is_alive()
    lines = ("".join(shown) + capsys.readouterr().out).splitlines()
    assert all(line.startswith("running, step ") for line in lines[:-1])
    assert len(set(lines)) == len(lines)
    assert f"but process {job.status()['pid']} is gone" in lines[-1]


def test_watch_on_a_terminal_shows_the_run_in_place(run, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        "cmtrain.commands.status.Console",
        lambda **options: Console(file=screen, force_terminal=True, width=120),
    )
    monkeypatch.setattr("cmtrain.commands.status.REFRESH_SECONDS", 0.01)
    threading.Timer(0.3, lambda: change(run, state="finished", reason="top-1 0.5")).start()
    assert main(["watch", "r"]) == 0
    shown = screen.getvalue()
    assert "r: running, step 1,200 of 3,600" in shown
    assert "\x1b[" in shown  # the cursor goes back up
    assert "r: finished, step 1,200 of 3,600: top-1 0.5" in shown


def test_watch_of_a_run_that_is_deleted_ends_in_one_line(run, capsys):
    threading.Timer(0.3, shutil.rmtree, (run.path,)).start()
    assert main(["watch", "r"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "r: no such run; a run is a folder with a status.json, such as runs/demo"
    ]


@pytest.mark.parametrize("verb", ["status", "watch"])
def test_escapes_in_status_json_stay_visible(run, capsys, verb):
    change(run, state="failed", reason="\x1b]0;owned\x07\n\x1b[2J\u202e", resume_from="\x1b[8m")
    text = printed(capsys, verb, "runs/r")
    assert all(line.isprintable() for line in text.splitlines())
    assert r"failed, step 1,200 of 3,600: \x1b]0;owned\x07\n\x1b[2J\u202e" in text
