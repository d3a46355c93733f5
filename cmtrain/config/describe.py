"""`cmtrain config reference`: every key of a configuration file as Markdown, from the schema."""

import re
from typing import Any

from pydantic_core import PydanticUndefined

from cmtrain.config.load import describe_values
from cmtrain.config.schema import Config, config_schema
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
