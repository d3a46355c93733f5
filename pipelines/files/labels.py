"""Turn the labels of a list, or the names of class folders, into classes.

All are names of classes, other spellings of names that are numbers, or positions among the classes; or, if
images have several classes, names with SEPARATOR between them. One label that does not fit is an error.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipelines.files.listing import LISTED_ALREADY, Listing
from pipelines.files.lists import read_list
from pipelines.spec import DataError

Files = TypeVar("Files", bound=Any)  # a Listing or a Manifest
SEPARATOR, NO_CLASS = ";", "-"  # of a label such as cat;dog; the label of an image of no class


def relabel_folder(listing: Listing, class_names: Sequence[str] | None, positions: bool = False) -> Listing:
    """Return the same files with places in `class_names` as labels; None takes the folders' names.
    `positions`: folders may be positions in it. Raises DataError: a folder is no class or, for None, empty.
    """
    found, root = listing.class_names, listing.root
    if class_names is not None:
        return relabelled(listing, class_names, lambda name: f"{root / name}:", "folder", positions)
    if len(empty := np.flatnonzero(np.bincount(listing.labels, minlength=len(found)) == 0)):
        folder = root / found[empty[0]]
        others = (root / name for name in found if root / name != folder)
        same = next((other.name for other in others if os.path.samefile(other, folder)), None)
        what = "no images in this class folder; add some or remove the folder"
        if LISTED_ALREADY in listing.skipped:
            what = f"{what}; if it has some, a link in another class leads here: remove that link"
        link = f"the same folder as {same}, by a link: two classes cannot share their images; remove one"
        raise DataError(f"{folder}: {link if same else what}")
    return listing


def line_of(path: Path, root: Path, label: str) -> str:
    """Return the beginning of a sentence about `label`: the line of the list `path` that has it first."""
    number = next(number for number, _, text in read_list(path, root) if text == label)
    return f"{path}:{number}: label {label!r} is"


def relabel_list(listing: Listing, path: Path, class_names: Sequence[str] | None) -> Listing:
    """Return the same files with places in `class_names` as labels; None takes the labels found, in order.
    Then numbers are positions if half or more up to the largest occur, else names. DataError names the line.
    """

    subject = partial(line_of, path, listing.root)
    if class_names is not None:
        return relabelled(listing, class_names, subject, "label", True)
    found = listing.class_names
    numbers = [_number(label) for label in found]
    signed = [label for label in found if label.startswith("-") and _number(label[1:]) is not None]
    if signed and numbers.count(None) == len(signed):
        raise DataError(f"{subject(signed[0])} negative; leave out the lines of images without a class")
    if None in numbers:
        listing = relabelled(listing, sorted(found), subject, "label", False)
        others = [label for label in found if _number(label) is None and label not in signed]
        num_numbers = len(found) - len(others)
        what = f"{path}: {num_numbers:,} labels are numbers and others, as {others[0]!r}, are not"
        note = f"{what}: all are taken as names of classes"
        return replace(listing, notes=(note,)) if num_numbers else listing
    by_number: dict[int | None, str] = {}
    for number, label in zip(numbers, found, strict=True):
        if by_number.setdefault(number, label) != label:
            raise DataError(f"{subject(label)} the number of {by_number[number]!r}, too; write one of them")
    largest = max(number or 0 for number in numbers)
    if largest < 2 * len(found):
        return relabelled(listing, list(map(str, range(largest + 1))), subject, "label", True)
    names = sorted(found, key=lambda label: _number(label) or 0)
    what = f"{path}: labels are numbers with gaps, so they are names of {len(names):,} classes"
    note = f"{what}, {names[0]} to {names[-1]}; numbers without images are no classes"
    return replace(relabelled(listing, names, subject, "label", False), notes=(note,))


def relabelled(
    files: Files, names: Sequence[str], subject: Callable[[str], str], what: str, positions: bool
) -> Files:
    """Return the same files with places in `names` as labels, and a note if not all were matched by name.
    `positions`: whether numbers may be positions; never where a class has a number for a name. Raises
    DataError, a sentence that `subject` begins: which `what` ("label", "folder", "class") matched.
    """
    found, place = files.class_names, {name: index for index, name in enumerate(names)}
    others = [label for label in found if label not in place]
    classes, how, hint = [place[label] for label in found if label in place], "", ""
    numbers, numbered = [_number(label) for label in found], [_number(name) for name in names]
    if others and None not in numbers and None not in numbered:
        by_number = {number: index for index, number in enumerate(numbered)}
        unique = len(by_number) == len(names) and len(set(numbers)) == len(found)
        if unique and by_number.keys() >= set(numbers):
            how = f"{what} {found[0]} is class {names[by_number[numbers[0]]]}"
            classes, others = [by_number[number] for number in numbers], []
        hint = "; where classes have numbers for names, a number is never a position"
    elif others and None not in numbers and positions and len(others) == len(found):
        places = [number for number in numbers if number is not None]
        if numbered.count(None) == len(names) and max(places) < len(names):
            shown = ", ".join(f"{index} is {names[index]}" for index in sorted(places)[:3])
            how = f"{what}s are positions among the classes: {shown}"
            classes, others = places, []
        else:
            others = [name for name, at in zip(found, places, strict=True) if at >= len(names)] or others
            hint = f"; as positions they would go from 0 to {len(names) - 1}"
    if not others:
        labels, notes = np.array(classes, np.int64)[files.labels], (f"{files.root}: {how}",) if how else ()
        return replace(files, labels=labels, class_names=tuple(names), notes=notes)
    if other := {_plain(name): name for name in names}.get(_plain(others[0])):
        hint = f"; {other} looks alike in another Unicode normal form (NFC, NFD) or case: use one spelling"
    matched = [label for label in found if label not in others]
    shown = f"{len(matched)} of {len(found)} {what}s are ({some(matched)})" if matched else f"no {what} is"
    listed = f"{shown}, {len(others)} such: {some(others)}; classes: {some(names)}"
    raise DataError(f"{subject(others[0])} not one of the {len(names)} training classes; {listed}{hint}")


def relabel_sets(files: Files, class_names: Sequence[str] | None, path: Path | None = None) -> Files:
    """Return the same files with the sets of classes that their labels, such as cat;dog, name.

    `class_names`: the classes; None takes those found, numbers by size, others by name. `path`: the list
    that the labels are from. Raises DataError: a class that is not there, an empty name, or no class at all.
    """
    labels, used = files.class_names, np.unique(files.labels).tolist()
    parts = [() if label == NO_CLASS else tuple(map(str.strip, label.split(SEPARATOR))) for label in labels]
    if class_names is None:
        found = sorted({name for row in used for name in parts[row]})
        is_number = all(map(str.isdecimal, found))
        class_names = sorted(found, key=lambda name: (len(name), name)) if is_number else found
    place = {name: index for index, name in enumerate(class_names) if name not in ("", NO_CLASS)}
    table = np.zeros((len(labels), len(class_names)), np.bool_)
    for row in used:
        if wrong := [name for name in parts[row] if name not in place]:
            where = f"{files.root}: label {labels[row]!r} is"
            where = line_of(path, files.root, labels[row]) if path else where
            known = f"the {len(place)} training classes: {some(class_names)}"
            what = f"{wrong[0]!r}, which is not one of {known}" if wrong[0] else "an empty one"
            raise DataError(f"{where} no list of classes: it names {what}")
        table[row, [place[name] for name in parts[row]]] = True
    if not place:
        raise DataError(f"{path or files.root}: no label names a class")
    return replace(files, class_names=tuple(class_names), label_sets=table)


def look_alikes(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of names that differ in case, blanks, unprintable characters or Unicode form only."""
    first: dict[str, str] = {}
    pairs = ((first.setdefault(_plain(name), name), name) for name in names)
    return [(one, other) for one, other in pairs if one != other]


def some(names: Sequence[str]) -> str:
    """Return the first few of `names`, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _plain(name: str) -> str:
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(char for char in plain if char.isprintable() and not char.isspace())


def _number(label: str) -> int | None:
    """Return the whole number that a label spells, as 7, 007, 7.0 and +7 do; None if it is none."""
    found = re.fullmatch(r"\+?(\d{1,99})(\.0*)?", label)
    return int(found[1]) if found else None
