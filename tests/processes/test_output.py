"""Nobody reads what is printed: a run goes on and records it, other verbs end quietly or with one line."""

import os
import subprocess
import sys

import pytest
from helpers.runs import ROOT

DEAD = str(ROOT / "tests" / "helpers" / "dead_output.py")
RUN_PROGRAM = "import sys; from cmtrain.cli.main import main; sys.exit(main())"
PROGRAM = [sys.executable, "-c", RUN_PROGRAM]


def run_into(stdout, *arguments, **how):
    """Run the program with this stdout; return exit code and stderr."""
    done = subprocess.run(
        [*PROGRAM, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=600, **how
    )
    return done.returncode, done.stderr


@pytest.fixture
def dead_pipe():
    """The end to write to, of a pipe whose reader is gone, as that of `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("verb", [["config", "reference"], ["--help"], ["status", "--help"]])
def test_a_reader_that_has_gone_ends_a_verb_quietly(dead_pipe, verb):
    assert run_into(dead_pipe, *verb) == (141, "")


def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        assert run_into(full, "config", "schema") == (3, "stdout: No space left on device\n")


@pytest.mark.parametrize(
    ("place", "code", "line"), [("/dev/full", 3, "stdout: No space left"), ("pipe", 141, "")]
)
def test_what_a_verb_flushes_at_once_ends_it_as_quietly(tmp_path, dead_pipe, place, code, line):
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    with open("/dev/full", "w") as full:
        stdout = dead_pipe if place == "pipe" else full
        found, err = run_into(stdout, "watch", str(tmp_path))
    assert found == code
    assert err.startswith(line)
    assert err.count("\n") == bool(line)


def test_a_mistake_keeps_its_exit_code_without_stderr(dead_pipe):
    done = subprocess.run([*PROGRAM, "nonsense"], stderr=dead_pipe, stdout=subprocess.PIPE, timeout=600)
    assert (done.returncode, done.stdout) == (2, b"")


def test_closed_streams_are_opened_and_take_nobodys_place(tmp_path):
    """`>&- 2>&-`: else the first file that is opened becomes stdout, and gets what is printed."""
    program = "from cmtrain.processes.output import guard_output; guard_output(stdout_raises=True); "
    program += f"file = open({str(tmp_path / 'file')!r}, 'w'); print('text', flush=True); file.write('own')"
    command = f'exec {sys.executable} -c "{program}" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], timeout=600).returncode == 0
    assert (tmp_path / "file").read_text() == "own"


def test_names_that_are_not_text_can_be_printed():
    program = "from cmtrain.processes.output import guard_output; guard_output(stdout_raises=True); "
    program += r"print('a\udcffb')"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, b"a\\udcffb\n")


@pytest.mark.parametrize(
    ("how", "nproc", "lost"),
    [("pipe", 1, "Broken pipe"), ("/dev/full", 2, "No space left on device"), ("closed", 1, None)],
)
def test_a_run_goes_on_without_its_readers(make_job, how, nproc, lost):
    """A dead `tee`, a full disk behind `> log`, `>&-`; on every rank."""
    job = make_job("job", schedule={"epochs": 1, "warmup_epochs": 0})
    job(module=DEAD, OUTPUT=how, nproc=nproc)
    status = job.status()
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 6)
    reported = {event["what"] for event in job.events() if event["event"] == "record_lost"}
    assert reported == ({f"stderr: {lost}", f"stdout: {lost}"} if lost else set())
    job()  # finished before, and a reader gets its result
