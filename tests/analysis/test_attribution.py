"""Graphs of causes: of a prompt, pruned for one behaviour; what attention and neurons share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spd.analysis import attribution
from spd.analysis.attention import HeadOf, interaction, rotation, score_parts, static_strength
from spd.analysis.behaviour import Pruning, prune
from spd.analysis.edges import INPUT
from spd.analysis.graph import Wanted, graph_of
from spd.component_model import ComponentModel
from spd.components import LinearSubcomponents
from spd.config import UserError, parse
from spd.engine.prepare import prepare
from spd.experiments.lm.data.text import TextConfig
from spd.experiments.tms.tms_decomposition import build
from spd.importance import AffineImportance
from spd.problem import Problem
from spd.runs.run import Run, start
from tests.analysis.test_editing import planted
from tests.little_lm import build as build_lm
from tests.little_lm import little_config as lm_config
from tests.runs.little_run import little_config, status_of


def always_a_little_on() -> tuple[ComponentModel, Problem]:
    """The planted text model with every subcomponent on everywhere, its own token's fully."""
    model, problem = planted()
    own = model.sites["map"].importance
    assert isinstance(own, AffineImportance)
    with torch.no_grad():
        own.bias.fill_(0.2)
    return model, problem


def test_the_graph_of_a_prompt_has_the_planted_cause():
    """Token 4 → subcomponent 4 → token 5; shares of an output add up to 1 with signs left out."""
    model, problem = always_a_little_on()
    ids = torch.tensor([[3, 4]])
    graph = graph_of(model, problem, ids, [Wanted(1, 5), Wanted(1, 4)])
    names = [(node.kind, node.position, node.item) for node in graph.nodes]
    component, token = names.index(("component", 1, 4)), names.index(("input", 1, 4))
    output = names.index(("output", 1, 5))
    edges = {(s, t): (value, share) for s, t, value, share in graph.edges}
    value, share = edges[(token, component)]
    assert value == pytest.approx(3.0) and share == pytest.approx(1.0)
    strongest = max((e for e in graph.edges if e[1] == output), key=lambda e: e[2])
    assert strongest[0] == component and strongest[2] > 0.5
    assert sum(abs(e[3]) for e in graph.edges if e[1] == output) <= 1 + 1e-5
    for s, t, *_ in graph.edges:
        assert graph.nodes[s].position == graph.nodes[t].position, "the map mixes no positions"
        assert graph.nodes[t].kind != "input" and graph.nodes[s].kind != "output"
    few = graph_of(model, problem, ids, [Wanted(1, 5)], n_nodes=1)
    assert [n.item for n in few.nodes if n.kind == "component"] in ([3], [4])
    assert few.n_left_out == 23
    with pytest.raises(UserError, match="of one example; 2 are given"):
        graph_of(model, problem, ids.reshape(2, 1), [Wanted(0, 5)])


@pytest.mark.slow
def test_pruned_for_a_behaviour_one_node_is_left():
    """Of 24 nodes that are on, the one that writes token 5; the adversary finds nothing against it."""
    model, problem = always_a_little_on()
    ids = torch.tensor([[3, 4]])
    how = Pruning(steps=60, lr=0.1, minimality=0.1)
    found = prune(model, problem, ids, position=1, wanted=5, how=how)
    assert found.before.n_nodes == 24 and found.after.n_nodes == 1
    assert found.importances["map"][0, 1, 4] > 0.5
    p = model(ids, {})[0, 1].softmax(dim=-1)[5].item()
    assert found.after.target == pytest.approx(p, rel=1e-5)
    assert found.after.adversarial > 0.8 * p
    nothing = prune(model, problem, ids, position=1, wanted=5, how=how._replace(minimality=50.0))
    assert nothing.after.n_nodes == 0 and nothing.after.masked < 0.7 * p


