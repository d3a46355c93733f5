"""Read a configuration file and command-line overrides; report every mistake at once, each with its line.

Precedence: command line > the file > the file that it `extends`, and so on > default. A mistake is one line:

    configs/x.yaml:14: model.drop_pth: unknown key, did you mean model.drop_path_rate?
    --optim.lrr: unknown option, did you mean --optim.lr?
"""

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cmtrain.config.describe import describe_values, schema_of
from cmtrain.config.schema import Config, contradictions, defaults, fields, flat
from cmtrain.config.strict_yaml import REFUSED, Node, parse, parse_argument, show
from cmtrain.errors import ConfigError, did_you_mean
from pipelines.spec import is_device

MAX_FILE_BYTES = 1_000_000
MAX_MISTAKES_SHOWN = 50
MAX_FILES = 10
COMMAND_LINE, DEFAULT = "command line", "default"

Overrides = Sequence[tuple[str, str]]  # (dotted key, text as on a command line)

# Names that other trainers use, where the spelling alone does not lead to ours.
_FOREIGN_NAMES = {
    "aa": "augment.rand_augment", "amp": "train.precision", "batch_size": "train.global_batch_size",
    "data_dir": "data.root", "drop": "model.drop_rate", "img_size": "data.image_px",
    "input_size": "data.image_px", "learning_rate": "optim.lr", "num_workers": "data.threads",
    "output": "run.dir", "wd": "optim.weight_decay", "workers": "data.threads",
}  # fmt: skip


class Resolved(NamedTuple):
    """A valid configuration. `origins`: dotted key -> "configs/x.yaml:14", "command line" or "default"."""

    config: Config
    origins: Mapping[str, str]


def load_config(path: str | Path, overrides: Overrides = ()) -> Resolved:
    """Read the configuration file `path`, or the packaged one of that name, and apply `overrides` in order.
    Raises ConfigError: str() is all mistakes, one line each.
    """
    path = find_config(path)
    draft = _Draft()
    draft.read_files(path)
    draft.read_overrides(overrides)
    config = draft.validate(default_name=re.sub(r"^[.]|[^A-Za-z0-9._-]", "-", path.stem)[:64] or "run")
    if config and config.run.imports:
        try:
            run = config.run.model_copy(update={"imports": _pinned(config.run.imports, path.parent)})
            config = config.model_copy(update={"run": run})
        except (ConfigError, OSError) as error:
            draft.mistake(draft.settings["run.imports"].place, str(error), "run.imports")
    if draft.mistakes or config is None:
        lines = [line for _, line in sorted(draft.mistakes)]
        if len(lines) > MAX_MISTAKES_SHOWN:
            lines[MAX_MISTAKES_SHOWN:] = [f"... and {len(lines) - MAX_MISTAKES_SHOWN} more"]
        raise ConfigError("\n".join(lines))
    stated = {key: draft.origin(setting.place) for key, setting in draft.settings.items()}
    return Resolved(config, dict.fromkeys(flat(config), DEFAULT) | stated)


def source_of(entry: str) -> Path:
    """Return the file of a module. Raises ConfigError: there is none, or it is a package."""
    name = entry.partition("@")[0]
    spec = PathFinder.find_spec(name)
    if spec is None or not spec.origin or Path(spec.origin).name != f"{name}.py":
        raise ConfigError(f"no {name}.py in {sys.path[0]} or on Python's path")
    return Path(spec.origin)


