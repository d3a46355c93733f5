"""Image sizes from file headers, for as many files as are not known yet."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.checks.decode_one import Verdict
from pipelines.checks.decode_one import read_header as _read_header
from pipelines.files.listing import Listing
from pipelines.progress import tracked

# A file or folder that is changed twice within one tick of its file system's clock looks as after the first change (so
# git checks "racily clean" files again). The coarsest tick is FAT's two seconds; another one for clocks that differ.
TICK_NS = 3_000_000_000
_DAY_NS = 86_400_000_000_000
_BLOCK = 64  # files that a thread takes at a time

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Scan:
    """All that is known of the files of a split."""

    listing: Listing
    sizes: NDArray[np.int32]  # (N, 2) height and width as stored, (0, 0) where a file is unusable
    reasons: dict[int, str]  # why it is, by place


def scan(listing: Listing, threads: int | None, known: Scan | None) -> Scan:
    """Reads the headers of the files that `known` lacks, holds with another size or time, or holds as unusable.

    Args:
        threads: readers; None is four per core.
        known: an earlier scan of the same root.
    """
    sizes = np.zeros((len(listing), 2), np.int32)
    if known is not None:
        places = known.listing.paths.find(listing.paths)  # (N,)
        same = (places >= 0) & ~is_racy(listing.mtime_ns, known.listing.began_ns)
        for now, then in (
            (listing.size_bytes, known.listing.size_bytes),
            (listing.mtime_ns, known.listing.mtime_ns),
        ):
            same &= now == then[places]
        sizes[same] = known.sizes[places[same]]
    reasons = dict(listing.bad)
    unread = np.setdiff1d(np.flatnonzero(sizes[:, 0] == 0), list(reasons), assume_unique=True)
    verdicts = tracked(
        read_headers(listing, unread, threads), f"{listing.root}: reading image headers", len(unread)
    )
    for place, (height, width, reason) in zip(unread, verdicts, strict=True):
        sizes[place] = height, width
        if reason:
            reasons[int(place)] = reason
    return Scan(listing, sizes, dict(sorted(reasons.items())))


def read_headers(listing: Listing, places: NDArray[np.int64], threads: int | None) -> Iterator[Verdict]:
    """One verdict a place, in order."""

    def read(place: int) -> Verdict:
        return _read_header(os.path.join(listing.root, listing.paths[place]))

    with warnings.catch_warnings():
        # Pillow warns from 89 megapixels on and raises from 179 on; both are over our limit anyway.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield from in_threads(read, places, threads)


def in_threads(
    look: Callable[[Any], T], items: Sequence[Any] | NDArray[Any], threads: int | None
) -> Iterator[T]:
    """`look` at every item, results in order; None is four threads per core, since they wait for a disk or a server."""

    def look_at_block(begin: int) -> list[T]:
        return [look(item) for item in items[begin : begin + _BLOCK]]

    with ThreadPoolExecutor(threads or 4 * (os.cpu_count() or 1)) as pool:
        for results in pool.map(look_at_block, range(0, len(items), _BLOCK)):
            yield from results


def is_racy(times_ns: NDArray[np.int64], began_ns: int) -> NDArray[np.bool_]:
    """Whether something with these times may have changed after a look at `began_ns` without a new time.

    A time more than a day ahead is no clock's, so a change would set it back.
    """
    return (times_ns > began_ns - TICK_NS) & (times_ns < began_ns + _DAY_NS)
