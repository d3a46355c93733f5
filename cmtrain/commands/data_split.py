"""Divide a folder of images into training, validation and test lists (`cmtrain data split`).

No image is moved: each list is a text file that a run takes in place of a folder (pipelines/files/lists.py).
"""

import csv
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmtrain.errors import ConfigError
from cmtrain.storage.records import replace_file
from pipelines.checks.decode_one import FORMATS
from pipelines.files.doubts import split_doubts
from pipelines.files.labels import some
from pipelines.files.lists import read_list
from pipelines.files.manifest import Manifest
from pipelines.plan import sample_keys
from pipelines.progress import tracked
from pipelines.spec import DataError, os_errors_in_one_line, print_lines, visible

SPLITS = ("train", "val", "test")
THUMBNAIL_PX = 16
# Correlation of grey thumbnails. 63 of ImageNet's photographs at half and quarter size or at quality 10 have
# 0.9962 or more, and two different ones 0.68 at most (measured). Cut-outs have less.
ALIKE = 0.995
MAX_COMPARED = 100_000  # images: every pair is compared
ROWS_AT_ONCE = 1024
_SPLIT_DOMAIN = 4  # keeps these draws apart from other uses of the same seed

Ints = NDArray[np.int64]


@os_errors_in_one_line()
def split(
    root: str, *, val: float, test: float, group_by: str | None, seed: int, out: str | None, compare: bool
) -> None:
    """Write train.csv, val.csv and, for `test` > 0, test.csv, each with its share of every class.

    Images of one group are on one side: those in whose path below `root` the pattern `group_by` finds the
    same text (its first group, else the whole match), and near-duplicates (if `compare`). The same images,
    shares and seed give the same lists. `root` has one folder per class; `val` and `test` are shares of each
    class. `out`: folder for the lists; None for `root`, where a run finds them.
    Raises ConfigError: shares or a pattern that cannot be used. DataError: no images, a folder that is split
    already, a list that is there with other content, or a name that no list can hold.
    """
    if val <= 0 or val + test >= 1:
        raise ConfigError(f"--val {val:g}, --test {test:g}: val must be above 0, and both together below 1")
    folder, target = Path(root).absolute(), Path(out or root).absolute()
    if found := next((folder / name for name in SPLITS[:2] if (folder / name).is_dir()), None):
        raise DataError(f"{found}: is a split already; give a folder with one folder per class")
    images = Manifest.from_folder(folder)
    print_lines(*split_doubts(images, folder.name))
    print_lines(*(f"left out: {file.path}: {file.reason}" for file in images.bad))
    links = [_same_text(images, group_by)] if group_by else []
    if compare:
        links.append(near_duplicates(images))
    groups = _connected(len(images), links)
    sides = divide(images.labels, groups, [1 - val - test, val, *([test] if test else [])], seed)
    names = SPLITS if test else SPLITS[:2]
    if empty := [name for side, name in enumerate(names) if side not in sides]:
        what = f"{empty[0]}: its {len(images):,} images are {groups.max() + 1:,} groups"
        advice = "by near-duplicates or --group-by; try --no-compare or other shares"
        raise DataError(f"{folder}: no images for {what}, {advice}")
    lists = {target / f"{name}.csv": np.flatnonzero(sides == side) for side, name in enumerate(names)}
    contents = {path: _list_of(images, places) for path, places in lists.items()}
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise DataError(f"{path}: holds something else already; remove it, or give another --out")
    target.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        replace_file(path, content)
    _describe(images, groups, sides, list(contents), folder)


def divide(labels: Ints, groups: Ints, shares: Sequence[float], seed: int) -> Ints:
    """Return the side of each image, (N,) places in `shares`, so that no group is on two sides.
    Large groups come first, equal ones in an order drawn from `seed`. Each goes to the side where it brings
    the numbers of images per class closest to their shares, by the sum of squares over expected numbers.
    """
    counts = np.bincount(labels)
    expected = np.outer(shares, counts) + 1e-9  # (sides, classes)
    few = (expected[1] < 1) & (counts > 1)  # such classes have one image for validation
    expected[:, few] *= (counts[few] - 1) / (counts[few] - expected[1, few])
    expected[1, few] = 1
    missing = expected.copy()
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    keys = sample_keys(seed, _SPLIT_DOMAIN, np.arange(len(members))).tolist()
    sides = np.zeros(len(labels), np.int64)
    for group in sorted(range(len(members)), key=lambda group: (-len(members[group]), keys[group])):
        found, sizes = np.unique(labels[members[group]], return_counts=True)
        change = (sizes**2 - 2 * missing[:, found] * sizes) / expected[:, found]  # of the squares
        side = int(change.sum(1).argmin())
        missing[side, found] -= sizes
        sides[members[group]] = side
    return sides


