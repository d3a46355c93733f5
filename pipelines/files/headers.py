"""Read image sizes from file headers, in threads, for the files that an earlier scan does not know."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.checks.decode_one import CheckResult, check_file
from pipelines.files.listing import Listing
from pipelines.progress import tracked

# Two changes within one tick of a file system's clock look like one (git's "racily clean" files). The
# coarsest tick is FAT's two seconds; another one for clocks that differ.
TICK_NS = 3_000_000_000
_DAY_NS = 86_400_000_000_000  # a time further ahead is no clock's: a change would set it back
_BLOCK = 64  # files that a thread takes at a time

T = TypeVar("T")


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
    results = read_headers(listing, unread)
    results = tracked(results, f"{listing.root}: reading image headers", len(unread))
    for place, result in zip(unread, results, strict=True):
        sizes[place] = result.height, result.width
        if result.fault:
            faults[place] = result.fault
    return replace(listing, sizes=sizes, faults=dict(sorted(faults.items())))


def read_headers(listing: Listing, places: list[int]) -> Iterator[CheckResult]:
    """Yield one result per place, in order."""
    root, paths = listing.root, listing.paths
    return in_threads(lambda place: check_file(os.path.join(root, paths[place]), decode=False), places)


def in_threads(function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
    """Yield `function` of every item, in order, in four threads per core: they wait for a disk."""

    def of_block(begin: int) -> list[T]:
        return [function(item) for item in items[begin : begin + _BLOCK]]

    with ThreadPoolExecutor(4 * (os.cpu_count() or 1)) as pool:  # as many as there are blocks, at most
        for results in pool.map(of_block, range(0, len(items), _BLOCK)):
            yield from results


def is_racy(times_ns: NDArray[np.int64], began_ns: int) -> NDArray[np.bool_]:
    """Return whether a file or folder may have changed after `began_ns` and yet have these times."""
    return (times_ns > began_ns - TICK_NS) & (times_ns < began_ns + _DAY_NS)
