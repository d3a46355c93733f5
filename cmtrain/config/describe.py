"""Describe the configuration: as Markdown for people, as JSON schema for editors, one field in words."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from cmtrain.config.schema import Config, fields
from cmtrain.config.strict_yaml import emit

TABLE = "| key | value | default | meaning |\n|---|---|---|---|\n"


def config_reference() -> str:
    """Return docs/configuration.md: every key with its legal values, default and meaning."""
    tables = {section: f"\n## {section}\n\n{TABLE}" for section in Config.model_fields}
    for name, field in fields().items():
        default = "*required*" if field.default is PydanticUndefined else f"`{emit(field.default)}`"
        value = re.sub(r"matches (\S+)", r"matches `\1`", describe_values(schema_of(name)))
        meaning = schema_of(name)["description"].replace("<", "&lt;")
        cells = [cell.replace("|", r"\|") for cell in (f"`{name}`", value, default, meaning)]
        tables[name.split(".")[0]] += f"| {' | '.join(cells)} |\n"
    return Path(__file__).with_name("reference.md").read_text() + "".join(tables.values())


_KINDS = {
    "number": "a number", "integer": "a whole number", "boolean": "true or false", "string": "text",
    "null": "null",
}  # fmt: skip
_LIMITS = {
    "exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<=",
    "multipleOf": "a multiple of",
}  # fmt: skip


def describe_values(schema: Mapping[str, Any]) -> str:
    """Return a field's JSON schema in words: "a number > 0 and <= 1 or null"."""
    if "anyOf" in schema:
        return " or ".join(describe_values(option) for option in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "prefixItems" in schema:
        items = [describe_values(item) for item in schema["prefixItems"]]
        return f"a list of {len(items)} values, [{', '.join(items)}]"
    if "items" in schema:
        return f"a list of values, each {describe_values(schema['items'])}"
    if "pattern" in schema:
        return f"text that matches {schema['pattern']}"
    limits = [f"{sign} {emit(schema[limit])}" for limit, sign in _LIMITS.items() if limit in schema]
    return f"{_KINDS[schema['type']]} {' and '.join(limits)}".rstrip()


@functools.cache
def config_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, for editors."""
    # A description of several lines is one text.
    schema = json.loads(json.dumps(Config.model_json_schema()).replace("\\n", " "))
    what = "file to start from: relative to this one, or one that ships with cmtrain"
    schema["properties"]["extends"] = {"type": "string", "description": what}
    return schema


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON schema of the field `name`, a dotted key."""
    section, key = name.split(".")
    model: Any = Config.model_fields[section].annotation
    return config_schema()["$defs"][model.__name__]["properties"][key]
