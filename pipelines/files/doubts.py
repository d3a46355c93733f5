"""Find what is legal in a data set but likely a mistake: one line each, for the user of a run."""

from pathlib import Path

import numpy as np

from pipelines.files.labels import NO_CLASS, SEPARATOR, look_alikes, some
from pipelines.files.manifest import Manifest

_COMPARED_IMAGES = 8  # validation images that are compared with training's by their bytes


def split_doubts(manifest: Manifest, split: str) -> list[str]:
    """Return a line per doubt about a `split` ("training"): labels, empty classes, files named twice."""
    doubts, names = list(manifest.notes), manifest.class_names
    if len(empty := np.flatnonzero(manifest.class_counts() == 0)):
        what = f"{len(empty):,} of {len(names):,} classes have no usable image"
        doubts.append(f"{split}: {what}: {some([names[index] for index in empty.tolist()])}")
    if len(names) == 1 and manifest.label_sets is None:
        doubts.append(f"{split}: only one class, {names[0]}: there is nothing to learn; a folder too deep?")
    for one, other in look_alikes(names)[:3]:
        what = "differ only in case, blanks or Unicode form (NFC, NFD)"
        doubts.append(f"{split}: classes {one!r} and {other!r} {what}: one class?")
    sets = [name.split(SEPARATOR) for name in names if SEPARATOR in name]
    if sets and manifest.label_sets is None and all({*parts} <= {*names, NO_CLASS} for parts in sets):
        doubts.append(f"{split}: {SEPARATOR.join(sets[0])!r} is a class of its own without data.multi_label")
    ids = np.sort(manifest.identities)
    same = (ids[1:] == ids[:-1]) & (ids[1:] != 0)
    if num_same := int(same.sum()):
        order = np.argsort(manifest.identities, kind="stable")  # slower than a sort, and seldom needed
        labels = manifest.labels[order]
        place = int(np.argmax(same))
        conflicts = int((same & (labels[1:] != labels[:-1])).sum())
        first, second = (manifest.paths[index] for index in order[place : place + 2].tolist())
        example = first if first == second else f"{first} and {second} are one file"
        under = f", {conflicts:,} of them under two labels" if conflicts else ""
        if conflicts and manifest.label_sets is not None:
            under += "; all labels of an image go into one line, as cat;dog"
        doubts.append(f"{split}: {num_same:,} images are there twice{under}: {example}")
    return doubts


def pair_doubts(train: Manifest, val: Manifest) -> list[str]:
    """Return a line if validation images are training images, by identity or, for a few, by their bytes."""
    shared = (val.identities != 0) & np.isin(val.identities, train.identities)
    if shared.any():
        what = f"{int(shared.sum()):,} of {len(val):,} images are also in training"
        return [f"validation: {what}, so its accuracy means little: {val.file(int(np.argmax(shared)))}"]
    if train.packed or val.packed:
        return []
    chosen = np.unique(np.linspace(0, len(val) - 1, _COMPARED_IMAGES).astype(np.int64)).tolist()
    copies = [original for index in chosen if (original := _original(train, val, index))]
    if 2 * len(copies) <= len(chosen):
        return []
    what = f"of {len(chosen)} images {len(copies)} are also in training, as copies"
    return [f"validation: {what}, so its accuracy means little: {copies[0]}"]


def _original(train: Manifest, val: Manifest, index: int) -> str | None:
    """Return a training image with the bytes of a validation image, if its name or size leads to one."""
    same = train.size_bytes == val.size_bytes[index]
    same &= (train.heights == val.heights[index]) & (train.widths == val.widths[index])
    found = [train.file(place) for place in np.flatnonzero(same)[:100].tolist()]
    path = Path(val.file(index))
    found.sort(key=lambda file: Path(file).name != path.name)
    try:
        content = path.read_bytes()
        return next((file for file in found[:2] if Path(file).read_bytes() == content), None)
    except OSError:
        return None
