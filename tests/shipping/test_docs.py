"""Check that what README and docs/ name exists: verbs, options, keys, files, links, packages, tests."""

import re

import pytest
from helpers.runs import ROOT

from cmtrain.cli.main import _VERBS, main
from cmtrain.config.load import load_config
from cmtrain.config.schema import flat

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = set(flat(load_config("configs/demo.yaml").config))
SECTIONS = {key.split(".")[0] for key in KEYS}
FILE_ENDINGS = {"py", "md", "yaml", "json", "jsonl", "png", "pt", "pt2", "onnx", "safetensors"}


def commands(text):
    """Yield what follows `cmtrain` in code, up to the end of the command."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    fenced = [code for language, code in blocks if language == "bash"]
    code = re.findall(r"^    (.*)$|`([^`\n]+)`", text, re.MULTILINE)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + [block or inline for block, inline in code]:
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


def test_the_tree_names_every_package_and_only_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text.partition("## The tree")[2].partition("\n## ")[0]
    named = set(re.findall(r"^ +(\w+)/ ", tree, re.MULTILINE))
    packages = {
        path.parent for top in ("cmtrain", "pipelines") for path in (ROOT / top).rglob("__init__.py")
    }
    assert {package.name for package in packages} - named == set()
    files = {path.name for path in ROOT.rglob("*.*") if ".venv" not in path.parts}
    assert set(re.findall(r"[\w.]+\.(?:py|md|yaml|sh)\b", tree)) - files == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page):
    named = r"`((?!pipelines/test_)(?:tests|cmtrain|pipelines|benchmarks|docker|examples)/[\w/.-]+\.\w+)"
    for path in re.findall(named, page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_fault_names_tests_that_exist():
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"\b\w+/test_\w+\.py", row)
        assert named, row
        for path in named:
            assert (ROOT / "tests" / path).exists(), path


def test_the_readme_is_short_and_opens_with_a_picture():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 160
    assert any("docs/live.png" in line for line in lines[:30])


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == [
        "README.md"
    ]


def test_pages_name_no_package_registry():
    for page in PAGES:
        assert not re.search(r"pypi\.org|index-url|pythonhosted", page.read_text()), page


def test_options_that_are_shown_are_taken(capsys):
    """The verbs' own options, without running them."""
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
