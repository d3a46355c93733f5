"""A test without its program is skipped, and says how to get it, or fails where all of them are wanted."""

import re
from types import SimpleNamespace

import pytest
from helpers import tools
from helpers.runs import ROOT


@pytest.fixture
def empty_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(tools, "required", False)


def test_a_missing_program_skips_and_says_how_to_get_it(empty_path):
    with pytest.raises(pytest.skip.Exception, match=r"without amtool: sudo apt install prom"):
        tools.need("amtool")


def test_a_missing_program_fails_where_all_are_required(empty_path, monkeypatch):
    monkeypatch.setattr(tools, "required", True)
    for tool in ("chromium", "shellcheck"):
        with pytest.raises(pytest.fail.Exception, match=f"^without {tool}: "):
            tools.need(tool)


def test_a_missing_package_is_a_missing_tool(monkeypatch):
    monkeypatch.setattr(tools, "required", True)
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    for name in ("onnx", "nvidia.dali"):
        with pytest.raises(pytest.fail.Exception, match=f"^without {name}: make setup"):
            tools.need(name)


def test_a_program_of_another_name_will_do(empty_path, tmp_path):
    assert tools.find("chromium") is None
    (tmp_path / "google-chrome").touch(0o755)
    assert tools.find("chromium") == str(tmp_path / "google-chrome")
    tools.need("chromium")


def test_skips_are_listed_by_reason_with_tools_first():
    reasons = ["needs a CUDA device"] * 3 + ["without chromium: sudo apt install chromium"] * 2
    reports = [SimpleNamespace(longrepr=("a.py", 1, f"Skipped: {reason}")) for reason in reasons]
    assert tools.count_skips(reports) == [
        "2 skipped without chromium: sudo apt install chromium",
        "3 skipped: needs a CUDA device",
    ]


def test_make_installs_every_program_that_tests_name():
    makefile = (ROOT / "Makefile").read_text()
    lists = {name: set(text.split()) for name, text in re.findall(r"^(TOOLS_\w+) *:= (.+)$", makefile, re.M)}
    named = {
        package for how in tools.SOURCES.values() for package in how.partition("apt install ")[2].split()
    }
    assert named == set.union(*lists.values())


def test_programs_are_looked_for_in_one_place():
    """Or a skip would neither be listed with its remedy nor fail."""
    files = {path for path in (ROOT / "tests").rglob("*.py") if path.parent.name != "gpu"}
    assert {path.name for path in files if "shutil.which(" in path.read_text()} == {
        "tools.py",
        "test_tools.py",
    }
