"""Nothing is unpickled, and only the sanctioned lines parse what could run someone else's code."""

import ast

import pytest
from helpers.runs import ROOT

SOURCES = sorted(path for package in ("cmtrain", "pipelines") for path in (ROOT / package).rglob("*.py"))

# Where a dangerous thing is done on purpose, and how often.
SANCTIONED = {
    "cmtrain/storage/weights.py": ["torch.load"],  # others' files, as weights only: see the next test
    "cmtrain/config/strict_yaml.py": ["yaml.parse"],  # events only; our own code constructs the values
}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "xmlrpc"}
NAMES = {"eval", "exec", "compile", "__import__"}
METHODS = {
    "torch": {"load"}, "os": {"system", "popen", "execv", "execve"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "numpy": {"load"}, "np": {"load"}, "shutil": {"unpack_archive"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load", "safe_load", "parse", "compose"},
}  # fmt: skip


def findings(tree: ast.AST) -> list[str]:
    """Every use of something that could execute what it reads, as `module.function`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names}
            found += [node.module] if node.module.split(".")[0] in MODULES else []
            found += [f"{node.module}.{name}" for name in names & METHODS.get(node.module, set())]
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if "shell" in keywords:
                found.append("shell=")
            if isinstance(node.func, ast.Name) and node.func.id in NAMES:
                found.append(node.func.id)
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                module, method = node.func.value.id, node.func.attr
                safe = (
                    isinstance(pickled := keywords.get("allow_pickle"), ast.Constant)
                    and pickled.value is False
                )
                if method in METHODS.get(module, ()) and not (module in ("np", "numpy") and safe):
                    found.append(f"{module}.{method}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_sanctioned_lines(path):
    assert findings(ast.parse(path.read_text())) == SANCTIONED.get(str(path.relative_to(ROOT)), [])


def test_files_of_others_are_loaded_as_weights_only():
    """torch.load runs no code of a file then, but for the few types that it allows."""
    tree = ast.parse((ROOT / "cmtrain" / "storage" / "weights.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    keywords = [{keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} for call in calls]
    assert [(each["weights_only"], each["map_location"]) for each in keywords] == [("True", "'cpu'")]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "torch.load(x)", "from torch import load", "eval(x)",
        "exec(x)", "subprocess.run(x, shell=True)", "yaml.load(x)", "yaml.load(x, Loader=L)",
        "from yaml import unsafe_load",
        "os.system(x)", "np.load(x)", "np.load(x, allow_pickle=True)", "import joblib.numpy_pickle",
    ],
)  # fmt: skip
def test_the_test_can_fail(line):
    assert findings(ast.parse(line))
