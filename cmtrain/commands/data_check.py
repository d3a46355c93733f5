"""`cmtrain data check`: look at every image before a run has to."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.checks.bad_list import write_list
from pipelines.checks.decode_one import Fault
from pipelines.checks.decode_pool import DecodePool
from pipelines.files.listing import Listing, classes_of_folder, list_folder
from pipelines.files.manifest import Manifest
from pipelines.progress import tracked
from pipelines.spec import DataError

EXIT_OK, EXIT_DATA = 0, 3
NUM_SHOWN = 20
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Examined:
    """One split and what is wrong with it: faults by place in `listing`."""

    listing: Listing
    faults: dict[int, Fault]
    seconds: float


def check(
    root: str, *, full: bool, processes: int | None, out: str | None, cache_dir: str | None = None
) -> int:
    """Examine the images of `root`, in processes that a hostile file may kill, and list those that cannot be used.

    The list is written beside the data, or into the user's cache where the data is read-only; training leaves out what
    it names. That matters most for truncated files: DALI 1.34 decodes them to grey without a word. A check of headers
    alone writes no list, since training reads all headers itself. Either way every header is read, and what the next
    run remembers of the files is what they are now.

    Args:
        root: a folder with train/ and val/, each a tree of class folders, or one such tree.
        full: decode every image, not only its header.
        processes: decode in so many processes; None is one per core.
        out: write the list there instead, for people: training does not look there.
        cache_dir: data.cache_dir of the runs, where they remember the files.

    Returns:
        The process exit code: 0 when every file is good, else 3.

    Raises:
        DataError: no images there, or a validation class that training does not have.
    """
    folder = Path(root).absolute()
    pool = DecodePool(processes, decode=full)
    try:
        splits = [_examine(listing, pool) for listing in _list_splits(folder)]
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
            _say(f"{len(faults):,} bad files are listed in {written}")
    class_names = splits[0].listing.class_names
    for split in splits:
        _describe(split, class_names, cache_dir)
    for path, fault in list(faults.items())[:NUM_SHOWN]:
        _say(f"  {path}: {fault.reason}")
    if len(faults) > NUM_SHOWN:
        _say(f"  and {len(faults) - NUM_SHOWN:,} more")
    return EXIT_DATA if faults else EXIT_OK


def _list_splits(folder: Path) -> Iterator[Listing]:
    class_names = None
    roots = [folder / name for name in SPLITS if (folder / name).is_dir()] or [folder]
    for root in roots:
        listing = classes_of_folder(list_folder(root), class_names)
        class_names = listing.class_names
        yield listing


def _examine(listing: Listing, pool: DecodePool) -> Examined:
    begin = time.monotonic()
    places = [place for place in range(len(listing)) if place not in listing.faults]
    results = pool.check([str(listing.root / listing.paths[place]) for place in places])
    tracked_results = tracked(results, f"{listing.root}: checking", len(places))
    found = {
        place: result.fault for place, result in zip(places, tracked_results, strict=True) if result.fault
    }
    return Examined(listing, dict(sorted((listing.faults | found).items())), time.monotonic() - begin)


def _describe(split: Examined, class_names: tuple[str, ...], cache_dir: str | None) -> None:
    listing, num_bad = split.listing, len(split.faults)
    kinds = Counter(fault.kind for fault in split.faults.values())
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    _say(
        f"{listing.root}: {len(listing):,} files, {len(listing) - num_bad:,} good, {num_bad:,} bad"
        + f" ({by_kind})" * bool(kinds)
    )
    _say(f"  {len(listing) / split.seconds:,.0f} images/s")
    good = np.delete(listing.labels, list(split.faults))
    counts = np.bincount(good, minlength=len(class_names))
    fewest = class_names[int(counts.argmin())]
    _say(
        f"  {len(class_names):,} classes of {counts.min():,} ({fewest}) to {counts.max():,} good images, "
        f"median {np.median(counts):,.0f}"
    )
    try:
        manifest = Manifest.from_folder(
            listing.root, class_names=class_names, cache_dir=cache_dir, max_bad_fraction=1.0, refresh=True
        )
    except DataError:  # not one image is usable
        return
    _say(f"  fingerprint {manifest.fingerprint}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
