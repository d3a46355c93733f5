"""List the candidate images of a folder or of a list file, without opening them.

DALI's directory reader gives hidden and empty folders a label and ignores nested files, so the walk is our
own.
"""

from __future__ import annotations

import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.checks.decode_one import Fault, fault_in_stat, fault_of
from pipelines.spec import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LAYOUT = "data.root must hold train/<class>/*.jpg and val/<class>/*.jpg"
_ENCODED_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)
_LIST_LINE = re.compile(rf"(.+(?:{'|'.join(map(re.escape, EXTENSIONS))}))\s*[,\s]\s*(.+)", re.IGNORECASE)
_INT64_MASK = 2**63 - 1  # some file systems use all 64 bits of an inode number

Ints = NDArray[np.int64]
FolderState = tuple[int, int, int, int]
FileState = tuple[int, int, Fault | None]


@dataclass(frozen=True, eq=False)
class Paths:
    """Relative paths as one array, because 1.28 million Python strings are heavy and slow to pickle."""

    encoded: NDArray[np.bytes_]  # (N,) in the file system's encoding

    @staticmethod
    def of(paths: Iterable[str]) -> Paths:
        return Paths(np.array([os.fsencode(path) for path in paths], np.bytes_))

    @staticmethod
    def split(buffer: NDArray[np.uint8], offsets: Ints) -> Paths:
        """Return the paths in a buffer of `joined`."""
        lengths = np.diff(offsets)[:, None]
        padded = np.zeros((len(lengths), lengths.max(initial=1)), np.uint8)
        padded[np.arange(padded.shape[1]) < lengths] = buffer
        return Paths(padded.view(f"S{padded.shape[1]}")[:, 0])

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.encoded[index])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded)

    def select(self, indices: Ints) -> Paths:
        """Return the paths at `indices`, in their order."""
        return Paths(self.encoded[indices])

    def find(self, wanted: Paths) -> Ints:
        """Return where each of `wanted` is in here, (len(wanted),); -1 where it is not."""
        order = np.argsort(self.encoded, kind="stable")
        rank = np.searchsorted(self.encoded, wanted.encoded, sorter=order)
        places = order[np.minimum(rank, len(self) - 1)]
        return np.where(self.encoded[places] == wanted.encoded, places, -1)

    def joined(self) -> tuple[NDArray[np.uint8], Ints]:
        """Return the bytes of all paths in one buffer; path i is `buffer[offsets[i] : offsets[i + 1]]`."""
        flat = self.encoded.view(np.uint8)
        return flat[flat != 0], np.cumsum(np.append(0, np.char.str_len(self.encoded)))


class Folders(NamedTuple):
    """The folders of the files. Adding, removing or renaming a file changes the state of its folder."""

    paths: Paths  # relative to root
    states: Ints  # (F, 4) of `folder_state`, from before their entries were read


@dataclass(frozen=True, eq=False)
class Listing:
    """Files that look like images."""

    root: Path
    paths: Paths  # relative to root
    labels: Ints  # (N,)
    size_bytes: Ints  # (N,)
    mtime_ns: Ints  # (N,)
    class_names: tuple[str, ...]
    faults: dict[int, Fault]  # by place, of files that are known to be unusable without opening them
    folders: Folders
    began_ns: int  # this host's clock before the first folder was read

    def __len__(self) -> int:
        return len(self.labels)

    def encoded_path(self, path: bytes) -> bytes:
        """Return a path relative to the root as one that can be opened."""
        return os.path.join(os.fsencode(self.root), path)


def list_folder(root: Path) -> Listing:
    """List the images below `root/<class>/`, by class, then by the bytes of their path.

    Raises DataError when there is no such folder, no class or no image.
    """
    _check_root(root)
    columns = _Columns()
    start = os.fsencode(os.path.join(root, ""))
    columns.folders[b""] = folder_state(start)
    names = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise DataError(f"{root}: no class folders; {LAYOUT}")
    visited: set[tuple[int, int]] = set()
    for label, name in enumerate(names):
        for path in sorted(_walk(start, os.fsencode(name), visited, columns.folders)):
            columns.add(path, label, file_state(start + path))
    return columns.listing(root, tuple(names))


