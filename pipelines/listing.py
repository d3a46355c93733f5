"""Candidate files of a folder or of a list file, before any of them is opened. Columns, not one object a file.

DALI's directory reader gives hidden and empty folders a label and ignores nested files, so the walk is our own.
"""

from __future__ import annotations

import os
import re
import stat
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.paths import Paths
from pipelines.spec import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LAYOUT = "data.root must hold train/<class>/*.jpg and val/<class>/*.jpg"
_ENCODED_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)
_LIST_LINE = re.compile(rf"(.+(?:{'|'.join(map(re.escape, EXTENSIONS))}))\s*[,\s]\s*(.+)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Listing:
    """Files that look like images. What is known to be unusable without opening it is in `bad`, by place."""

    root: Path
    paths: Paths  # relative to root
    labels: NDArray[np.int64]  # (N,)
    size_bytes: NDArray[np.int64]  # (N,)
    mtime_ns: NDArray[np.int64]  # (N,)
    class_names: tuple[str, ...]
    bad: dict[int, str]

    def __len__(self) -> int:
        return len(self.labels)


def list_folder(root: Path, class_names: Sequence[str] | None) -> Listing:
    """As `Manifest.from_folder`: images below `root/<class>/`, by class, then by the bytes of their path."""
    _check_root(root)
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(f"{root}: no class folders; {LAYOUT}")
    names = tuple(found if class_names is None else class_names)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(f"{root / unknown[0]}: not one of the {len(names)} training classes ({len(unknown)} such)")
    index_of = {name: index for index, name in enumerate(names)}
    columns = _Columns()
    visited: set[tuple[int, int]] = set()
    start = os.fsencode(os.path.join(root, ""))
    for name in found:
        here = sorted(_walk(start, os.fsencode(name), visited))
        if not here and class_names is None:
            raise DataError(f"{root / name}: no images in this class folder; add some or remove the folder")
        for path, size_bytes, mtime_ns, reason in here:
            columns.add(path, index_of[name], size_bytes, mtime_ns, reason)
    return columns.listing(root, names)


def list_file(path: Path, root: Path, class_names: Sequence[str] | None) -> Listing:
    """As `Manifest.from_list`: the images that `path` names, in its order."""
    _check_root(root)
    columns = _Columns()
    first_line: dict[str, int] = {}  # of every label, in order of appearance
    place: dict[str, int] = {}
    start = os.fsencode(os.path.join(root, ""))
    for number, name, label in _read_list(path):
        first_line.setdefault(label, number)
        encoded = os.fsencode(name)
        columns.add(encoded, place.setdefault(label, len(place)), *_stat(start + encoded))
    if not place:
        raise DataError(f"{path}: names no images")
    names = tuple(class_names) if class_names is not None else _names_of(list(place))
    index_of = {name: index for index, name in enumerate(names)}
    classes = []
    for label, number in first_line.items():
        index = index_of.get(label, int(label) if label.isdecimal() else len(names))
        if index >= len(names):
            raise DataError(f"{path}:{number}: label {label!r} is not one of the {len(names)} classes")
        classes.append(index)
    columns.labels = array("q", np.array(classes, np.int64)[np.frombuffer(columns.labels, np.int64)].tobytes())
    return columns.listing(root, names)


@dataclass
class _Columns:
    """A listing while it grows."""

    buffer: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q", [0]))
    labels: array[int] = field(default_factory=lambda: array("q"))
    size_bytes: array[int] = field(default_factory=lambda: array("q"))
    mtime_ns: array[int] = field(default_factory=lambda: array("q"))
    bad: dict[int, str] = field(default_factory=dict)

    def add(self, path: bytes, label: int, size_bytes: int, mtime_ns: int, reason: str) -> None:
        if reason:
            self.bad[len(self.labels)] = reason
        self.buffer += path
        self.ends.append(len(self.buffer))
        self.labels.append(label)
        self.size_bytes.append(size_bytes)
        self.mtime_ns.append(mtime_ns)

    def listing(self, root: Path, class_names: tuple[str, ...]) -> Listing:
        if not self.labels:
            raise DataError(f"{root}: no images; {LAYOUT}")
        paths = Paths(np.frombuffer(self.buffer, np.uint8), np.frombuffer(self.ends, np.int64))
        labels, size_bytes, mtime_ns = (
            np.frombuffer(column, np.int64) for column in (self.labels, self.size_bytes, self.mtime_ns)
        )
        return Listing(root, paths, labels, size_bytes, mtime_ns, class_names, self.bad)


def _check_root(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}")


def _walk(start: bytes, folder: bytes, visited: set[tuple[int, int]]) -> Iterator[tuple[bytes, int, int, str]]:
    """(path, size, time of change, why it cannot be used) of the images below `start + folder`."""
    info = os.stat(start + folder)
    if (info.st_dev, info.st_ino) in visited:  # a link back up, or a second link to the same folder
        return
    visited.add((info.st_dev, info.st_ino))
    with os.scandir(start + folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(b"."):
                continue
            path = folder + b"/" + entry.name
            if entry.name.lower().endswith(_ENCODED_EXTENSIONS):
                yield path, *_stat(start + path)
            elif entry.is_dir():
                yield from _walk(start, path, visited)


def _stat(path: bytes) -> tuple[int, int, str]:
    try:
        info = os.stat(path)
    except OSError as error:
        return 0, 0, f"cannot be opened: {error.strerror}"
    if not stat.S_ISREG(info.st_mode):
        return 0, 0, "not a file"
    return info.st_size, info.st_mtime_ns, "" if info.st_size else "empty file"


def _read_list(path: Path) -> Iterator[tuple[int, str, str]]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, raw in enumerate(lines, start=1):
                line = raw.strip()
                if not line or line.startswith("#"):
                    continue
                found = _LIST_LINE.fullmatch(line)
                if found is None:
                    raise DataError(f"{path}:{number}: expected 'path,label' or 'path label', found {line!r}")
                yield number, found[1], found[2].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the list of images: {error}") from error


def _names_of(labels: list[str]) -> tuple[str, ...]:
    if all(label.isdecimal() for label in labels):
        return tuple(str(index) for index in range(1 + max(map(int, labels))))
    return tuple(sorted(set(labels)))
