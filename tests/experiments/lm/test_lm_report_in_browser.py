"""The browser of subcomponents, used in headless Chromium as a reader uses it."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from spd.experiments.lm.report.page import write_subcomponents
from tests.little_lm import AWKWARD, made_up_data
from tests.made_up_run import make_run
from tests.reports.test_report_in_browser import CHROMIUM, in_browser

NEAR = ("--allow-file-access-from-files",)
"""the test looks into the page from one beside it"""
HELPERS = """
const seen = {};
const say = () => { document.title = JSON.stringify(seen); };
onerror = (message) => { seen.error = String(message); say(); };
const frame = document.querySelector("iframe"), page = () => frame.contentDocument;
const $ = (selector) => page().querySelector(selector);
const rows = () => [...page().querySelectorAll(".row")].map((row) => ({
  name: row.children[0].textContent, mean: Number(row.children[1].textContent),
  size: Number(row.getAttribute("aria-setsize")), top: row.style.top,
}));
const type = (text) => {
  $("#search").value = text;
  $("#search").dispatchEvent(new frame.contentWindow.Event("input"));
};
const press = (target, key) => target.dispatchEvent(
  new frame.contentWindow.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const opened = () => $(".detail h3").textContent;
"""


def use(
    tmp_path: Path,
    page: Path,
    script: str,
    *,
    link: str = "",
    width: int = 1280,
    options: tuple[str, ...] = ("--virtual-time-budget=5000",),
) -> Any:
    """What a script has noted in `seen` after the page was loaded."""
    frame = f'<iframe src="{page.as_uri()}{link}" style="width: {width}px; height: 900px"></iframe>'
    wrapper = tmp_path / "wrapper.html"
    run = f"onload = async () => {{ {script}; say(); }};"
    wrapper.write_text(f"<!doctype html><title>-</title>{frame}<script>{HELPERS}{run}</script>")
    done = in_browser(tmp_path, *NEAR, *options, "--dump-dom", wrapper.as_uri())
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)[:1]
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(html.unescape(title))
    assert "error" not in seen
    return seen


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on PATH")
def test_search_sort_open_and_links(tmp_path: Path):
    texts = [*AWKWARD, *(f" word{i}" for i in range(200)), "needle", "\n", "\u202e", "   "]
    data = made_up_data(2000, texts=texts, n_contexts=3)
    for row in data["rows"]:
        row["shares"][0][0] = row["c"] % 3  # an awkward token on the list of each
    needle = texts.index("needle")
    for row in data["rows"]:
        for pairs in (row["shares"], row["means"], *row["reads"], *row["writes"]):
            pairs[:] = [pair if pair[0] != needle else [3, *pair[1:]] for pair in pairs]
    data["rows"][700]["writes"][1][4][0] = needle
    data["sites"][3]["reads"] = "its input is <b>not</b> the stream"
    del data["rows"][1600]["reads"]
    data["rows"][1999] |= {"active": 90_000, "mean": 1.0}  # on nearly everywhere
    run = make_run(tmp_path, **{"metrics.jsonl": None})
    page = write_subcomponents(run, data)
    seen = use(
        tmp_path,
        page,
        """
        seen.linked = opened();
        seen.first = rows();
        $("#list").scrollTop = 1e9; $("#list").dispatchEvent(new frame.contentWindow.Event("scroll"));
        seen.end = rows();
        type("NEEDLE"); seen.needle = rows(); seen.found = $("#found").textContent;
        type("layers.2 up_proj/13"); seen.named = rows();
        type("no such thing"); seen.none = rows();
        type("");
        $("[data-key=density]").click(); seen.dense = rows();
        $("[data-key=density]").click(); seen.sparse = rows();
        $("[data-key=name]").click(); seen.names = rows();
        $("#site").value = "3"; $("#site").dispatchEvent(new frame.contentWindow.Event("change"));
        seen.site = rows();
        $(".row").click(); seen.clicked = opened(); seen.detail = $(".detail").textContent;
        seen.contexts = [...page().querySelectorAll(".contexts .text")].map((e) => e.textContent);
        seen.shade = $(".contexts .token").getAttribute("style");
        press($("#list"), "ArrowDown"); press($("#list"), "ArrowDown"); seen.arrows = opened();
        seen.active = page().getElementById($("#list").getAttribute("aria-activedescendant")).textContent;
        press($("#list"), "End"); seen.last = opened();
        press($("#list"), "Home");
        press($("#list"), "Enter"); seen.focus = page().activeElement.id;
        press($(".detail"), "Escape"); seen.back = page().activeElement.id;
        await wait(400); seen.hash = frame.contentWindow.location.hash;
        const link = $(".pairs a"); seen.companion = link.textContent; link.click();
        await wait(400); seen.followed = opened();
        frame.contentWindow.location.hash = "model.layers.3.mlp.up_proj/100";
        await wait(100); seen.unread = $(".detail").textContent;
        const odd = [...page().querySelectorAll("img[src=x], #browser script, #browser b")];
        seen.odd = odd.map((e) => e.outerHTML);
        seen.drawn = page().querySelectorAll(".row").length;
        """,
        link="#model.layers.1.mlp.up_proj/200",
    )
    assert seen["linked"] == "model.layers.1.mlp.up_proj/200"
    means = [row["mean"] for row in seen["first"]]
    assert means == sorted(means, reverse=True) and seen["first"][0]["size"] == 2000
    assert len(seen["first"]) < 60 and len(seen["end"]) < 60
    last, before = seen["end"][-1], seen["end"][-2]
    assert last["name"] == "3.mlp.up_proj/499", "what is on nearly everywhere comes last"
    assert before["mean"] == 0 and last["mean"] == 1
    assert [row["name"] for row in seen["needle"]] == ["1.mlp.up_proj/200"]
    assert seen["found"] == "1 subcomponent" and seen["none"] == []
    names = {f"2.mlp.up_proj/13{digit}" for digit in ("", *range(10))}
    assert {row["name"] for row in seen["named"]} == names
    assert seen["dense"][0]["name"] == "3.mlp.up_proj/499"
    assert seen["sparse"][0]["name"] == seen["names"][0]["name"] == "0.mlp.up_proj/0"
    assert [row["name"] for row in seen["site"][:3]] == [f"3.mlp.up_proj/{c}" for c in range(3)]
    assert seen["site"][0]["size"] == 500
    assert seen["clicked"] == "model.layers.3.mlp.up_proj/0"
    row = data["rows"][1500]
    for (_, _, *tokens), shown in zip(row["contexts"], seen["contexts"], strict=True):
        assert shown == "".join(texts[token] for token in tokens).replace("\n", "↵")
    assert "density 1.5 % (1,501 of 100,000)" in seen["detail"]
    assert "What V readsNot shown: its input is <b>not</b> the stream." in seen["unread"]
    assert re.fullmatch(r"--g: [01]\.\d\d;", seen["shade"])
    assert seen["arrows"] == "model.layers.3.mlp.up_proj/2" and "up_proj/2" in seen["active"]
    assert seen["last"] == "model.layers.3.mlp.up_proj/499"
    assert (seen["focus"], seen["back"]) == ("detail", "list")
    assert seen["hash"] == "#model.layers.3.mlp.up_proj/0"
    assert seen["followed"] == seen["companion"] != seen["clicked"]
    assert seen["odd"] == [] and seen["drawn"] < 60


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on PATH")
def test_two_thousand_are_there_soon_and_nothing_overflows(tmp_path: Path):
    texts = [f" word{i}" for i in range(4096)] + ["\n" * 60, "=" * 90, " " * 80]
    data = made_up_data(2000, texts=texts)
    for row in data["rows"]:
        row["contexts"][0][3] = row["shares"][0][0] = row["writes"][0][0][0] = 4096 + row["c"] % 3
    page = write_subcomponents(make_run(tmp_path, **{"metrics.jsonl": None}), data)
    seen = use(
        tmp_path,
        page,
        """
        seen.ms = Date.now() - frame.contentWindow.performance.timeOrigin;
        const before = performance.now();
        for (let i = 0; i < 20; i++) press($("#list"), "ArrowDown");
        type("word12"); type("word123"); $("[data-key=density]").click(); type("");
        seen.work = performance.now() - before;
        seen.opened = opened();
        seen.wide = [];
        for (const width of [360, 1280]) {
          frame.style.width = `${width}px`;
          const room = page().documentElement.clientWidth;
          const inner = [...page().querySelectorAll("body *")].filter((e) => !e.closest(".scroll, .row"));
          const out = inner.filter((e) => e.getBoundingClientRect().right > room + 1);
          seen.wide.push([room, page().documentElement.scrollWidth, out.map((e) => e.outerHTML)]);
        }
        """,
        width=360,
        options=(),
    )
    assert seen["wide"] == [[360, 360, []], [1280, 1280, []]]
    assert seen["opened"].startswith("model.layers.")
    print(f"{seen['ms']:.0f} ms to load, {seen['work']:.0f} ms for 20 openings, 3 searches, a sort")
    assert seen["ms"] < 3000 and seen["work"] < 3000
