"""The command line: what each spelling starts, how mistakes read, which exit code comes back."""

# ruff: noqa: E501 - error lines are compared whole

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cmtrain import __version__
from cmtrain.cli import start
from cmtrain.cli.main import main
from cmtrain.config.load import load_config
from cmtrain.config.schema import Config
from cmtrain.errors import ConfigError
from pipelines.spec import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def calls(monkeypatch):
    """Replaces the modules behind the verbs; the list receives (verb, args, kwargs) of each call. They
    return 4.
    """
    received = []
    places = {
        "train": "training.train", "bench": "commands.bench.bench", "check": "commands.data_check",
        "pack": "commands.data_pack", "preview": "commands.data_preview", "stats": "commands.data_preview",
    }  # fmt: skip
    for verb, place in places.items():
        name = f"cmtrain.{place}"
        module = sys.modules.get(name) if verb == "stats" else ModuleType(name)
        setattr(module, verb, lambda *args, verb=verb, **kwargs: received.append((verb, args, kwargs)) or 4)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(start, "open_data", lambda config, world_size: f"images for {world_size}")
    monkeypatch.setattr(start, "check_places", lambda config: None)
    return received


def refusal(capsys, *arguments: str) -> str:
    """Return the stderr of arguments that are refused with exit code 2, before anything happened."""
    assert main(arguments) == 2
    assert os.listdir() == []
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.removesuffix("\n")


@pytest.mark.parametrize("verb", [[], ["train"]])
def test_train_is_the_default_verb(calls, verb):
    assert main([*verb, "--config", "configs/demo.yaml", "--resume", "never", "--max-steps", "3"]) == 4
    ((name, (config,), options),) = calls
    chosen = {"resume": "never", "max_steps": 3, "as_json": False}
    assert (name, options) == ("train", chosen | {"data": "images for 1"})
    assert config == load_config("configs/demo.yaml").config


def test_resume_defaults_to_auto_and_no_step_limit(calls):
    main(["--config", "configs/demo.yaml"])
    assert calls[0][2].items() >= {"resume": "auto", "max_steps": None}.items()


def test_overrides_may_stand_anywhere_and_use_either_spelling(calls):
    main(["--optim.lr=4e-3", "--config=configs/demo.yaml", "--mixing.mixup", "0.8", "--max-steps=2", "--train.compile",
          "true", "--augment.scale", "[0.2,1]", "--ema.decay", "null", "--data.mean", "[-1, 0, 1]"])  # fmt: skip
    config: Config = calls[0][1][0]
    assert (config.optim.lr, config.mixing.mixup, config.train.compile) == (0.004, 0.8, True)
    assert (config.augment.scale, config.ema.decay, config.data.mean) == ((0.2, 1.0), None, (-1.0, 0.0, 1.0))
    assert calls[0][2]["max_steps"] == 2


def test_data_verbs_pass_their_options_on(calls):
    assert main(["data", "check", "in", "--processes", "3", "--cache-dir", "c"]) == 4
    assert main(["data", "pack", "in", "out", "--resize-shorter", "256", "--shard-size", "64"]) == 0
    assert main(["data", "preview", "--config", "configs/demo.yaml", "--rows", "2", "--out", "x.png"]) == 0
    assert main(["data", "stats", "--config", "configs/demo.yaml", "--data.threads", "2"]) == 0
    assert [(verb, args[:2]) for verb, args, _ in calls[:2]] == [("check", ("in",)), ("pack", ("in", "out"))]
    assert calls[0][2] == {"processes": 3, "out": None, "cache_dir": "c"}
    assert (calls[1][2]["resize_shorter"], calls[1][2]["shard_mib"], calls[1][2]["quality"]) == (256, 64, 90)
    assert calls[2][2] == {"out": "x.png", "rows": 2, "columns": 8, "epoch": 0}
    assert calls[3][1][0].data.threads == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "configs/demo.yaml"],
        ["demo"],
        ["data", "pack", "in", "out"],
        ["data", "stats", "--config", "configs/demo.yaml"],
    ],
)
def test_a_person_asks_for_json(calls, arguments):
    assert main(arguments) == main([*arguments, "--json"])
    assert [options["as_json"] for _, _, options in calls] == [False, True]


def test_bench_and_eval_print_json_on_request_or_write_it_to_a_file(calls):
    for given in ([], ["--json"], ["--json", "f.json"]):
        assert main(["bench", *given]) == 0
    assert [options.json for _, (_, options), _ in calls] == [None, "", "f.json"]


def test_negative_value_is_a_value(capsys):
    line = refusal(capsys, "--config", "configs/demo.yaml", "--optim.lr", "-1")
    assert line == "--optim.lr: must be a number > 0, got -1"


