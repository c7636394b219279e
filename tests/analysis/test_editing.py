"""Edits of subcomponents: by hand, of a planted one whose effect is predicted, and as a command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from spd.analysis import editing
from spd.analysis.edits import (
    activation_signs,
    applied,
    edited_matrices,
    effect_of,
    ever_on,
    random_members,
    rewritten,
    scaled,
)
from spd.component_model import ComponentModel
from spd.config import UserError
from spd.experiments.tms.tms_decomposition import build
from spd.importance import AffineImportance, AffineImportanceConfig
from spd.problem import Problem
from spd.runs.export import export
from spd.runs.run import load_run, start
from tests.runs.little_run import little_config, status_of


class Square(nn.Module):
    """y = x W."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.map = nn.Linear(n, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def test_one_component_rewritten_by_hand():
    """W = I, U_c (.5, 0), V_c (0, 1), u_o (3, 4), α 3."""
    target = Square(2)
    nn.init.eye_(target.map.weight)
    model = ComponentModel(target, {"map": 1}, AffineImportanceConfig())
    parts = model.sites["map"].subcomponents
    with torch.no_grad():
        parts.V.copy_(torch.tensor([[0.0], [1.0]]))
        parts.U.copy_(torch.tensor([[0.5, 0.0]]))
    edit = rewritten(model, {"map": [0]}, torch.tensor([3.0, 4.0]), 3.0)
    x = torch.tensor([[1.0, -2.0], [1.0, 0.0]])
    before = model(x, {})
    with applied(model, edit):
        change = model(x, {}) - before
    assert torch.allclose(change[0], torch.tensor([4.6, 4.8]), atol=1e-6)
    assert (change[0] @ torch.tensor([0.6, 0.8])).item() == pytest.approx(6.6, abs=1e-5)
    assert change[1].tolist() == [0.0, 0.0]
    assert torch.equal(model(x, {}), before), "nothing is left of it"