def _pinned(entries: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Return `entries` with the hash of each source, which may be in `folder` or on Python's path.
    Raises ConfigError: as source_of, or its source is another than its entry's. OSError: it cannot be read.
    """
    if str(folder.resolve()) != sys.path[0]:
        sys.path.insert(0, str(folder.resolve()))
    found = []
    for entry in entries:
        file = source_of(entry)
        found.append(f"{entry.partition('@')[0]}@{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}")
        if found[-1] != entry and "@" in entry:
            raise ConfigError(f"{file} is not the source that {entry} was made with")
    return tuple(found)


def find_config(path: str | Path) -> Path:
    """Return `path` or else the packaged file of that name. Raises ConfigError if there is neither."""
    if os.path.exists(path):
        return Path(path)
    packaged = _packaged()
    if found := packaged.get(str(Path(path))) or packaged.get(f"configs/{Path(path)}"):
        return found
    raise ConfigError(f"{show(str(path))}: no such file{did_you_mean(str(path), packaged)}")


def find_configs(path: str | Path) -> list[Path]:
    """Return the file `path`, or all files of the folder `path` by name; either may ship with cmtrain.
    `base.yaml` is left out of a folder, since the other files extend it. Raises ConfigError as find_config.
    """
    if os.path.isdir(path):
        found = sorted(Path(path).glob("*.yaml"))
    else:
        folders = (f"{Path(path)}", f"configs/{Path(path)}")
        found = [file for name, file in _packaged().items() if os.path.dirname(name) in folders]
    return [file for file in found if file.name != "base.yaml"] or [find_config(path)]


def _packaged() -> dict[str, Path]:
    """Return the configurations that ship with cmtrain: "configs/demo.yaml" -> its path."""
    package = Path(__file__).resolve().parent.parent  # holds them in a wheel; a checkout has them beside
    folder = package / "_configs" if (package / "_configs").is_dir() else package.parent / "configs"
    return {f"configs/{file.relative_to(folder)}": file for file in sorted(folder.rglob("*.yaml"))}


class _Place(NamedTuple):
    """A line of a source. Sorts in reading order: the file, the files that it extends, the command line."""

    source: int  # position in _Draft.file_names, or _COMMAND_LINE
    line: int


class _Setting(NamedTuple):
    value: Any
    place: _Place


_COMMAND_LINE = MAX_FILES


class _Draft:
    """A configuration while it is read: what has been set, where, and every mistake in it."""

    def __init__(self) -> None:
        self.file_names: list[str] = []
        self.settings: dict[str, _Setting] = {}
        self.sections: dict[str, _Place] = {}
        self.mistakes: list[tuple[_Place, str]] = []
        self.incomplete = False  # True: a part could not be read; what seems to be missing may be in there

    def origin(self, place: _Place) -> str:
        if place.source == _COMMAND_LINE:
            return COMMAND_LINE
        return f"{self.file_names[place.source]}:{place.line}"

    def mistake(self, place: _Place, message: str, key: str = "") -> None:
        subject = f"{key}: " if key else ""
        start = "--" if place.source == _COMMAND_LINE else f"{self.origin(place)}: "
        self.mistakes.append((place, f"{start}{subject}{message}"))

    def read_files(self, path: Path | None) -> None:
        """Read `path`, the file that it extends, the file that this one extends, and so on."""
        files: dict[Path, dict[str, Node]] = {}
        while path:
            self.file_names.append(_printable(path))
            files[path] = self._read(len(files), path)
            extends = files[path].pop("extends", None)
            path = self._find_extended(extends, [*files]) if extends else None
        for source, root in reversed([*enumerate(files.values())]):  # what is added later wins
            self._add(source, root)

    def _find_extended(self, extends: Node, read: Sequence[Path]) -> Path | None:
        """Return the file that the last of `read` extends; None, and a mistake, if it cannot be taken."""
        name = extends.value
        if not isinstance(name, str) or not name.isprintable() or os.path.isabs(name):
            problem = f"must be the path of a file, relative to this one, got {show(name)}"
        else:
            path = Path(os.path.normpath(read[-1].parent / name))
            if not path.is_file():
                path = _packaged().get(name, path)
            if not path.is_file():
                problem = f"no such file: {path}"
            elif any(path.samefile(other) for other in read):
                problem = f"{path} would extend itself"
            elif len(read) == MAX_FILES:
                problem = f"more than {MAX_FILES} files extend one another"
            else:
                return path
        self._cannot_read(_Place(len(read) - 1, extends.line), f"extends: {problem}")
        return None

    def _read(self, source: int, path: Path) -> dict[str, Node]:
        """Return the sections of a file, as far as it can be read."""
        start = _Place(source, 1)
        if path.is_fifo() and not is_device(path):  # it would wait for its writer; <(...) has one
            return self._cannot_read(start, "cannot be read: a pipe")
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            return self._cannot_read(start, f"cannot be read: {error.strerror}")
        if len(content) > MAX_FILE_BYTES:
            return self._cannot_read(start, f"larger than {MAX_FILE_BYTES:,} bytes, so not a configuration")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place = _Place(source, content.count(b"\n", 0, error.start) + 1)
            return self._cannot_read(place, f"not UTF-8 text: byte 0x{content[error.start]:02x}")
        root, problems = parse(text)
        for line, message in problems:
            self._cannot_read(_Place(source, line), message)
        if root is None or root.value is None:
            return {} if problems else self._cannot_read(start, "the file is empty")
        if not isinstance(root.value, dict):
            return self._cannot_read(start, f"must hold sections such as `optim:`, got {show(root.value)}")
        return root.value

    def _cannot_read(self, place: _Place, message: str) -> dict[str, Node]:
        self.mistake(place, message)
        self.incomplete = True
        return {}

    def _add(self, source: int, root: Mapping[str, Node]) -> None:
        for section, node in root.items():
            place = _Place(source, node.line)
            if section not in Config.model_fields:
                self.mistake(place, _unknown_section(section, node.value), _printable(section))
                continue
            self.sections[section] = place
            keys = node.value if isinstance(node.value, dict) else {}
            if node.value not in (None, REFUSED, keys):
                self.mistake(place, f"is a section and must hold keys, got {show(node.value)}", section)
            for key, child in keys.items():
                name, place = f"{section}.{key}", _Place(source, child.line)
                if name in fields():
                    self.settings[name] = _Setting(child.value, place)
                else:
                    self.mistake(place, f"unknown key{_suggest(section, key)}", _printable(name))

    def read_overrides(self, overrides: Overrides) -> None:
        for position, (name, text) in enumerate(overrides):
            place = _Place(_COMMAND_LINE, position)
            value, problem = parse_argument(text)
            if name not in fields():
                section, _, key = name.rpartition(".")
                self.mistake(place, f"unknown option{_suggest(section, key, '--')}", _printable(name))
                continue
            if problem:
                self.mistake(place, problem, name)
            types = {option.get("type") for option in schema_of(name).get("anyOf", [schema_of(name)])}
            if isinstance(value, int | float) and types <= {"string", "null"}:
                value = text  # quotes are for files: a shell takes them
            self.settings[name] = _Setting(value, place)

    def validate(self, *, default_name: str) -> Config | None:
        """Return the configuration; None, and more mistakes, where it is not valid."""
        tree: dict[str, dict[str, Any]] = {section: {} for section in Config.model_fields}
        for name, (value, _) in self.settings.items():
            section, key = name.split(".")
            if value is not REFUSED:
                tree[section][key] = value
        if tree["run"].get("name") is None:
            tree["run"]["name"] = default_name
        wrong = {name for name, (value, _) in self.settings.items() if value is REFUSED}
        config = None
        try:
            config = Config.model_validate(tree)
        except ValidationError as errors:
            for error in errors.errors():
                name = ".".join(str(part) for part in error["loc"][:2])
                if not name or name in wrong:
                    continue
                if error["type"] != "missing":
                    value, place = self.settings[name]
                    self.mistake(place, _wrong_value(name, error, value), name)
                    wrong.add(name)
                elif not self.incomplete:
                    place = self.sections.get(name.split(".")[0], _Place(0, 1))
                    self.mistake(place, f"required, but not set ({schema_of(name)['description']})", name)
        values = defaults() | {name: setting.value for name, setting in self.settings.items()}
        right = {name: values[name] for name in values.keys() - wrong}
        order = (_COMMAND_LINE, *range(MAX_FILES), None)  # None: a default
        sources = {name: setting.place.source for name, setting in self.settings.items()}
        for names, message in contradictions(right, self.settings):
            # Blame what takes precedence: an override rather than a file, either rather than a default.
            name = min(names, key=lambda name: order.index(sources.get(name)))
            self.mistake(self.settings[name].place, message, name)
        return config


def _suggest(section: str, key: str, prefix: str = "") -> str:
    """Return `, did you mean ...?` for a key that `section` lacks: that name elsewhere, or a similar one."""
    key = key.lower().replace("-", "_")
    names = [name for name in fields() if name.split(".")[1] == key]
    if not names and key in _FOREIGN_NAMES:
        names = [_FOREIGN_NAMES[key]]
    for start in f"{section}.", "":
        by_key = {name.split(".")[1]: name for name in fields() if name.startswith(start)}
        names = names or [by_key[close] for close in difflib.get_close_matches(key, by_key, n=1)]
    if not names:
        return ", see `cmtrain config schema`"
    return f", did you mean {' or '.join(prefix + name for name in names)}?"


def _unknown_section(name: str, value: Any) -> str:
    if name in fields():
        section, key = name.split(".")
        return f"write {key} below {section}, not with a dot"
    if isinstance(value, dict | None):
        return f"unknown section{did_you_mean(name, Config.model_fields) or _suggest('', name)}"
    return f"unknown key{_suggest('', name)}"


def _wrong_value(name: str, error: ErrorDetails, value: Any) -> str:
    """Describe what `value` should have been, in one sentence for every reason of pydantic."""
    if error["type"] == "value_error":
        shown = re.sub("://.*", "://...", value) if isinstance(value, str) else value  # it may hold a key
        return f"{error['ctx']['error']}, got {show(shown)}"
    schema = schema_of(name)
    message = f"must be {describe_values(schema)}, got {show(value)}"
    if error["type"] == "literal_error" and isinstance(value, str):
        choices = [choice for part in [schema, *schema.get("anyOf", [])] for choice in part.get("enum", [])]
        return message + did_you_mean(value, choices)
    if error["type"] == "string_type" and isinstance(value, int | float):
        return f"{message}; put it in quotes"
    return message


def _printable(text: str | Path) -> str:
    return str(text) if str(text).isprintable() and len(str(text)) <= 200 else ascii(str(text))[:200]
