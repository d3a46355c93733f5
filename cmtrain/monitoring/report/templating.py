"""Pages made of cmtrain/templates: whatever is put into them is escaped, and a browser runs no script but ours."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cmtrain.monitoring.units import duration, short


def make_templates() -> Environment:
    """The templates. Jinja escapes all values; what charts.py made is marked as safe in the templates themselves."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"short": short, "duration": duration}
    return templates


def join_scripts(templates: Environment, names: Sequence[str]) -> dict[str, str]:
    """`script`, of the files `names`, and `script_hash`, for the page's policy.

    Should anything slip through the escaping all the same: a browser runs no script but the one with this hash.
    """
    script = "".join(templates.get_template(name).render() for name in names)
    return {
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
