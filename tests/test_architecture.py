"""Imports point one way, by package; config stays light; files stay one thing each."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("cmtrain/**/*.py"), *ROOT.glob("pipelines/**/*.py")])

# What each package may import, itself aside. A module that is named alone may be imported without its
# package. Everything may import cmtrain.errors and pipelines.spec.
FILES = {"pipelines.checks", "pipelines.atomic", "pipelines.plan", "pipelines.progress"}
PIPELINES = {"pipelines", "pipelines.files", "pipelines.checks", "pipelines.dali", "pipelines.packing"}
MONITORING = {"cmtrain.storage", "cmtrain.step", "cmtrain.config"}
TRAINING = MONITORING | {
    "cmtrain.monitoring",
    "cmtrain.monitoring.report",
    "cmtrain.processes",
    "cmtrain.models",
}
COMMANDS = TRAINING | {"cmtrain.training", "cmtrain.commands.bench", "cmtrain.commands.again"} | PIPELINES
MAY_IMPORT = {
    "cmtrain": {"cmtrain.cli"},
    "cmtrain.cli": COMMANDS | {"cmtrain.commands"},
    "cmtrain.commands": COMMANDS,
    "cmtrain.commands.bench": COMMANDS,
    "cmtrain.commands.again": COMMANDS | {"cmtrain.commands.trained_model"},
    "cmtrain.training": TRAINING | PIPELINES,
    "cmtrain.monitoring": MONITORING
    | {"cmtrain.monitoring.report", "pipelines.checks", "pipelines.files.objects"},
    "cmtrain.monitoring.report": MONITORING | {"cmtrain.monitoring", "pipelines.checks"},
    "cmtrain.processes": {"cmtrain.storage", "cmtrain.config"},
    "cmtrain.storage": {"cmtrain.models", "cmtrain.config", "pipelines.atomic"},
    "cmtrain.step": set(),
    "cmtrain.models": set(),
    "cmtrain.config": set(),
    "pipelines": PIPELINES,
    "pipelines.checks": {"pipelines.atomic"},
    "pipelines.files": FILES,
    "pipelines.dali": {"pipelines.plan", "pipelines.rand_augment"},
    "pipelines.packing": {"pipelines.files", *FILES},
}
ALWAYS = {"cmtrain.errors", "pipelines.spec"}
MAX_FILES, MAX_LINES, SHORT_LINES, MAX_SHORT_FILES, MAX_CODE_LINES = 14, 400, 60, 12, 20_000


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def package_of(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


def imports_of(path: Path, *, at_once: bool = False) -> set[str]:
    """Our own modules that `path` imports anywhere; `at_once`: those that are loaded with it."""
    found, tree = set(), ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES and name not in ("cmtrain", "pipelines")}


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def test_imports_have_no_cycle():
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert len(order) == len(MODULES)


def test_packages_import_only_what_stands_below_them():
    wrong = set()
    for name, imported in GRAPH.items():
        package = package_of(name)
        allowed = MAY_IMPORT[package] | ALWAYS | {package}
        wrong |= {(name, other) for other in imported if not {other, package_of(other)} & allowed}
    assert wrong == set()


def test_packages_have_no_cycle():
    graph: dict[str, set[str]] = {package: set() for package in MAY_IMPORT}
    for name, imported in GRAPH.items():
        graph[package_of(name)] |= {package_of(other) for other in imported - ALWAYS} - {package_of(name)}
    # monitoring draws its report, and pipelines has its contracts and its loader in one folder
    graph["cmtrain.monitoring.report"] -= {"cmtrain.monitoring"}
    for package in graph:
        if package.startswith("pipelines."):
            graph[package] -= {"pipelines"}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_pipelines_do_not_know_the_trainer():
    for name, imported in GRAPH.items():
        if name.startswith("pipelines"):
            assert not {i for i in imported if i.startswith("cmtrain")}, name
            assert "torch.distributed" not in code_of(MODULES[name]), name


def test_only_entry_points_import_the_training_run():
    users = {name for name, imported in GRAPH.items() if "cmtrain.training.train" in imported}
    assert users == {"cmtrain.cli.main"}


TRACKERS = "cmtrain.monitoring.trackers"


@pytest.mark.parametrize(("library", "allowed"), [
    ("nvidia.dali", ["pipelines.dali"]),
    ("accelerate", ["cmtrain.training.", "cmtrain.step.", "cmtrain.commands.", TRACKERS]),
])  # fmt: skip
def test_libraries_stay_behind_few_modules(library, allowed):
    users = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n == library or n.startswith(library + ".") for n in names):
                users.add(name)
    assert users
    assert {user for user in users if not user.startswith(tuple(allowed))} == set()


def test_cmtrain_loads_dali_where_it_is_used():
    """Everything of cmtrain can be imported without DALI."""
    dali = {"pipelines.loader", *(name for name in MODULES if package_of(name) == "pipelines.dali")}
    loaded = {name: imports_of(path, at_once=True) for name, path in MODULES.items()}
    users = {name for name, imported in loaded.items() if imported & dali}
    assert users <= dali
    assert "pipelines.loader" in GRAPH["cmtrain.training.loaders"]  # in its functions


def code_of(path: Path) -> str:
    """The source without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant("")
    return ast.unparse(tree)


LINES = {
    name: len(path.read_text().splitlines()) for name, path in MODULES.items() if path.name != "__init__.py"
}


def test_files_are_neither_long_nor_slices():
    assert {name: lines for name, lines in LINES.items() if lines > MAX_LINES} == {}
    short = [name for name, lines in LINES.items() if lines < SHORT_LINES]
    assert len(short) <= MAX_SHORT_FILES, short
    assert sum(len(path.read_text().splitlines()) for path in SOURCES) <= MAX_CODE_LINES


def test_folders_are_not_corridors():
    folders = [path.parent for path in SOURCES if path.name != "__init__.py"]
    assert {folder: n for folder in folders if (n := folders.count(folder)) > MAX_FILES} == {}


def test_tests_import_helpers_and_never_each_other():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else ""
            assert not (module or "").split(".")[-1].startswith(("test_", "conftest")), path


def test_models_register_with_timm():
    program = (
        "import timm, cmtrain; assert timm.is_model('cmt_ti'); cmtrain.models.load_reference_checkpoint"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


def test_importing_cmtrain_is_light():
    program = (
        "import sys, cmtrain; assert not {'torch', 'timm', 'nvidia'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
