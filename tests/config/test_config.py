"""A configuration means what it looks like; every mistake is one line with its place and a remedy."""

# ruff: noqa: E501 - error lines are compared whole

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cmtrain.config.describe import config_reference, config_schema
from cmtrain.config.load import MAX_MISTAKES_SHOWN, find_config, load_config
from cmtrain.config.schema import Config, contradictions, flat, to_yaml
from cmtrain.errors import ConfigError

ROOT = Path(__file__).parents[2]

GOOD = """\
data:
  root: /data
optim:
  lr: 6e-3
schedule:
  epochs: 300
train:
  global_batch_size: 4096
"""


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes, name: str = "x.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


TRIED: list[bool] = []


def mistakes(text: str | bytes, *overrides: tuple[str, str]) -> list[str]:
    """The error lines for a file x.yaml that holds `text`; checks that nothing was created beside it."""
    write(text)
    before = set(os.listdir())
    TRIED.append(False)
    with pytest.raises(ConfigError) as refused:
        load_config("x.yaml", overrides)
    TRIED[-1] = True
    assert set(os.listdir()) == before
    return str(refused.value).split("\n")


def values(text: str, *overrides: tuple[str, str]) -> dict[str, object]:
    return flat(load_config(write(text), overrides).config)


# --- what people get wrong, and exactly what they read ---

TYPICAL = [
    (
        "model:\n  drop_pth: 0.1\n",
        "x.yaml:10: model.drop_pth: unknown key, did you mean model.drop_path_rate?",
    ),
    ("lr: 1e-3\n", "x.yaml:9: lr: unknown key, did you mean optim.lr?"),
    ("augment:\n  mixup: 0.8\n", "x.yaml:10: augment.mixup: unknown key, did you mean mixing.mixup?"),
    ("modle:\n  name: cmt_s\n", "x.yaml:9: modle: unknown section, did you mean model?"),
    ("run:\n  seed: yes\n", "x.yaml:10: run.seed: must be a whole number >= 0 and <= 2147483647, got yes"),
    ("ema:\n  decay: 1\n", "x.yaml:10: ema.decay: must be a number > 0 and < 1 or null, got 1"),
    (
        "mixing:\n  label_smoothing: 0.1\n",
        "x.yaml:10: mixing.label_smoothing: unknown key, did you mean mixing.smoothing?",
    ),
    (
        "evaluate:\n  batch_size: 64\n",
        "x.yaml:10: evaluate.batch_size: unknown key, did you mean train.global_batch_size?",
    ),
    (
        "model: {attention_bias: realtive}\n",
        "x.yaml:9: model.attention_bias: must be one of none, relative, pairwise or null, got realtive, "
        "did you mean relative?",
    ),
    ("data2:\n  image_size: 150\n", "x.yaml:9: data2: unknown section, did you mean data?"),
    ("guard:\n  enabled: on\n", "x.yaml:10: guard.enabled: must be true or false, got on"),
    (
        "run: {name: 7}\n",
        "x.yaml:9: run.name: must be text that matches ^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$ or null, got 7; put it in quotes",
    ),
    ("checkpoint:\n  zeal: 1\n", "x.yaml:10: checkpoint.zeal: unknown key, see `cmtrain config schema`"),
]


@pytest.mark.parametrize(("added", "line"), TYPICAL)
def test_typical_mistake_in_a_file(added, line):
    assert mistakes(GOOD + added) == [line]


