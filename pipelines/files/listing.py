"""List the candidate images of a folder, without opening them; by our own walk.

DALI's directory reader gives hidden and empty folders a label and ignores nested files.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.checks.bad_list import NAME
from pipelines.checks.decode_one import Fault, fault_in_stat, fault_of, is_trouble, patiently
from pipelines.spec import DataError, os_errors_in_one_line, visible

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp")
_LISTS = "<class>/*.jpg and the lists of `cmtrain data split`"
LAYOUT = f"data.root must hold train/<class>/*.jpg and val/<class>/*.jpg, or {_LISTS}"
NO_EXTENSION, LISTED_ALREADY = "without extension", "linked to a folder that is listed already"
MAX_KINDS = 8  # named in one line
_ENCODED_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)
# Folders that systems put into others: zip files of a Mac, thumbnails of a NAS, the root of a disk.
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
_INT64_MASK = 2**63 - 1  # some file systems use all 64 bits of an inode number

Ints = NDArray[np.int64]
FolderState = tuple[int, int, int, int]
# Yields (path, label) of the files below a folder, and fills the states of the folders.
Entries = Callable[[bytes, dict[bytes, FolderState]], Iterator[tuple[bytes, int]]]


@dataclass(frozen=True, eq=False)
class Paths:
    """Relative paths as one array, because 1.28 million Python strings are heavy and slow to pickle."""

    encoded: NDArray[np.bytes_]  # (N,) in the file system's encoding

    @staticmethod
    def of(paths: Iterable[str]) -> "Paths":
        return Paths(np.array([os.fsencode(path) for path in paths], np.bytes_))

    @staticmethod
    def split(buffer: NDArray[np.uint8], offsets: Ints) -> "Paths":
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

    def find(self, wanted: "Paths") -> Ints:
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
    faults: dict[int, Fault]  # by place, of unusable files; before a scan those found without opening them
    folders: Paths  # of the files, relative to root
    folder_states: Ints  # (F, 4) of `folder_state`, from before their entries were read
    began_ns: int  # this host's clock before the first folder was read
    skipped: dict[str, int]  # what was not taken: number by kind, see `describe_skipped`
    notes: tuple[str, ...] = ()  # how labels became classes, for the user
    label_sets: NDArray[np.bool_] | None = None  # (labels, classes) where a label names several
    # (N, 2) height and width as stored, (0, 0) where a file is unusable; see `scan_cache.scan`
    sizes: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), np.int32))

    def __len__(self) -> int:
        return len(self.labels)

    def encoded_path(self, path: bytes) -> bytes:
        """Return a path relative to the root as one that can be opened."""
        return os.path.join(os.fsencode(self.root), path)


def list_folder(root: Path) -> Listing:
    """List the images below `root/<class>/`, by class, then by the bytes of their path.
    Raises DataError when there is no such folder, one that cannot be read, no class or no image.
    """
    names: list[str] = []
    skipped = Counter[str]()

    def entries(start: bytes, folders: dict[bytes, FolderState]) -> Iterator[tuple[bytes, int]]:
        folders[b""] = folder_state(start)
        for entry in _entries(os.fsencode(root)):
            kind = _kind_of(entry)
            if kind is None:
                names.append(os.fsdecode(entry.name))
            elif entry.name != NAME.encode():
                is_file = kind.startswith((".", NO_EXTENSION))
                skipped["beside the class folders" if is_file else kind] += 1
        if not names:
            besides = describe_skipped(skipped)
            raise DataError(f"{root}: no class folders; {besides and f'{besides}; '}{LAYOUT}")
        visited: set[tuple[int, int]] = set()
        for label, name in enumerate(names):
            for path in sorted(walk(start, os.fsencode(name), visited, folders, skipped)):
                yield path, label

    return look_at(root, entries, names, skipped)


def folder_state(path: bytes) -> FolderState:
    """Return what changes with a folder's entries: inode, size, mtime, ctime; all -1 for a missing folder.
    mtime alone is not enough: rsync and tar set it back. Raises OSError when the machine cannot look.
    """
    if isinstance(info := _stat(path), OSError):
        return -1, -1, -1, -1
    return info.st_ino & _INT64_MASK, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def file_state(path: bytes) -> tuple[int, int, int, Fault | None]:
    """Return size in bytes, mtime, inode, and a fault that stat shows. Raises OSError as `folder_state`."""
    if isinstance(info := _stat(path), OSError):
        return 0, 0, 0, fault_of(info)
    return info.st_size, info.st_mtime_ns, info.st_ino & _INT64_MASK, fault_in_stat(info)


def _stat(path: bytes) -> os.stat_result | OSError:
    try:
        return patiently(lambda: os.stat(path))
    except OSError as error:
        if is_trouble(error):
            raise
        return error


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Return what was not taken as an image, in words; "" if that is nothing."""
    kinds = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{number:,} {kind}" for kind, number in kinds[:MAX_KINDS]]
    if others := sum(number for _, number in kinds[MAX_KINDS:]):
        parts.append(f"{others:,} of other kinds")
    return visible(f"ignored: {', '.join(parts)}") if parts else ""


