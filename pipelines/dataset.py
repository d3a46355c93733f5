"""Which images there are, of which class and of which size: found once by our own walk, never by DALI's.

DALI's directory reader gives hidden and empty folders a label, ignores nested files and reports a broken file by ending
the run. Here every file's header is read beforehand, and what cannot be trained on is left out and named.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.headers import FileStat, scan_sizes
from pipelines.plan import sample_keys
from pipelines.spec import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_LAYOUT = "data.root must hold train/<class>/*.jpg and val/<class>/*.jpg"
_LIST_LINE = re.compile(rf"(.+(?:{'|'.join(map(re.escape, EXTENSIONS))}))\s*[,\s]\s*(.+)", re.IGNORECASE)
_SUBSET_DOMAIN = 3  # keeps the choice of a subset apart from the plan's uses of the same seed


class BadFile(NamedTuple):
    """A file that was left out."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Paths:
    """Relative paths in one buffer, because 1.28 million Python strings are heavy and slow to pickle.

    `buffer` holds the encoded paths one after another, path i in `buffer[offsets[i] : offsets[i + 1]]`.
    """

    buffer: NDArray[np.uint8]
    offsets: NDArray[np.int64]  # (N + 1,)

    @staticmethod
    def of(paths: Sequence[str]) -> Paths:
        encoded = [os.fsencode(path) for path in paths]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(path) for path in encoded], out=offsets[1:])
        return Paths(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        begin, end = self.offsets[index], self.offsets[index + 1]
        return os.fsdecode(self.buffer[begin:end].tobytes())

    def padded(self, indices: NDArray[np.int64], prefix: str) -> NDArray[np.uint8]:
        """`prefix` + path of each index as bytes, (B, length of the longest), padded with zeros."""
        start = np.frombuffer(os.fsencode(prefix), np.uint8)
        begins, ends = self.offsets[indices, None], self.offsets[indices + 1, None]  # (B, 1)
        columns = begins + np.arange(int((ends - begins).max()))  # (B, L)
        names = np.where(columns < ends, self.buffer[np.minimum(columns, len(self.buffer) - 1)], 0)
        return np.concatenate([np.broadcast_to(start, (len(indices), len(start))), names], axis=1, dtype=np.uint8)

    def select(self, indices: NDArray[np.int64]) -> Paths:
        return Paths.of([self[int(index)] for index in indices])


@dataclass(frozen=True, eq=False)
class Manifest:
    """The usable images of one split, in a fixed order: by class, then by path (a list file keeps its own order)."""

    root: Path
    paths: Paths  # relative to root
    labels: NDArray[np.int64]  # (N,)
    heights: NDArray[np.int32]  # (N,) as stored in the file, that is, before any EXIF rotation
    widths: NDArray[np.int32]
    class_names: tuple[str, ...]
    bad: tuple[BadFile, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of paths, labels, sizes and class names: two runs with equal fingerprints saw the same samples."""
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for array in (self.paths.buffer, self.paths.offsets, self.labels, self.heights, self.widths):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def file(self, index: int) -> str:
        """Path of one image."""
        return os.path.join(self.root, self.paths[index])

    def fraction(self, fraction: float, seed: int) -> Manifest:
        """A fixed subset with `fraction` of every class (at least one image), by a hash of (seed, index)."""
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction {fraction} is not in (0, 1]")
        keys = sample_keys(seed, _SUBSET_DOMAIN, np.arange(len(self)))
        by_class = np.lexsort((keys, self.labels))
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        place = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
        wanted = np.maximum(np.rint(counts * fraction), 1)[self.labels[by_class]]
        return self._select(np.sort(by_class[place < wanted]))

    def _select(self, indices: NDArray[np.int64]) -> Manifest:
        return replace(
            self,
            paths=self.paths.select(indices),
            labels=self.labels[indices],
            heights=self.heights[indices],
            widths=self.widths[indices],
        )

    @staticmethod
    def from_folder(
        root: Path | str,
        *,
        class_names: Sequence[str] | None = None,
        cache_dir: Path | str | None = None,
        max_bad_fraction: float = 0.001,
        threads: int | None = None,
    ) -> Manifest:
        """Images below `root/<class>/`, at any depth; hidden files and folders are skipped, links are followed once.

        Args:
            root: the folder of one split.
            class_names: those of the training split, for a validation split; None takes the folders' names, sorted.
            cache_dir: where image sizes are remembered; None is `$XDG_CACHE_HOME/cmtrain`.
            max_bad_fraction: more unusable files than this fraction are an error, fewer are left out (`bad`).
            threads: readers of file headers; None is four per core.

        Raises:
            DataError: no such folder, no classes, an empty class, a class that training does not know, too many bad
                files.
        """
        root = Path(root).absolute()
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; {_LAYOUT}")
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise DataError(f"{root}: no class folders; {_LAYOUT}")
        names = tuple(found if class_names is None else class_names)
        unknown = sorted(set(found) - set(names))
        if unknown:
            raise DataError(f"{root / unknown[0]}: not one of the {len(names)} training classes ({len(unknown)} such)")
        files: list[FileStat] = []
        labels: list[int] = []
        visited: set[tuple[int, int]] = set()
        index_of = {name: index for index, name in enumerate(names)}
        for name in found:
            here = sorted(_walk(root, name, visited), key=lambda file: file.path)
            if not here and class_names is None:
                raise DataError(f"{root / name}: no images in this class folder; add some or remove the folder")
            files += here
            labels += [index_of[name]] * len(here)
        return _manifest(root, files, labels, names, cache_dir, max_bad_fraction, threads)

    @staticmethod
    def from_list(
        list_file: Path | str,
        root: Path | str,
        *,
        class_names: Sequence[str] | None = None,
        cache_dir: Path | str | None = None,
        max_bad_fraction: float = 0.001,
        threads: int | None = None,
    ) -> Manifest:
        """Images named in a text file, one `path,label` or `path label` a line, paths relative to `root`.

        Labels are whole numbers or class names. Empty lines and lines that begin with # are skipped. Other arguments
        as for `from_folder`.

        Raises:
            DataError: no such file or folder, a line that cannot be read, a label that training does not know, too
                many bad files.
        """
        root, list_file = Path(root).absolute(), Path(list_file)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; {_LAYOUT}")
        lines = list(_read_list(list_file))
        if not lines:
            raise DataError(f"{list_file}: names no images")
        names = tuple(class_names) if class_names is not None else _names_of([label for _, _, label in lines])
        index_of = {name: index for index, name in enumerate(names)}
        labels = []
        for number, _, label in lines:
            # A whole number counts classes, unless there is a class of that very name.
            index = index_of.get(label, int(label) if label.isdecimal() else len(names))
            if index >= len(names):
                raise DataError(f"{list_file}:{number}: label {label!r} is not one of the {len(names)} classes")
            labels.append(index)
        return _manifest(
            root, [_stat(root, path) for _, path, _ in lines], labels, names, cache_dir, max_bad_fraction, threads
        )


def _read_list(list_file: Path) -> Iterator[tuple[int, str, str]]:
    try:
        text = list_file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_file}: cannot read the list of images: {error}") from error
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        found = _LIST_LINE.fullmatch(line)
        if found is None:
            raise DataError(f"{list_file}:{number}: expected 'path,label' or 'path label', found {line!r}")
        yield number, found[1], found[2].strip()


def _names_of(labels: list[str]) -> tuple[str, ...]:
    if all(label.isdecimal() for label in labels):
        return tuple(str(index) for index in range(1 + max(map(int, labels))))
    return tuple(sorted(set(labels)))


def _walk(root: Path, folder: str, visited: set[tuple[int, int]]) -> Iterator[FileStat]:
    info = os.stat(root / folder)
    if (info.st_dev, info.st_ino) in visited:  # a link back up, or a second link to the same folder
        return
    visited.add((info.st_dev, info.st_ino))
    with os.scandir(root / folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            path = f"{folder}/{entry.name}"
            if entry.name.lower().endswith(EXTENSIONS):
                yield _stat(root, path)
            elif entry.is_dir():
                yield from _walk(root, path, visited)


def _stat(root: Path, path: str) -> FileStat:
    try:
        info = os.stat(root / path)
    except OSError as error:
        return FileStat(path, 0, 0, f"cannot be opened: {error.strerror}")
    if not os.path.isfile(root / path):
        return FileStat(path, 0, 0, "not a file")
    return FileStat(path, info.st_size, info.st_mtime_ns, "" if info.st_size else "empty file")


def _manifest(
    root: Path,
    files: list[FileStat],
    labels: list[int],
    class_names: tuple[str, ...],
    cache_dir: Path | str | None,
    max_bad_fraction: float,
    threads: int | None,
) -> Manifest:
    if not files:
        raise DataError(f"{root}: no images; {_LAYOUT}")
    cache = Path(cache_dir) if cache_dir is not None else _default_cache_dir()
    sizes, reasons = scan_sizes(root, files, cache, threads)  # (N, 2)
    bad = tuple(BadFile(str(root / file.path), reason) for file, reason in zip(files, reasons, strict=True) if reason)
    named = "; ".join(f"{file.path}: {file.reason}" for file in bad[:3])
    if len(bad) > max_bad_fraction * len(files) or len(bad) == len(files):
        raise DataError(
            f"{root}: {len(bad)} of {len(files)} images cannot be used, more than data.max_bad_fraction "
            f"{max_bad_fraction:g} allows: {named}"
        )
    good = np.flatnonzero(sizes[:, 0])
    return Manifest(
        root=root,
        paths=Paths.of([files[index].path for index in good]),
        labels=np.array(labels, np.int64)[good],
        heights=sizes[good, 0],
        widths=sizes[good, 1],
        class_names=class_names,
        bad=bad,
    )


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmtrain"
