"""A graph of causes as a page of its own: self-contained, drawn by a script of ours in the browser."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd.reports.page import HERE, inline_json, inline_script, render_page

TEMPLATE, SCRIPT = "graph.html.j2", "graph.js"


def write_graph(
    path: Path, data: Mapping[str, Any], *, title: str, sentences: Sequence[str]
) -> Path:
    """Write the page of a graph; `data` has rows from below, columns, nodes and edges.

    A node is {kind, row, column, index, g, a, text}, an edge [source, target, attr, share].
    """
    script, policy = inline_script((HERE / SCRIPT).read_text(encoding="utf-8"))
    contents = {
        **{"title": title, "sentences": sentences, "data": inline_json(data)},
        **{"script": script, "policy": policy},
    }
    return render_page(path, TEMPLATE, contents)
