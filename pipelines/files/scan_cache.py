"""Cache what one start found out about the files of a split, for as long as it is valid.

Looking at 1.28 million files takes seconds on a local disk and loads a file server, from every rank at every
start. So a scan is kept in one file. It is valid while these are unchanged: the state of every folder, size
and time of a sample of the files, and the header of every unusable file. docs/data.md describes which
changes that cannot see.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.atomic import locked, remove_leftovers, replacing
from pipelines.checks.decode_one import Fault
from pipelines.files.headers import Scan, in_threads, is_racy, read_headers, scan
from pipelines.files.listing import Listing, Paths, file_state, folder_state
from pipelines.spec import DataError, visible

NUM_SAMPLED = 1024  # 1 % of files overwritten in place escape it with a probability of 0.00003

_FORMAT = 4
_ARRAYS = ("labels", "size_bytes", "mtime_ns", "inodes", "folder_states")  # columns of a listing
_PATHS = ("paths", "folders")


def cached_scan(
    lister: Callable[[], Listing], name: str, content: str, cache: Path, threads: int | None, refresh: bool
) -> Scan:
    """Return the cached scan if it is still valid, else scan and cache.

    Of several processes that find no valid scan, one at a time scans; the others wait and use what it found.

    Args:
        name: name of the split; scans of different names are kept apart.
        content: digest of the list file, if there is one; a scan is valid for the same content only.
        cache: folder of the scans; a line is printed when none can be written there.
        threads: number of threads that read files; None is four per core.
        refresh: whether to look at everything again.

    Raises OSError when the machine cannot read a folder or file; then nothing is cached.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = cache / f"files-{digest}.npz"
    remove_leftovers(path)
    kept = None if refresh else _load(path)
    if kept and _is_valid(*kept, content, threads):
        return kept[1]
    kept = None  # it is large, and another process may write a new one while this one waits
    with locked(path, "lists the images"):
        kept = None if refresh else _load(path)
        if kept and _is_valid(*kept, content, threads):
            return kept[1]
        found = scan(lister(), threads, kept and kept[1])
        _store(path, content, found)
        return found


def list_digest(path: Path) -> str:
    """Return the SHA-256 of a list of images. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the list of images: {error}") from error


def _is_valid(then: str, kept: Scan, content: str, threads: int | None) -> bool:
    listing = kept.listing
    folder_times_ns = listing.folder_states[:, 2:]  # (F, 2) mtime, ctime
    if (folder_times_ns == 0).any():  # a file system that gives folders no time (s3fs issue 2048)
        return False
    times_ns = folder_times_ns, listing.mtime_ns
    if then != content or any(is_racy(times, listing.began_ns).any() for times in times_ns):
        return False
    folders = list(map(listing.encoded_path, listing.folders.encoded))
    if not np.array_equal(list(in_threads(folder_state, folders, threads)), listing.folder_states):
        return False
    sample = np.linspace(0, len(listing) - 1, min(len(listing), NUM_SAMPLED)).astype(np.int64)
    files = list(map(listing.encoded_path, listing.paths.encoded[sample]))
    known = np.stack([listing.size_bytes[sample], listing.mtime_ns[sample]], axis=1)
    if not np.array_equal([state[:2] for state in in_threads(file_state, files, threads)], known):
        return False
    # An unusable file may have been repaired by a change that no time shows, as of its permissions.
    results = read_headers(listing, list(kept.faults), threads)
    return [result.fault for result in results] == list(kept.faults.values())


def _load(path: Path) -> tuple[str, Scan] | None:
    """Return content and scan; None when there is none, or one that is damaged or of another version."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            columns: dict[str, Any] = dict(data)  # checks a CRC-32 of each
        if columns["format"] != _FORMAT:
            return None
        names = tuple(columns["class_names"].tolist())
        arrays = {name: columns[name] for name in _ARRAYS} | {name: Paths(columns[name]) for name in _PATHS}
        root, began_ns = Path(str(columns["root"])), int(columns["began_ns"])
        skipped = dict(zip(columns["skipped"].tolist(), columns["num_skipped"].tolist(), strict=True))
        # The faults are among those of the scan.
        facts: dict[str, Any] = {"class_names": names, "faults": {}, "began_ns": began_ns}
        listing = Listing(root=root, **arrays, **facts, skipped=skipped)
        faults = map(Fault._make, columns["faults"].tolist())
        places = columns["fault_places"].tolist()
        found = Scan(listing, columns["sizes"], dict(zip(places, faults, strict=True)))
        return str(columns["content"]), found
    except Exception:  # zipfile and numpy raise almost anything on damaged bytes
        return None


def _store(path: Path, content: str, found: Scan) -> None:
    listing = found.listing
    columns = {name: getattr(listing, name) for name in (*_ARRAYS, "class_names", "began_ns")}
    columns |= {name: getattr(listing, name).encoded for name in _PATHS}
    columns |= {"format": _FORMAT, "content": content, "root": str(listing.root), "sizes": found.sizes}
    columns["fault_places"] = np.array(list(found.faults), np.int64)
    columns["faults"] = np.array(list(found.faults.values()), np.str_).reshape(-1, 2)
    columns["skipped"] = np.array(list(listing.skipped), np.str_)
    columns["num_skipped"] = np.array(list(listing.skipped.values()), np.int64)
    try:
        with replacing(path) as file:
            np.savez(file, **columns)
    except OSError as error:
        advice = "set data.cache_dir to a writable folder"
        sys.stderr.write(visible(f"the list of images is not cached: {error}; {advice}") + "\n")