@pytest.mark.parametrize(
    ("option", "text", "line"),
    [
        ("optim.lrr", "1", "--optim.lrr: unknown option, did you mean --optim.lr?"),
        ("epochs", "3", "--epochs: unknown option, did you mean --schedule.epochs?"),
        ("batch-size", "64", "--batch-size: unknown option, did you mean --train.global_batch_size?"),
        ("every_epochs", "3", "--every_epochs: unknown option, did you mean --checkpoint.every_epochs or --evaluate.every_epochs?"),
        ("qqq", "3", "--qqq: unknown option, see `cmtrain config schema`"),
        ("optim.lr", "fast", "--optim.lr: must be a number > 0, got fast"),
        ("optim.lr", "", "--optim.lr: must be a number > 0, got null"),
        ("augment.scale", "[0.2", "--augment.scale: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("augment.scale", "0.2", "--augment.scale: must be a list of 2 values, [a number > 0, a number >= 0 and <= 1], got 0.2"),
        ("schedule.epochs", "5", "--schedule.epochs: schedule.warmup_epochs (5.0) must be less than schedule.epochs (5)"),
    ],
)  # fmt: skip
def test_typical_mistake_on_the_command_line(option, text, line):
    assert mistakes(GOOD, (option, text)) == [line]


@pytest.mark.parametrize("text", ["42", "007", "1e3", "true"])
def test_text_on_the_command_line_needs_no_quotes(text):
    found = values(GOOD, ("run.name", text), ("data.train_dir", text), ("data.val_list", text))
    assert (found["run.name"], found["data.train_dir"], found["data.val_list"]) == (text, text, text)
    assert values(GOOD, ("data.val_list", "null"))["data.val_list"] is None


@pytest.mark.parametrize(
    "key", ["data.root", "run.dir", "data.cache_dir", "model.init_from", "data.val_list"]
)
@pytest.mark.parametrize("path", ["~/data", "~", "~me/data", "$HOME/data", "${HOME}/data"])
def test_a_path_that_no_shell_expanded_is_refused(key, path):
    first = path.split("/")[0]
    (line,) = mistakes(GOOD, (key, f"'{path}'"))
    assert line.startswith(
        f"--{key}: {first} is expanded by no shell here: write the folder out (or ./{first}"
    )
    assert values(GOOD, (key, f"./{path}"))[key] == f"./{path}"


def test_all_mistakes_of_all_sources_are_reported_at_once_in_reading_order():
    write("optim: {lr: slow, weight_decay: -1}\nfoo: 1\n", "base.yaml")
    text = "extends: base.yaml\ndata:\n  root: /data\n  image_px: 100\noptim: {lr: 1e-3}\nschedule:\n  warmup_epochs: 5\n"
    assert mistakes(text, ("train.compile", "maybe"), ("lr", "1")) == [
        "x.yaml:1: train.global_batch_size: required, but not set (samples of one optimizer step, over all GPUs and accumulation)",
        "x.yaml:4: data.image_px: must be a whole number >= 32 and a multiple of 16, got 100",
        "x.yaml:6: schedule.epochs: required, but not set (epochs of warm-up and decay together)",
        "base.yaml:1: optim.weight_decay: must be a number >= 0, got -1",
        "base.yaml:2: foo: unknown key, see `cmtrain config schema`",
        "--train.compile: must be true or false, got maybe",
        "--lr: unknown option, did you mean --optim.lr?",
    ]


@pytest.mark.parametrize(
    ("added", "overrides", "line"),
    [
        ("", [("schedule.warmup_epochs", "300")], "--schedule.warmup_epochs: schedule.warmup_epochs (300) must be less than schedule.epochs (300)"),
        ("evaluate: {}\n", [("data.eval_resize_px", "128")], "--data.eval_resize_px: data.eval_resize_px (128) must not be less than data.image_px (160)"),
        ("augment: {scale: [1, 0.2]}\n", [], "x.yaml:9: augment.scale: augment.scale ([1, 0.2]) must go from low to high"),
        ("augment: {ratio: [2, 1]}\n", [], "x.yaml:9: augment.ratio: augment.ratio ([2, 1]) must go from low to high"),
        ("", [("schedule.min_lr", "1")], "--schedule.min_lr: schedule.min_lr (1) must not exceed optim.lr (0.006)"),
        ("", [("optim.lr", "1e-7")], "--optim.lr: schedule.warmup_lr (1e-06) must not exceed optim.lr (1e-07)"),
        ("", [("optim.opt", "sgd"), ("optim.momentum", "0")], "--optim.momentum: optim.nesterov (true) needs optim.momentum (0) to be greater than 0"),
        ("", [("train.compile_mode", "max-autotune")], "--train.compile_mode: train.compile_mode (max-autotune) needs train.compile (false) to be true"),
        ("augment: {repeats: 3}\n", [("data.sampling", "balanced")], "--data.sampling: data.sampling (balanced) does not go with augment.repeats (3)"),
        ("expect:\n  enforce: true\n", [], "x.yaml:10: expect.enforce: expect.enforce (true) needs expect.top1 (null) to be set"),
    ],
)  # fmt: skip
def test_contradictions_blame_what_was_set_last(added, overrides, line):
    assert mistakes(GOOD + added, *overrides)[-1] == line


def test_contradictions_are_found_beside_other_mistakes():
    assert mistakes(GOOD + "augment: {scale: [1, 0.2], hflip: 2}\n") == [
        "x.yaml:9: augment.hflip: must be a number >= 0 and <= 1, got 2",
        "x.yaml:9: augment.scale: augment.scale ([1, 0.2]) must go from low to high",
    ]


# --- hostile files: one line with file and line number, nothing executed, nothing created ---

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "python object tag": ("run: !!python/object/apply:os.system ['touch canary']\n", "x.yaml:9: tags "),
    "python name tag": ("run: {name: !!python/name:os.system ''}\n", "x.yaml:9: tags "),
    "standard tag": ("ema: {decay: !!float '1'}\n", "x.yaml:9: tags "),
    "local tag": ("run: {name: !x y}\n", "x.yaml:9: tags "),
    "tag with a line break": ("run: {name: !<a%0Ab> y}\n", "x.yaml:9: tags "),
    "anchor": ("run: {name: &n y}\n", "x.yaml:9: anchors "),
    "alias to nothing": ("run: *nothing\n", "x.yaml:9: aliases "),
    "merge key": ("model:\n  <<: {name: cmt_s}\n", "x.yaml:10: model.<<: unknown key"),
    "duplicate key": ("model:\n  name: a\n  name: b\n", "x.yaml:11: name: duplicate key, first set in line 10"),
    "duplicate section": ("optim:\n  eps: 1e-9\n", "x.yaml:9: optim: duplicate key, first set in line 3"),
    "list as key": ("? [a, b]\n: c\n", "x.yaml:9: a key must be plain text"),
    "mapping as key": ("{a: b}: c\n", "x.yaml:9: a key must be plain text"),
    "alias as key": ("*x : c\n", "x.yaml:9: a key must be plain text"),
    "anchored key": ("&x model: {}\n", "x.yaml:9: a key must be plain text"),
    "deep list": ("model: " + "[" * 5000, "x.yaml:9: not YAML: nested deeper than 20 levels"),
    "deep mapping": ("model: " + "{a: " * 30 + "}" * 30 + "\n", "x.yaml:9: not YAML: nested deeper than 20 levels"),
    "second document": ("---\ndata:\n  root: /other\n", "x.yaml:9: a second document starts here"),
    "nan": ("augment: {hflip: .nan}\n", "x.yaml:9: augment.hflip: must be a number >= 0 and <= 1, got .nan"),
    "infinity": ("mixing: {mixup: .inf}\n", "x.yaml:9: mixing.mixup: must be a number >= 0, got .inf"),
    "overflow": ("mixing: {mixup: 1e999}\n", "x.yaml:9: mixing.mixup: must be a number >= 0, got .inf"),
    "octal": ("run: {seed: 010}\n", 'x.yaml:9: run.seed: must be a whole number >= 0 and <= 2147483647, got "010"'),
    "sexagesimal": ("metrics: {port: 1:30}\n", 'x.yaml:9: metrics.port: must be a whole number >= 1 and <= 65535, got "1:30"'),
    "hexadecimal": ("run: {seed: 0x1F}\n", "x.yaml:9: run.seed: must be a whole number"),
    "underscore": ("run: {seed: 1_000}\n", "x.yaml:9: run.seed: must be a whole number"),
    "5000 digits": (f"run: {{seed: {'9' * 5000}}}\n", "x.yaml:9: run.seed: must be a whole number"),
    "number in quotes": ("mixing: {mixup: '0.8'}\n", 'x.yaml:9: mixing.mixup: must be a number >= 0, got "0.8"'),
    "true as a number": ("mixing: {mixup: true}\n", "x.yaml:9: mixing.mixup: must be a number >= 0, got true"),
    "float as a count": ("checkpoint: {keep: 2.5}\n", "x.yaml:9: checkpoint.keep: must be a whole number >= 1, got 2.5"),
    "mapping as a value": ("mixing: {mixup: {a: b}}\n", "x.yaml:9: mixing.mixup: must be a number >= 0, got {a: b}"),
    "list as a section": ("model: [1, 2]\n", "x.yaml:9: model: is a section and must hold keys, got [1, 2]"),
    "run name climbs": ("run: {name: ../../etc}\n", "x.yaml:9: run.name: must be text that matches"),
    "run name is dots": ("run: {name: ..}\n", "x.yaml:9: run.name: must be text that matches"),
    "shell in the run name": ("run: {name: $(touch canary)}\n", "x.yaml:9: run.name: must be text that matches"),
    "shell in the host": ("metrics: {host: ';touch canary'}\n", "x.yaml:9: metrics.host: must be text that matches"),
    "shell in the model": ("model: {name: '`touch canary`'}\n", "x.yaml:9: model.name: must be text that matches"),
    "NUL": ('run: {dir: "a\\0b"}\n', "x.yaml:9: run.dir: must be text of at least one character, without control"),
    "escape sequence": ('run: {dir: "\\e[2J"}\n', 'x.yaml:9: run.dir: must be text of at least one character, without control characters, got "\\u001b[2J"'),
    "line break in a value": ('run: {dir: "a\\nb"}\n', "x.yaml:9: run.dir: must be text"),
    "line break in a key": ('"a\\nb": 1\n', "x.yaml:9: 'a\\nb': unknown key"),
    "half a surrogate pair": ('run: {dir: "\\ud800"}\n', "x.yaml:9: run.dir: must be text"),
    "beyond Unicode": ('run: {dir: "\\UFFFFFFFF"}\n', "x.yaml:1: not YAML: "),
    "control character": ("run: {dir: a\x07b}\n", "x.yaml:9: not YAML: the character '\\x07' is not allowed"),
    "tab": ("run:\n\tname: x\n", "x.yaml:10: not YAML: found character '\\t' that cannot start any token"),
    "open bracket": ("run: [\n", "x.yaml:10: not YAML: "),
    "open quote": ("run: 'abc\n", "x.yaml:10: not YAML: "),
    "extends itself": ("extends: x.yaml\n", "x.yaml:9: extends: x.yaml would extend itself"),
    "extends nothing": ("extends: missing.yaml\n", "x.yaml:9: extends: no such file: missing.yaml"),
    "extends the system": ("extends: /etc/passwd\n", "x.yaml:9: extends: must be the path of a file, relative to this"),
    "extends a device": ("extends: ../../../../../../../../../dev/zero\n", "x.yaml:9: extends: no such file: "),
    "extends a list": ("extends: [a, b]\n", "x.yaml:9: extends: must be the path of a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_addition_is_refused_in_one_line(name):
    text, expected = HOSTILE[name]
    (line,) = mistakes(GOOD + text)
    assert line.startswith(expected)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "x.yaml:1: the file is empty"),
        (b"# only a comment\n", "x.yaml:1: the file is empty"),
        (b"---\n...\n", "x.yaml:1: the file is empty"),
        (b"just text\n", 'x.yaml:1: must hold sections such as `optim:`, got "just text"'),
        (b"- a\n- b\n", "x.yaml:1: must hold sections such as `optim:`, got [a, b]"),
        (GOOD.encode() + b"# \xff\n", "x.yaml:9: not UTF-8 text: byte 0xff"),
        (GOOD.encode("utf-16"), "x.yaml:1: not UTF-8 text: byte 0xff"),
        (b"\x7fELF\x00\x01", "x.yaml:1: not YAML: the character '\\x7f' is not allowed"),
        (b"# " + b"x" * 2_000_000, "x.yaml:1: larger than 1,000,000 bytes, so not a configuration"),
    ],
)
def test_hostile_file_is_refused_in_one_line(content, expected):
    assert mistakes(content) == [expected]


