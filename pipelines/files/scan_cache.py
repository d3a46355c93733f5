"""What an earlier start found out about the files of a split, for as long as it holds.

To look at 1.28 million files takes seconds on a local disk, and a file server feels it, from every rank at every start.
So a scan is kept in one file, and used again while these are what they were then: the state of every folder, size and
time of a sample of the files, and the header of every file that was unusable. docs/data.md tells what that cannot see.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.files.headers import Scan, in_threads, is_racy, read_headers, scan
from pipelines.files.listing import Folders, Listing, file_state, folder_state
from pipelines.files.paths import Paths
from pipelines.progress import LINE_SECONDS
from pipelines.spec import DataError

NUM_SAMPLED = 1024  # 1 % of files overwritten in place escape it with a probability of 0.00003

_FORMAT = 1
_POLL_SECONDS = 0.1


def remembered(
    look: Callable[[], Listing],
    name: str,
    *,
    content: str,
    cache_dir: Path,
    threads: int | None,
    refresh: bool,
) -> Scan:
    """A scan of what `look` lists: an earlier one while it holds, else a new one, kept for the next start.

    Of several processes that find no scan that holds, one at a time looks; the others wait and use what it found.

    Args:
        look: lists the files.
        name: of the split; scans of different names are kept apart.
        content: must be as it was then.
        cache_dir: where scans are kept; that nothing can be kept there is a warning.
        threads: that look at files; None is four per core.
        refresh: look at everything.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = cache_dir / f"files-{digest}.npz"
    kept = None if refresh else _load(path)
    if kept and _holds(*kept, content, threads):
        return kept[1]
    kept = None  # it is large, and another process may write a new one while this one waits
    with _alone(path.with_suffix(".lock")):
        kept = None if refresh else _load(path)
        if kept and _holds(*kept, content, threads):
            return kept[1]
        found = scan(look(), threads, kept and kept[1])
        _store(path, content, found)
    return found


def list_digest(path: Path) -> str:
    """SHA-256 of a list of images. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the list of images: {error}") from error


def _holds(then: str, kept: Scan, content: str, threads: int | None) -> bool:
    listing = kept.listing
    folder_times_ns = listing.folders.states[:, 2:]  # (F, 2) mtime, ctime
    if (folder_times_ns == 0).any():  # a file system that gives folders no time (s3fs issue 2048)
        return False
    if any(is_racy(times_ns, listing.began_ns).any() for times_ns in (folder_times_ns, listing.mtime_ns)):
        return False
    return (
        then == content
        and _folders_hold(listing, threads)
        and _files_hold(listing, threads)
        and _reasons_hold(kept, threads)
    )


def _folders_hold(listing: Listing, threads: int | None) -> bool:
    prefix = os.fsencode(os.path.join(listing.root, ""))
    folders = [prefix + os.fsencode(path) for path in listing.folders.paths]
    return np.array_equal(list(in_threads(folder_state, folders, threads)), listing.folders.states)


def _files_hold(listing: Listing, threads: int | None) -> bool:
    prefix = os.fsencode(os.path.join(listing.root, ""))
    sample = np.linspace(0, len(listing) - 1, min(len(listing), NUM_SAMPLED)).astype(np.int64)
    states = in_threads(
        file_state, [prefix + os.fsencode(listing.paths[place]) for place in sample], threads
    )
    then = zip(listing.size_bytes[sample].tolist(), listing.mtime_ns[sample].tolist(), strict=True)
    return [(size_bytes, mtime_ns) for size_bytes, mtime_ns, _ in states] == list(then)


def _reasons_hold(kept: Scan, threads: int | None) -> bool:
    """What could not be used may have been repaired by a change that no time tells, as of its permissions."""
    verdicts = read_headers(kept.listing, np.array(list(kept.reasons), np.int64), threads)
    return [verdict.reason for verdict in verdicts] == list(kept.reasons.values())


def _load(path: Path) -> tuple[str, Scan] | None:
    """The content and the scan; None when there is none, or one that is damaged or of another version."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            columns = dict(data)  # checks a CRC-32 of each
        if columns["format"] != _FORMAT:
            return None
        listing = Listing(
            root=Path(str(columns["root"])),
            paths=Paths(columns["path_buffer"], columns["path_offsets"]),
            labels=columns["labels"],
            size_bytes=columns["size_bytes"],
            mtime_ns=columns["mtime_ns"],
            class_names=tuple(columns["class_names"].tolist()),
            bad={},  # among the reasons of the scan
            folders=Folders(
                Paths(columns["folder_buffer"], columns["folder_offsets"]), columns["folder_states"]
            ),
            began_ns=int(columns["began_ns"]),
        )
        reasons = dict(zip(columns["bad_places"].tolist(), columns["bad_reasons"].tolist(), strict=True))
        return str(columns["content"]), Scan(listing, columns["sizes"], reasons)
    except Exception:  # zipfile and numpy raise almost anything on damaged bytes
        return None


def _store(path: Path, content: str, found: Scan) -> None:
    listing = found.listing
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".files-") as folder:
            partial = Path(folder, path.name)
            np.savez(
                partial,
                format=np.array(_FORMAT),
                content=np.array(content),
                root=np.array(str(listing.root)),
                path_buffer=listing.paths.buffer,
                path_offsets=listing.paths.offsets,
                labels=listing.labels,
                size_bytes=listing.size_bytes,
                mtime_ns=listing.mtime_ns,
                class_names=np.array(listing.class_names, np.str_),
                folder_buffer=listing.folders.paths.buffer,
                folder_offsets=listing.folders.paths.offsets,
                folder_states=listing.folders.states,
                began_ns=np.array(listing.began_ns),
                sizes=found.sizes,
                bad_places=np.array(list(found.reasons), np.int64),
                bad_reasons=np.array(list(found.reasons.values()), np.str_),
            )
            partial.replace(path)
    except OSError as error:
        warnings.warn(
            f"the list of images is not cached: {error}; set data.cache_dir to a writable folder",
            stacklevel=2,
        )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process is in here, on this host or, if the file system of `path` can do it, on any."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError:  # nothing can be kept there, so there is nothing to wait for
        yield
        return
    with file:
        _lock(file)
        yield


def _lock(file: IO[bytes]) -> None:
    tell_at = time.monotonic() + LINE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL_SECONDS)
        except OSError:  # a file system without locks: every process looks for itself
            return
        else:
            return
        if time.monotonic() > tell_at:
            sys.stderr.write(f"waiting for the process that lists the images (it holds {file.name})\n")
            tell_at = time.monotonic() + LINE_SECONDS
