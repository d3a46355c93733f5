"""A sweep does each row once, continues after failed rows, stops on request; its table is right."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import ROOT

from cmtrain.cli.main import main
from cmtrain.commands import sweep
from cmtrain.commands.sweep import DEMO_STEPS, read_rows
from cmtrain.config.load import load_config
from cmtrain.config.schema import to_yaml
from cmtrain.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Working folder of the sweeps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def write(name, text="", top1="top1: 0.5"):
    Path("study").mkdir(exist_ok=True)
    Path("study/base.yaml").write_text(
        "model: {name: cmt_micro}\ndata: {root: demo:digits, image_px: 32, eval_resize_px: 32}\n"
        "optim: {lr: 1e-3}\nschedule: {epochs: 2, warmup_epochs: 1}\ntrain: {global_batch_size: 64}\n"
    )
    Path(f"study/{name}.yaml").write_text(f"extends: base.yaml\n{text}\nexpect: {{{top1}}}\n")


@pytest.fixture
def study():
    """Four rows in the folder `study`."""
    write("a")
    write("b", "optim: {lr: 5.0}", top1="diverges: true")
    write("c", "model: {qkv_bias: false}")
    write("d")
    return ["study"]


def rows_of(files, **how):
    return read_rows(files, [], **{"select": None, "scale": None, "max_steps": None} | how)


@pytest.fixture
def outcomes(monkeypatch):
    """outcomes[run name] = exit code of a row; the list holds the names of trained rows."""
    codes, trained = {}, []

    def call(command):
        name = load_config(command[command.index("--config") + 1]).config.run.name
        trained.append(name)
        return codes.get(name, 0), name == codes.get("stopped")

    monkeypatch.setattr(sweep, "_call", call)
    return codes, trained


def test_every_row_is_trained_in_order_and_a_base_is_no_row(study, outcomes, capsys):
    _, trained = outcomes
    assert main(["sweep", *study]) == 0
    assert trained == ["a", "b", "c", "d"]
    assert capsys.readouterr().out.count("not started") == 4


@pytest.mark.parametrize(
    ("codes", "code", "last"),
    [
        ({"b": 4}, 0, "d"),  # as the file expects
        ({"a": 4}, 4, "d"),
        ({"a": 5, "c": 1}, 5, "d"),
        ({"b": 3}, 3, "b"),  # no data: no row has any
        ({"b": 143}, 143, "b"),
        ({"a": 130}, 130, "a"),
    ],
)
def test_some_exit_codes_end_a_sweep(study, outcomes, codes, code, last):
    wanted, trained = outcomes
    wanted |= codes
    assert main(["sweep", *study]) == code
    assert trained[-1] == last


def test_rows_are_chosen_by_number(study, outcomes):
    assert main(["sweep", *study, "--rows", "4,1-2"]) == 0
    assert outcomes[1] == ["a", "b", "d"]


def test_overrides_hold_for_every_row_in_any_position(study, capsys):
    assert main(["sweep", "--optim.lr", "0.25", *study, "--run.seed=7", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cmtrain --config study/a.yaml --optim.lr=0.25 --run.seed=7"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "cmtrain sweep: the following arguments are required: FILE; "),
        (["study", "--rows", "0-2"], "--rows: 0-2: there are rows 1 to 4"),
        (["study", "--rows", "2-9"], "--rows: 2-9: there are rows 1 to 4"),
        (["study", "--rows", "3-1"], "--rows: 3-1: there are rows 1 to 4"),
        (["study", "--rows", "all"], "--rows: must be numbers and ranges of them, such as 1,3-5, got all"),
        (["stady"], "stady: no such file"),
        (
            ["study", "study/a.yaml"],
            "study/a.yaml: has the run folder runs/a, as study/a.yaml has; sweep them apart",
        ),
        (["study", "--optim.lrr", "1"], "--optim.lrr: unknown option, did you mean --optim.lr?"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(study, outcomes, capsys, arguments, line):
    assert main(["sweep", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert outcomes[1] == []


def test_all_mistakes_of_all_files_are_reported_before_any_row_is_trained(study, outcomes, capsys):
    write("c", "optim: {lr: fast}")
    write("d", "optim: {momentun: 0.5}")
    assert main(["sweep", *study]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "study/c.yaml",
        "study/d.yaml",
    ]
    assert outcomes[1] == []


# --- the table ---


def finish(row, top1, **status):
    row.run_path.mkdir(parents=True)
    (row.run_path / "config.yaml").write_text(to_yaml(row.config))
    status = {"state": "finished", "step": 44, "total_steps": 44, "result": {"top1": top1}} | status
    (row.run_path / "status.json").write_text(json.dumps(status))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_table_compares_what_finished_with_what_was_published(study, capsys, monkeypatch, is_terminal):
    a, b, c, _ = rows_of(study)
    finish(a, 0.513)
    finish(b, None, state="diverged", step=7)
    finish(c, 0.2, state="running", step=22)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert main(["sweep", *study, "--table"]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header == "| row | run | differs in | published | measured | difference | state | source |"
    assert lines == [
        "| 1 | a | as its base | 50.00 % | 51.30 % | +1.30 points | finished |  |",
        "| 2 | b | lr 5.0 | diverged | - |  | diverged, step 7 of 44 |  |",
        "| 3 | c | qkv_bias false | 50.00 % | - |  | running, step 22 of 44 |  |",
        "| 4 | d | as its base | 50.00 % | - |  | not started |  |",
    ]


def test_a_run_that_max_steps_ended_has_not_finished_and_is_not_compared(study, capsys):
    a, b, *_ = rows_of(study)
    finish(a, 0.9, step=3)
    finish(b, 0.5, result={"top1": 0.5, "ema_top1": 0.6})
    lines = sweep.table(rows_of(study)).splitlines()
    assert "| not a whole run |  | ended by --max-steps, step 3 of 44 |" in lines[2]
    assert "| diverged | 60.00 % |" in lines[3]  # the better one of model and EMA, as in the run's own words


def test_a_run_of_another_recipe_is_not_passed_off_as_the_row(study):
    finish(rows_of(study)[0], 0.9)
    write("a", "optim: {lr: 9e-3}")
    assert "| 90.00 % |" not in sweep.table(rows_of(study))
    assert "finished, of another recipe" in sweep.table(rows_of(study))


# --- real processes ---


def test_a_sweep_trains_each_row_once(study, folder, capfd):
    """A row for two steps, started as a person does, and once more."""
    arguments = ["sweep", *study, "--rows", "3", "--scale", "demo", "--max-steps", "2"]
    command = [sys.executable, "-m", "cmtrain", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1].startswith("| 3 | c | qkv_bias false | 50.00 % |")
    assert re.search(r"ended by --max-steps, step 2 of \d+", first.stdout)
    checkpoints = sorted(folder.glob("runs/sweep-demo/*/checkpoints/*"))
    assert len(checkpoints) == 1
    assert main(arguments) == 0
    assert capfd.readouterr().err.count("finished before") == 1


def test_a_stop_signal_ends_the_sweep_whatever_its_row_returns(study, outcomes):
    codes, trained = outcomes
    codes["stopped"] = "b"
    assert main(["sweep", *study]) == 0
    assert trained == ["a", "b"]


def test_a_stop_signal_reaches_the_row():
    code = (
        "import sys; from cmtrain.commands.sweep import _call\n"
        "program = 'import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143));'\n"
        "program += 'print(1, flush=True); time.sleep(9999)'\n"
        "print(_call([sys.executable, '-c', program]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=600)[0] == "(143, True)\n"


# --- SLURM ---


@pytest.fixture
def slurm(folder, monkeypatch):
    """A stand-in for SLURM's sbatch, which refuses a run named d; its calls are lines of this file."""
    (folder / "bin").mkdir()
    sbatch = folder / "bin" / "sbatch"
    sbatch.write_text(
        "#!/bin/sh\nprintf '%s ' \"$@\" >> calls; echo >> calls\n[ $1 != --job-name=cmtrain-d ]\n"
    )
    sbatch.chmod(0o755)
    (folder / "job.sh").touch()
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    return folder / "calls"


