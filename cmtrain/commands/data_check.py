"""Check every image before a run has to (`cmtrain data check`)."""

import contextlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cmtrain.errors import EXIT_DATA, EXIT_DONE
from pipelines.checks import bad_list, decode_one, decode_pool
from pipelines.files import doubts, labels, shards
from pipelines.files.listing import Listing, describe_skipped, list_folder
from pipelines.files.manifest import Manifest
from pipelines.progress import tracked
from pipelines.spec import MAX_BAD_FRACTION, DataError, os_errors_in_one_line, visible

NUM_SHOWN = 20
KIND_NAMES: dict[decode_one.Kind, str] = {
    "truncated": "cut short", "not_an_image": "not an image", "too_large": "too large",
    "missing": "cannot be opened", "other": "damaged",
}  # fmt: skip


@os_errors_in_one_line()
def check(
    root: str, *, processes: int | None, out: str | None, cache_dir: str | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> int:  # fmt: skip
    """Test the images of `root`, in processes that a hostile file may kill, and list the unusable ones.

    Training leaves out what is on the list, which is beside the data, or in the user's cache if the data is
    read-only. That matters most for truncated files: DALI 1.34 decodes them to grey without an error. Every
    header is read again into the cache of the runs. `root`: train/ and val/, each a tree of class folders,
    or one such tree. `out`: a list for people instead. `cache_dir`, `max_bad_fraction`: as the runs' data.*.

    Returns the exit code: 3 when a split has more bad files than `max_bad_fraction`, or when `out` is given
    and training would meet them. Raises DataError: no images, a validation class that training lacks, what
    the machine cannot read (nothing is listed then), or a list that cannot be written.
    """
    folder = Path(root).absolute()
    with contextlib.closing(decode_pool.DecodePool(processes)) as pool:
        splits = [_check_split(listing, pool) for listing in _list_splits(folder)]
    listings, faults = [listing for listing, _, _ in splits], dict[str, decode_one.Fault]()
    for listing in listings:
        start = listing.root.relative_to(folder)
        faults |= {str(start / listing.paths[place]): fault for place, fault in listing.faults.items()}
    # Before the manifests are made, which leave out what it names.
    written = bad_list.write_list(folder, faults, Path(out) if out else None)
    for path, fault in itertools.islice(faults.items(), NUM_SHOWN):
        _print(f"  {path}: {fault.reason}")
    if len(faults) > NUM_SHOWN:
        _print(f"  and {len(faults) - NUM_SHOWN:,} more")
    for split in splits:
        _describe(*split, cache_dir)
    if len(listings) == 1 and listings[0].root != folder:
        _print(f"{folder}: only {listings[0].root.name}/ was checked, the other split is no folder")
    if written is not None:
        _print(f"the list of bad files is {written}")
    labels.relabel_folder(listings[0], None)  # raises where training would
    if not faults:
        return EXIT_DONE
    if out:
        _print("training does not read it: check without --out to have them left out")
        return EXIT_DATA
    sizes = [(str(listing.root), len(listing), len(listing.faults)) for listing in listings]
    if crowded := [root for root, size, bad in sizes if bad > min(max_bad_fraction * size, size - 1)]:
        _print(f"training will refuse {' and '.join(crowded)}: more than {max_bad_fraction:g} of it is bad")
        return EXIT_DATA
    _print("training leaves them out")
    return EXIT_DONE


def _list_splits(folder: Path) -> Iterator[Listing]:
    class_names = None
    for root in [folder / name for name in bad_list.SPLITS if (folder / name).is_dir()] or [folder]:
        if shards.is_packed(root):
            what = "is packed: the same `cmtrain data pack` again verifies it"
            raise DataError(f"{root}: {what}; check the folder that it was packed from")
        listing = list_folder(root)
        listing = labels.relabel_folder(listing, class_names or listing.class_names)
        class_names = listing.class_names
        yield listing


def _check_split(listing: Listing, pool: decode_pool.DecodePool) -> tuple[Listing, int, float]:
    """Return the split with all of its faults, how many images ask to be turned, and the seconds it took."""
    begin = time.monotonic()
    places = [place for place in range(len(listing)) if place not in listing.faults]
    results = pool.check([str(listing.root / listing.paths[place]) for place in places])
    faults, num_rotated = dict(listing.faults), 0
    results = tracked(results, f"{listing.root}: checking", len(places))
    for place, result in zip(places, results, strict=True):
        num_rotated += result.rotated
        if result.fault:
            faults[place] = result.fault
    return replace(listing, faults=dict(sorted(faults.items()))), num_rotated, time.monotonic() - begin


def _describe(listing: Listing, num_rotated: int, seconds: float, cache_dir: str | None) -> None:
    num_bad, class_names = len(listing.faults), listing.class_names
    kinds = Counter(KIND_NAMES[fault.kind] for fault in listing.faults.values())
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    line = f"{listing.root}: {len(listing):,} files, {len(listing) - num_bad:,} good, {num_bad:,} bad"
    _print(f"{line} ({by_kind})" if kinds else line)
    if listing.skipped:
        _print(f"  {describe_skipped(listing.skipped)}")
    if num_rotated:
        _print(f"  {num_rotated:,} ask to be turned (EXIF); images are used as they are stored")
    good = np.delete(listing.labels, list(listing.faults))
    counts = np.bincount(good, minlength=len(class_names))
    fewest = class_names[int(counts.argmin())]
    sizes = f"{counts.min():,} ({fewest}) to {counts.max():,} good images, median {np.median(counts):,.0f}"
    _print(f"  {len(class_names):,} classes of {sizes}; {len(listing) / seconds:,.0f} images/s")
    if num_bad < len(listing):  # the next start uses what is read here
        manifest = Manifest.from_folder(
            listing.root, class_names=class_names, cache_dir=cache_dir, max_bad_fraction=1.0, refresh=True
        )
        for line in doubts.split_doubts(replace(manifest, notes=()), listing.root.name):
            _print(f"  {line}")


def _print(line: str) -> None:
    sys.stdout.write(f"{visible(line)}\n")
