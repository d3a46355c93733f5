"""Read and write the list of unusable files that `cmtrain data check` finds and training leaves out.

A text file, one `path<TAB>kind<TAB>reason` per line, paths relative to the folder that was checked, with
escapes; docs/data.md says where it is.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipelines.atomic import replacing
from pipelines.checks.decode_one import KINDS, Fault, Kind, patiently
from pipelines.spec import DataError, os_errors_in_one_line, visible

NAME = "bad_files.tsv"
SPLITS = ("train", "val")
_LISTED = f" (listed in {NAME})"
_HEADER = r"# cmtrain data check: left out of training; delete a line to use its file again (\\ is one \)"
_ESCAPES = re.compile(r"\\(?:\\|[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


class BadFile(NamedTuple):
    """A file that cannot be used."""

    path: str
    kind: Kind
    reason: str


def read_lists(root: Path, inner: Iterable[str] = ()) -> dict[str, Fault]:
    """Return faults by path relative to `root`, of the lists in it, in the folder above and in `inner`."""
    faults: dict[str, Fault] = {}
    above = {(holder.parent, f"{holder.name}/", "") for holder in (root, Path(os.path.realpath(root)))}
    below = [(root / folder, "", f"{folder}/") for folder in inner]
    for folder, prefix, start in [*sorted(above), (root, "", ""), *below]:
        for path in _places(folder):
            for listed, (kind, reason) in _read(path).items():
                if listed.startswith(prefix):
                    faults[start + listed.removeprefix(prefix)] = Fault(kind, f"{reason}{_LISTED}")
    return faults


def find_list(root: Path, files: Iterable[BadFile]) -> Path | None:
    """Return the list of `root` or of the folder above, if all of `files` are left out because of a list."""
    if not all(file.reason.endswith(_LISTED) for file in files):
        return None
    places = [place for folder in (root.parent, root) for place in _places(folder)]
    return next((place for place in places if os.path.exists(place)), None)


def write_list(folder: Path, faults: Mapping[str, Fault], path: Path | None = None) -> Path | None:
    """Replace the list of `folder`; without faults, delete it. After an error the old one is as it was.

    A split has no list of its own: its part of the list of the folder above is replaced. `faults`: by path
    relative to `folder`. `path`: write this file only. Returns where the list is, None if it was deleted.
    Raises DataError where it can be written nowhere.
    """
    if path is not None:
        with os_errors_in_one_line(path):
            _write(path, faults)
        return path
    if folder.name in SPLITS:
        prefix = f"{folder.name}/"
        others = [item for place in _places(folder.parent) for item in _read(place).items()]
        kept = {listed: fault for listed, fault in others if not listed.startswith(prefix)}
        faults = kept | {prefix + listed: fault for listed, fault in faults.items()}
        folder = folder.parent
    written = _write_first(_places(folder), faults) if faults else None
    for place in _places(folder):
        if place != written:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)
    return written


def user_cache() -> Path:
    """Return $XDG_CACHE_HOME/cmtrain; a folder that is not there for a user without a home."""
    home = os.path.expanduser("~/.cache")  # is left as it is where there is none
    given = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(given):  # such as ~/x; its standard asks to ignore it
        given = "/nonexistent" if home.startswith("~") else home
    return Path(given) / "cmtrain"


def _places(folder: Path) -> tuple[Path, Path]:
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    return folder / NAME, user_cache() / f"bad-files-{name}.tsv"


def _read(path: Path) -> dict[str, Fault]:
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise DataError(f"{path}: not a file; move it away, the list of bad files belongs there")
    try:
        text = patiently(lambda: path.read_text("utf-8-sig", "surrogateescape"), path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError:
        if path.name != NAME:  # a cache of somebody else, where no check of this user has left a list
            return {}
        raise
    faults: dict[str, Fault] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line and not line.startswith("#"):
            listed, _, rest = line.partition("\t")
            column, _, reason = rest.partition("\t")
            kind = next((kind for kind in KINDS if kind == column), None)
            if kind is None or "\0" in line:
                advice = "expected path, tab, kind, tab, reason; mend it, or run `cmtrain data check` again"
                raise DataError(f"{path}:{number}: {advice}")
            name = _ESCAPES.sub(lambda found: found[0].encode().decode("unicode_escape"), listed)
            faults[name] = Fault(kind, reason)
    return faults


def _write(path: Path, faults: Mapping[str, Fault]) -> None:
    lines = [_HEADER]
    for listed, (kind, reason) in sorted(faults.items()):
        name = visible(listed.replace("\\", "\\\\"))
        name = f"\\x23{name[1:]}" if name.startswith("#") else name  # no comment
        lines.append(f"{name}\t{kind}\t{visible(' '.join(reason.split()))}")
    with replacing(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _write_first(places: Iterable[Path], faults: Mapping[str, Fault]) -> Path:
    errors = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(place, faults)
            return place
        except OSError as error:
            errors.append(f"{place}: {error.strerror or error}")
    raise DataError(f"the list of bad files cannot be written: {'; '.join(errors)}")
