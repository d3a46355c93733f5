"""Which images there are, of which class and of which size: found once by our own walk, never by DALI's.

DALI reports a broken file by ending the run. Here every file's header is read beforehand, and what cannot be trained on
is left out and named.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.checks.bad_list import read_lists, user_cache
from pipelines.files import shards
from pipelines.files.headers import Scan
from pipelines.files.listing import Listing, classes_of_folder, classes_of_list, list_file, list_folder
from pipelines.files.paths import Paths
from pipelines.files.scan_cache import list_digest, remembered
from pipelines.files.shards import Slices
from pipelines.plan import sample_keys
from pipelines.spec import MAX_BAD_FRACTION, DataError

_SUBSET_DOMAIN = 3  # keeps the choice of a subset apart from the plan's uses of the same seed


class BadFile(NamedTuple):
    """A file that was left out."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """The usable images of one split, in a fixed order: by class, then by path (a list file keeps its own order)."""

    root: Path
    paths: Paths  # relative to root
    labels: NDArray[np.int64]  # (N,)
    heights: NDArray[np.int32]  # (N,) as stored in the file, that is, before any EXIF rotation
    widths: NDArray[np.int32]
    size_bytes: NDArray[np.int64]  # (N,) of the encoded images
    class_names: tuple[str, ...]
    bad: tuple[BadFile, ...] = ()
    packed: Slices | None = None  # where the images are, when they are not files of their own

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of paths, labels, sizes and class names, and of packed shards: two runs with equal fingerprints saw
        the same samples."""
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for array in (self.paths.buffer, self.paths.offsets, self.labels, self.heights, self.widths):
            digest.update(array.data)
        if self.packed is not None:
            digest.update(self.packed.digest.encode())
        return digest.hexdigest()

    def file(self, index: int) -> str:
        """The path of one image; in packed shards `<shard>:<path in the source>`, a name that cannot be opened."""
        if self.packed is not None:
            return f"{self.root / self.packed.shard_names[self.packed.shards[index]]}:{self.paths[index]}"
        return os.path.join(self.root, self.paths[index])

    @contextmanager
    def files(self, indices: Sequence[int]) -> Iterator[list[str]]:
        """Paths that can be opened; those of packed images are copies that last as long as the context."""
        if self.packed is None:
            yield [self.file(index) for index in indices]
            return
        with tempfile.TemporaryDirectory() as folder:
            for index in indices:
                Path(folder, str(index)).write_bytes(self.packed.read(index))
            yield [os.path.join(folder, str(index)) for index in indices]

    def fraction(self, fraction: float, seed: int) -> Manifest:
        """A fixed subset with `fraction` of every class (at least one image), by a hash of (seed, index)."""
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction {fraction} is not in (0, 1]")
        keys = sample_keys(seed, _SUBSET_DOMAIN, np.arange(len(self)))
        by_class = np.lexsort((keys, self.labels))
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        place = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
        wanted = np.maximum(np.rint(counts * fraction), 1)[self.labels[by_class]]
        return self.select(np.sort(by_class[place < wanted]))

    def select(self, indices: NDArray[np.int64]) -> Manifest:
        """The images at `indices`, in their order; they get new indices, and so other draws."""
        return replace(
            self,
            paths=self.paths.select(indices),
            labels=self.labels[indices],
            heights=self.heights[indices],
            widths=self.widths[indices],
            size_bytes=self.size_bytes[indices],
            packed=self.packed and self.packed.select(indices),
        )

    @staticmethod
    def from_folder(
        root: Path | str,
        *,
        class_names: Sequence[str] | None = None,
        cache_dir: Path | str | None = None,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        threads: int | None = None,
        refresh: bool = False,
    ) -> Manifest:
        """Images below `root/<class>/`, at any depth; hidden files and folders are skipped, links are followed once.

        Args:
            root: the folder of one split.
            class_names: those of the training split, for a validation split; None takes the folders' names, sorted.
            cache_dir: where the list of images and their sizes are remembered; None is `$XDG_CACHE_HOME/cmtrain`.
            max_bad_fraction: more unusable files than this fraction are an error, fewer are left out (`bad`).
            threads: readers of file headers; None is four per core.
            refresh: look at every file, whatever is remembered (see `scan_cache` for what is used otherwise).

        Raises:
            DataError: no such folder, no classes, an empty class, a class that training does not know, too many bad
                files.
        """
        folder, cache = Path(root).absolute(), Path(cache_dir or user_cache())

        def look() -> Listing:
            listing = list_folder(folder)
            classes_of_folder(listing, class_names)  # a wrong class is told before all headers are read
            return listing

        found = remembered(look, f"{folder}", content="", cache_dir=cache, threads=threads, refresh=refresh)
        return _manifest(found, classes_of_folder(found.listing, class_names), max_bad_fraction)

    @staticmethod
    def from_list(
        path: Path | str,
        root: Path | str,
        *,
        class_names: Sequence[str] | None = None,
        cache_dir: Path | str | None = None,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        threads: int | None = None,
        refresh: bool = False,
    ) -> Manifest:
        """Images named in a text file, one `path,label` or `path label` a line, paths relative to `root`.

        Labels are whole numbers or class names. Empty lines and lines that begin with # are skipped. Other arguments
        as for `from_folder`.

        Raises:
            DataError: no such file or folder, a line that cannot be read, a label that training does not know, too
                many bad files.
        """
        file, folder, cache = Path(path).absolute(), Path(root).absolute(), Path(cache_dir or user_cache())

        def look() -> Listing:
            listing = list_file(file, folder)
            classes_of_list(listing, file, class_names)
            return listing

        content = list_digest(file)
        found = remembered(
            look, f"{folder}\0{file}", content=content, cache_dir=cache, threads=threads, refresh=refresh
        )
        return _manifest(found, classes_of_list(found.listing, file, class_names), max_bad_fraction)

    @staticmethod
    def from_shards(folder: Path | str, *, class_names: Sequence[str] | None = None) -> Manifest:
        """The images of a packed split, in the order of the manifest that it was packed from.

        Raises:
            DataError: no index or a damaged one, a shard that is missing or has another size, a class that training
                does not know.
        """
        index = shards.read_index(Path(folder).absolute())
        return Manifest(
            root=index.slices.folder,
            paths=index.paths,
            labels=index.labels if class_names is None else shards.relabel(index, class_names),
            heights=index.heights,
            widths=index.widths,
            size_bytes=index.slices.size_bytes,
            class_names=index.class_names if class_names is None else tuple(class_names),
            bad=tuple(BadFile(path, reason) for path, reason in index.bad),
            packed=index.slices,
        )