def test_what_is_pruned_without_an_adversary_looks_better_than_it_is():
    """Two subcomponents that cancel are thrown out by masks g alone, half on they do harm."""
    model, problem = always_a_little_on()
    site = model.sites["map"]
    with torch.no_grad():
        site.subcomponents.V[4, 8] = site.subcomponents.V[4, 9] = 1.0
        site.subcomponents.U[8] = 0.6 * torch.eye(12)[5]
        site.subcomponents.U[9] = -0.6 * torch.eye(12)[5]
        site.own_importance().get_parameter("weight")[8:10] = 0.0
    ids = torch.tensor([[3, 4]])
    found = prune(model, problem, ids, position=1, wanted=5, how=Pruning(steps=1))
    own = found.before
    assert own.masked == pytest.approx(own.target, rel=0.05), "the importances alone look right"
    assert own.adversarial < own.stochastic
    assert own.adversarial < 0.6 * own.masked
    # the worst of all corners of what is a node at that position, by hand
    g = model.importances(ids).lower["map"].clamp(0, 1)
    worst = 1.0
    for corner in range(4):
        mask = torch.ones_like(g)
        for bit, c in enumerate((8, 9)):
            mask[0, 1, c] = 1.0 if corner >> bit & 1 else g[0, 1, c]
        p = model(ids, {"map": mask})[0, 1].softmax(dim=-1)[5].item()
        worst = min(worst, p)
    assert own.adversarial <= worst + 1e-3


def random_parts(seed: int, d_out: int) -> LinearSubcomponents:
    parts = LinearSubcomponents(6, d_out, 5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        parts.V.copy_(torch.randn(6, 5, generator=generator))
        parts.U.copy_(torch.randn(5, d_out, generator=generator))
    return parts


def rotated(q: Tensor, position: int) -> Tensor:
    """As rotary embeddings are defined: pairs (i, i + d/2) turned by position · base^(−2i/d)."""
    half = len(q) // 2
    out = q.clone()
    for i in range(half):
        angle = torch.tensor(position * 10_000.0 ** (-2 * i / len(q)), dtype=torch.float64)
        out[i] = q[i] * angle.cos() - q[i + half] * angle.sin()
        out[i + half] = q[i] * angle.sin() + q[i + half] * angle.cos()
    return out


def test_the_pairs_of_queries_and_keys_make_up_the_score():
    query, key = random_parts(0, 8), random_parts(1, 4)
    head = HeadOf(slice(4, 8), slice(0, 4))
    x, y = (
        torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i in (2, 3)
    )
    parts = score_parts(query, key, (x, y), (9, 4), head)
    q = x @ (query.V.double() @ query.U.double())[:, head.query]
    k = y @ (key.V.double() @ key.U.double())[:, head.key]
    assert parts.shape == (5, 5)
    score = (rotated(q.detach(), 9) @ rotated(k.detach(), 4)).item()
    assert parts.sum().item() == pytest.approx(score, abs=1e-12)
    assert torch.allclose(rotation(3, 4) @ q.detach(), rotated(q.detach(), 3), atol=1e-14)
    signs = (torch.ones(5), -torch.ones(5))
    strength = static_strength(query, key, head, 5, signs)
    acts = (x @ query.V.double())[:, None] * (y @ key.V.double())
    sizes = query.V.double().norm(dim=0)[:, None] * key.V.double().norm(dim=0)
    assert torch.allclose(strength, -parts / acts * sizes, atol=1e-10)


def test_the_interaction_of_subcomponents_at_neurons():
    U = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # neurons × subcomponents
    found = interaction(U.mT, torch.tensor([[2.0, 1.0], [0.0, 3.0]]))
    assert torch.allclose(found, torch.tensor([[1.0, 0.5], [0.1, 1.0]]))
    idle = interaction(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.ones(1, 2))
    assert idle.tolist() == [[0.0, 0.0], [0.0, 1.0]]


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    config = little_config(folder, "n_eval_batches=2", "metrics={}", "figures={}")
    return start(config, build, directory=folder / "a-run")


def test_the_command_on_a_toy(run: Path, capsys: pytest.CaptureFixture[str]):
    assert status_of(attribution.main, run, "--row", "1", "--output", "2", "0") == 0
    out = capsys.readouterr().out
    assert "What causes '2', '0' at position 0" in out
    data = json.loads((run / "analysis/attribution/graph.json").read_text(encoding="utf-8"))
    assert data["rows"] == [INPUT, "linear1", "linear2", "output"] and data["columns"] == [""]
    assert (run / "analysis/attribution/graph.html").is_file()
    assert status_of(attribution.main, run, "--data", "1") == 0
    record = json.loads((run / "analysis/attribution/data.json").read_text(encoding="utf-8"))
    for (source, _), (target, _), *_ in record["edges"]:
        assert (source, target) in ((INPUT, "linear1"), ("linear1", "linear2"))
    assert status_of(attribution.main, run, "--prompt", "x") == 2
    assert "--prompt: this run's target reads no text" in capsys.readouterr().err
    assert status_of(attribution.main, run, "--row", "100000") == 2
    assert status_of(attribution.main, run, "--output", "7") == 2
    assert "outputs 0 to 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "shown", "columns"),
    [
        ({"bos": True}, "word8 word9", ["word7", "word8", "word9"]),
        ({"lowercase": True}, "WORD8 word9", ["word8", "word9"]),
        ({"bos": True, "lowercase": True}, "WORD8 word9", ["word7", "word8", "word9"]),
        ({"bos": "auto"}, "WORD8 word9", ["?", "word9"]),
    ],
)
def test_a_prompt_is_read_as_the_data_of_the_run(
    data: dict[str, Any], shown: str, columns: list[str]
):
    """Here word7 is the token that a sequence begins with, and no word in capitals is known."""
    problem = build_lm(lm_config(), torch.device("cpu"))
    assert problem.tokenizer is not None
    problem.tokenizer.bos_token = "word7"
    raw = {"source": "a.txt", "eval_frac": 0.5, "context_length": 8, "end_token": "?", **data}
    text = parse(TextConfig, raw, "test")
    prepared = prepare(replace(problem, text=text), lm_config(metrics={}, n_eval_batches=1))
    run = Run(Path("nowhere"), None, prepared, 0, [])
    assert attribution.prompt_of(run, text=shown).columns == columns


