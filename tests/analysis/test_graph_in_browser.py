"""The page of a graph, used in headless Chromium as a reader uses it."""

import re
from pathlib import Path

import pytest

from spd.reports.graph import write_graph
from tests.experiments.lm.test_lm_report_in_browser import use
from tests.little_lm import AWKWARD
from tests.reports.test_report_in_browser import CHROMIUM, in_browser

NODES = [
    {"kind": "component", "row": 1, "column": 0, "index": 7, "g": 1.0, "a": 2.5, "text": ""},
    {"kind": "component", "row": 2, "column": 1, "index": 3, "g": 0.25, "a": -1.0, "text": ""},
    {"kind": "output", "row": 4, "column": 1, "index": 9, "g": 1.0, "a": 4.0, "text": AWKWARD[0]},
    {"kind": "input", "row": 0, "column": 0, "index": 1, "g": 1.0, "a": 1.0, "text": AWKWARD[1]},
    {"kind": "input", "row": 0, "column": 1, "index": 2, "g": 1.0, "a": 1.0, "text": " b\n"},
]
EDGES = [
    [0, 1, 1.5, 0.75],
    [1, 2, -2.0, -0.5],
    [0, 2, 0.2, 0.05],
    [3, 0, 0.7, 1.0],
    [4, 1, 0.1, 0.001],
]
DATA = {
    "rows": ["input", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.empty", "output"],
    "columns": [AWKWARD[1], " b\n"],
    "nodes": NODES,
    "edges": EDGES,
    "left_out": 4,
}
SAID = "Of this behaviour: adversarial masks 0.443 <b>not</b>"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_graph(
        tmp_path / "graph.html", DATA, title=f"Causes {AWKWARD[0]}", sentences=[SAID]
    )


def test_the_page_needs_nothing_else(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert re.search(r"(src|href)=\"https?:", text) is None
    assert "<b>not</b>" not in text and "</script><script>" not in text, "text stays text"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on PATH")
def test_point_pin_and_threshold(tmp_path: Path, page: Path):
    seen = use(
        tmp_path,
        page,
        """
        const node = (i) => $(`[data-node="${i}"]`), y = (i) => node(i).getBoundingClientRect().top;
        const lines = () => page().querySelectorAll("path.edge").length;
        const lit = () => page().querySelectorAll("path.edge.on").length;
        const point = (i, kind) => node(i).dispatchEvent(
          new (frame.contentWindow.PointerEvent)(kind, { bubbles: true }));
        const click = (i) => node(i).dispatchEvent(
          new (frame.contentWindow.MouseEvent)("click", { bubbles: true }));
        seen.upwards = y(3) > y(0) && y(0) > y(1) && y(1) > y(2);
        seen.lines = lines();
        seen.before = [lit(), $("#detail").textContent];
        point(0, "pointerover");
        seen.hover = [lit(), $("#detail h2").textContent, $("#detail").textContent];
        point(0, "pointerout");
        seen.out = lit();
        click(1);
        point(0, "pointerover");
        point(0, "pointerout");
        seen.pinned = [$("#detail h2").textContent, node(1).classList.contains("pinned"), lit()];
        click(1);
        seen.unpinned = lit();
        press(node(2), "Enter");
        seen.keyboard = $("#detail h2").textContent;
        $("#threshold").value = "0";
        $("#threshold").dispatchEvent(new frame.contentWindow.Event("input"));
        seen.all = lines();
        $("#threshold").value = "80";
        $("#threshold").dispatchEvent(new frame.contentWindow.Event("input"));
        seen.few = lines();
        seen.counts = $("#counts").textContent;
        seen.colours = [...page().querySelectorAll("path.edge")].map((e) => e.classList[1]);
        seen.rows = [...page().querySelectorAll("svg text title")].map((t) => t.textContent);
        """,
    )
    assert seen["upwards"] and seen["lines"] == 4, "the weak edge is below the threshold"
    assert seen["before"] == [0, ""]
    n, name, detail = seen["hover"]
    assert n == 3 and name.startswith("layers.0.mlp.up_proj:7 at 0")
    assert "importance 1" in detail and "75.0 %" in detail and AWKWARD[1] in detail
    assert seen["out"] == 0
    assert seen["pinned"][0].startswith("layers.0.mlp.down_proj:3") and seen["pinned"][1:] == [
        True,
        2,
    ]
    assert seen["unpinned"] == 0 and seen["keyboard"].startswith("output")
    assert seen["all"] == 5 and seen["few"] == 2 and seen["colours"] == ["more", "more"]
    assert "5 nodes, 2 of 5 edges; 4 less important" in seen["counts"]
    assert "layers.1.empty" not in seen["rows"], "a row without nodes takes no room"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on PATH")
def test_the_browser_paints_it(tmp_path: Path, page: Path):
    picture = tmp_path / "page.png"
    done = in_browser(tmp_path, f"--screenshot={picture}", page.as_uri())
    assert picture.stat().st_size > 10_000
    assert "CONSOLE" not in done.stderr
