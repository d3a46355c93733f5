"""`cmtrain data check`: look at every image before a run has to."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmtrain.errors import EXIT_DATA, EXIT_DONE
from pipelines.checks.bad_list import write_list
from pipelines.checks.decode_one import kind_of
from pipelines.checks.decode_pool import Judges
from pipelines.files.listing import Listing, classes_of_folder, list_folder
from pipelines.files.manifest import Manifest
from pipelines.progress import tracked
from pipelines.spec import DataError

NUM_SHOWN = 20
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Examined:
    """One split and what is wrong with it: reasons by place in `listing`."""

    listing: Listing
    reasons: dict[int, str]
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
    judges = Judges(processes, decode=full)
    try:
        splits = [_examine(listing, judges) for listing in _list_splits(folder)]
    finally:
        judges.close()
    reasons = {
        str((split.listing.root / split.listing.paths[place]).relative_to(folder)): reason
        for split in splits
        for place, reason in split.reasons.items()
    }
    if out or full:  # before the manifests are made, which leave out what it names
        written = write_list(folder, reasons, Path(out) if out else None)
        if written is not None:
            _say(f"{len(reasons):,} bad files are listed in {written}")
    class_names = splits[0].listing.class_names
    for split in splits:
        _describe(split, class_names, cache_dir)
    for path, reason in list(reasons.items())[:NUM_SHOWN]:
        _say(f"  {path}: {reason}")
    if len(reasons) > NUM_SHOWN:
        _say(f"  and {len(reasons) - NUM_SHOWN:,} more")
    return EXIT_DATA if reasons else EXIT_DONE


def _list_splits(folder: Path) -> Iterator[Listing]:
    class_names = None
    roots = [folder / name for name in SPLITS if (folder / name).is_dir()] or [folder]
    for root in roots:
        listing = classes_of_folder(list_folder(root), class_names)
        class_names = listing.class_names
        yield listing


def _examine(listing: Listing, judges: Judges) -> Examined:
    begin = time.monotonic()
    places = [place for place in range(len(listing)) if place not in listing.bad]
    verdicts = judges.verdicts([str(listing.root / listing.paths[place]) for place in places])
    tracked_verdicts = tracked(verdicts, f"{listing.root}: checking", len(places))
    found = {
        place: verdict.reason
        for place, verdict in zip(places, tracked_verdicts, strict=True)
        if verdict.reason
    }
    return Examined(listing, dict(sorted((listing.bad | found).items())), time.monotonic() - begin)


def _describe(split: Examined, class_names: tuple[str, ...], cache_dir: str | None) -> None:
    listing, num_bad = split.listing, len(split.reasons)
    kinds = Counter(kind_of(reason) for reason in split.reasons.values())
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    _say(
        f"{listing.root}: {len(listing):,} files, {len(listing) - num_bad:,} good, {num_bad:,} bad"
        + f" ({by_kind})" * bool(kinds)
    )
    _say(f"  {len(listing) / split.seconds:,.0f} images/s")
    good = np.delete(listing.labels, list(split.reasons))
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
