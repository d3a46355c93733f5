"""All that README and docs/ name exists: verbs, options, configuration keys, files, links."""

import re
from fnmatch import filter as filter_names
from fnmatch import fnmatch

import pytest
import yaml
from helpers.runs import ROOT

from cmtrain.cli.main import _VERBS, main
from cmtrain.config.load import load_config
from cmtrain.config.schema import flat

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = set(flat(load_config("configs/demo.yaml").config))
SECTIONS = {key.split(".")[0] for key in KEYS}
FILE_ENDINGS = {"py", "md", "yaml", "json", "jsonl", "png", "pt", "pt2", "onnx", "safetensors"}


def commands(text):
    """Yield the arguments of each `cmtrain` command in code."""
    code = re.findall(r"^    (.*)$|`([^`\n]+)`", text, re.MULTILINE)
    for line in (block or inline for block, inline in code):
        for found in re.finditer(r"(?:^|[\s(])(?:-m )?cmtrain ([^#|]*)", line):
            yield found[1].replace(" \\", "").strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_keys_exist(page):
    text = page.read_text()
    for command in commands(text):
        verb = command.split()[0]
        if not verb.startswith("-") and re.fullmatch(r"[a-z][a-z-]*", verb):
            assert verb in _VERBS, command
        for key in re.findall(r"--([a-z]+[.][a-z_0-9]+)", command):
            assert key in KEYS, command
    for key in re.findall(r"`([a-z]+[.][a-z_0-9]+)(?:: [^`]*)?`", text):
        section, name = key.split(".")
        if section in SECTIONS and name not in FILE_ENDINGS:
            assert key in KEYS, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_that_are_named_ship(page):
    for name in re.findall(r"configs/[a-z0-9_/]+\.yaml", page.read_text()):
        assert (ROOT / name).exists(), name


def test_the_tree_names_every_module_and_no_other():
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    named = set(re.findall(r"[\w*]+\.py\b", tree))
    modules = {
        path.name for folder in ("cmtrain", "pipelines") for path in (ROOT / folder).rglob("[!_]*.py")
    }
    there = modules | {
        path.name for folder in ("tests", "examples") for path in (ROOT / folder).glob("*.py")
    }
    assert [module for module in modules if not any(fnmatch(module, name) for name in named)] == []
    assert [name for name in named if not filter_names(there, name)] == []


def test_the_tutorials_configuration_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text()
    block = re.search(r"`shoes.yaml`:\n\n((?:    .*\n|\n)+)", text)[1]
    (tmp_path / "shoes.yaml").write_text(re.sub("^    ", "", block, flags=re.MULTILINE))
    assert yaml.safe_load((tmp_path / "shoes.yaml").read_text())["data"] == {"root": "shoes"}
    assert main(["--config", "shoes.yaml", "--dry-run"]) == 0
    assert "256 = 1 x 1 x 256" in capsys.readouterr().out


def test_options_that_are_shown_are_taken(capsys):
    """Checks the options of the verbs, without running them."""
    shown = [command for page in PAGES for command in commands(page.read_text())]
    assert len(shown) > 50
    for command in shown:
        verb = command.split()[0]
        if verb not in ("eval", "export", "sweep", "bench", "doctor", "demo"):
            continue
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        known = capsys.readouterr().out
        for option in re.findall(r"(--[a-z-]+)(?![a-z.-])", command):
            assert re.search(rf"{option}[\s,\]]", known), command
