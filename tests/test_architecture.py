"""Imports point one way, config stays light, and dangerous calls exist in one place only."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("cmtrain/**/*.py"), *ROOT.glob("pipelines/**/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """Our own modules that `path` imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES and name not in ("cmtrain", "pipelines")}


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def test_imports_have_no_cycle():
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert len(order) == len(MODULES)


def test_pipelines_do_not_know_the_trainer():
    for name, imported in GRAPH.items():
        if name.startswith("pipelines"):
            assert not {i for i in imported if i.startswith("cmtrain")}, name
            assert "torch.distributed" not in code_of(MODULES[name]), name


def test_only_entry_points_import_the_training_run():
    assert {name for name, imported in GRAPH.items() if "cmtrain.train" in imported} == {"cmtrain.cli", "cmtrain.demo"}


ACCELERATES = ("bench", "bench_models", "build", "doctor", "doctor_checks", "learner", "repair_bn", "trackers", "train")


@pytest.mark.parametrize(("library", "allowed"), [
    ("nvidia.dali", {"pipelines.augment", "pipelines.graphs", "pipelines.stages"}),
    ("accelerate", {f"cmtrain.{name}" for name in ACCELERATES}),
])  # fmt: skip
def test_libraries_stay_behind_few_modules(library, allowed):
    users = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n == library or n.startswith(library + ".") for n in names):
                users.add(name)
    assert users <= allowed


def code_of(path: Path) -> str:
    """The source without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant("")
    return ast.unparse(tree)


def test_modules_are_one_room_each():
    assert {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 400} == {}


@pytest.mark.parametrize("imports", ["import timm, cmtrain", "import cmtrain, timm", "import cmtrain.models, timm"])
def test_models_register_with_timm_in_any_import_order(imports):
    program = f"{imports}; assert timm.is_model('cmt_ti'); assert cmtrain.models.load_reference_checkpoint"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_importing_cmtrain_is_light():
    program = "import sys, cmtrain; assert not {'torch', 'timm', 'nvidia'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
