"""Render the templates of pages, charts and model cards. Values are escaped, and what is not printable."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cmtrain import __version__
from cmtrain.monitoring.units import duration, percent, short, utc, workers
from pipelines.spec import visible


@functools.cache
def make_templates() -> Environment:
    """Return all templates, by name."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_visible, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {f.__name__: f for f in (short, duration, percent, utc, workers)}
    return templates


def _visible(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(visible, value.split("\n")))


def render_page(template: str, values: dict[str, Any], scripts: Sequence[str]) -> str:
    """Return a page with `scripts` in it.
    Its security policy names their hash: a browser runs no other, even if one got past the escaping.
    """
    templates = make_templates()
    script = "".join(templates.get_template(name).render() for name in scripts)
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values |= {"script": script, "script_hash": script_hash, "version": __version__}
    return templates.get_template(template).render(values)
