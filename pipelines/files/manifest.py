"""List the usable images of a split, with class and size.

A broken file would end DALI's pipeline. So headers are read first, and unusable files left out and named.
"""

import hashlib
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import atomic, plan
from pipelines.checks.bad_list import BadFile, read_lists, user_cache
from pipelines.checks.decode_one import Fault
from pipelines.files import labels, lists, mirror, scan_cache
from pipelines.files.listing import Listing, Paths, describe_skipped, file_state, list_folder, look_at
from pipelines.files.shards import INDEX, NO_INDEX, Slices
from pipelines.spec import MAX_BAD_FRACTION, DataError, os_errors_in_one_line


@dataclass(frozen=True, eq=False)
class Manifest:
    """The usable images of one split, by class, then by path; a list file keeps its own order."""

    root: Path
    paths: Paths  # relative to root
    labels: NDArray[np.int64]  # (N,)
    heights: NDArray[np.int32]  # (N,) as stored in the file, that is, before any EXIF rotation
    widths: NDArray[np.int32]
    size_bytes: NDArray[np.int64]  # (N,) of the encoded images
    class_names: tuple[str, ...]
    bad: tuple[BadFile, ...] = ()
    packed: Slices | None = None  # where the images are, when they are not files of their own
    # (N,) equal for one file under several names, 0 where unknown; of packed images by content
    identities: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    notes: tuple[str, ...] = ()  # how labels became classes and what was not used, for the user
    skipped: Mapping[str, int] = field(default_factory=dict)  # what is no image, by kind
    # (S, K) the classes of each label, where an image has any number of them; None where it has one
    label_sets: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of paths, labels, sizes, class names and shards: if it is equal, so are the samples."""
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for array in (*self.paths.joined(), self.labels, self.heights, self.widths):
            digest.update(array.data)
        if self.packed is not None:
            digest.update(self.packed.digest.encode())
        if self.label_sets is not None:
            digest.update(np.packbits(self.label_sets).data)
        return digest.hexdigest()

    def label_name(self, label: int) -> str:
        """Return the class of a label; its classes, as in a list file, where there may be several."""
        if self.label_sets is None:
            return self.class_names[label]
        names = [self.class_names[place] for place in np.flatnonzero(self.label_sets[label])]
        return labels.SEPARATOR.join(names) or labels.NO_CLASS

    def with_sets_as_classes(self) -> "Manifest":
        """Return the same images with one class for each label, named as in a list file."""
        assert self.label_sets is not None
        names = tuple(map(self.label_name, range(len(self.label_sets))))
        return replace(self, class_names=names, label_sets=None)

    def class_counts(self) -> NDArray[np.int64]:
        """Return the number of images of each class, (K,)."""
        if self.label_sets is None:
            return np.bincount(self.labels, minlength=len(self.class_names))
        return np.bincount(self.labels, minlength=len(self.label_sets)) @ self.label_sets

    def are_of(self, classes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether each image is of the class at its place in `classes`: (N,) -> (N,)."""
        if self.label_sets is None:
            return self.labels == classes
        known = classes < len(self.class_names)  # a model may have more outputs
        return known & self.label_sets[self.labels, np.where(known, classes, 0)]

    def file(self, index: int) -> str:
        """Return the path of one image; in packed shards `<shard>:<path in the source>`, for people."""
        if self.packed is not None:
            return f"{self.packed.shard_path(self.packed.shards[index])}:{self.paths[index]}"
        return os.path.join(self.root, self.paths[index])

    @contextmanager
    def files(self, indices: Sequence[int]) -> Iterator[list[str]]:
        """Yield paths that can be opened; those of packed images are copies for as long as the context."""
        if self.packed is None:
            yield [self.file(index) for index in indices]
            return
        with os_errors_in_one_line(tempfile.gettempdir()), tempfile.TemporaryDirectory() as folder:
            for index in indices:
                Path(folder, str(index)).write_bytes(self.packed.read(index))
            yield [os.path.join(folder, str(index)) for index in indices]

    def fraction(self, fraction: float, seed: int) -> "Manifest":
        """Return `fraction` of every class, at least one image, chosen by a hash of (seed, index).
        Where an image may have several classes, the share is of all images, whatever their sets.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction {fraction} is not in (0, 1]")
        labels = self.labels if self.label_sets is None else np.zeros_like(self.labels)
        by_class = np.lexsort((plan.sample_keys(seed, plan.SUBSET_DOMAIN, np.arange(len(self))), labels))
        counts = np.bincount(labels, minlength=len(self.class_names))
        place = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
        wanted = np.maximum(np.rint(counts * fraction), 1)[labels[by_class]]
        return self.select(np.sort(by_class[place < wanted]))

    def select(self, indices: NDArray[np.int64]) -> "Manifest":
        """Return the images at `indices`, in their order; they get new indices, and so other draws."""
        columns = ("labels", "heights", "widths", "size_bytes", "identities")
        arrays = {name: getattr(self, name)[indices] for name in columns if len(getattr(self, name))}
        packed = self.packed and self.packed.select(indices)
        return replace(self, paths=Paths(self.paths.encoded[indices]), packed=packed, **arrays)

    @staticmethod
    @os_errors_in_one_line()
    def from_folder(
        root: Path | str, *, image_list: Path | str | None = None,
        class_names: Sequence[str] | None = None, cache_dir: Path | str | None = None,
        max_bad_fraction: float = MAX_BAD_FRACTION, refresh: bool = False, positions: bool = False,
        multi_label: bool = False,
    ) -> "Manifest":  # fmt: skip
        """Read the images below `root/<class>/`, at any depth, without hidden ones; links are followed once.

        image_list: text file that names the images below `root` instead; see `lists`.
        class_names: classes of the training split, for a validation split; None takes those found.
        cache_dir: folder for the cached list of images and sizes; None is `$XDG_CACHE_HOME/cmtrain`.
        max_bad_fraction: largest share of unusable files; they are left out (`bad`).
        refresh: whether to look at every file, whatever is cached (see `scan_cache`).
        positions: whether class folders may be named by positions in `class_names`; labels of lists may.
        multi_label: whether a label names several classes, as cat;dog does (see `relabel_sets`).
        Raises DataError: no folder, class or image, an unreadable list, unknown class, too many bad files.
        """
        folder, cache = Path(root).absolute(), Path(cache_dir or user_cache())
        file = Path(image_list).absolute() if image_list else None
        if file is None:
            name, content, find = f"{folder}", "", partial(list_folder, folder)
            relabel = partial(labels.relabel_folder, class_names=class_names, positions=positions)
        else:
            name, content = f"{folder}\0{file}", scan_cache.list_digest(file)
            find = partial(lists.list_file, file, folder)
            relabel = partial(labels.relabel_list, path=file, class_names=class_names)
        if multi_label:
            relabel = partial(labels.relabel_sets, class_names=class_names, path=file)

        def checked() -> Listing:
            listing = find()
            relabel(listing)  # reports a wrong class before all headers are read
            return listing

        listing = relabel(scan_cache.cached_scan(checked, name, content, cache, refresh))
        return _manifest(listing, max_bad_fraction, listed=file is not None)

    @staticmethod
    def from_list(list_path: Path | str, root: Path | str, **options: Any) -> "Manifest":
        """Read the images below `root` that a text file names; options and errors as for `from_folder`."""
        return Manifest.from_folder(root, image_list=list_path, **options)

    @staticmethod
    @os_errors_in_one_line()
    def from_files(files: Sequence[str]) -> "Manifest":
        """Read `files` of any folders, in their order, with the label 0; any number of them may be `bad`."""
        paths = [os.fsencode(os.path.abspath(file))[1:] for file in files]
        listing = look_at(Path("/"), lambda start, folders: ((path, 0) for path in paths), (), Counter())
        return _manifest(scan_cache.scan(listing, None), None, listed=False)

    @staticmethod
    def from_shards(
        folder: Path | str, *, class_names: Sequence[str] | None = None, multi_label: bool = False
    ) -> "Manifest":
        """Read a packed split, in its source's order. Raises DataError as `read_index` and `relabelled`."""
        _, shards = read_index(Path(folder).absolute())
        if multi_label:
            return labels.relabel_sets(shards, class_names)
        if class_names is None:
            return shards
        subject = partial("{}: {} is".format, shards.root)
        return labels.relabelled(shards, class_names, subject, "class", False)