def test_alias_bomb_is_refused_without_being_expanded():
    found = mistakes(GOOD + "bomb:\n" + "".join(f"  {line}\n" for line in BOMB.splitlines()))
    assert found[0].startswith("x.yaml:9: bomb: unknown section")
    assert found[1] == "x.yaml:10: anchors (&a) are not supported; write the value out"
    assert all("\n" not in line and len(line) < 200 for line in found)


def test_thousands_of_mistakes_are_cut():
    found = mistakes("".join(f"k{index}: 1\n" for index in range(3000)))
    assert len(found) == MAX_MISTAKES_SHOWN + 1
    assert found[-1] == "... and 2954 more"  # 3000 unknown keys and 4 missing ones


def test_damaged_files_end_in_config_errors_and_nothing_else():
    source, draw = (ROOT / "configs/full_in1k.yaml").read_bytes(), random.Random(0)
    refused = []
    for _ in range(300):
        content = bytearray(source)
        for _ in range(draw.randint(1, 4)):
            position = draw.randrange(len(content))
            content[position : position + draw.randint(0, 3)] = draw.randbytes(
                draw.randint(0, 3)
            ) + draw.choice(
                [b"", b"{", b"[", b"&", b"*", b"!", b"'", b'"\\x', b"\n", b": ", b"\t", b"%", b"---\n"]
            )
        write(bytes(content))
        try:
            load_config("x.yaml")
        except ConfigError as error:
            refused.append(str(error))
            TRIED.append(True)
    assert len(refused) > 100
    assert all(line.startswith("x.yaml:") for error in refused for line in error.split("\n"))


