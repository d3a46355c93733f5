"""Image sizes from file headers, read once and remembered."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.judge import read_header as _read_header
from pipelines.listing import Listing
from pipelines.progress import tracked
from pipelines.quarantine import read_lists

_CACHE_FORMAT = "2"
_BLOCK = 256  # files that a thread takes at a time


def scan_sizes(listing: Listing, cache_dir: Path, threads: int | None) -> tuple[NDArray[np.int32], dict[int, str]]:
    """Height and width (N, 2) of every file as stored, (0, 0) where a file is unusable, and why, by place.

    The result is kept in one file of `cache_dir`, named after root and every file's path, size and time of change.
    Files that `cmtrain data check` has listed are unusable, too; its list is read anew every time.
    """
    digest = hashlib.sha256(f"{_CACHE_FORMAT}\0{listing.root}".encode("utf-8", "surrogateescape"))
    for column in (listing.paths.buffer, listing.paths.offsets, listing.size_bytes, listing.mtime_ns):
        digest.update(column.data)
    cache_file = cache_dir / f"sizes-{digest.hexdigest()[:32]}.npz"
    cached = _load(cache_file)
    sizes, reasons = cached or _scan(listing, threads)
    if cached is None:
        _store(cache_file, sizes, reasons)
    return _without_listed(listing, sizes, reasons)


def _without_listed(
    listing: Listing, sizes: NDArray[np.int32], reasons: dict[int, str]
) -> tuple[NDArray[np.int32], dict[int, str]]:
    listed = read_lists(listing.root)
    found = {place: listed[path] for place, path in enumerate(listing.paths) if path in listed} if listed else {}
    sizes[list(found)] = 0
    return sizes, dict(sorted((found | reasons).items()))


def _scan(listing: Listing, threads: int | None) -> tuple[NDArray[np.int32], dict[int, str]]:
    sizes = np.zeros((len(listing), 2), np.int32)
    reasons = dict(listing.bad)

    def read_block(begin: int) -> None:
        for index in range(begin, min(begin + _BLOCK, len(listing))):
            if index not in listing.bad:
                *sizes[index], reason = _read_header(os.path.join(listing.root, listing.paths[index]))
                if reason:
                    reasons[index] = reason

    with warnings.catch_warnings(), ThreadPoolExecutor(threads or 4 * (os.cpu_count() or 1)) as pool:
        # Pillow warns from 89 megapixels on and raises from 179 on; both are over our limit anyway.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        blocks = pool.map(read_block, range(0, len(listing), _BLOCK))
        for _ in tracked(blocks, f"{listing.root}: reading image headers", len(listing), per_step=_BLOCK):
            pass
    return sizes, dict(sorted(reasons.items()))


def _load(cache_file: Path) -> tuple[NDArray[np.int32], dict[int, str]] | None:
    try:
        with cache_file.open("rb") as file, np.load(file, allow_pickle=False) as data:
            return data["sizes"], dict(zip(data["bad_indices"].tolist(), data["bad_reasons"].tolist(), strict=True))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or damaged: scan again
        return None


def _store(cache_file: Path, sizes: NDArray[np.int32], reasons: dict[int, str]) -> None:
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_file.parent, delete=False) as partial:
            np.savez(
                partial,
                sizes=sizes,
                bad_indices=np.array(list(reasons), np.int64),
                bad_reasons=np.array(list(reasons.values()), np.str_),
            )
        os.replace(partial.name, cache_file)
    except OSError as error:
        warnings.warn(f"image sizes are not cached: {error}; set data.cache_dir to a writable folder", stacklevel=2)