def write_index(shards: Manifest, recipe: str) -> None:
    """Put the index of a packed split beside its shards; `recipe` is how and from what. Raises OSError."""
    assert shards.packed is not None
    buffer, offsets = shards.paths.joined()
    image = {name: getattr(shards, name) for name in ("labels", "heights", "widths", "class_names")}
    bad = np.array(shards.bad, np.str_).reshape(-1, 3)
    # But folder and mirror
    places = {field.name: getattr(shards.packed, field.name) for field in fields(Slices)[1:-1]}
    with atomic.replacing(shards.root / INDEX) as file:
        np.savez(file, recipe=recipe, path_buffer=buffer, path_offsets=offsets, **image, bad=bad, **places)


def read_index(folder: Path) -> tuple[str, Manifest]:
    """Return the recipe and the manifest of a packed split.
    Raises DataError when the index cannot be read, or a shard is missing or has another size.
    """
    try:
        with (folder / INDEX).open("rb") as file, np.load(file, allow_pickle=False) as data:
            columns: dict[str, Any] = dict(data)
        recipe, bad = str(columns.pop("recipe")), columns.pop("bad").tolist()
        paths = Paths.split(columns.pop("path_buffer"), columns.pop("path_offsets"))
        for name in ("class_names", "shard_names", "shard_sha256"):
            columns[name] = tuple(columns[name].tolist())
        image = {name: columns.pop(name) for name in ("labels", "heights", "widths", "class_names")}
        slices = Slices(folder, **columns)
        if (folder / mirror.SOURCE).is_file():
            slices = replace(slices, mirror=mirror.Mirror(slices))
        bad_files = tuple(BadFile(*row) for row in bad)
        sizes = slices.size_bytes
        facts: dict[str, Any] = {"bad": bad_files, "identities": _identities(slices.checksums, sizes)}
        shards = Manifest(folder, paths, **image, size_bytes=sizes, packed=slices, **facts)
        _check_columns(shards, slices)
    except OSError as error:  # it may be whole
        raise DataError.of(error, folder / INDEX) from error
    except NO_INDEX as error:
        what = f"cannot be read ({error}); remove {folder} and pack again"
        raise DataError(f"{folder / INDEX}: {what}") from error
    slices.check_shards()
    return recipe, shards


