"""Scan the files of a split for their sizes, and cache what was found out for as long as it is valid.

A scan of 1.28 million files takes seconds on a local disk and loads a file server. It is valid while these
are unchanged: the state of every folder, size and time of a sample of the files, and the header of every
unusable file. docs/data.md describes which changes that cannot see.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines import atomic, progress
from pipelines.checks.decode_one import CheckResult, Fault, check_file
from pipelines.files.listing import Listing, Paths, file_state, folder_state
from pipelines.spec import DataError, print_lines

NUM_SAMPLED = 1024  # 1 % of files overwritten in place escape it with a probability of 0.00003

_FORMAT = 5
_ARRAYS = ("labels", "size_bytes", "mtime_ns", "inodes", "folder_states", "sizes")  # of a listing
_PATHS = ("paths", "folders")

# Two changes within one tick of a file system's clock look like one (git's "racily clean" files). The
# coarsest tick is FAT's two seconds; another one for clocks that differ.
TICK_NS = 3_000_000_000
_DAY_NS = 86_400_000_000_000  # a time further ahead is no clock's: a change would set it back
_BLOCK = 64  # files that a thread takes at a time

T = TypeVar("T")


def cached_scan(find: Callable[[], Listing], name: str, content: str, cache: Path, refresh: bool) -> Listing:
    """Return the cached scan if it is still valid, else scan and cache, in one process at a time.

    `name`: of the split; each has its own scan. `content`: digest of the list file, if any; a scan is valid
    for it only. `cache`: folder of the scans; if it cannot be written, a line is printed. `refresh`: look at
    everything again. Raises OSError when the machine cannot read a folder or file; then nothing is cached.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = cache / f"files-{digest}.npz"
    kept = None if refresh else _load(path)
    if kept and _is_valid(*kept, content):
        return kept[1]
    kept = None  # it is large, and another process may write a new one while this one waits
    with atomic.locked(path, "lists the images"):
        kept = None if refresh else _load(path)
        if kept and _is_valid(*kept, content):
            return kept[1]
        found = scan(find(), kept and kept[1])
        _store(path, content, found)
        return found


def list_digest(path: Path) -> str:
    """Return the SHA-256 of a list of images. Raises DataError when it cannot be read."""
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise DataError(f"{path}: cannot read the list of images: not a file")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the list of images: {error}") from error


def _is_valid(then: str, listing: Listing, content: str) -> bool:
    folder_times_ns = listing.folder_states[:, 2:]  # (F, 2) mtime, ctime
    if (folder_times_ns == 0).any():  # a file system that gives folders no time (s3fs issue 2048)
        return False
    times_ns = folder_times_ns, listing.mtime_ns
    if then != content or any(is_racy(times, listing.began_ns).any() for times in times_ns):
        return False
    folders = list(map(listing.encoded_path, listing.folders.encoded))
    if not np.array_equal(list(in_threads(folder_state, folders)), listing.folder_states):
        return False
    sample = np.linspace(0, len(listing) - 1, min(len(listing), NUM_SAMPLED)).astype(np.int64)
    files = list(map(listing.encoded_path, listing.paths.encoded[sample]))
    known = np.stack([listing.size_bytes[sample], listing.mtime_ns[sample]], axis=1)
    if not np.array_equal([state[:2] for state in in_threads(file_state, files)], known):
        return False
    # An unusable file may have been repaired by a change that no time shows, as of its permissions.
    results = read_headers(listing, list(listing.faults))
    return [result.fault for result in results] == list(listing.faults.values())


def _load(path: Path) -> tuple[str, Listing] | None:
    """Return content and scan; None when there is none, or one that is damaged or of another version."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            columns: dict[str, Any] = dict(data)  # checks a CRC-32 of each
        facts = json.loads(columns["facts"].tobytes())
        if facts["format"] != _FORMAT:
            return None
        arrays = {name: columns[name] for name in _ARRAYS} | {name: Paths(columns[name]) for name in _PATHS}
        arrays |= {name: facts[name] for name in ("began_ns", "skipped")}
        arrays["faults"] = {place: Fault(kind, reason) for place, kind, reason in facts["faults"]}
        names = tuple(facts["class_names"])
        return facts["content"], Listing(root=Path(facts["root"]), class_names=names, **arrays)
    except Exception:  # zipfile and numpy raise almost anything on damaged bytes
        return None


def _store(path: Path, content: str, listing: Listing) -> None:
    columns = {name: getattr(listing, name) for name in _ARRAYS}
    columns |= {name: getattr(listing, name).encoded for name in _PATHS}
    facts = {name: getattr(listing, name) for name in ("class_names", "began_ns", "skipped")}
    facts |= {"format": _FORMAT, "content": content, "root": str(listing.root)}
    facts["faults"] = [(place, *fault) for place, fault in listing.faults.items()]
    try:
        with atomic.replacing(path) as file:
            np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **columns)
    except OSError as error:
        print_lines(f"the list of images is not cached: {error}; set data.cache_dir to a writable folder")


def scan(listing: Listing, known: Listing | None) -> Listing:
    """Return the same files with their sizes and all faults. Reads those headers that `known`, an earlier
    scan, lacks, has with another size or time, or as unusable. Raises OSError: the machine cannot read a
    file, which may be good.
    """
    sizes = np.zeros((len(listing), 2), np.int32)
    if known is not None:
        places = known.paths.find(listing.paths)  # (N,)
        same = (places >= 0) & ~is_racy(listing.mtime_ns, known.began_ns)
        same &= listing.size_bytes == known.size_bytes[places]
        same &= listing.mtime_ns == known.mtime_ns[places]
        sizes[same] = known.sizes[places[same]]
    faults = dict(listing.faults)
    unread = np.setdiff1d(np.flatnonzero(sizes[:, 0] == 0), list(faults), assume_unique=True).tolist()
    what = f"{listing.root}: reading image headers"
    results = progress.tracked(read_headers(listing, unread), what, len(unread))
    for place, result in zip(unread, results, strict=True):
        sizes[place] = result.height, result.width
        if result.fault:
            faults[place] = result.fault
    return replace(listing, sizes=sizes, faults=dict(sorted(faults.items())))


def read_headers(listing: Listing, places: list[int]) -> Iterator[CheckResult]:
    """Yield one result per place, in order."""
    return in_threads(lambda i: check_file(os.path.join(listing.root, listing.paths[i]), False), places)


def in_threads(function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
    """Yield `function` of every item, in order, in four threads per core: they wait for a disk."""
    blocks = range(0, len(items), _BLOCK)
    with ThreadPoolExecutor(4 * (os.cpu_count() or 1)) as pool:  # as many as there are blocks, at most
        for results in pool.map(lambda at: [function(item) for item in items[at : at + _BLOCK]], blocks):
            yield from results


def is_racy(times_ns: NDArray[np.int64], began_ns: int) -> NDArray[np.bool_]:
    """Return whether a file or folder may have changed after `began_ns` and yet have these times."""
    return (times_ns > began_ns - TICK_NS) & (times_ns < began_ns + _DAY_NS)
