"""`cmtrain config reference`: every key of a configuration file as Markdown, from the schema."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from cmtrain.config.schema import Config
from cmtrain.config.strict_yaml import emit

HEAD = """\
# Configuration

A configuration file is YAML: sections with keys. Values are strict: `"512"` is no number, `yes` is not `true`; `6e-3`
is a number. `extends: other.yaml` starts from another file: relative to this one, or one that ships with cmtrain, such
as `configs/full_in1k.yaml`. Precedence: command line (`--section.key value`) > the file > the file that it extends >
default. `cmtrain config show --config FILE` prints every value and where it comes from, `cmtrain config schema` a JSON
schema for editors. This page is what `cmtrain config reference` prints.
"""


def config_reference() -> str:
    """All sections and keys, with legal values, default and meaning."""
    definitions = config_schema()["$defs"]
    parts = [HEAD]
    for section, field in Config.model_fields.items():
        model: Any = field.annotation
        lines = [f"## {section}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        for key, option in model.model_fields.items():
            schema = definitions[model.__name__]["properties"][key]
            default = "*required*" if option.default is PydanticUndefined else f"`{emit(option.default)}`"
            value = re.sub(r"matches (\S+)", r"matches `\1`", describe_values(schema))
            meaning = str(option.description).replace("<", "&lt;")
            cells = [cell.replace("|", r"\|") for cell in (f"`{section}.{key}`", value, default, meaning)]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


_KINDS = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}


_LIMITS = {
    "exclusiveMinimum": ">",
    "minimum": ">=",
    "exclusiveMaximum": "<",
    "maximum": "<=",
    "multipleOf": "a multiple of",
}


def describe_values(schema: Mapping[str, Any]) -> str:
    """A field's JSON schema in words: "a number > 0 and <= 1 or null"."""
    if "anyOf" in schema:
        return " or ".join(describe_values(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "prefixItems" in schema:
        items = [describe_values(item) for item in schema["prefixItems"]]
        return f"a list of {len(items)} values, [{', '.join(items)}]"
    if "items" in schema:
        return f"a list of values, each {describe_values(schema['items'])}"
    if "pattern" in schema:
        return f"text that matches {schema['pattern']}"
    stated = " and ".join(
        f"{sign} {emit(schema[limit])}" for limit, sign in _LIMITS.items() if limit in schema
    )
    return f"{_KINDS[schema['type']]} {stated}".rstrip()


def config_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors."""
    schema = Config.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "file to start from: relative to this one, or one that ships with cmtrain",
    }
    return schema
