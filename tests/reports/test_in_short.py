"""One run on a screen: its figures in words, and not too many of them."""

from spd.config import counted
from spd.metrics import CausesMetric, LadderMetric, quantity_of
from spd.metrics.causes import beyond
from spd.reports.evaluations import described, evaluation_of
from spd.reports.results import Result, format_result

VALUES = {
    **{"loss/total": 1.0, **{f"loss/term{n}": 1.0 for n in range(6)}},
    **{f"ladder/adversarial_{n}_{scope}": 1.0 for n in (1, 20, 80) for scope in ("batch", "row")},
    **{f"ladder/{name}": 1.0 for name in ("unmasked", "importance_masked", "ablated")},
    **{f"ladder_share/adversarial_80_{scope}": 1.5 for scope in ("batch", "row")},
    **{f"unfaithful/linear{n}": 0.01 for n in range(9)},
    **{"ladder_l0": 1.0, "ladder_C": 40.0, "ladder_rows": 256.0},
    **{"adversarial/20_steps": 0.25, "solved": 0.0},
}
METRICS = {"causes": CausesMetric(), "ladder": LadderMetric()}


def shown() -> list[str]:
    found = evaluation_of(VALUES, METRICS).model_dump()
    given = {"experiment": "mine", "seed": 0, "steps": 1, "seconds": 2.0, **found}
    return format_result(Result.model_validate(given)).splitlines()


def test_a_screen_holds_it_and_says_where_the_rest_is():
    lines = shown()
    assert len(lines) <= 25 and lines[0] == "mine, seed 0, 1 step, 2 s"
    text = "\n".join(lines)
    for label in ("held-out total", "adversary over ablation, 80 steps, one source", "L0 of all"):
        assert label in text
    assert f"and {len(VALUES) - 16} figures more in result.json and report.html" in text
    assert "not solved by causes" in text


def test_every_label_reads_like_words():
    quantities = described(METRICS)
    for key in VALUES:
        quantity = quantity_of(key, quantities)
        assert quantity is not None and "_" not in quantity.label, key
    rows = {row.key: row.metric for row in evaluation_of(VALUES, METRICS).rows}
    assert rows["adversarial/20_steps"] == "adversarial error after 20 steps"
    assert rows["ladder/adversarial_1_row"] == "D adversary, 1 step, one each"


def test_one_is_no_plural():
    assert counted(1, "error") == "1 error" and counted(0, "error") == "0 errors"
    assert counted(1200.0, "batch", "batches") == "1,200 batches"
    said = beyond({"effect_errors/a": 1.0, "wrong_weights/a": 1.0, "effect_errors/b": 2.0})
    assert [line.partition(" (")[0] for line in said] == [
        "a: mechanisms: 1 error in the effects on the probes",
        "a: weights: those of 1 feature are not the target's",
        "b: mechanisms: 2 errors in the effects on the probes",
    ]
