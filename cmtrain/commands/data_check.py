"""Check every image before a run has to (`cmtrain data check`)."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmtrain.errors import EXIT_DATA, EXIT_DONE
from pipelines.checks.bad_list import write_list
from pipelines.checks.decode_one import Fault
from pipelines.checks.decode_pool import DecodePool
from pipelines.files.labels import relabel_folder
from pipelines.files.listing import Listing, list_folder
from pipelines.files.manifest import Manifest
from pipelines.progress import tracked
from pipelines.spec import DataError

NUM_SHOWN = 20
SPLITS = ("train", "val")


@dataclass(frozen=True)
class CheckedSplit:
    """One split, and why images cannot be used: faults by place in `listing`."""

    listing: Listing
    faults: dict[int, Fault]
    seconds: float


def check(
    root: str, *, full: bool, processes: int | None, out: str | None, cache_dir: str | None = None
) -> int:
    """Test the images of `root`, in processes that a hostile file may kill, and list the unusable ones.

    The list is written beside the data, or into the user's cache if the data is read-only, and training
    leaves out the images on it. That matters most for truncated files, which DALI 1.34 decodes to grey
    without an error. A check of headers alone writes no list, because training reads all headers itself.
    Either way every header is read again, and the cache of the runs is brought up to date.

    Args:
        root: a folder with train/ and val/, each a tree of class folders, or one such tree.
        full: decode every image, not only its header.
        processes: number of decoding processes; None is one per core.
        out: file for the list instead, for people: training does not read it.
        cache_dir: data.cache_dir of the runs, where they cache file headers.

    Returns:
        The process exit code: 0 when every file is good, else 3.

    Raises:
        DataError: no images there, or a validation class that training does not have.
    """
    folder = Path(root).absolute()
    pool = DecodePool(processes, decode=full)
    try:
        splits = [_check_split(listing, pool) for listing in _list_splits(folder)]
    finally:
        pool.close()
    faults = {
        str((split.listing.root / split.listing.paths[place]).relative_to(folder)): fault
        for split in splits
        for place, fault in split.faults.items()
    }
    if out or full:  # before the manifests are made, which leave out what it names
        written = write_list(folder, faults, Path(out) if out else None)
        if written is not None:
            _print(f"{len(faults):,} bad files are listed in {written}")
    class_names = splits[0].listing.class_names
    for split in splits:
        _describe(split, class_names, cache_dir)
    for path, fault in list(faults.items())[:NUM_SHOWN]:
        _print(f"  {path}: {fault.reason}")
    if len(faults) > NUM_SHOWN:
        _print(f"  and {len(faults) - NUM_SHOWN:,} more")
    return EXIT_DATA if faults else EXIT_DONE


def _list_splits(folder: Path) -> Iterator[Listing]:
    class_names = None
    roots = [folder / name for name in SPLITS if (folder / name).is_dir()] or [folder]
    for root in roots:
        listing = relabel_folder(list_folder(root), class_names)
        class_names = listing.class_names
        yield listing


def _check_split(listing: Listing, pool: DecodePool) -> CheckedSplit:
    begin = time.monotonic()
    places = [place for place in range(len(listing)) if place not in listing.faults]
    results = pool.check([str(listing.root / listing.paths[place]) for place in places])
    tracked_results = tracked(results, f"{listing.root}: checking", len(places))
    found = {
        place: result.fault for place, result in zip(places, tracked_results, strict=True) if result.fault
    }
    return CheckedSplit(listing, dict(sorted((listing.faults | found).items())), time.monotonic() - begin)


def _describe(split: CheckedSplit, class_names: tuple[str, ...], cache_dir: str | None) -> None:
    listing, num_bad = split.listing, len(split.faults)
    kinds = Counter(fault.kind for fault in split.faults.values())
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    line = f"{listing.root}: {len(listing):,} files, {len(listing) - num_bad:,} good, {num_bad:,} bad"
    _print(f"{line} ({by_kind})" if kinds else line)
    _print(f"  {len(listing) / split.seconds:,.0f} images/s")
    good = np.delete(listing.labels, list(split.faults))
    counts = np.bincount(good, minlength=len(class_names))
    fewest = class_names[int(counts.argmin())]
    _print(
        f"  {len(class_names):,} classes of {counts.min():,} ({fewest}) to {counts.max():,} good images, "
        f"median {np.median(counts):,.0f}"
    )
    try:
        manifest = Manifest.from_folder(
            listing.root, class_names=class_names, cache_dir=cache_dir, max_bad_fraction=1.0, refresh=True
        )
    except DataError:  # no image is usable
        return
    _print(f"  fingerprint {manifest.fingerprint}")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
