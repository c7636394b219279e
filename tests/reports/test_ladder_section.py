"""What the page of a run says of its ladder: every line with its masks, its adversary and its budget."""

import json
from pathlib import Path
from typing import Any

import pytest

from spd.metrics import LadderMetric, SparsityMetric
from spd.reports.evaluations import evaluation_of
from spd.reports.ladder import Ladder, ladder_of
from spd.reports.report import write_report
from spd.reports.results import verdict
from tests.made_up_run import make_run
from tests.reports.test_report import Page

pytestmark = pytest.mark.undrawn

RUNGS = {
    **{"unmasked": 0.01, "stochastic": 0.1, "importance_masked": 0.2, "rounded": 0.3},
    **{"adversarial_1_batch": 0.4, "adversarial_20_batch": 1.0, "adversarial_80_row": 8.0},
    "ablated": 2.0,
}
FIGURES = {
    **{f"ladder/{name}": value for name, value in RUNGS.items()},
    **{"ladder_share/adversarial_20_batch": 0.5, "ladder_share/adversarial_80_row": 4.0},
    **{"ladder_recovered/rounded": 0.875, "ladder_recovered/adversarial_80_row": -3.0},
    **{"ladder_l0": 900.0, "ladder_C": 1200.0, "ladder_rows": 256.0, "alive/a": 950.0},
    "never_active/a": 0.25,
}
METRICS = {"ladder": LadderMetric(), "sparsity": SparsityMetric()}


def ladder(tmp_path: Path, **changes: float) -> Ladder:
    values = FIGURES | changes
    history = [{"step": 5.0, **{f"eval/{key}": value for key, value in values.items()}}]
    found = ladder_of(values, history, tmp_path)
    assert found is not None
    return found


def test_each_line_says_masks_adversary_budget_and_share(tmp_path: Path):
    found = ladder(tmp_path)
    lines = dict(zip(RUNGS, found.lines, strict=True))
    assert lines["importance_masked"] == ["g", "none", "0.2", "0.100", "–"]
    how = "1 step of 0.1, one start, one source for the whole batch"
    assert lines["adversarial_1_batch"][1] == how
    masks, how, *numbers = lines["adversarial_80_row"]
    assert masks == "g + (1 − g) r"
    assert how == "80 steps of 0.1, one start, one source for each row or position"
    assert numbers == ["8", "4.000", "-300.0%"]
    assert lines["rounded"][2:] == ["0.3", "0.150", "87.5%"]
    assert lines["ablated"] == ["all subcomponents off", "none", "2", "1.000", "–"]


def test_how_much_is_on_stands_beside_it(tmp_path: Path):
    said = "900 of 1,200 subcomponents are on at a time (L0), 950 are alive."
    assert ladder(tmp_path).on == f"On 256 held-out rows or positions, {said}"


def test_where_nothing_is_predicted_there_is_no_column_for_it(tmp_path: Path):
    values = {key: value for key, value in FIGURES.items() if "recovered" not in key}
    found = ladder_of(values, [], tmp_path)
    assert found is not None
    assert len(found.heads) == 4 and {len(line) for line in found.lines} == {4}


def test_what_is_not_known_has_no_share(tmp_path: Path):
    found = ladder(tmp_path, **{"ladder/ablated": 0.0})
    assert {line[3] for line in found.lines} == {"–"}
    assert ladder_of({"l0/a": 1.0}, [], tmp_path) is None


def test_the_curves_over_the_search_and_over_the_run(tmp_path: Path):
    kept: dict[str, Any] = {"rungs": {"ablated": 4.0}, "n_restarts": 3}
    kept["adversary"] = {"batch": [1.0, 2.0, 4.0], "row": [4.0, 8.0, 16.0]}
    (tmp_path / "analysis" / "adversary").mkdir(parents=True)
    (tmp_path / "analysis" / "adversary" / "ladder.json").write_text(json.dumps(kept))
    search, run = ladder(tmp_path).figure.axes
    drawn = [
        (list(line.get_xdata()), list(line.get_ydata()))  # pyright: ignore[reportArgumentType]
        for line in search.lines
    ]
    own_batch, own_row, batch, row, _ = drawn
    assert own_batch == ([1, 20], [0.2, 0.5]) and own_row == ([80], [4.0])
    assert batch == ([1, 2], [0.5, 1.0]) and row == ([1, 2], [2.0, 4.0])
    over = {str(line.get_label()): list(line.get_ydata()) for line in run.lines}  # pyright: ignore
    assert over["rounded"] == [0.15] and over["adversarial 20 batch"] == [0.5]


@pytest.mark.parametrize(("checkpoint", "is_drawn"), [(5, True), (4, False)])
def test_what_was_found_at_another_checkpoint_is_left_out_and_named(
    tmp_path: Path, checkpoint: int, is_drawn: bool
):
    kept = {"checkpoint": checkpoint, "rungs": {"ablated": 4.0}, "n_restarts": 3}
    (tmp_path / "analysis" / "adversary").mkdir(parents=True)
    path = tmp_path / "analysis" / "adversary" / "ladder.json"
    path.write_text(json.dumps({**kept, "adversary": {"batch": [1.0, 2.0, 4.0]}}))
    found = ladder_of(FIGURES, [{"step": 5.0}], tmp_path, 5)
    assert found is not None
    labels = [str(line.get_label()) for line in found.figure.axes[0].lines]
    assert any("spd.analysis.adversary" in label for label in labels) == is_drawn
    said = "Made at the checkpoint of step 4, while this page shows step 5."
    assert (said in found.on) != is_drawn


def test_the_page_opens_with_it_and_says_that_this_is_all_there_is(tmp_path: Path):
    """The first run on SmolLM2-135M was headed by what its recipe trains."""
    values = FIGURES | {
        "ladder/adversarial_80_batch": 3.0,
        "ladder_share/adversarial_80_batch": 1.5,
    }
    found = evaluation_of(values, METRICS)
    result = {"experiment": "lm", "seed": 0, "steps": 9, "seconds": 1.0}
    result |= json.loads(found.model_dump_json())
    run = make_run(tmp_path, **{"result.json": result, "config.yaml": "sites: {a: 1200}\n"})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    seen = page.visible
    headline = (
        "Masks from 80 steps of an adversary cost 150.0% of ablating everything, at L0 900 of 1200"
    )
    assert headline in seen
    assert "the figures of this page are all there is to judge it by" in seen
    places = [seen.index(words) for words in (headline, "900 of 1,200 subcomponents", "matrix C")]
    assert places == sorted(places)
    assert "a 1200 950 0.250" in seen, "what is never active stands beside what is alive"
    assert seen.count("8 4.000") == 1, "the lines of the ladder stand in its table alone"
    assert verdict(found).endswith("400.0%; on 256 held-out rows or positions)")


def test_without_both_searches_there_is_no_conclusion():
    spec, whole = (
        LadderMetric(),
        FIGURES
        | {
            "ladder/adversarial_20_row": 1.0,
            "ladder_share/adversarial_20_row": 0.5,
        },
    )
    assert spec.conclusion(whole) is not None
    assert spec.conclusion({k: v for k, v in whole.items() if not k.endswith("_row")}) is None
    assert spec.conclusion({"l0/a": 1.0}) is None
