"""How far runs on one target agree: by hand, on planted subcomponents, and as a command."""

import json
from pathlib import Path

import pytest
import torch

from spd.analysis import agreement
from spd.analysis.agreement import Correlation, cosines, interval, match, similarities
from spd.experiments.tms.tms_decomposition import build
from spd.runs.run import load_run, start
from tests.run_fixtures import make_tms_target
from tests.runs.little_run import little_config, status_of

pytestmark = pytest.mark.undrawn

AXES = torch.eye(2)
OTHERS = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0], [1.0, 0.0]])


def test_the_axes_against_three_directions():
    signed = match(cosines(AXES, OTHERS))
    assert signed.best.mean().item() == pytest.approx(0.853553, abs=1e-6)
    assert signed.assigned.tolist() == pytest.approx([1.0, 0.5**0.5])
    absolute = match(cosines(AXES, OTHERS).abs())
    assert absolute.best.tolist() == [1.0, 1.0] and absolute.assigned.tolist() == [1.0, 1.0]


def test_a_partner_serves_one_alone_and_the_rest_has_none():
    """Both axes are nearest to the diagonal, which one of them gets."""
    found = match(cosines(AXES, torch.tensor([[1.0, 1.0]])))
    assert found.best.tolist() == pytest.approx([0.5**0.5] * 2)
    assert sorted(found.assigned.tolist()) == pytest.approx([0.0, 0.5**0.5])
    nothing = match(torch.zeros(2, 0))
    assert nothing.best.tolist() == nothing.assigned.tolist() == [0.0, 0.0]


def test_the_sign_of_both_directions_together_means_nothing():
    generator = torch.Generator().manual_seed(0)
    V, U = torch.randn(5, 3, generator=generator), torch.randn(3, 4, generator=generator)
    order, sign = torch.tensor([2, 0, 1]), torch.tensor([1.0, -1.0, 1.0])
    other_V, other_U = V[:, order] * sign, U[order] * sign[:, None]
    for similarity in similarities((V, other_V), (U, other_U)).values():
        assert match(similarity).assigned.tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    flipped = similarities((V, other_V), (U, -other_U))
    assert match(flipped["V"]).best.tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert flipped["rank one"].min().item() == pytest.approx(-1.0, abs=1e-6)


def test_the_correlation_of_importances_is_pearsons_over_all_batches():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(50, 3, generator=generator), torch.rand(50, 2, generator=generator)
    b[:, 1] = 0.25
    correlation = Correlation()
    for rows in (slice(0, 20), slice(20, 50)):
        correlation.update(a[rows], b[rows])
    expected = torch.corrcoef(torch.cat([a, b[:, :1]], dim=1).mT)[:3, 3]
    assert correlation.compute()[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert correlation.compute()[:, 1].tolist() == [0.0] * 3, "a constant goes with nothing"


def test_the_interval_holds_the_mean_and_narrows():
    generator = torch.Generator().manual_seed(2)
    few, many = torch.rand(10, generator=generator), torch.rand(1000, generator=generator)
    for values in (few, many):
        low, high = interval([values])
        assert low < values.mean() < high
    assert interval([few])[1] - interval([few])[0] > 5 * (interval([many])[1] - interval([many])[0])
    assert interval([torch.full((7,), 0.5)]) == (0.5, 0.5)


@pytest.fixture(scope="module", name="runs")
def runs_fixture(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of two seeds on one target."""
    folder = tmp_path_factory.mktemp("agreeing")
    settings = ("n_eval_batches=2", "metrics={}", "figures={}")
    return [
        start(
            little_config(folder, *settings, f"seed={seed}"), build, directory=folder / f"run{seed}"
        )
        for seed in (0, 1)
    ]


def test_a_run_agrees_with_itself_whatever_the_order_of_its_subcomponents(runs: list[Path]):
    one, other = load_run(runs[0]), load_run(runs[0])
    site = other.model.sites["linear1"]
    order = torch.randperm(site.C, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in site.named_parameters():
            if parameter.requires_grad:
                axis = 1 if name.endswith("V") else 0
                parameter.copy_(parameter.index_select(axis, order))
    found = agreement.agreement([one, other])["linear1"]
    assert found.alive[0] == found.alive[1] > 1
    for kind, matches in found.matches.items():
        for pair in matches:
            assert pair.assigned.tolist() == pytest.approx([1.0] * len(pair.best), abs=1e-4), kind
    for kind in ("V", "U", "rank one"):
        initial = found.chance[kind].initial
        assert initial is not None and initial[1] < 0.999
    assert abs(found.chance["importance"].permuted[1]) < 0.5


def test_the_command_prints_a_line_for_each_kind_and_keeps_all(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
):
    assert status_of(agreement.main, *runs) == 0
    out = capsys.readouterr().out
    for words in ("linear1", "linear2", "rank one", "importance", "initial", "permuted"):
        assert words in out
    path = runs[0] / agreement.ANALYSIS
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["pairs"] == [[0, 1], [1, 0]] and kept["checkpoints"] == [6, 6]
    before = path.read_bytes()
    assert status_of(agreement.main, *runs) == 0
    assert path.read_bytes() == before, "the same every time"


def test_runs_on_other_targets_are_not_compared(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_tms_target(tmp_path / "made-target", seed=3)
    other = start(
        little_config(tmp_path, "metrics={}", "figures={}"), build, directory=tmp_path / "b"
    )
    assert status_of(agreement.main, runs[0], other) == 2
    assert f"{other}: its target is another than that of {runs[0]}" in capsys.readouterr().err


def test_one_run_is_not_enough(runs: list[Path]):
    assert status_of(agreement.main, runs[0]) == 2