def test_a_part_of_a_character_is_shown_by_its_bytes():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)  # no ASCII comes first
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    problem = replace(build_lm(lm_config(), torch.device("cpu")), tokenizer=tokenizer)
    prepared = prepare(problem, lm_config(metrics={}, n_eval_batches=1))
    run = Run(Path("nowhere"), None, prepared, 0, [])
    names = attribution.prompt_of(run, row=0).names
    parts = [name for i, name in names.items() if "\ufffd" in tokenizer.decode([i])]
    assert parts and all(name.startswith("<0x") for name in parts)


@pytest.mark.slow
def test_the_command_on_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sites = {"model.layers.*.mlp.*_proj": 6, "model.layers.*.self_attn.*_proj": 4}
    config = lm_config(sites=sites, metrics={}, n_eval_batches=1, n_report_batches=1)
    run = start(config, build_lm, directory=tmp_path / "run")
    words = ("--prompt", "word7 word8 word9", "--prune", "3", "--nodes", "20", "--name", "own")
    assert status_of(attribution.main, run, *words) == 0
    out = capsys.readouterr().out
    assert "Of this behaviour" in out and "adversarial masks" in out
    data = json.loads((run / "analysis/attribution/own.json").read_text(encoding="utf-8"))
    assert data["columns"] == ["word7", "word8", "word9"]
    assert data["behaviour"]["after"]["n_steps"] == 20
    page = (run / "analysis/attribution/own.html").read_text(encoding="utf-8")
    assert "adversarial masks" in page, "beside the graph, always"
    assert status_of(attribution.main, run, "--data", "1") == 0
    record = json.loads((run / "analysis/attribution/data.json").read_text(encoding="utf-8"))
    assert record["edges"] and record["towards_tokens"]
