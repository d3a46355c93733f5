"""The list of files that `cmtrain data check` found unusable, and that training therefore leaves out.

A text file, `path<TAB>reason` a line, paths relative to the folder that was checked: bad_files.tsv in that folder, or,
where that cannot be written, a file in the user's cache. Deleting a line takes its file back in.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

NAME = "bad_files.tsv"
_HEADER = "# cmtrain data check: these files are left out of training; delete a line to use its file again\n"


def read_lists(root: Path) -> dict[str, str]:
    """Reasons by path relative to `root`, from the lists of `root` and of the folder that holds it."""
    reasons: dict[str, str] = {}
    for folder in (root.parent, root):
        prefix = "" if folder == root else f"{root.name}/"
        for path in _places(folder):
            for listed, reason in _read(path).items():
                if listed.startswith(prefix):
                    reasons[listed.removeprefix(prefix)] = f"{reason}, says {NAME}"
    return reasons


def write_list(folder: Path, reasons: Mapping[str, str], path: Path | None = None) -> Path | None:
    """Replaces the list of `folder`; `reasons` by relative path, none for no list at all.

    Args:
        path: write there and nowhere else.

    Returns:
        Where the list is, None when it is empty.
    """
    if path is not None:
        _write(path, reasons)
        return path
    beside, cached = _places(folder)
    for place in (beside, cached):
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)
    if not reasons:
        return None
    try:
        _write(beside, reasons)
    except OSError:  # the data is read-only
        cached.parent.mkdir(parents=True, exist_ok=True)
        _write(cached, reasons)
        return cached
    return beside


def user_cache() -> Path:
    """$XDG_CACHE_HOME/cmtrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmtrain"


def _places(folder: Path) -> tuple[Path, Path]:
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    return folder / NAME, user_cache() / f"bad-files-{name}.tsv"


def _read(path: Path) -> dict[str, str]:
    try:
        text = path.read_text("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    pairs = (line.rpartition("\t") for line in text.split("\n") if line and not line.startswith("#"))
    return {listed: reason for listed, _, reason in pairs}


def _write(path: Path, reasons: Mapping[str, str]) -> None:
    lines = [f"{listed}\t{' '.join(reason.split())}\n" for listed, reason in sorted(reasons.items())]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(_HEADER + "".join(lines), "utf-8", "surrogateescape")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
