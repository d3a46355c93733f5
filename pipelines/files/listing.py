"""List the candidate images of a folder, without opening them.

DALI's directory reader gives hidden and empty folders a label and ignores nested files, so the walk is our
own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.checks.decode_one import Fault, fault_in_stat, fault_of
from pipelines.spec import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LAYOUT = "data.root must hold train/<class>/*.jpg and val/<class>/*.jpg"
_ENCODED_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)
_INT64_MASK = 2**63 - 1  # some file systems use all 64 bits of an inode number

Ints = NDArray[np.int64]
FolderState = tuple[int, int, int, int]
FileState = tuple[int, int, int, Fault | None]
# Yields (path, label) of the files below a folder, and fills the states of the folders.
Entries = Callable[[bytes, dict[bytes, FolderState]], Iterator[tuple[bytes, int]]]


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


@dataclass(frozen=True, eq=False)
class Listing:
    """Files that look like images."""

    root: Path
    paths: Paths  # relative to root
    labels: Ints  # (N,)
    size_bytes: Ints  # (N,)
    mtime_ns: Ints  # (N,)
    inodes: Ints  # (N,)
    class_names: tuple[str, ...]
    faults: dict[int, Fault]  # by place, of files that are known to be unusable without opening them
    folders: Paths  # of the files, relative to root
    folder_states: Ints  # (F, 4) of `folder_state`, from before their entries were read
    began_ns: int  # this host's clock before the first folder was read
    notes: tuple[str, ...] = ()  # how labels became classes, for the user

    def __len__(self) -> int:
        return len(self.labels)

    def encoded_path(self, path: bytes) -> bytes:
        """Return a path relative to the root as one that can be opened."""
        return os.path.join(os.fsencode(self.root), path)


def list_folder(root: Path) -> Listing:
    """List the images below `root/<class>/`, by class, then by the bytes of their path.

    Raises DataError when there is no such folder, no class or no image.
    """
    names: list[str] = []

    def entries(start: bytes, folders: dict[bytes, FolderState]) -> Iterator[tuple[bytes, int]]:
        folders[b""] = folder_state(start)
        names.extend(sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")))
        if not names:
            raise DataError(f"{root}: no class folders; {LAYOUT}")
        visited: set[tuple[int, int]] = set()
        for label, name in enumerate(names):
            for path in sorted(_walk(start, os.fsencode(name), visited, folders)):
                yield path, label

    return look_at(root, entries, names)


def folder_state(path: bytes) -> FolderState:
    """Return what changes with a folder's entries: inode, size, mtime, ctime; all -1 for a missing folder.

    The time of modification alone is not enough: rsync and tar set it back, and it may be all the same.
    """
    try:
        info = os.stat(path)
    except OSError:
        return -1, -1, -1, -1
    return info.st_ino & _INT64_MASK, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def file_state(path: bytes) -> FileState:
    """Return size in bytes, time of modification, inode, and the fault that shows without opening the file.

    The inode is of the file itself: of one with many names, by links or by spelling, it is one.
    """
    try:
        info = os.stat(path)
    except OSError as error:
        return 0, 0, 0, fault_of(error)
    return info.st_size, info.st_mtime_ns, info.st_ino & _INT64_MASK, fault_in_stat(info)


def look_at(root: Path, entries: Entries, classes: Iterable[str]) -> Listing:
    """Return the listing of `entries(start, folders)`, which fills `folders` and `classes` as it is read."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}")
    began_ns, start = time.time_ns(), os.fsencode(os.path.join(root, ""))
    folders: dict[bytes, FolderState] = {}
    paths: list[bytes] = []
    faults: dict[int, Fault] = {}

    def rows() -> Iterator[tuple[int, int, int, int]]:
        for path, label in entries(start, folders):
            size_bytes, mtime_ns, inode, fault = file_state(start + path)
            if fault:
                faults[len(paths)] = fault
            paths.append(path)
            yield label, size_bytes, mtime_ns, inode

    # Straight into an array: a million tuples would take more memory than all the rest.
    labels, sizes, times, inodes = np.fromiter(rows(), np.dtype((np.int64, 4))).T.copy()
    if not paths:
        raise DataError(f"{root}: no images; {LAYOUT}")
    images, holders = (Paths(np.array(list(found), np.bytes_)) for found in (paths, folders))
    states, names = np.array(list(folders.values()), np.int64), tuple(classes)
    return Listing(root, images, labels, sizes, times, inodes, names, faults, holders, states, began_ns)


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