def list_file(path: Path, root: Path) -> Listing:
    """List the images that `path` names, in its order; classes are its labels, in order of appearance.

    Raises DataError when there is no such folder or file, no image, or a line that cannot be read.
    """
    _check_root(root)
    columns = _Columns()
    place: dict[str, int] = {}
    start = os.fsencode(os.path.join(root, ""))
    for _, name, label in _read_list(path):
        encoded = os.fsencode(name)
        folder = os.path.dirname(encoded)
        if folder not in columns.folders:
            columns.folders[folder] = folder_state(start + folder)
        columns.add(encoded, place.setdefault(label, len(place)), file_state(start + encoded))
    if not place:
        raise DataError(f"{path}: names no images")
    return columns.listing(root, tuple(place))


def classes_of_folder(listing: Listing, class_names: Sequence[str] | None) -> Listing:
    """Return the same files with places in `class_names` as labels; None takes the folders' names.

    Raises DataError for a folder that is no class of `class_names`, and, if these are None, for an empty
    one.
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
    """Return the same files with places in `class_names` as labels; None takes all numbers or names found.

    Raises DataError for a label that is neither one of `class_names` nor the number of one, with its line in
    `path`.
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


def folder_state(path: bytes) -> FolderState:
    """Return what changes with a folder's entries: inode, size, mtime, ctime; all -1 for a missing folder.

    The time of modification alone is not enough: rsync and tar set it back, and some read-only images have
    one for all.
    """
    try:
        info = os.stat(path)
    except OSError:
        return -1, -1, -1, -1
    return info.st_ino & _INT64_MASK, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def file_state(path: bytes) -> FileState:
    """Return size in bytes, time of modification, and the fault that shows without opening the file."""
    try:
        info = os.stat(path)
    except OSError as error:
        return 0, 0, fault_of(error)
    return info.st_size, info.st_mtime_ns, fault_in_stat(info)


@dataclass
class _Columns:
    """A listing while it grows."""

    began_ns: int = field(default_factory=time.time_ns)
    folders: dict[bytes, FolderState] = field(default_factory=dict)
    paths: list[bytes] = field(default_factory=list)
    labels: array[int] = field(default_factory=lambda: array("q"))
    size_bytes: array[int] = field(default_factory=lambda: array("q"))
    mtime_ns: array[int] = field(default_factory=lambda: array("q"))
    faults: dict[int, Fault] = field(default_factory=dict)

    def add(self, path: bytes, label: int, state: FileState) -> None:
        size_bytes, mtime_ns, fault = state
        if fault:
            self.faults[len(self.paths)] = fault
        self.paths.append(path)
        self.labels.append(label)
        self.size_bytes.append(size_bytes)
        self.mtime_ns.append(mtime_ns)

    def listing(self, root: Path, class_names: tuple[str, ...]) -> Listing:
        if not self.paths:
            raise DataError(f"{root}: no images; {LAYOUT}")
        columns = self.labels, self.size_bytes, self.mtime_ns
        labels, sizes, mtimes = (np.frombuffer(column, np.int64) for column in columns)
        states = np.array(list(self.folders.values()), np.int64)
        folders = Folders(Paths(np.array(list(self.folders), np.bytes_)), states)
        paths = Paths(np.array(self.paths, np.bytes_))
        return Listing(root, paths, labels, sizes, mtimes, class_names, self.faults, folders, self.began_ns)


def _relabelled(listing: Listing, classes: list[int], names: tuple[str, ...]) -> Listing:
    return replace(listing, labels=np.array(classes, np.int64)[listing.labels], class_names=names)


def _check_root(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}")


def _walk(
    start: bytes, folder: bytes, visited: set[tuple[int, int]], folders: dict[bytes, FolderState]
) -> Iterator[bytes]:
    """Yield the paths of the images below `start + folder`."""
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
                yield path
            elif entry.is_dir():
                yield from _walk(start, path, visited, folders)


def _read_list(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, path and label of every image."""
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
