"""What a library user sees and gets back."""

import re
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spd
from spd.engine.prepare import eval_contexts, prepare
from spd.metrics import SiteUsage, site_usage
from spd.reports.png import read_png
from spd.runs.library import Result
from tests.test_optimize import Recorder
from tests.toy import MLP, make_config

pytestmark = pytest.mark.undrawn

LOSSES = {
    "faithfulness": {"coeff": 1.0},
    "stochastic_recon": {"coeff": 1.0},
    "importance_minimality": {"coeff": 1e-3, "pnorm": 2.0},
}


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.rand(32, 4, generator=generator)


def decomposed(losses: dict[str, Any] = LOSSES, **options: Any) -> Result:
    torch.manual_seed(0)
    settings = {"sites": {"first": 8, "deep.*": 6}, "steps": 4, "lr": 1e-2}
    config = make_config(losses, **settings, log_every=2, eval_every=2, n_eval_batches=2)
    return spd.decompose(spd.Problem(MLP(), batches(), batches()), config, **options)


def test_progress_and_evaluations_are_shown(capsys: pytest.CaptureFixture[str]):
    decomposed()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 2", "step 4"]
    assert all("loss/total " in line and "loss/faithfulness " in line for line in lines)
    assert "4/4" in err and "loss=" in err and "L0=" in err


def test_nothing_is_shown_where_it_is_not_wanted(capsys: pytest.CaptureFixture[str]):
    recorder = Recorder()
    quiet, observed = decomposed(quiet=True), decomposed(observer=recorder)
    assert capsys.readouterr() == ("", "")
    assert quiet.history == observed.history
    assert quiet.history == [{"step": step, **values} for step, values in recorder.lines]


def test_the_history_has_a_row_for_every_line():
    rows = decomposed(quiet=True).history
    kinds = [(row["step"], "eval" if "eval/loss/total" in row else "step") for row in rows]
    assert kinds == [
        *[(0, "eval"), (0, "step"), (2, "eval"), (2, "step")],
        (3, "step"),
        (4, "eval"),
    ]
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())


def test_the_observer_hears_of_the_end_of_a_run_that_fails():
    class Ending(Recorder):
        over = False

        def ended(self) -> None:
            self.over = True

    recorder = Ending()
    broken = iter([torch.full((2, 4), torch.nan)] * 9)
    config = make_config(LOSSES, sites={"first": 8}, steps=5)
    with pytest.raises(spd.RunError, match="step 0"):
        spd.decompose(spd.Problem(MLP(), broken, batches()), config, observer=recorder)
    assert recorder.over


def test_the_result_shows_itself():
    result = decomposed(quiet=True)
    assert list(result.model.sites) == ["first", "deep.mid"]
    loss = result.history[-1]["eval/loss/total"]
    first, *_ = summary = result.summary().splitlines()
    assert first.startswith("4 steps; losses on held-out data: ") and f"total {loss:.4g}" in first
    (row,) = [line for line in summary if line.startswith("first ")]
    use = result.usage["first"]
    assert row.split() == ["first", "8", f"{use.l0:.2f}", str(use.alive), str(use.always_on)]
    page = result._repr_html_()
    assert f"<td>first</td><td>8</td><td>{use.l0:.2f}</td>" in page
    pictures = re.findall(r'<img alt="(\w+)".*?base64,([^"]+)"', page)
    assert [name for name, _ in pictures] == ["loss_curves", "mean_activity"]
    for _, picture in pictures:
        text, (width, height) = read_png(b64decode(picture))
        assert text is not None and min(width, height) > 100
    assert repr(result) == result.summary()


def test_the_use_is_counted_on_held_out_data():
    """Of importances that do not depend on the input."""
    config = make_config(LOSSES, sites={"first": 5}, n_eval_batches=2)
    prepared = prepare(spd.Problem(MLP(), batches(), batches()), config)
    model = prepared.objective.model
    for parameter in model.sites["first"].own_importance().parameters():
        nn.init.zeros_(parameter)
    bias = model.sites["first"].own_importance().get_parameter("out_bias")
    bias.data = torch.tensor([2.0, 1.0, 0.05, 0.0, -1.0])
    assert site_usage(model, eval_contexts(prepared)) == {"first": SiteUsage(5, 3.0, 2, 2)}


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (SiteUsage(20, 18.0, 20, 15), "15 of 20 .* on nearly everywhere; try a larger coefficient"),
        (SiteUsage(20, 0.0, 0, 0), "no subcomponent is ever on; try a smaller coefficient"),
    ],
)
def test_a_result_in_which_nothing_was_decomposed_says_so(use: SiteUsage, said: str):
    result = Result(
        decomposed(quiet=True).prepared, [{"step": 4, "eval/loss/total": 1.0}], {"a": use}
    )
    for text in (result.summary(), result._repr_html_()):
        assert "Warning: a is not decomposed: " in text
        assert re.search(said, text)


def test_a_site_in_use_raises_no_warning():
    assert SiteUsage(20, 3.0, 12, 10).problem is None
    assert SiteUsage(1, 1.0, 1, 1).problem is None
    usage = {"a": SiteUsage(20, 3.0, 12, 2)}
    result = Result(decomposed(quiet=True).prepared, [{"step": 4, "eval/loss/total": 1.0}], usage)
    assert "Warning" not in result.summary()