def _manifest(found: Scan, listing: Listing, max_bad_fraction: float) -> Manifest:
    sizes, reasons = _without_listed(found)
    if len(reasons) > max_bad_fraction * len(listing) or len(reasons) == len(listing):
        named = "; ".join(f"{listing.paths[place]}: {reasons[place]}" for place in list(reasons)[:3])
        raise DataError(
            f"{listing.root}: {len(reasons)} of {len(listing)} images cannot be used, more than data.max_bad_fraction "
            f"{max_bad_fraction:g} allows: {named}"
        )
    everything = Manifest(
        root=listing.root,
        paths=listing.paths,
        labels=listing.labels,
        heights=np.ascontiguousarray(sizes[:, 0]),
        widths=np.ascontiguousarray(sizes[:, 1]),
        size_bytes=listing.size_bytes,
        class_names=listing.class_names,
        bad=tuple(
            BadFile(str(listing.root / listing.paths[place]), reason) for place, reason in reasons.items()
        ),
    )
    return everything.select(np.flatnonzero(sizes[:, 0])) if reasons else everything


def _without_listed(found: Scan) -> tuple[NDArray[np.int32], dict[int, str]]:
    """Sizes and reasons when what `cmtrain data check` listed is unusable, too; its list is read anew every time."""
    listed = read_lists(found.listing.root)
    if not listed:
        return found.sizes, found.reasons
    entries, reasons = Paths.of(listed).find(found.listing.paths), list(listed.values())
    places = np.flatnonzero(entries >= 0)
    sizes = found.sizes.copy()
    sizes[places] = 0
    of_listed = {
        place: reasons[entry] for place, entry in zip(places.tolist(), entries[places].tolist(), strict=True)
    }
    return sizes, dict(sorted((of_listed | found.reasons).items()))
