"""The families of docs/language_models.md: each is decomposed as the table says, or refused in one line."""

import fnmatch
import logging
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from spd.components import decomposable, expert_matrices
from spd.config import UserError
from spd.engine.prepare import prepare
from spd.experiments.lm.loading import Wanted, load_lm
from spd.experiments.lm.model import TokenModel
from spd.problem import Problem
from spd.runs.library import decompose
from tests.experiments.lm.families import BATCHES, SETTINGS, ids, tiny
from tests.toy import make_config

DOCS = Path(__file__).parents[3] / "docs" / "language_models.md"
LOSSES = {
    "faithfulness": {"coeff": 1.0},
    "stochastic_recon": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0},
    "importance_minimality": {"coeff": 1e-3, "pnorm": 1.0},
}


class Row(NamedTuple):
    """What the documentation says of a family."""

    class_name: str
    left_out: list[str]
    notes: str


def table() -> dict[str, Row]:
    text = DOCS.read_text(encoding="utf-8")
    (lines,) = re.findall(r"<!-- families -->\n(.*?)<!-- end", text, flags=re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()[2:]]
    return {
        family: Row(name.strip("`"), re.findall("`(.*?)`", left), notes)
        for family, name, left, notes in rows
    }


def may_be_sites(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path → the parameter that holds the matrix, or all those of a kind."""
    found = {}
    for path, module in model.named_modules():
        if decomposable(module):
            found[path] = module.get_parameter("weight")
        elif (form := expert_matrices(module)) is not None:
            held = {name: module.get_parameter(name) for name in form.names}
            held |= {
                f"{name}_bias": module.get_parameter(f"{name}_bias") for name in held if form.biases
            }
            found |= {own: held[own.rpartition(".")[2]] for own in form.paths(path)}
    return found


def matches(name: str, patterns: list[str]) -> list[str]:
    return [pattern for pattern in patterns if fnmatch.fnmatch(name, pattern)]


def config(sites: list[str]) -> Any:
    return make_config(
        LOSSES, sites=dict.fromkeys(sites, 3), steps=2, log_every=1, n_eval_batches=1
    )


def test_the_table_and_the_models_agree() -> None:
    assert list(table()) == list(SETTINGS)
    assert {family for family, row in table().items() if "batch:" in row.notes} == set(BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("family", SETTINGS)
def test_a_family_is_decomposed_as_the_table_says(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    row = table()[family]
    inner, batch = tiny(family, row.class_name)
    model = TokenModel(inner, "logits").eval()
    candidates = may_be_sites(model)
    sites = [path for path in candidates if not matches(path, row.left_out)]
    assert len(sites) >= 3

    biases = {n for n, p in model.named_parameters() if n.endswith("_proj_bias") and "experts" in n}
    held = {id(candidates[path]) for path in sites}
    matrices = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if sum(size > 1 for size in parameter.shape) > 1 and id(parameter) not in held
    } - biases
    left_out = matrices | (candidates.keys() - set(sites))
    assert all(matches(name, row.left_out) for name in left_out), left_out
    assert {p for name in left_out for p in matches(name, row.left_out)} == set(row.left_out)
    assert ("experts" in row.notes.split("; ")) == any(
        re.search(r"\.experts\.\d+\.", path) for path in sites
    )

    problem = Problem(model, [batch(), batch()], [batch()], recon="kl")
    with caplog.at_level(logging.WARNING):
        history = decompose(problem, config(sites), quiet=True).history
    assert ("passes run whole" in caplog.text) == ("whole passes" in row.notes)
    assert len({line["step"] for line in history}) == 3
    assert all(math.isfinite(value) for line in history for value in line.values())

    if candidates.keys() - set(sites):
        whole = TokenModel(tiny(family, row.class_name).inner, "logits").eval()
        with pytest.raises(UserError, match="the target calls .* leave it out"):
            prepare(Problem(whole, [batch()], [batch()], recon="kl"), config([*candidates]))


@pytest.mark.slow
@pytest.mark.parametrize("family", BATCHES)
def test_what_needs_more_than_ids_is_refused_for_a_text_in_one_line(
    family: str, tmp_path: Path
) -> None:
    row = table()[family]
    inner = tiny(family, row.class_name).inner
    model = TokenModel(inner, "logits").eval()
    (site, *_) = may_be_sites(model)
    with pytest.raises(UserError, match="TokenModel fails on the first batch .*by name"):
        prepare(Problem(model, [ids()], [ids()]), config([site]))
    inner.save_pretrained(tmp_path / "model")
    wanted = Wanted(
        target=str(tmp_path / "model"),
        revision=None,
        model_class=f"transformers.{row.class_name}",
        output="logits",
        dtype="float32",
        tokenizer=None,
        needs_tokenizer=False,
    )
    said = f"target: a {row.class_name} does not read token ids alone: .*with a Problem"
    with pytest.raises(UserError, match=said) as refusal:
        load_lm(wanted, torch.device("cpu"), folders=())
    assert "\n" not in str(refusal.value)