def test_demo_and_bench_pass_their_options_on(calls):
    assert main(["demo", "--photos", "--schedule.epochs", "3"]) == 4
    assert (
        main(["bench", "--what", "loader", "--steps", "7", "--json", "f.json", "--data.threads", "2"]) == 0
    )
    (name, (demo,), _), (_, (config, options), _) = calls
    assert (name, demo.schedule.epochs, demo.data.root) == ("train", 3, "demo:photos")
    assert config == load_config("configs/demo.yaml", [("data.threads", "2")]).config
    assert (options.what, options.steps, options.rounds, options.json) == ("loader", 7, 5, "f.json")
    assert options.beside == ["resnet50", "efficientnet_b0"]


def test_bench_may_run_beside_nothing(calls):
    assert main(["bench", "--beside", ""]) == 0
    ((_, (_, options), _),) = calls
    assert options.beside == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tran"], "tran: unknown verb, did you mean train?"),
        (["x.yaml"], "x.yaml: unknown verb (verbs: train, doctor, demo, sweep, eval, predict, export, replay, diff, verify, status, watch, report, bench, repair-bn, data, config; a configuration file goes after --config)"),
        (["train"], "cmtrain train: --config is missing, e.g. cmtrain train --config configs/demo.yaml"),
        (["--config"], "--config: expected one argument"),
        (["--config", "x.yaml"], "x.yaml: no such file"),
        (["--config", "configs/demo.yaml", "--max-step", "3"], "--max-step: unknown option, did you mean --max-steps?"),
        (["--config", "configs/demo.yaml", "--max-steps", "0"], "--max-steps: must be a whole number >= 1, got 0"),
        (["--config", "configs/demo.yaml", "--lr", "1"], "--lr: unknown option, did you mean --optim.lr?"),
        (["--config", "configs/demo.yaml", "--train.compile"], "--train.compile: needs a value"),
        (["--config", "configs/demo.yaml", "more"], "cmtrain train: unexpected argument more"),
        (["--config=~/x.yaml"], "--config=~/x.yaml: no shell expanded the ~: write the whole path; after a blank, and not after =, a shell expands it"),
        (["data", "check", "~/photos"], "~/photos: no shell expanded the ~: write the whole path; after a blank, and not after =, a shell expands it"),
        (["config"], "cmtrain config: unknown verb; there are show, schema, reference"),
        (["status", ""], "an argument is empty: a variable of the shell that is not set?"),
        (["eval", "x", "--folder", ""], "--folder: is empty: a variable of the shell that is not set?"),
        (["report", "x", "--out="], "--out: is empty: a variable of the shell that is not set?"),
        (["--config", "configs/demo.yaml", "--resume", ""], "--resume: is empty: a variable of the shell that is not set?"),
        (["--config", "configs/demo.yaml", "--model.init_from", ""], "--model.init_from: is empty: a variable of the shell that is not set?"),
        (["--config", "configs/demo.yaml", "--config=x.yaml"], "--config: given twice; a file takes the values of another by `extends: FILE`"),
        (["status"], "cmtrain status: the following arguments are required: RUN; see cmtrain status --help"),
        (["eval", "--foo", "runs/demo"], "--foo: unknown option; see cmtrain eval --help"),
        (["eval", "x", "--json", "no/x.json"], "--json: no/x.json: must be a file, in a folder that exists"),
        (["data", "check", "x", "--out", "."], "--out: .: must be a file, in a folder that exists"),
        (["data", "check", "x", "--max-bad-fraction", "nan"], "--max-bad-fraction: must be a share 0..1, got nan"),
        (["data", "preview", "--epoch", "-1"], "--epoch: must be a whole number >= 0, got -1"),
        (["predict", "small"], "cmtrain predict: the following arguments are required: IMAGES; see cmtrain predict --help"),
        (["predict", "x", "a.jpg", "--top", "0"], "--top: must be a whole number >= 1, got 0"),
        (["config", "show"], "cmtrain config show: --config is missing, e.g. cmtrain config show --config configs/demo.yaml"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_with_a_way_out(capsys, arguments, line):
    assert refusal(capsys, *arguments) == line


@pytest.mark.parametrize("name", ["log.jsonl", "status.json", "job.yaml", "000.JPG", "shard-000000.tar"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "x", "--out"],
        ["eval", "x", "--per-class"],
        ["predict", "x", "a.jpg", "--csv"],
        ["predict", "x", "--embeddings"],
        ["data", "preview", "--out"],
        ["bench", "--json"],
    ],
)
def test_a_result_does_not_replace_what_was_an_input(calls, capsys, tmp_path, arguments, name):
    (tmp_path / name).write_text("kept")
    assert main([*arguments, str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.endswith(
        f"{name}: exists, and is no result to replace; give another name\n"
    )
    assert (tmp_path / name).read_text() == "kept"
    assert calls == []


@pytest.mark.parametrize("verb", [["eval", "x"], ["predict", "x", "a.jpg"], ["repair-bn", "x"]])
def test_some_verbs_run_in_one_process(capsys, monkeypatch, verb):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.get(name, "1"))
    assert refusal(capsys, *verb) == f"cmtrain {verb[0]}: runs in one process, without a launcher"


def test_options_of_a_verb_may_stand_between_its_arguments(capsys):
    assert main(["predict", "nowhere", "--top", "3", "a.jpg", "--csv", "x.csv", "b.jpg"]) == 3
    assert "nowhere: no run and no checkpoint of one" in capsys.readouterr().err
    assert main(["report", "a", "--out", "x.html", "b"]) == 3
    assert "unexpected argument" not in capsys.readouterr().err


@pytest.mark.parametrize(("option", "choice"), [("--what", "everything"), ("--predict", "h300")])
def test_invalid_choice_is_one_line(capsys, option, choice):
    line = refusal(capsys, "bench", option, choice)
    assert line.startswith(f"{option}: invalid choice: '{choice}'")
    assert "\n" not in line


def test_a_prediction_is_of_the_model_alone(capsys):
    assert refusal(capsys, "bench", "--predict", "h200") == "--predict: needs --what model"


@pytest.mark.parametrize(("error", "code"), [(ConfigError("a: b"), 2), (DataError("a: b"), 3)])
def test_errors_of_a_run_are_one_line_and_an_exit_code(capsys, calls, monkeypatch, error, code):
    def fail(config, **_):
        raise error

    monkeypatch.setattr(sys.modules["cmtrain.training.train"], "train", fail)
    assert main(["--config", "configs/demo.yaml"]) == code
    first, loading, *rest = capsys.readouterr().err.splitlines()
    assert first == f"cmtrain {__version__}: configs/demo.yaml, run folder runs/demo, 1 process on the CPU"
    assert (loading, rest) == ("loading torch and DALI ...", ["a: b"])


def test_ctrl_c_before_the_first_step_is_130(calls, monkeypatch):
    def interrupt(config, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["cmtrain.training.train"], "train", interrupt)
    assert main(["--config", "configs/demo.yaml"]) == 130


def test_help_names_every_verb_and_every_exit_code(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        f"\n  {word}" in text
        for word in (
            "train ",
            "demo ",
            "eval ",
            "predict ",
            "export ",
            "bench ",
            "config show ",
            "config schema ",
        )
    )
    assert all(f"\n  {code:<5}" in text for code in (0, 2, 3, 4, 5, 130, 143))
    assert max(map(len, text.splitlines())) <= 120
    for verb in (["train"], ["demo"], ["eval"], ["predict"], ["export"], ["bench"], ["config", "show"]):
        with pytest.raises(SystemExit) as done:
            main([*verb, "--help"])
        assert done.value.code == 0


def test_no_arguments_is_help_but_not_success(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: cmtrain")


def test_config_show_loads_back_and_says_where_values_come_from(capsys):
    assert main(["config", "show", "--config", "configs/paper/cmt_s.yaml", "--run.seed", "7"]) == 0
    text = capsys.readouterr().out
    Path("shown.yaml").write_text(text)
    assert (
        load_config("shown.yaml").config
        == load_config("configs/paper/cmt_s.yaml", [("run.seed", "7")]).config
    )
    origins = {
        line.split(":")[0].strip(): line.split("  # ")[1] for line in text.splitlines() if "#" in line
    }
    assert origins["seed"] == "command line"
    assert origins["momentum"] == "default"
    for key, name in {"lr": "configs/paper/cmt_s.yaml", "mixup": "configs/paper/cmt_ti.yaml"}.items():
        path, line = origins[key].rsplit(":", 1)
        assert path.endswith(name)
        assert (ROOT / name).read_text().splitlines()[int(line) - 1].startswith(f"  {key}: ")
    assert len({line.index("  # ") for line in text.splitlines() if "#" in line}) == 1


def test_config_schema_is_json(capsys):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["Optim"]["properties"]["lr"]["exclusiveMinimum"] == 0


def test_dry_run_plans_without_data(capsys, monkeypatch):
    assert main(["--config", "configs/full_in1k.yaml", "--dry-run"]) == 0
    assert "batch    4096 = 8 x 1 x 512 (processes x accumulation x images)\n" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal(capsys, "--config", "configs/full_in1k.yaml", "--dry-run")
    assert line.startswith("train.global_batch_size: 4096 does not split over 3 processes")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["config", "show", "--config", "configs/demo.yaml"], 0),
        (["--config", "configs/demo.yaml", "--dry-run"], 0),
        (["--config", "configs/demo.yaml", "--optim.lr", "fast"], 2),
        (["eval", "--help"], 0),
        (["export", "runs/demo"], 2),
    ],
)
def test_module_answers_without_loading_torch_or_dali(arguments, code):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['cmtrain', *{arguments}]\n"
        "try: runpy.run_module('cmtrain', run_name='__main__')\n"
        "except SystemExit as done: print(done.code, [name for name in ('torch', 'nvidia', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith(f"{code} []\n")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cmtrain {__version__}\n"


@pytest.mark.parametrize("quality", ["0", "101", "1000000000000"])
def test_a_quality_of_jpegs_is_refused_where_no_encoder_has_it(quality, capsys):
    assert main(["data", "pack", "a", "b", "--quality", quality]) == 2
    assert f"--quality: must be a whole number >= 1 and <= 100, got {quality}" in capsys.readouterr().err
