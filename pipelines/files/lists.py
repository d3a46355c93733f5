"""Find the images that a person names: in list files, folders and patterns.

A list file is text with one `path,label` or `path label` per line; # begins a comment line.
"""

import csv
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.files import listing
from pipelines.files.listing import EXTENSIONS, Listing, look_at, walk
from pipelines.spec import DataError, os_errors_in_one_line, print_lines

LIST_EXTENSIONS = (".csv", ".tsv", ".txt", ".lst")

_PATH = rf".+(?:{'|'.join(map(re.escape, EXTENSIONS))})"
_LINE = re.compile(rf"({_PATH})\s*[,\s]\s*(.+)", re.IGNORECASE)
_HEADER = re.compile(r"[^\s,;|./]+(\s*[\s,;|]\s*[^\s,;|./]+)+")
_NUMBERS = re.compile(r"[-+.\d]+(\s+[-+.\d]+)+")
_COLUMNS = "expected two columns, 'path,label'; a label that holds a comma, tab or # goes in double quotes"


def list_file(path: Path, root: Path) -> Listing:
    """List the images that `path` names, in its order; classes are its labels, in order of appearance.
    Raises DataError when there is no such folder or file, no image, or a line that cannot be read.
    """
    place: dict[str, int] = {}
    skipped = Counter[str]()

    def entries(start: bytes, folders: dict[bytes, listing.FolderState]) -> Iterator[tuple[bytes, int]]:
        for _, name, label in read_list(path, root, skipped):
            encoded = os.fsencode(name)
            if (folder := os.path.dirname(encoded)) not in folders:
                folders[folder] = listing.folder_state(start + folder)
            yield encoded, place.setdefault(label, len(place))
        if not place:
            raise DataError(f"{path}: names no images")

    return look_at(root, entries, place, skipped)


def read_list(
    path: Path, root: Path, skipped: Counter[str] | None = None, *, labelled: bool = True
) -> Iterator[tuple[int, str, str]]:
    """Yield line number, path relative to `root` and label of every image, without ./ and //.

    `skipped` counts lines that begin with #. Unless `labelled`, a label may be missing, and a path absolute
    or with `..`. Raises DataError: a file that is no UTF-8 text, or the first line that is not understood.
    """
    roots = {os.path.join(root, ""), os.path.join(os.path.realpath(root), "")}
    first = True
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, raw in enumerate(lines, start=1):
                line = raw.strip()
                if not line or line.startswith("#"):
                    if line and skipped is not None:
                        skipped["on lines that begin with #"] += 1
                    continue
                where = f"{path}:{number}"
                bare = line.strip('"')
                alone = not labelled and bare.lower().endswith(EXTENSIONS) and '"' not in bare
                name, label = (bare, "") if alone else _split(line, where, first)
                if ("./" in name or "//" in name) and ".." not in name.split("/"):
                    name = os.path.normpath(name.replace("//", "/"))
                for prefix in roots if name.startswith("/") else ():
                    name = name.removeprefix(prefix)
                if "\0" in line or (labelled and (name.startswith("/") or ".." in name.split("/"))):
                    raise DataError(f"{where}: must be below data.root: not absolute, without .. and NUL")
                if "\\" in name and "/" not in name:
                    raise DataError(f"{where}: {name!r} has backslashes; folders are separated by /")
                yield number, name, label
                first = False
    except OSError as error:
        raise DataError(f"{path}: cannot read the list of images: {error}") from error
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x}"
        what = f"{path}: cannot read the list of images: not UTF-8 ({bad}); save it as UTF-8"
        raise DataError(what) from error


@os_errors_in_one_line()
def find_images(places: Sequence[str]) -> list[str]:
    """Return the files that `places` name, in that order, each once.

    A folder stands for the images below it, by path; a pattern, in quotes, for what it matches; a file with
    one of LIST_EXTENSIONS for what it lists, relative to its folder, with or without labels; any other file
    for itself. Raises DataError: a place without images, or a list that cannot be read.
    """
    found: dict[str, str] = {}
    num_named = 0
    for place in places:
        skipped = Counter[str]()
        files = dict.fromkeys(_files_at(place, skipped))  # a/**: what is in a folder, and the folder
        if not files:
            is_known = os.path.lexists(place) or glob.has_magic(place)
            besides = listing.describe_skipped(skipped)
            what = "no images" if is_known else "no such file or folder"
            raise DataError(f"{place}: {what}{besides and f'; {besides}'}")
        if skipped:
            print_lines(f"{place}: {listing.describe_skipped(skipped)}")
        num_named += len(files)
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    if len(found) < num_named:
        print_lines(f"{num_named - len(found):,} of {num_named:,} files were named twice; used once")
    return list(found.values())


def _files_at(place: str, skipped: Counter[str]) -> Iterator[str]:
    if os.path.isfile(place) and place.lower().endswith(LIST_EXTENSIONS):
        folder = os.path.dirname(place)
        for _, name, _ in read_list(Path(place), Path(folder), skipped, labelled=False):
            yield os.path.join(folder, name)
        return
    for match in [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True)):
        if os.path.isdir(match):
            top = os.fsencode(match.rstrip("/"))
            yield from map(os.fsdecode, sorted(walk(b"", top, set(), {}, skipped)))
        elif match == place or match.lower().endswith(EXTENSIONS):
            yield match


def _split(line: str, where: str, first: bool) -> tuple[str, str]:
    if '"' in line and len(line) < 10_000:
        cells = next(csv.reader([line], skipinitialspace=True))
        if len(cells) == 2 and cells[0].lower().endswith(EXTENSIONS) and cells[1].strip():
            return cells[0], cells[1].strip()
    if (found := _LINE.fullmatch(line)) is None:
        what = f"{where}: expected 'path,label' or 'path label', found {line[:100]!r}"
        raise DataError(f"{what}{_why_not(line, first)}")
    name, label = found[1], found[2].strip()
    if re.search(r"[,\t]|\s#", label) or _NUMBERS.fullmatch(label) or label.lower().endswith(EXTENSIONS):
        raise DataError(f"{where}: {_COLUMNS}; found {line[:100]!r}")
    return name, label


def _why_not(line: str, first: bool) -> str:
    """Return what a person probably meant by a line that names no image and label."""
    if line.lower().rstrip(" ,;\t").endswith(EXTENSIONS):
        return "; the label is missing: it comes after the path"
    line = line[:200]  # some of these patterns take quadratic time
    if separator := re.search(rf"{_PATH}\s*([;|:])", line, re.IGNORECASE):
        return f"; the separator is a comma, not {separator[1]!r}"
    if first and _HEADER.fullmatch(line):
        return "; a header line? Remove it, or begin it with #"
    suffix = re.search(r"(\.\w{1,5})[,\s]", line)
    return f"; {suffix[1]} is not among {' '.join(EXTENSIONS)}" if suffix else ""