def _check_columns(shards: Manifest, slices: Slices) -> None:
    """Raise ValueError unless each image has a class, a size and a place in a shard."""
    columns: list[NDArray[Any]] = [shards.labels, shards.heights, shards.widths]
    columns += [slices.shards, slices.offsets, slices.size_bytes]
    if {(len(shards.paths),)} != {column.shape for column in [*columns, slices.checksums]}:
        raise ValueError("its columns differ in length")
    ends = len(shards.class_names), 2**31, 2**31, len(slices.shard_names), 2**62, 2**62
    for column, least, end in zip(columns, (0, 1, 1, 0, 0, 1), ends, strict=True):
        if column.dtype.kind not in "iu" or not len(column) or column.min() < least or column.max() >= end:
            raise ValueError("no images, or one without a class, a size or a shard")
    if (slices.offsets + slices.size_bytes > slices.shard_bytes[slices.shards]).any():
        raise ValueError("an image ends behind its shard")


def _identities(first: NDArray[Any], *others: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return (N,) hashes of the columns; 0 where the first is 0."""
    mixed = np.zeros(len(first), np.uint64)
    for column in (first, *others):
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.where(first == 0, np.uint64(0), mixed)


def _listed_faults(listing: Listing, known: NDArray[np.uint64], inner: Sequence[str]) -> dict[int, Fault]:
    """Return the faults that `cmtrain data check` listed, by place: by path, else by identity."""
    if not (listed := read_lists(listing.root, inner)):
        return {}
    entries = Paths.of(listed).find(listing.paths)  # (N,)
    names, faults = list(listed), list(listed.values())
    found = {place: faults[entries[place]] for place in np.flatnonzero(entries >= 0).tolist()}
    wanted = {int(known[place]): fault for place, fault in found.items()}
    if elsewhere := np.setdiff1d(np.arange(len(faults)), entries).tolist():
        states = [file_state(listing.encoded_path(os.fsencode(names[entry]))) for entry in elsewhere]
        sizes, times, inodes = (np.array(column, np.int64) for column in list(zip(*states, strict=True))[:3])
        ids = _identities(inodes, sizes, times).tolist()
        wanted |= {one: faults[entry] for one, entry in zip(ids, elsewhere, strict=True)}
    wanted.pop(0, None)
    for place in np.flatnonzero(np.isin(known, np.array(list(wanted), np.uint64))).tolist():
        found.setdefault(place, wanted[int(known[place])])
    return found


def _manifest(listing: Listing, max_bad_fraction: float | None, *, listed: bool) -> Manifest:
    sizes, faults, paths = listing.sizes, listing.faults, listing.paths
    # The device is not among them: its number may change with a mount.
    identities = _identities(listing.inodes, listing.size_bytes, listing.mtime_ns)
    inner: set[str] = set()  # folders below the root and above images, where a check may have left its list
    for folder in list(listing.folders) if listed else []:
        while (folder := os.path.dirname(folder)) and folder not in inner:
            inner.add(folder)
    if more := _listed_faults(listing, identities, sorted(inner)):  # of `cmtrain data check`; never cached
        sizes = sizes.copy()
        sizes[list(more)] = 0
        faults = dict(sorted((more | faults).items()))
    bad = tuple(BadFile(str(listing.root / paths[place]), *fault) for place, fault in faults.items())
    hint = _why_missing(listing, [place for place, fault in faults.items() if fault.kind == "missing"])
    if max_bad_fraction is not None:
        check_num_bad(listing.root, bad, len(listing), max_bad_fraction, hint if listed else "")
    unused = describe_skipped(listing.skipped)
    notes = (*listing.notes, f"{listing.root}: {unused}") if unused else listing.notes
    heights, widths = sizes.T.copy()
    everything = Manifest(
        listing.root, paths, listing.labels, heights, widths, listing.size_bytes, listing.class_names, bad,
        identities=identities, notes=notes, skipped=listing.skipped, label_sets=listing.label_sets,
    )  # fmt: skip
    return everything.select(np.flatnonzero(heights)) if bad else everything


def _why_missing(listing: Listing, missing: Sequence[int]) -> str:
    for name in (listing.paths[place] for place in missing[:3]):
        for form in ("NFC", "NFD"):
            if (other := unicodedata.normalize(form, name)) != name and (listing.root / other).exists():
                return f"; {name} is there in another Unicode normal form ({form})"
    return "; paths in a list are relative to data.root" if len(missing) == len(listing) else ""


def check_num_bad(
    root: Path, bad: Sequence[BadFile], num_files: int, max_bad_fraction: float, hint: str = ""
) -> None:
    """Raise DataError when more of the files below `root` are bad than allowed, or all of them."""
    if len(bad) > max_bad_fraction * num_files or len(bad) == num_files:
        named = "; ".join(f"{os.path.relpath(file.path, root)}: {file.reason}" for file in bad[:3])
        what = f"{len(bad)} of {num_files} images cannot be used"
        limit = f"more than data.max_bad_fraction {max_bad_fraction:g} allows"
        raise DataError(f"{root}: {what}, {limit}: {named}{hint}")
