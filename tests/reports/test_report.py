"""The report: everything in one page, whatever the run directory holds."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spd.config import UserError
from spd.reports.report import verdict, write_report
from spd.reports.results import Result, format_result, format_table, read_result
from spd.reports.results import verdict as line_of
from tests.made_up_run import METRICS, add_figures, make_run, result

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A parsed page; fails on elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def visible(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(run: Path) -> Page:
    path = write_report(run, METRICS)
    assert path == run / "report.html"
    assert not list(run.glob(".*.partial"))
    return Page(path.read_text(encoding="utf-8"))


def test_verdict_comes_first_then_the_results_beside_the_published_ones(tmp_path: Path):
    page = report(make_run(tmp_path))
    seen = page.visible
    assert seen.index("Solved") < seen.index("What this is") < seen.index("MMCS linear1")
    assert "MMCS linear1 1.000 ± 0.000 1.000 ± 0.000" in seen
    assert "ML2R linear1 0.991 ± 0.004 0.993 ± 0.002" in seen
    assert "matrix C L0 alive errors unfaithful effect errors linear1 20 0.251 5 0 0.010 0" in seen
    assert "faithfulness 1.0 1.25e-06" in seen
    assert "12 min 34 s" in seen and "51.5 steps/s" in seen and "0123456789abcdef" in seen


def test_every_figure_is_inlined_once_newest_in_configured_order_with_its_text(tmp_path: Path):
    run = make_run(tmp_path)
    newest = add_figures(run)
    page = report(run)
    images = page.all("img")
    assert [image["alt"] for image in images[:2]] == ["second at 1200.", "first at 1200."]
    inlined = [base64.b64decode(i["src"].removeprefix("data:image/png;base64,")) for i in images]
    assert inlined[:2] == [newest["second"], newest["first"]]
    assert inlined[2].startswith(b"\x89PNG") and "Curves over the steps" in images[2]["alt"]
    assert len(images) == 3
    assert "Read first & look." in page.visible


def test_the_page_is_self_contained_and_well_formed(tmp_path: Path):
    run = make_run(tmp_path)
    add_figures(run)
    page = report(run)
    own = re.sub(r"<script.*?</script>", "", _without_images(page.text), flags=re.DOTALL)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", own)
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|\.src=", page.text)
    assert page.all("script") == SCRIPTS
    assert all(i["src"].startswith("data:") for i in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert {link.removeprefix("#") for link in links if link.startswith("#")} <= set(ids)
    tables = [link for link in links if not link.startswith("#")]
    names = ("second", "first", "loss_curves")
    assert set(tables) == {f"figures/{name}/00001200.csv" for name in names}
    for table in tables:
        assert (run / table).read_text().startswith("panel,series,x,y,value\n")
    assert page.all("html") == [{"lang": "en"}]


SCRIPTS = [{"type": "application/json", "id": "curve-data"}, {}]
"""the curves' numbers, and what shows them"""


def _without_images(text: str) -> str:
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)


def test_how_to_reproduce_it(tmp_path: Path):
    run = make_run(tmp_path)
    seen = report(run).visible
    assert "git checkout 0123456789abcdef" in seen
    again = f"python -m spd.experiments.tms.tms_decomposition {run}/config.yaml"
    assert f"{again} target={run}/target" in seen
    assert f'run = load_run("{run}")' in seen
    assert "2 networks were trained side by side" in seen and "4 (chosen)" in seen
    assert "sites: {linear*: 20}" in seen
    assert "were not committed" not in seen


def test_a_run_that_is_not_solved_names_what_is_beyond_its_limits(tmp_path: Path):
    run = make_run(tmp_path, **{"result.json": result(solved=False, errors=1)})
    seen = report(run).visible
    said = "linear1: mechanisms: 1 error in the effects on the probes (at most 0)."
    assert f"Not solved by causes Beyond the limits: {said}" in seen
    assert "solved on most seeds" in seen


def test_an_interrupted_run_shows_how_far_it_came(tmp_path: Path):
    meta = {"status": "interrupted", "entry": {"module": "/some where/script.py"}}
    run = make_run(tmp_path, **{"result.json": None, "meta.json": meta, "timings.jsonl": None})
    page = report(run)
    assert "Interrupted at step 1,200 of 40,000" in page.visible
    said = "At the last evaluation: every site matches the known importance pattern."
    assert said in page.visible
    assert f"spd-run --resume {run}" in page.visible
    assert page.visible.count("Solved") == 0
    assert len(page.all("img")) == 1  # the curves so far


