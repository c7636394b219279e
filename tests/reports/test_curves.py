"""The curves that a reader can look into: what they show, and that they do it in a browser."""

import html
import json
import re
from pathlib import Path

import pytest

from spd.reports.curves import live_curves
from spd.reports.figures import loss_curves
from spd.reports.page import inline_script
from spd.reports.report import write_report
from tests.made_up_run import make_run
from tests.reports.test_report_in_browser import CHROMIUM, in_browser

HISTORY = [
    {"step": 0, "loss/total": 2.0, "eval/loss/total": 3.0, "eval/errors/total": 4},
    {"step": 10, "loss/total": 0.123456789},
    {"step": 20, "loss/total": float("nan"), "eval/loss/total": 0.0, "eval/errors/total": 0},
]
LOOK = """
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const view = document.querySelector("iframe").contentWindow;
  const plot = page.querySelector(".u-over"), box = plot.getBoundingClientRect();
  const values = () =>
    [...page.querySelector(".u-legend").querySelectorAll(".u-value")].map((e) => e.textContent);
  const at = (kind, x, target) => target.dispatchEvent(new view.MouseEvent(kind, {
    bubbles: true, movementX: 9, clientX: box.left + x * box.width, clientY: box.top + 50,
  }));
  at("mousemove", 0, plot);
  setTimeout(() => {
    const first = values();
    at("mousedown", 0.4, plot); at("mousemove", 0.9, plot); at("mouseup", 0.9, page);
    setTimeout(() => {
      at("mousemove", 0, plot);
      setTimeout(() => {
        const drawn = page.getElementById("drawn-curves");
        document.title = JSON.stringify({first, then: values(), hidden: drawn.hidden});
      }, 200);
    }, 200);
  }, 200);
};
"""


def test_every_line_has_a_value_or_none_at_every_step():
    total, errors = json.loads(live_curves(loss_curves(HISTORY))["panels"])
    assert total["title"] == "total" and total["scale"] == 3 and total["steps"] == [0, 10, 20]
    training, held_out = total["series"]
    assert training["values"] == [2.0, 0.123457, None], "six digits; nothing for what is no number"
    assert held_out["values"] == [3.0, None, None], "a logarithmic axis has no zero"
    assert errors["series"][0]["values"] == [4.0, 0.0] and errors["scale"] == 4
    assert (training["label"], held_out["label"]) == ("training", "held out")


def test_nothing_logged_gives_no_curve():
    assert live_curves(loss_curves([]))["panels"] == "[]"


def test_the_policy_lets_that_very_script_run(tmp_path: Path):
    page = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert f"script-src {inline_script(script)[1]}" in html.unescape(policy)
    assert "http" not in policy


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on PATH")
def test_pointing_shows_values_and_dragging_zooms(tmp_path: Path):
    lines = [{"step": step, "loss/total": 1.0 + step} for step in range(0, 1000, 10)]
    page = write_report(make_run(tmp_path, **{"metrics.jsonl": lines})).read_text(encoding="utf-8")
    frame = f'<iframe style="width: 1280px; height: 9000px" srcdoc="{html.escape(page)}"></iframe>'
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><title>-</title>{frame}<script>{LOOK}</script>")
    done = in_browser(tmp_path, "--dump-dom", "--virtual-time-budget=5000", wrapper.as_uri())
    found = json.loads(html.unescape(re.findall("<title>(.*?)</title>", done.stdout)[0]))
    assert found["first"][:2] == ["0", "1"] and found["hidden"]
    step, value = (float(number) for number in found["then"][:2])
    assert 350 < step < 450 and value == step + 1, "the left edge is now where dragging began"
    assert "CONSOLE" not in done.stderr