def near_duplicates(images: Manifest) -> Ints:
    """Return for each image, (N,), the first whose grey thumbnail is ALIKE. Raises DataError: too many."""
    if len(images) > MAX_COMPARED:
        raise DataError(f"{images.root}: {len(images):,} images are too many to compare; add --no-compare")
    with ThreadPoolExecutor() as pool:
        drawn = pool.map(_thumbnail, map(images.file, range(len(images))))
        pixels = np.stack(list(tracked(drawn, f"{images.root}: comparing", len(images))))  # (N, 256)
    pixels -= pixels.mean(1, keepdims=True)
    norms = np.linalg.norm(pixels, axis=1, keepdims=True)
    pixels /= np.where(norms > THUMBNAIL_PX, norms, np.inf)  # without contrast it is like no other
    first = np.arange(len(images))
    for begin in range(0, len(images), ROWS_AT_ONCE):
        alike = pixels[begin : begin + ROWS_AT_ONCE] @ pixels.T >= ALIKE
        places = begin + np.flatnonzero(alike.any(1))
        first[places] = alike[places - begin].argmax(1)
    return first


def _thumbnail(path: str) -> NDArray[np.float32]:
    side = THUMBNAIL_PX
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("L", (16 * side, 16 * side))  # decodes a large JPEG at a part of its size
            small = image.convert("L").resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(small, np.float32).ravel()
    except Exception:  # damaged behind its header, as a check or a run will find out: like no other
        return np.zeros(side * side, np.float32)


def _same_text(images: Manifest, group_by: str) -> Ints:
    """Return for each image, (N,), the first one in whose path `group_by` finds the same text."""
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ConfigError(f"--group-by {group_by}: is no regular expression: {error}") from error
    first: dict[str, int] = {}
    places = []
    for place, path in enumerate(images.paths):
        match = pattern.search(path)
        places.append(first.setdefault(match[pattern.groups and 1], place) if match else place)
    if len(first) < 2:
        what = f"finds only {next(iter(first))!r}" if first else "finds nothing"
        raise ConfigError(f"--group-by {group_by}: {what} in paths such as {images.paths[0]}")
    return np.array(places)


def _connected(num_images: int, links: Sequence[Ints]) -> Ints:
    """Return group numbers, (N,) from 0: each image is in one group with those that `links` name for it."""
    groups, before = np.arange(num_images), np.arange(0)
    while not np.array_equal(groups, before):
        before = groups.copy()
        for link in links:
            np.minimum.at(groups, link, before)
            groups = np.minimum(groups, groups[link])
    return np.unique(groups, return_inverse=True)[1]


def _list_of(images: Manifest, places: Ints) -> bytes:
    """Return a list file that names the images at `places`. Raises DataError: a name that it cannot hold."""
    rows = [(images.paths[place], images.class_names[images.labels[place]]) for place in places.tolist()]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content := text.getvalue().encode())
            file.flush()
            if [row[1:] for row in read_list(Path(file.name), images.root)] == rows:
                return content
        wrong = "a name"
    except (UnicodeEncodeError, DataError) as error:
        wrong = str(error).partition(": ")[2] or str(error)
    raise DataError(f"{images.root}: a list cannot hold all names: {wrong}; rename what is unusual")


def _describe(images: Manifest, groups: Ints, sides: Ints, lists: list[Path], folder: Path) -> None:
    names, num_groups = images.class_names, int(groups.max()) + 1
    together = f", in {num_groups:,} groups that stay together" if num_groups < len(images) else ""
    lines = [f"{folder}: {len(images):,} images of {len(names):,} classes{together}"]
    for side, path in enumerate(lists):
        counts = np.bincount(images.labels[sides == side], minlength=len(names))
        lines.append(f"{path}: {counts.sum():,} images, {counts.min():,} to {counts.max():,} of a class")
        if empty := [names[place] for place in np.flatnonzero(counts == 0).tolist()]:
            lines.append(f"  it has none of {some(empty)}: too few groups of images")
    own = "" if lists[0].parent == folder else f" --data.train_list {lists[0]} --data.val_list {lists[1]}"
    lines.append(f"train: cmtrain --config configs/small.yaml --data.root {shlex.quote(str(folder))}{own}")
    sys.stdout.writelines(f"{visible(line)}\n" for line in lines)
