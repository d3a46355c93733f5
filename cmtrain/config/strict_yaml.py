"""Parse YAML in which a value is what it looks like, and give every value its line.

YAML 1.1 loaders read `6e-3` as text, `010` as 8 and `1:30` as 90, and let the last of two equal keys win.
Here numbers are decimal. Other scalars but `true`, `false` and `null` are text. Duplicate keys, anchors,
aliases and tags are errors. Values are built from the parser's events: nothing is executed or expanded.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import yaml

MAX_DEPTH = 20
REFUSED = object()  # the value of what was refused; the reason is among the problems

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.:+@-]*(?<!:)")


@dataclass(frozen=True)
class Node:
    """A value and the line of it or of its key (1 is the first)."""

    line: int
    value: Any  # None, bool, int, float, str, a tuple of such values, a dict of Nodes, or REFUSED


Problem = tuple[int, str]  # line, message


def parse(text: str) -> tuple[Node | None, list[Problem]]:
    """Return the root of the document in `text`, None if none can be read to the end, and every problem."""
    root, problems = None, list[Problem]()
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        for event in events:
            if isinstance(event, yaml.NodeEvent):
                root = Node(_line(event), _build(events, event, 0, problems))
            elif isinstance(event, yaml.DocumentStartEvent) and root is not None:
                problems.append((_line(event), "a second document starts here; a file holds one"))
                break
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return None, [*problems, (line, f"not YAML: the character {text[error.position]!a} is not allowed")]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        return None, [*problems, (line, f"not YAML: {error.problem or error.context}")]
    except (ValueError, OverflowError) as error:  # escapes beyond Unicode, versions of thousands of digits
        return None, [*problems, (1, f"not YAML: {error}")]
    return root, problems


def parse_argument(text: str) -> tuple[Any, str | None]:
    """Return an option's value (or REFUSED) and problem: YAML if it opens a list, a mapping or quotes."""
    if text[:1] not in ("[", "{", '"', "'"):
        return scalar(text), None
    root, problems = parse(text)
    if problems or root is None:
        return REFUSED, problems[0][1]
    return root.value, None


def scalar(text: str) -> Any:
    """Return the value of an unquoted scalar: None, bool, int, float, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def emit(value: Any) -> str:
    """Write `value` on one line that `parse` reads back as an equal value; REFUSED becomes `...`."""
    if value is REFUSED:
        return "..."
    if isinstance(value, dict):
        return "{" + ", ".join(f"{emit(str(key))}: {emit(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(emit(item) for item in value) + "]"
    if isinstance(value, Node):
        return emit(value.value)
    if isinstance(value, str):
        plain = _NEEDS_NO_QUOTES.fullmatch(value) and scalar(value) == value
        return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return repr(value)


def _line(event: yaml.Event) -> int:
    return cast(yaml.Mark, event.start_mark).line + 1


def _build(events: Iterator[yaml.Event], event: yaml.Event, depth: int, problems: list[Problem]) -> Any:
    """Return the value that starts at `event`; its other events are taken from `events`."""
    if depth > MAX_DEPTH:
        what = f"nested deeper than {MAX_DEPTH} levels"
        raise yaml.MarkedYAMLError(problem=what, problem_mark=cast(Any, event.start_mark))
    if isinstance(event, yaml.AliasEvent):
        problems.append((_line(event), f"aliases (*{event.anchor}) are not supported; write the value out"))
        return REFUSED
    assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
    refused = len(problems)
    if event.anchor is not None:
        problems.append((_line(event), f"anchors (&{event.anchor}) are not supported; write the value out"))
    if event.tag is not None:
        problems.append((_line(event), f"tags ({show(event.tag)}) are not supported"))
    if isinstance(event, yaml.ScalarEvent):
        value = event.value if event.style else scalar(event.value)
        return REFUSED if len(problems) > refused else value
    items = itertools.takewhile(lambda item: not isinstance(item, yaml.CollectionEndEvent), events)
    if isinstance(event, yaml.SequenceStartEvent):
        values = tuple(_build(events, item, depth + 1, problems) for item in items)
        return REFUSED if len(problems) > refused else values
    nodes: dict[str, Node] = {}
    for item in items:
        line, key = _line(item), None
        if isinstance(item, yaml.ScalarEvent) and item.anchor is None and item.tag is None:
            key = item.value  # a name, whatever it looks like: `1`, `null` and `true` stay text
        else:
            problems.append((line, "a key must be plain text"))
            _build(events, item, depth + 1, [])
        value = _build(events, next(events), depth + 1, problems)
        if key in nodes:
            problems.append((line, f"{show(key)}: duplicate key, first set in line {nodes[key].line}"))
        elif key is not None:
            nodes[key] = Node(line, value)
    return nodes


def show(value: Any) -> str:
    """Write `value` for an error message: on one line, without control characters, cut to 60 characters."""
    text = emit(value)
    return text if len(text) <= 60 else text[:57] + "..."
