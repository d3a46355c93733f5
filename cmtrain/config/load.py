"""From a configuration file and command-line overrides to a Config, or to every mistake in them at once.

Precedence: command line > the file > the file that it `extends` > default. A mistake is one line:

    configs/x.yaml:14: model.drop_pth: unknown key, did you mean model.drop_path_rate?
    --optim.lrr: unknown option, did you mean --optim.lr?
"""

import difflib
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from cmtrain.config.describe import config_schema, describe_values
from cmtrain.config.schema import Config, contradictions, flat
from cmtrain.config.strict_yaml import REFUSED, Node, parse, parse_argument, show
from cmtrain.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
MAX_MISTAKES_SHOWN = 50
COMMAND_LINE, DEFAULT = "command line", "default"

# What other trainers call it, where the spelling alone does not lead to our name.
_FOREIGN_NAMES = {
    "aa": "augment.rand_augment",
    "amp": "train.precision",
    "batch_size": "train.global_batch_size",
    "data_dir": "data.root",
    "drop": "model.drop_rate",
    "img_size": "data.image_px",
    "input_size": "data.image_px",
    "learning_rate": "optim.lr",
    "num_workers": "data.threads",
    "output": "run.dir",
    "wd": "optim.weight_decay",
    "workers": "data.threads",
}


@dataclass(frozen=True)
class Resolved:
    """A valid configuration. `origins`: dotted key -> "configs/x.yaml:14", "command line" or "default"."""

    config: Config
    origins: Mapping[str, str]


