"""Pages: a template and what it shows, as one file that needs nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from spd.run_files import atomic_write

HERE = Path(__file__).parent


def render_page(
    path: Path, template: str, contents: Mapping[str, Any], *, folder: Path = HERE
) -> Path:
    """Write a page, whole or not at all, from a template in `folder`; returns its path.

    The template may extend and include those that lie here. All values are escaped, and a name without a
    value is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(contents)
    atomic_write(path, page)
    return path