@pytest.mark.parametrize("key", ["data.train_dir", "data.val_dir"])
def test_folders_of_splits_stay_below_the_data_folder(key):
    for value in ("../x", "/etc", "a/../../b", ".."):
        assert mistakes(GOOD, (key, value)) == [
            f"--{key}: must be below data.root: not absolute, and without .., got {value}"
        ]


@pytest.mark.parametrize(
    "key", ["run.dir", "data.root", "data.cache_dir", "data.train_dir", "data.train_list"]
)
def test_paths_are_ones_that_a_file_system_can_hold(key):
    for value in ("x" * 256, "a/" + "é" * 128, "x/" * 513):
        (line,) = mistakes(GOOD, (key, value))
        assert line.startswith(
            f"--{key}: must be a path of at most 1024 bytes, and 255 between two slashes, got "
        )
        assert len(line) < 200
    load_config(write(GOOD), [(key, "x" * 255 + "/" + "é" * 127)])


def test_missing_file_is_one_line_with_a_suggestion():
    for given, line in {
        "nowhere.yaml": "nowhere.yaml: no such file",
        "configs/full_in1.yaml": "configs/full_in1.yaml: no such file, did you mean configs/full_in1k.yaml?",
        "a\0b": '"a\\u0000b": no such file',
    }.items():
        with pytest.raises(ConfigError) as refused:
            load_config(given)
        assert str(refused.value) == line
    Path("folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"^folder\.yaml:1: cannot be read: Is a directory$"):
        load_config("folder.yaml")


# --- what is right ---


def test_numbers_are_what_they_look_like():
    found = values(
        GOOD + "mixing: {mixup: 8e-1, cutmix: 1, reprob: .25, smoothing: 1.e-1}\nrun: {name: '010'}\n"
    )
    assert [found[f"mixing.{key}"] for key in ("mixup", "cutmix", "reprob", "smoothing")] == [
        0.8,
        1.0,
        0.25,
        0.1,
    ]
    assert (found["optim.lr"], found["run.name"]) == (0.006, "010")
    assert (
        values(GOOD, ("optim.lr", "1e-3"), ("train.compile", "true"), ("ema.decay", "null"))["optim.lr"]
        == 0.001
    )


def test_words_of_yaml_1_1_stay_text():
    assert values(GOOD + "run: {name: no}\nexpect: {source: 2021-07-13}\n")["run.name"] == "no"


def test_precedence_and_origins():
    write("run: {seed: 1, dir: base}\noptim: {lr: 1, eps: 1e-9}\n", "base.yaml")
    resolved = load_config(
        write("extends: base.yaml\n" + GOOD + "run:\n  seed: 2\n"), [("run.seed", "3"), ("run.seed", "4")]
    )
    config, origins = resolved.config, resolved.origins
    assert (config.run.seed, origins["run.seed"]) == (4, "command line")
    assert (config.optim.lr, origins["optim.lr"]) == (0.006, "x.yaml:5")
    assert (config.run.dir, origins["run.dir"]) == ("base", "base.yaml:1")
    assert (config.ema.decay, origins["ema.decay"]) == (None, "default")
    assert set(origins) == set(flat(config))


def test_a_file_may_extend_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: configs/full_in1k.yaml\noptim: {lr: 1e-3}\n")
    resolved = load_config(mine)
    assert (resolved.config.model.name, resolved.config.optim.lr) == ("cmt_ti", 1e-3)
    shipped = (ROOT / "configs" / "full_in1k.yaml").read_text().splitlines()
    line = shipped.index("  name: cmt_ti") + 1
    assert resolved.origins["model.name"].endswith(f"configs/full_in1k.yaml:{line}")
    (tmp_path / "configs").mkdir()  # one's own comes first
    (tmp_path / "configs" / "full_in1k.yaml").write_text((ROOT / "configs" / "demo.yaml").read_text())
    assert load_config(mine).config.model.name == "cmt_micro"


def test_extended_file_is_found_beside_the_file_that_extends_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(GOOD, "a/base.yaml")
    resolved = load_config(write("extends: ../base.yaml\n", "a/b/x.yaml"))
    assert resolved.origins["optim.lr"] == "a/base.yaml:4"


def test_run_is_named_after_its_file():
    assert load_config(write(GOOD, "first try (2).yaml")).config.run.name == "first-try--2-"
    assert values(GOOD, ("run.name", "other"))["run.name"] == "other"
    assert values(GOOD, ("run.name", '"7"'))["run.name"] == "7"


def test_packaged_configurations_are_found_from_anywhere():
    assert find_config("configs/full_in1k.yaml") == ROOT / "configs/full_in1k.yaml"
    assert find_config("paper/cmt_s.yaml") == ROOT / "configs/paper/cmt_s.yaml"
    Path("configs").mkdir()
    write(GOOD, "configs/full_in1k.yaml")
    assert find_config("configs/full_in1k.yaml") == Path("configs/full_in1k.yaml")


def test_yaml_round_trip_is_exact():
    odd = [
        ("run.dir", "é: #x"), ("expect.source", '"1e-3"'), ("data.root", "demo:digits"), ("optim.lr", "0.1234567890123456"),
        ("optim.eps", "1e-08"), ("run.name", '"010"'), ("data.cache_dir", '"null"'), ("augment.scale", "[1e-1, .5]"),
    ]  # fmt: skip
    config = load_config(write(GOOD), odd).config
    resolved = load_config(write(to_yaml(config), "again.yaml"))
    assert resolved.config == config
    assert hash(resolved.config) == hash(config)
    assert "default" not in resolved.origins.values()
    assert Config.model_validate(config.model_dump()) == config


def test_configurations_are_frozen_and_cannot_contradict_themselves():
    config = load_config(write(GOOD)).config
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="must be less than"):
        Config.model_validate(config.model_dump() | {"schedule": {"epochs": 5, "warmup_epochs": 5.0}})