class LittleText(nn.Module):
    """Token ids → logits: an embedding, a matrix added to the stream, a norm that bends, an unembedding."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.embed, self.map = nn.Embedding(n, n), nn.Linear(n, n, bias=False)
        self.head = nn.Linear(n, n, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(F.rms_norm(x + self.map(x), x.shape[-1:]))


def planted(n: int = 12) -> tuple[ComponentModel, Problem]:
    """Subcomponent c of `map` is on at token c alone, and writes a little of token c + 1."""
    torch.manual_seed(0)
    target = LittleText(n)
    with torch.no_grad():
        target.embed.weight.copy_(torch.eye(n) * 3)
        target.head.weight.copy_(torch.eye(n))
        target.map.weight.copy_(0.25 * torch.eye(n).roll(1, dims=0) + 0.002 * torch.randn(n, n))
    model = ComponentModel(target, {"map": n}, AffineImportanceConfig())
    site = model.sites["map"]
    assert isinstance(site.importance, AffineImportance)
    with torch.no_grad():
        site.subcomponents.V.copy_(torch.eye(n))
        site.subcomponents.U.copy_(0.25 * torch.eye(n).roll(1, dims=1))
        site.importance.weight.fill_(1.0)
        site.importance.bias.fill_(-0.5)
    ids = torch.randint(n, (6, 50), generator=torch.Generator().manual_seed(1))
    return model, Problem(target, [ids], [ids], recon="kl")


@pytest.mark.parametrize("wish", ["remove", "halve", "rewrite"])
def test_the_effect_of_a_planted_edit_is_predicted(wish: str):
    """Of token 4 the subcomponent 4 writes token 5: less of it, or token 9 instead."""
    model, problem = planted()
    members, wanted = {"map": [4]}, 5
    if wish == "rewrite":
        wanted = 9
        signs = activation_signs(model, members, [*problem.eval_batches])
        edit = rewritten(model, members, torch.eye(12)[9], 0.25, signs)
    else:
        edit = scaled(model, members, 0.0 if wish == "remove" else 0.5)
    ids = torch.randint(12, (6, 50), generator=torch.Generator().manual_seed(2))
    ids[:, ::9] = 4
    effect = effect_of(model, problem, edit, [ids[:3], ids[3:]], wanted=wanted)
    assert effect.n_on == int((ids == 4).sum())
    assert effect.predicted is not None and effect.measured is not None
    assert abs(effect.measured) > 0.1
    assert effect.predicted == pytest.approx(effect.measured, rel=0.1)
    assert effect.predicted != effect.measured, "the norm bends"
    assert effect.before is not None and effect.after is not None
    p = model(ids, {}).softmax(dim=-1)[ids == 4][:, wanted].mean().item()
    assert effect.before == pytest.approx(p, rel=1e-5)
    assert (effect.after > effect.before) == (wish == "rewrite")
    # elsewhere the activation of the subcomponent is exactly 0
    assert effect.far == effect.near == pytest.approx(0.0, abs=1e-6)
    assert effect.at > 1e-3
    chosen = random_members(model, members, ever_on(model, [ids]), seed=0)
    assert chosen["map"] != [4] and len(chosen["map"]) == 1
    factor = 0.5 if wish == "halve" else 0.0
    other = effect_of(model, problem, scaled(model, chosen, factor), [ids], wanted=wanted)
    assert abs(other.measured or 0.0) < 0.5 * abs(effect.measured)


def test_several_sites_and_what_is_near():
    """D near is of the tokens around the positions where it is on, far of all where it is off."""
    model, problem = planted()
    site = model.sites["map"]
    with torch.no_grad():
        site.subcomponents.V[7, 4] = 0.18  # it reads a little of token 7, too little to be on
    ids = torch.zeros(1, 60, dtype=torch.long)
    ids[0, 30], ids[0, [35, 38, 40, 59]] = 4, 7
    effect = effect_of(model, problem, scaled(model, {"map": [4]}, 0.0), [ids])
    with torch.no_grad():
        before = model(ids, {}).log_softmax(dim=-1)
        with applied(model, scaled(model, {"map": [4]}, 0.0)):
            after = model(ids, {}).log_softmax(dim=-1)
    errors = (before.exp() * (before - after)).sum(dim=-1)[0]
    assert effect.n_on == 1 and effect.measured is None
    assert effect.at == pytest.approx(errors[30].item(), rel=1e-4)
    assert effect.near == pytest.approx((errors[10:51].sum() - errors[30]).item() / 40, rel=1e-4)
    assert effect.far == pytest.approx((errors.sum() - errors[30]).item() / 59, rel=1e-4)
    assert effect.near is not None and effect.far is not None
    assert effect.near > effect.far > 1e-6


def test_what_is_saved_is_what_was_measured(tmp_path: Path):
    model, _ = planted()
    ids = torch.arange(12)[None]
    for edit in (
        scaled(model, {"map": [4, 2]}, 1.7),
        rewritten(model, {"map": [3]}, torch.eye(12)[9], 2.0),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        export(model, folder, "edited", edits=edited_matrices(model, edit))
        saved = LittleText(12)
        saved.load_state_dict(load_file(folder / "model.safetensors"))
        with torch.no_grad(), applied(model, edit):
            assert torch.allclose(saved(ids), model(ids, {}), atol=1e-5)
        assert not torch.allclose(saved(ids), model(ids, {}), atol=1e-2)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "no subcomponent is named"),
    ({"mop": [0]}, "no site.*map"),
    ({"map": [12]}, "subcomponents 0 to 11"),
    ({"map": [1, 1]}, "named twice"),
]


@pytest.mark.parametrize(("members", "message"), WRONG)
def test_what_cannot_be_edited(members: dict[str, Any], message: str):
    model, _ = planted()
    with pytest.raises(UserError, match=message):
        scaled(model, members, 0.0)
    with pytest.raises(UserError, match="vectors of 12 entries, and the direction has 3"):
        rewritten(model, {"map": [0]}, torch.ones(3), 1.0)
    with pytest.raises(UserError, match="no 7 others"):
        random_members(model, {"map": list(range(7))}, {}, 0)


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edited")
    config = little_config(folder, "n_eval_batches=2", "metrics={}", "figures={}")
    return start(config, build, directory=folder / "a-run")


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert status_of(editing.main, run, "linear1:3", "linear2:0", "--remove", "--wanted", "2") == 0
    out = capsys.readouterr().out
    assert "remove" in out and "random (mean of 5)" in out and "measured" in out
    kept = json.loads((run / "analysis/editing/edits.json").read_text(encoding="utf-8"))
    assert kept["members"] == [["linear1", 3], ["linear2", 0]] and kept["wanted"] == 2
    (edit,) = kept["edits"]
    assert edit["factor"] == 0 and len(edit["random"]) == 5
    members = tmp_path / "cluster.json"
    members.write_text('[["linear2", 1]]')
    words = ("--members", members, "--rewrite", "4", "--random", "0")
    assert status_of(editing.main, run, *words, "--alpha", "1", "2", "--name", "two") == 0
    assert "rewrite, α 2" in capsys.readouterr().out
    assert (run / "analysis/editing/two.json").is_file()
    assert status_of(editing.main, run, *words, "--save", tmp_path / "saved") == 0
    saved = load_file(tmp_path / "saved/model.safetensors")
    weight = load_run(run).model.sites["linear2"].weight
    assert saved["linear2.weight"].shape == weight.shape
    assert not torch.allclose(saved["linear2.weight"], weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["linear1", "--remove"], "named SITE:C"),
        (["linear1:99", "--remove"], "subcomponents 0 to 5"),
        (["linear2:0", "--rewrite", "9"], "outputs 0 to 4"),
        (["linear1:0", "--rewrite", "1"], "vectors of 2 entries, which are not the 5 outputs"),
        (["linear2:0", "--rewrite", "cat"], "number of an output"),
    ],
)
def test_what_the_command_refuses(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert status_of(editing.main, run, *words) == 2
    assert message in capsys.readouterr().err