def test_slurm_gets_one_job_for_each_row_that_is_not_done(study, slurm, capsys):
    """A second job of a row waits for the first one, in SLURM's own words."""
    finish(rows_of(study)[1], 0.1)
    arguments = ["sweep", *study, "--jobs", "slurm", "--sbatch", "job.sh", "--run.seed", "7"]
    assert main([*arguments, "--rows", "1-3"]) == 0
    command = "--job-name=cmtrain-{0} --dependency=singleton job.sh --config study/{0}.yaml --run.seed=7"
    assert slurm.read_text().splitlines() == [command.format(name) + " " for name in "ac"]
    assert "row 2: runs/b is finished" in capsys.readouterr().err
    assert main([*arguments, "--dry-run", "--rows", "1"]) == 0
    assert capsys.readouterr().out == f"sbatch {command.format('a')}\n"
    assert main(arguments) == 3
    refused = f"sbatch {command.format('d')}: exit code 1"
    assert capsys.readouterr().err.splitlines()[-1] == refused


@pytest.mark.parametrize(
    ("path", "missing"), [("bin", "nowhere.sh: no such file; "), ("", "sbatch: not found; ")]
)
def test_without_slurm_or_a_job_script_it_says_so(study, slurm, capsys, monkeypatch, path, missing):
    monkeypatch.setenv("PATH", path)
    assert main(["sweep", *study, "--jobs", "slurm", "--sbatch", "nowhere.sh"]) == 3
    assert capsys.readouterr().err.startswith(f"{missing}--jobs slurm needs it, and a job script such as")
    assert not slurm.exists()


# --- the re-implementation's and the paper's rows ---


def test_all_rows_that_were_published_are_rows_of_one_table():
    rows = rows_of(["configs/ablations", "configs/paper", "full_in1k.yaml", "full_in1k_224.yaml"])
    assert len(rows) == 17 + 15 + 4 + 2
    published = [line for line in sweep.table(rows).splitlines()[2:] if "not started" in line]
    assert len(published) == len(rows)
    assert sum("| diverged |" in line for line in published) == 1
    with pytest.raises(ConfigError):
        rows_of(["configs/nowhere"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_published_row_can_be_trained(folder):
    """All 38 in one command, the real networks, on demo data."""
    files = ["configs/ablations", "configs/paper", "full_in1k.yaml", "full_in1k_224.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "cmtrain", "sweep", *files, "--scale", "demo"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=2900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [
        line for line in done.stdout.splitlines() if f"ended by --max-steps, step {DEMO_STEPS} of" in line
    ]
    assert len(rows) == 38