def test_a_run_without_a_known_solution(tmp_path: Path):
    run = make_run(tmp_path, **{"result.json": result(solved=None, errors=0)})
    page = report(run)
    assert "No known solution" in page.visible and "Solved" not in page.visible


def test_a_directory_with_hardly_anything_in_it(tmp_path: Path):
    keep = {"meta.json": {}, "config.yaml": "experiment: x\n"}
    missing = ("metrics.jsonl", "timings.jsonl", "result.json", "target/training.json")
    run = make_run(tmp_path, **keep, **dict.fromkeys([*missing, "target/config.yaml"]))
    page = report(run)
    assert "Not finished at step 0" in page.visible
    assert "The run was not evaluated yet." in page.visible
    assert page.all("img") == [] and page.all("table") == []


def test_hostile_names_and_links_stay_text(tmp_path: Path):
    hostile = '<script>alert(1)</script>"onload="x'
    config = f"experiment: {json.dumps(hostile)}\nseed: 0\nsteps: 10\n"
    meta = {"status": "finished", "tracker": "javascript:alert(1)", "command": "</pre><img src=x>"}
    run = make_run(tmp_path, **{"config.yaml": config, "meta.json": meta})
    page = report(run)
    assert page.all("script") == SCRIPTS and page.all("img")[0]["src"].startswith("data:")
    assert len(page.all("img")) == 1
    assert hostile in page.visible
    assert all("onload" not in attributes for _, attributes in page.elements)
    outside = [link["href"] for link in page.all("a") if not link["href"].startswith("#")]
    assert set(outside) == {"figures/loss_curves/00001200.csv"}


def test_the_link_to_the_tracker(tmp_path: Path):
    meta = {"status": "finished", "tracker": "https://example.org/run"}
    links = report(make_run(tmp_path, **{"meta.json": meta})).all("a")
    assert links[-1]["href"] == "https://example.org/run"


@pytest.mark.parametrize(
    ("status", "solved", "kind", "headline"),
    [
        ("finished", True, "solved", "Solved by causes"),
        ("finished", False, "unsolved", "Not solved by causes"),
        ("finished", None, "open", "No known solution"),
        ("failed", False, "open", "Failed at step 7 of 9"),
        ("running", True, "open", "Not finished at step 7 of 9"),
    ],
)
def test_verdict(status: str, solved: bool | None, kind: str, headline: str):
    found = Result.model_validate(result(solved=solved, errors=0 if solved else 2))
    given = verdict(status, found, 7, 9)
    assert (given.kind, given.headline) == (kind, headline)


def test_verdict_of_a_metric_that_knows_no_solution():
    """As that of a language model, which says what is kept."""
    raw = result(solved=None, errors=0)
    raw["conclusion"] = {"headline": "96.3% kept", "detail": "with the importances as masks"}
    of_model = Result.model_validate(raw)
    given = verdict("finished", of_model, 9, 9)
    assert (given.kind, given.headline) == ("open", "96.3% kept")
    assert given.detail.startswith("With the importances as masks. What the decomposition")
    assert line_of(of_model) == "96.3% kept (with the importances as masks)"


def test_a_figure_that_nobody_declared_is_called_by_its_key(tmp_path: Path):
    raw = result(solved=True, errors=0, **{"gini/here": 0.125, "lonely": 3.0})
    made = Result.model_validate(raw)
    assert re.search(r"^  gini here +0\.125 +–$", format_result(made), re.MULTILINE)
    assert "gini here" in format_table({"a run": made}).splitlines()[0]
    seen = report(make_run(tmp_path, **{"result.json": raw})).visible
    assert "gini here 0.125 –" in seen and "lonely 3 –" in seen


def test_a_result_holds_every_figure_and_is_read_back():
    raw = result(solved=False, errors=2)
    assert Result.model_validate(raw).as_json() == Result.model_validate(raw).as_json()
    rows = {row["key"]: row for row in raw["rows"]}
    assert rows["mmcs/linear1"]["spread"] == 0.0001 and "mmcs_sd/linear1" not in rows
    assert rows["solved"]["value"] == 0.0
    assert raw["quantities"]["mmcs"]["label"] == "MMCS"


def test_a_damaged_result_is_refused(tmp_path: Path):
    path = tmp_path / "result.json"
    path.write_text('{"experiment": "x"}')
    with pytest.raises(UserError, match=r"result\.json: not the result of a run: seed"):
        read_result(path)
