"""Candidate files of a folder or of a list file, before any of them is opened. Columns, not one object a file.

DALI's directory reader gives hidden and empty folders a label and ignores nested files, so the walk is our own.
"""

from __future__ import annotations

import os
import re
import stat
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.files.paths import Paths
from pipelines.spec import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LAYOUT = "data.root must hold train/<class>/*.jpg and val/<class>/*.jpg"
_ENCODED_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)
_LIST_LINE = re.compile(rf"(.+(?:{'|'.join(map(re.escape, EXTENSIONS))}))\s*[,\s]\s*(.+)", re.IGNORECASE)


_INT64_MASK = 2**63 - 1  # some file systems use all 64 bits of an inode number

FolderState = tuple[int, int, int, int]


class Folders(NamedTuple):
    """The folders that hold the files. To add, remove or rename a file changes the state of its folder."""

    paths: Paths  # relative to root
    states: NDArray[np.int64]  # (F, 4) of `folder_state`, from before their entries were read


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
    folders: Folders
    began_ns: int  # this host's clock before the first look at a folder

    def __len__(self) -> int:
        return len(self.labels)


def list_folder(root: Path) -> Listing:
    """Images below `root/<class>/`, by class, then by the bytes of their path; the classes are the folders found."""
    _check_root(root)
    columns = _Columns()
    start = os.fsencode(os.path.join(root, ""))
    columns.folders[b""] = folder_state(start)
    found = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )
    if not found:
        raise DataError(f"{root}: no class folders; {LAYOUT}")
    visited: set[tuple[int, int]] = set()
    for label, name in enumerate(found):
        for path, size_bytes, mtime_ns, reason in sorted(
            _walk(start, os.fsencode(name), visited, columns.folders)
        ):
            columns.add(path, label, size_bytes, mtime_ns, reason)
    return columns.listing(root, tuple(found))


def list_file(path: Path, root: Path) -> Listing:
    """The images that `path` names, in its order; the classes are its labels, in order of their appearance."""
    _check_root(root)
    columns = _Columns()
    place: dict[str, int] = {}
    start = os.fsencode(os.path.join(root, ""))
    for _, name, label in _read_list(path):
        encoded = os.fsencode(name)
        folder = os.path.dirname(encoded)
        if folder not in columns.folders:
            columns.folders[folder] = folder_state(start + folder)
        columns.add(encoded, place.setdefault(label, len(place)), *file_state(start + encoded))
    if not place:
        raise DataError(f"{path}: names no images")
    return columns.listing(root, tuple(place))


def classes_of_folder(listing: Listing, class_names: Sequence[str] | None) -> Listing:
    """The same files with places in `class_names` as labels; None takes the folders' names.

    Raises DataError for a folder that is no class of `class_names`, and, if these are None, for an empty one.
    """
    found, root = listing.class_names, listing.root
    names = found if class_names is None else tuple(class_names)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{root / unknown[0]}: not one of the {len(names)} training classes ({len(unknown)} such)"
        )
    empty = np.flatnonzero(np.bincount(listing.labels, minlength=len(found)) == 0)
    if len(empty) and class_names is None:
        raise DataError(
            f"{root / found[empty[0]]}: no images in this class folder; add some or remove the folder"
        )
    index_of = {name: index for index, name in enumerate(names)}
    return _relabelled(listing, [index_of[name] for name in found], names)


def classes_of_list(listing: Listing, path: Path, class_names: Sequence[str] | None) -> Listing:
    """The same files with places in `class_names` as labels; None takes 0 to the largest number, or the names sorted.

    Raises DataError for a label that is neither one of `class_names` nor the number of one, with its line in `path`.
    """
    found = listing.class_names
    names = tuple(class_names) if class_names is not None else _names_of(found)
    index_of = {name: index for index, name in enumerate(names)}
    classes = [index_of.get(label, int(label) if label.isdecimal() else len(names)) for label in found]
    for label, index in zip(found, classes, strict=True):
        if index >= len(names):
            number = next((number for number, _, text in _read_list(path) if text == label), 0)
            raise DataError(f"{path}:{number}: label {label!r} is not one of the {len(names)} classes")
    return _relabelled(listing, classes, names)


def _relabelled(listing: Listing, classes: list[int], names: tuple[str, ...]) -> Listing:
    return replace(listing, labels=np.array(classes, np.int64)[listing.labels], class_names=names)


def folder_state(path: bytes) -> FolderState:
    """What changes with the entries of a folder: inode, size, mtime, ctime; -1 for a folder that is not there.

    The time of modification alone is set back by rsync and tar, and is the same for all folders of some read-only
    images.
    """
    try:
        info = os.stat(path)
    except OSError:
        return -1, -1, -1, -1
    return info.st_ino & _INT64_MASK, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def file_state(path: bytes) -> tuple[int, int, str]:
    """Size in bytes, time of modification, and why the file cannot be used without opening it, or ""."""
    try:
        info = os.stat(path)
    except OSError as error:
        return 0, 0, f"cannot be opened: {error.strerror}"
    if not stat.S_ISREG(info.st_mode):
        return 0, 0, "not a file"
    return info.st_size, info.st_mtime_ns, "" if info.st_size else "empty file"


@dataclass
class _Columns:
    """A listing while it grows."""

    began_ns: int = field(default_factory=time.time_ns)
    folders: dict[bytes, FolderState] = field(default_factory=dict)
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
        folders = Folders(
            Paths.of(map(os.fsdecode, self.folders)),
            np.array(list(self.folders.values()), np.int64).reshape(-1, 4),
        )
        return Listing(
            root, paths, labels, size_bytes, mtime_ns, class_names, self.bad, folders, self.began_ns
        )


def _check_root(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}")


def _walk(
    start: bytes, folder: bytes, visited: set[tuple[int, int]], folders: dict[bytes, FolderState]
) -> Iterator[tuple[bytes, int, int, str]]:
    """(path, size, time of change, why it cannot be used) of the images below `start + folder`."""
    folders[folder] = folder_state(start + folder)
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
                yield path, *file_state(start + path)
            elif entry.is_dir():
                yield from _walk(start, path, visited, folders)


def _read_list(path: Path) -> Iterator[tuple[int, str, str]]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, raw in enumerate(lines, start=1):
                line = raw.strip()
                if not line or line.startswith("#"):
                    continue
                found = _LIST_LINE.fullmatch(line)
                if found is None:
                    raise DataError(
                        f"{path}:{number}: expected 'path,label' or 'path label', found {line[:100]!r}"
                    )
                if found[1].startswith("/") or ".." in found[1].split("/") or "\0" in line:
                    raise DataError(
                        f"{path}:{number}: must be below data.root: not absolute, without .. and NUL"
                    )
                yield number, found[1], found[2].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the list of images: {error}") from error


def _names_of(labels: Sequence[str]) -> tuple[str, ...]:
    if all(label.isdecimal() for label in labels):
        return tuple(str(index) for index in range(1 + max(map(int, labels))))
    return tuple(sorted(set(labels)))
