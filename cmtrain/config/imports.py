"""Find and import the user's own modules (run.imports), which register models with timm.

An entry is `my_models` as a person writes it, and `my_models@1f0c...` once it was read: the hash of its
source is a part of the recipe. A run folder has a copy of the source beside its config.yaml.
"""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from cmtrain.errors import ConfigError

HASH_LENGTH = 12


def sources(entry: str) -> dict[str, Path]:
    """Return the source files of a module or package by their name beside it; {} if there is none."""
    spec = PathFinder.find_spec(entry.partition("@")[0])
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return {}
    file = Path(spec.origin)
    files = sorted(file.parent.rglob("*.py")) if spec.submodule_search_locations else [file]
    top = file.parent.parent if spec.submodule_search_locations else file.parent
    return {str(found.relative_to(top)): found for found in files}


def pinned(entries: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Return `entries` with the hash of each source, which may be in `folder` or on Python's path.
    Raises ConfigError: there is no such module, or its source is another than its entry's.
    """
    if entries and str(folder.resolve()) not in sys.path[:1]:
        sys.path.insert(0, str(folder.resolve()))
    found = []
    for entry in entries:
        name, _, expected = entry.partition("@")
        if not (files := sources(entry)):
            raise ConfigError(f"no module {name} in {folder} or on Python's path")
        digest = hashlib.sha256()
        for short, file in files.items():
            digest.update(f"{short}\0".encode() + file.read_bytes())
        found.append(f"{name}@{digest.hexdigest()[:HASH_LENGTH]}")
        if expected and found[-1] != entry:
            raise ConfigError(f"{next(iter(files.values()))} is not the source that {entry} was made with")
    return tuple(found)


def import_modules(entries: Sequence[str]) -> None:
    """Import the modules of run.imports. Raises ConfigError: one fails; names the line at which it did."""
    for entry in entries:
        name = entry.partition("@")[0]
        try:
            importlib.import_module(name)
        except Exception as error:
            lines = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[1:]]
            own = [line for line in lines if "importlib" not in line]
            place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else own[0]
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ConfigError(f"{place}: run.imports: {name}: {why}") from error