def test_every_field_says_what_it_is_and_defaults_agree():
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for section, model in sections.items():
        for key, field in model.model_fields.items():
            assert field.description, f"{section}.{key}"
    defaults = {
        f"{s}.{k}": f.default
        for s, m in sections.items()
        for k, f in m.model_fields.items()
        if not f.is_required()
    }
    assert contradictions(defaults) == []
    assert "extends" in config_schema()["properties"]


def test_reading_a_configuration_loads_nothing_heavy():
    code = (
        "import sys, cmtrain.cli.main, cmtrain.training.schedule; from cmtrain.config.load import load_config;"
        f"load_config({str(ROOT / 'configs/full_in1k.yaml')!r});"
        "print([name for name in ('torch', 'nvidia', 'numpy', 'timm', 'accelerate', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_reference_in_the_documentation_is_the_schema_of_today():
    """After a change: cmtrain config reference > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text() == config_reference()
    assert all(f"| `{key}` |" in config_reference() for key in flat(load_config("configs/demo.yaml").config))


def test_not_one_of_those_above_was_executed(figure, tmp_path_factory):
    executed = len(list(tmp_path_factory.getbasetemp().rglob("canary")))
    figure(f"bad configurations: {len(TRIED)} tried, {sum(TRIED)} refused, {executed} executed")
    assert (executed, sum(TRIED)) == (0, len(TRIED))


def test_extended_files_may_extend_others_and_the_nearest_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(GOOD + "run: {seed: 1}\nema: {decay: 0.5}\nexpect: {top1: 0.5}\n", "c.yaml")
    write("extends: c.yaml\nrun: {seed: 2}\nema: {decay: 0.6}\n", "b.yaml")
    write("extends: b.yaml\nrun: {seed: 3}\n", "a.yaml")
    config, origins = load_config("a.yaml").config, load_config("a.yaml").origins
    assert (config.run.seed, config.ema.decay, config.expect.top1) == (3, 0.6, 0.5)
    assert (origins["run.seed"], origins["ema.decay"]) == ("a.yaml:2", "b.yaml:3")
    write("extends: a.yaml\n", "c.yaml")
    with pytest.raises(ConfigError, match=r"c\.yaml:1: extends: a\.yaml would extend itself"):
        load_config("a.yaml")
    for number in range(12):
        write(f"extends: {number + 1}.yaml\n", f"{number}.yaml")
    with pytest.raises(ConfigError, match=r"^9\.yaml:1: extends: more than 10 files extend one another"):
        load_config("0.yaml")


@pytest.mark.parametrize(
    "root",
    [
        "https://u:SECRET@h/x",
        "HTTPS://u:SECRET@h/x",
        "s3://b/x?X-Amz-Signature=SECRET",
        "S3://b/SECRET",
        "s3a://k:SECRET@b/x",
        "ftp://u:SECRET@h/x",
        "https://u:SEC/RET@h/x",
        "s3://",
        "s3:///SECRET",
    ],
)
def test_a_place_that_holds_a_key_is_refused_and_not_shown(root):
    (line,) = mistakes(GOOD, ("data.root", root))
    assert line.startswith("--data.root: must be a plain place, as s3://bucket/imagenet-256")
    assert "SEC" not in line


@pytest.mark.parametrize("root", ["s3://b", "gs://b/x/", "az://a/c/x", "https://h:8080/x", "http://h/x y"])
def test_a_plain_place_is_a_root(root):
    assert values(GOOD, ("data.root", root))["data.root"] == root