def load_config(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Resolved:
    """Read the configuration file `path`, or the packaged one of that name, and apply `overrides`.

    Args:
        overrides: (dotted key, text as on a command line) pairs; the last of two equal keys wins.

    Raises:
        ConfigError: str() is all mistakes, one line each. Nothing has been created on disk.
    """
    path = find_config(path)
    draft = _Draft()
    draft.read_files(path)
    draft.read_overrides(overrides)
    config = draft.validate(default_name=_run_name(path))
    if draft.mistakes or config is None:
        lines = [line for _, line in sorted(draft.mistakes)]
        hidden = len(lines) - MAX_MISTAKES_SHOWN
        raise ConfigError("\n".join(lines[:MAX_MISTAKES_SHOWN] + [f"... and {hidden} more"] * (hidden > 0)))
    origins = {key: DEFAULT for key, _ in flat(config)}
    return Resolved(
        config, origins | {key: draft.origin(setting.place) for key, setting in draft.settings.items()}
    )


def find_config(path: str | Path) -> Path:
    """`path` if it exists, else the file of that name among the configurations that ship with the program.

    Raises:
        ConfigError: there is neither.
    """
    if os.path.exists(path):
        return Path(path)
    packaged = _packaged()
    for name in (f"{Path(path)}", f"configs/{Path(path)}"):
        if name in packaged:
            return packaged[name]
    raise ConfigError(f"{show(str(path))}: no such file{_did_you_mean(str(path), packaged)}")


def find_configs(path: str | Path) -> list[Path]:
    """The file `path`, or all files in the folder `path` by name; either may be one that ships with the program.

    `base.yaml` is left out of a folder: it is what the other files extend.

    Raises:
        ConfigError: there is neither.
    """
    if os.path.isdir(path):
        found = sorted(Path(path).glob("*.yaml"))
    else:
        folders = (f"{Path(path)}", f"configs/{Path(path)}")
        found = [file for name, file in _packaged().items() if os.path.dirname(name) in folders]
    rows = [file for file in found if file.name != "base.yaml"]
    return rows or [find_config(path)]


def _packaged() -> dict[str, Path]:
    """Configurations that ship with the program: "configs/demo.yaml" -> where it is."""
    package = Path(__file__).resolve().parent.parent
    # In a wheel they lie inside the package, in a checkout beside it.
    folder = package / "_configs" if (package / "_configs").is_dir() else package.parent / "configs"
    return {f"configs/{file.relative_to(folder)}": file for file in sorted(folder.rglob("*.yaml"))}


def _run_name(path: Path) -> str:
    return re.sub(r"^[.]|[^A-Za-z0-9._-]", "-", path.stem)[:64] or "run"


class _Place(NamedTuple):
    """Where something is written. Sorts in reading order: the file, the file that it extends, the command line."""

    source: int
    line: int


class _Setting(NamedTuple):
    value: Any
    place: _Place


_FILE, _EXTENDED_FILE, _COMMAND_LINE = 0, 1, 2


class _Draft:
    """A configuration in the making: what has been set, where, and all that is wrong with it.

    `incomplete`: part of a file could not be read, so that what seems to be missing may be there.
    """

    def __init__(self) -> None:
        self.file_names: list[str] = []
        self.settings: dict[str, _Setting] = {}
        self.sections: dict[str, _Place] = {}
        self.mistakes: list[tuple[_Place, str]] = []
        self.incomplete = False

    def origin(self, place: _Place) -> str:
        return (
            COMMAND_LINE
            if place.source == _COMMAND_LINE
            else f"{self.file_names[place.source]}:{place.line}"
        )

    def mistake(self, place: _Place, message: str, key: str = "") -> None:
        subject = f"{key}: " if key else ""
        start = "--" if place.source == _COMMAND_LINE else f"{self.origin(place)}: "
        self.mistakes.append((place, f"{start}{subject}{message}"))

    def read_files(self, path: Path) -> None:
        """Read `path` and the file that it extends."""
        self.file_names.append(_printable(path))
        root = self._read(_FILE, path)
        if extends := root.pop("extends", None):
            self._add(_EXTENDED_FILE, self._read_extended(path.parent, extends))
        # What is added later wins.
        self._add(_FILE, root)

    def _read_extended(self, folder: Path, extends: Node) -> dict[str, Node]:
        place, name = _Place(_FILE, extends.line), extends.value
        if not isinstance(name, str) or not name.isprintable() or os.path.isabs(name):
            return self._cannot_read(
                place, f"extends: must be the path of a file, relative to this one, got {show(name)}"
            )
        path = Path(os.path.normpath(folder / name))
        if not path.is_file():
            path = _packaged().get(name, path)
        if not path.is_file():
            return self._cannot_read(place, f"extends: no such file: {path}")
        self.file_names.append(_printable(path))
        base = self._read(_EXTENDED_FILE, path)
        if second := base.pop("extends", None):
            message = f"a file that is extended, as by {self.origin(place)}, may not itself extend another"
            self.mistake(_Place(_EXTENDED_FILE, second.line), message, "extends")
        return base

    def _read(self, source: int, path: Path) -> dict[str, Node]:
        """The sections of a file, as far as it can be read."""
        start = _Place(source, 1)
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
            line = content.count(b"\n", 0, error.start) + 1
            return self._cannot_read(
                _Place(source, line), f"not UTF-8 text: byte 0x{content[error.start]:02x}"
            )
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
            if node.value is None or node.value is REFUSED:
                continue
            if not isinstance(node.value, dict):
                self.mistake(place, f"is a section and must hold keys, got {show(node.value)}", section)
                continue
            for key, child in node.value.items():
                name, place = f"{section}.{key}", _Place(source, child.line)
                if name in _fields():
                    self.settings[name] = _Setting(child.value, place)
                else:
                    self.mistake(place, f"unknown key{_suggest(section, key)}", _printable(name))

    def read_overrides(self, overrides: Sequence[tuple[str, str]]) -> None:
        for position, (name, text) in enumerate(overrides):
            place = _Place(_COMMAND_LINE, position)
            value, problem = parse_argument(text)
            if name not in _fields():
                section, _, key = name.rpartition(".")
                self.mistake(place, f"unknown option{_suggest(section, key, '--')}", _printable(name))
                continue
            if problem:
                self.mistake(place, problem, name)
            self.settings[name] = _Setting(value, place)

    def validate(self, *, default_name: str) -> Config | None:
        """The configuration; None, and the reasons among the mistakes, if there is none."""
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
                if error["type"] == "missing":
                    if not self.incomplete and name not in wrong:
                        place = self.sections.get(name.split(".")[0], _Place(_FILE, 1))
                        self.mistake(place, f"required, but not set ({_fields()[name].description})", name)
                elif name and name not in wrong:
                    self.mistake(
                        self.settings[name].place, _wrong_value(name, error, self.settings[name].value), name
                    )
                    wrong.add(name)
        values = {
            name: field.default
            for name, field in _fields().items()
            if field.default is not PydanticUndefined
        }
        values |= {name: setting.value for name, setting in self.settings.items()}
        for names, message in contradictions(
            {name: value for name, value in values.items() if name not in wrong}
        ):
            # Blame what was set last: an override rather than the file it contradicts, either rather than a default.
            name = max(names, key=lambda name: self._precedence(name))
            self.mistake(self.settings[name].place, message, name)
        return config

    def _precedence(self, name: str) -> int:
        order = {_EXTENDED_FILE: 1, _FILE: 2, _COMMAND_LINE: 3}
        return order[self.settings[name].place.source] if name in self.settings else 0


@functools.cache
def _fields() -> dict[str, FieldInfo]:
    """Every field by its dotted key."""
    sections: dict[str, Any] = {section: field.annotation for section, field in Config.model_fields.items()}
    return {
        f"{section}.{key}": field
        for section, model in sections.items()
        for key, field in model.model_fields.items()
    }


def _suggest(section: str, key: str, prefix: str = "") -> str:
    """`, did you mean ...?` for a key that `section` does not have; prefers the same name in another section."""
    key = key.lower().replace("-", "_")
    names = [name for name in _fields() if name.split(".")[1] == key]
    if not names and key in _FOREIGN_NAMES:
        names = [_FOREIGN_NAMES[key]]
    if not names:
        own = [name for name in _fields() if name.startswith(f"{section}.")]
        for candidates in own, list(_fields()):
            by_key = {name.split(".")[1]: name for name in candidates}
            names = names or [by_key[close] for close in difflib.get_close_matches(key, by_key, n=1)]
    return (
        f", did you mean {' or '.join(prefix + name for name in names)}?"
        if names
        else ", see `cmtrain config schema`"
    )


def _unknown_section(name: str, value: Any) -> str:
    if name in _fields():
        section, key = name.split(".")
        return f"write {key} below {section}, not with a dot"
    if isinstance(value, dict | None):
        return f"unknown section{_did_you_mean(name, list(Config.model_fields)) or _suggest('', name)}"
    return f"unknown key{_suggest('', name)}"


def _wrong_value(name: str, error: ErrorDetails, value: Any) -> str:
    """What `value` should have been. One sentence for all the ways in which pydantic says no."""
    if error["type"] == "value_error":
        return f"{error['ctx']['error']}, got {show(value)}"
    section, key = name.split(".")
    model: Any = Config.model_fields[section].annotation
    schema = config_schema()["$defs"][model.__name__]["properties"][key]
    message = f"must be {describe_values(schema)}, got {show(value)}"
    if error["type"] == "literal_error" and isinstance(value, str):
        choices = [
            choice for option in [schema, *schema.get("anyOf", [])] for choice in option.get("enum", [])
        ]
        return message + _did_you_mean(value, choices)
    return message + (
        "; put it in quotes" if error["type"] == "string_type" and isinstance(value, int | float) else ""
    )


def _did_you_mean(given: str, choices: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(given, choices, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _printable(text: str | Path) -> str:
    return str(text) if str(text).isprintable() and len(str(text)) <= 200 else ascii(str(text))[:200]


Overrides = list[tuple[str, str]]
