"""Read and write the list of unusable files that `cmtrain data check` finds and training leaves out.

A text file, one `path<TAB>kind<TAB>reason` per line, paths relative to the folder that was checked. It is
bad_files.tsv in that folder or, where that cannot be written, a file in the user's cache. Deleting a line
takes its file back in. Older lists have no kind: their files count as "other".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipelines.atomic import replacing
from pipelines.checks.decode_one import KINDS, Fault, Kind

NAME = "bad_files.tsv"
_HEADER = "# cmtrain data check: these files are left out of training; delete a line to use its file again\n"


class BadFile(NamedTuple):
    """A file that cannot be used."""

    path: str
    kind: Kind
    reason: str


def read_lists(root: Path, inner: Iterable[str] = ()) -> dict[str, Fault]:
    """Return faults by path relative to `root`, from the lists of `root` and of the folder that holds it.

    Args:
        inner: folders below `root` whose lists count, too.
    """
    faults: dict[str, Fault] = {}
    real = Path(os.path.realpath(root))
    above = {(holder.parent, f"{holder.name}/", "") for holder in (root, real)}
    below = [(root / folder, "", f"{folder}/") for folder in inner]
    for folder, prefix, start in [*sorted(above), (root, "", ""), *below]:
        for path in _places(folder):
            for listed, (kind, reason) in _read(path).items():
                if listed.startswith(prefix):
                    name = start + listed.removeprefix(prefix)
                    faults[name] = Fault(kind, f"{reason} (listed in {NAME})")
    return faults


def write_list(folder: Path, faults: Mapping[str, Fault], path: Path | None = None) -> Path | None:
    """Replace the list of `folder`; without faults, delete it.

    Args:
        faults: by path relative to `folder`.
        path: the only file to write instead, if given.

    Returns:
        Where the list is, None when it is empty.
    """
    if path is not None:
        _write(path, faults)
        return path
    beside, cached = _places(folder)
    for place in (beside, cached):
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)
    if not faults:
        return None
    try:
        _write(beside, faults)
    except OSError:  # the data is read-only
        cached.parent.mkdir(parents=True, exist_ok=True)
        _write(cached, faults)
        return cached
    return beside


def user_cache() -> Path:
    """Return $XDG_CACHE_HOME/cmtrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmtrain"


def _places(folder: Path) -> tuple[Path, Path]:
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    return folder / NAME, user_cache() / f"bad-files-{name}.tsv"


def _read(path: Path) -> dict[str, Fault]:
    try:
        text = path.read_text("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    faults: dict[str, Fault] = {}
    for line in text.split("\n"):
        if line and not line.startswith("#"):
            listed, _, reason = line.rpartition("\t")  # a path may hold tabs, a reason does not
            before, _, column = listed.rpartition("\t")
            kind = next((kind for kind in KINDS if kind == column), None)
            faults[before if kind else listed] = Fault(kind or "other", reason)
    return faults


def _write(path: Path, faults: Mapping[str, Fault]) -> None:
    text = _HEADER
    for listed, (kind, reason) in sorted(faults.items()):
        text += f"{listed}\t{kind}\t{' '.join(reason.split())}\n"
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