def look_at(root: Path, entries: Entries, classes: Iterable[str], skipped: Counter[str]) -> Listing:
    """Return the listing of `entries(start, folders)`, which fills `folders` and `classes` as it is read."""
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

    with os_errors_in_one_line(root):
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; {LAYOUT}")
        # Straight into an array: a million tuples would take more memory than all the rest.
        labels, sizes, times, inodes = np.fromiter(rows(), np.dtype((np.int64, 4))).T.copy()
    if not paths:
        besides = describe_skipped(skipped)
        raise DataError(f"{root}: no images; {besides and f'{besides}; '}{LAYOUT}")
    images, holders = (Paths(np.array(list(found), np.bytes_)) for found in (paths, folders))
    states, names = np.array(list(folders.values()), np.int64), tuple(classes)
    columns = images, labels, sizes, times, inodes, names, faults, holders, states
    return Listing(root, *columns, began_ns, dict(sorted(skipped.items())))


def walk(
    start: bytes, top: bytes, visited: set[tuple[int, int]], folders: dict[bytes, FolderState],
    skipped: Counter[str],
) -> Iterator[bytes]:  # fmt: skip
    """Yield the paths of the images below `start + top`. Raises OSError for a folder that cannot be read."""
    waiting = [top]  # no recursion: a path may have a thousand folders
    while waiting:
        folder = waiting.pop()
        folders[folder] = folder_state(start + folder)
        info = os.stat(start + folder)
        if (info.st_dev, info.st_ino) in visited:  # a link back up, or a second link to the same folder
            skipped[LISTED_ALREADY] += 1
            continue
        visited.add((info.st_dev, info.st_ino))
        inner = []
        for entry in _entries(start + folder):
            path = folder + b"/" + entry.name
            if entry.name.lower().endswith(_ENCODED_EXTENSIONS) and not entry.name.startswith(b"."):
                yield path
            elif kind := _kind_of(entry):
                skipped[kind] += 1
            else:
                inner.append(path)
        waiting += reversed(inner)


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    return sorted(patiently(lambda: list(os.scandir(folder))), key=lambda entry: entry.name)


def _kind_of(entry: os.DirEntry[bytes]) -> str | None:
    """Return what is skipped, None for a folder to look into. Raises OSError as `_entries`."""
    name = os.fsdecode(entry.name)
    if name.startswith("."):
        return "hidden"
    try:
        if patiently(entry.is_dir):
            return "of the system (such as __MACOSX)" if name in _SYSTEM_FOLDERS else None
        if not patiently(entry.is_file):
            return "linked to nowhere" if entry.is_symlink() else "pipe or device"
    except OSError as error:
        if is_trouble(error):
            raise
        return "linked to nowhere"
    return os.path.splitext(name)[1].lower() or NO_EXTENSION
