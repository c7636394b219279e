"""Pages: a template and what it shows, as one file that needs nothing else."""

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from spd.run_files import atomic_write

HERE = Path(__file__).parent


def render_page(
    path: Path, template: str, contents: Mapping[str, Any], *, folder: Path = HERE
) -> Path:
    """Write a page, whole or not at all, from a template in `folder`; returns its path.

    The template may extend and include those that lie here. All values are escaped, and a name without a
    value is an error.
    """
    atomic_write(path, templates_of(folder).get_template(template).render(contents))
    return path


@cache  # with the templates that were read: a study writes a page for each of its runs
def templates_of(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def inline_json(value: Any) -> Markup:
    """JSON that may stand inside a `<script>` element, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def inline_script(text: str) -> tuple[Markup, str]:
    """A script of our own, as it stands inside its element, and what lets a page's policy run it."""
    if "</script" in text:
        raise ValueError("a script that ends its own element")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"
