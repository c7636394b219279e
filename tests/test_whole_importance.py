"""Importance functions of all sites together: by hand, in chunks, in every way a run is executed."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.components import LinearSubcomponents
from spd.config import UserError, parse
from spd.engine.compilation import CompiledStep
from spd.engine.ensemble import Ensemble, StepInputs
from spd.engine.prepare import prepare
from spd.engine.sequential import Sequential
from spd.importance import (
    Chunk,
    GlobalMLPImportanceConfig,
    SharedMLPImportance,
    SharedMLPImportanceConfig,
    SiteSize,
    TransformerImportance,
    TransformerImportanceConfig,
)
from spd.optimize import Interrupted, Silent, run_steps
from spd.problem import Problem
from spd.runs.pretrained import Decomposition
from spd.spd_config import SPDConfig
from tests.little_lm import RandomBatches, little_model
from tests.toy import ALL_LOSSES, MLP, MLP_SITES, TokenModel, make_config, make_objective

MLPS = {"type": "global_mlp", "hidden_widths": [6, 5]}
TRANSFORMER = {"type": "transformer", "d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 12}
CHUNKED = {**TRANSFORMER, "chunks": [{"sites": ["first", "last"]}, {"sites": ["deep.*"]}]}
KINDS = pytest.mark.parametrize("kind", [MLPS, TRANSFORMER, CHUNKED], ids=["mlp", "tr", "chunks"])
SIZES = {"a": SiteSize(3, 4), "b": SiteSize(2, 5)}
LM_SITES = {"model.layers.*.mlp.*_proj": 6, "model.embed_tokens": 5, "lm_head": 3}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def spec(raw: dict[str, Any]) -> Any:
    return make_config({"recon": {"coeff": 1.0}}, importance=raw).importance


def made(raw: dict[str, Any], target: nn.Module | None = None, **options: Any) -> ComponentModel:
    torch.manual_seed(0)
    sites = options.pop("sites", MLP_SITES)
    return ComponentModel(target or MLP(), sites, spec(raw), **options)


def config(raw: dict[str, Any], **changes: Any) -> SPDConfig:
    losses = {name: ALL_LOSSES[name] for name in ("faithfulness", "stochastic_recon", "schatten")}
    settings = {"importance": raw, "steps": 6, "save_every": 2, "lr": 1e-2, "n_eval_batches": 1}
    return make_config(losses, **{**settings, **changes})


class Rows:
    """Random rows that know their position."""

    def __init__(self) -> None:
        self.n = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self.n += 1
        return torch.rand(8, 4, generator=torch.Generator().manual_seed(self.n))

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def prepared(raw: dict[str, Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    return prepare(Problem(MLP(), Rows(), Rows()), config(raw, **changes))


# --- N: sizes --------------------------------------------------------------------------------------


def layer_sizes() -> dict[str, SiteSize]:
    """Four layers of width 768, the sites and C of the largest run of the paper."""
    C = {"q": 512, "k": 512, "v": 1024, "o": 1024, "up": 3072, "down": 3584}
    return {
        f"{layer}.{name}": SiteSize(3072 if name == "down" else 768, n)
        for layer in range(4)
        for name, n in C.items()
    }


def test_the_sizes_of_a_transformer_for_67_million_parameters():
    sizes = layer_sizes()
    assert sum(s.d_in for s in sizes.values()) == 27_648
    assert sum(s.C for s in sizes.values()) == 38_912
    whole = TransformerImportanceConfig(d_model=2048, n_layers=8, n_heads=16, d_ff=8192)
    with torch.device("meta"):
        built = whole.build(sizes, generator=seeded())
        d_out = {path: 3072 if path.endswith("up") else 768 for path in sizes}
        parts = [LinearSubcomponents(s.d_in, d_out[p], s.C) for p, s in sizes.items()]
    assert sum(p.numel() for p in built.parameters()) == 539_090_944
    assert whole.n_parameters(sizes) == 539_090_944
    assert sum(p.numel() for part in parts for p in part.parameters()) == 121_110_528


def test_the_sizes_of_layerwise_mlps():
    for d_in, expected in ((5, 1320), (2, 1170)):
        layerwise = SharedMLPImportanceConfig(hidden_widths=(50,))
        function = layerwise.build(20, d_in, generator=seeded())
        assert sum(p.numel() for p in function.parameters()) == expected
        assert layerwise.n_parameters(20, d_in) == expected


def test_initial_weights():
    size = TransformerImportanceConfig(d_model=64, n_layers=1, n_heads=4, d_ff=256)
    network = TransformerImportance(100, 300, size, generator=seeded())
    (block,) = network.blocks
    found = {name: p for name, p in network.named_parameters() if "w_" in name}
    normal = {"w_in": 2 / 100, "w_out": 1 / 64, "blocks.0.w_up": 2 / 64, "blocks.0.w_down": 1 / 256}
    for name, variance in normal.items():
        assert found[name].std().item() == pytest.approx(math.sqrt(variance), rel=0.02), name
    for name in ("w_q", "w_k", "w_v", "w_o"):
        weight = block.get_parameter(name)
        assert weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
        assert weight.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.03)
    assert len(found) == 8 and all(not p.any() for n, p in network.named_parameters() if "b_" in n)


# --- what they compute -----------------------------------------------------------------------------


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {path: torch.randn(3, 7, size.d_in).double() for path, size in SIZES.items()}


def test_the_global_mlp_is_one_of_the_joined_inputs():
    function = GlobalMLPImportanceConfig(hidden_widths=(6,)).build(SIZES, generator=seeded())
    x, (network,) = inputs(), function.double().networks
    assert isinstance(network, SharedMLPImportance)
    z = torch.cat([x["a"], x["b"]], dim=-1)
    w, b = network.weights, network.biases
    expected = F.gelu(z @ w[0] + b[0]) @ w[1] + b[1]
    logits = function(x)
    assert list(logits) == ["a", "b"]
    torch.testing.assert_close(logits["a"], expected[..., :4])
    torch.testing.assert_close(logits["b"], expected[..., 4:])
    normal = GlobalMLPImportanceConfig(hidden_widths=(6,), normalize=True)
    found = normal.build(SIZES, generator=seeded()).double()(x)
    again = function({path: v / v.square().mean(-1, keepdim=True).sqrt() for path, v in x.items()})
    torch.testing.assert_close(found, again)


def test_the_transformer_position_by_position():
    """Against loops over examples, heads and positions."""
    for causal, rotary_base in ((False, 10_000), (True, 10_000), (False, 50)):
        options = {**TRANSFORMER, "causal": causal, "rotary_base": rotary_base}
        size = TransformerImportanceConfig.model_validate(options)
        function = size.build(SIZES, generator=seeded()).double()
        torch.manual_seed(2)
        for name, parameter in function.named_parameters():
            if ".b_" in name:
                nn.init.normal_(parameter)
        x = inputs()
        found = torch.cat(list(function(x).values()), dim=-1)
        for example in range(3):
            joined = torch.cat([normal(v[example]) for v in x.values()], dim=-1)
            expected = by_hand(function.networks[0], joined, rotary_base, causal=causal)
            torch.testing.assert_close(found[example], expected)


def normal(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def by_hand(network: Any, x: Tensor, base: float, *, causal: bool) -> Tensor:
    h = x @ network.w_in + network.b_in
    T, d = h.shape
    for block in network.blocks:
        n, attended = normal(h), torch.zeros_like(h)
        for head in range(2):
            own = slice(4 * head, 4 * head + 4)
            q, k, v = (n @ block.get_parameter(f"w_{name}")[:, own] for name in "qkv")
            for t in range(T):
                seen = range(t + 1 if causal else T)
                products = [turned(q[t], t, base) @ turned(k[s], s, base) for s in seen]
                scores = torch.stack(products) / 2
                p = scores.softmax(dim=0)
                attended[t, own] = sum((p[s] * v[s] for s in seen), torch.zeros(4).double())
        h = h + attended @ block.get_parameter("w_o")
        h = h + F.gelu(normal(h) @ block.w_up + block.b_up) @ block.w_down + block.b_down
    return h @ network.w_out + network.b_out


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """Pairs (i, i + 2) of four entries, by position × base^(−i/2)."""
    out = x.clone()
    for i in range(2):
        angle = position * base ** (-i / 2)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i], out[i + 2] = x[i] * cos - x[i + 2] * sin, x[i + 2] * cos + x[i] * sin
    return out


def test_a_row_without_positions_is_a_sequence_of_one():
    function = spec(TRANSFORMER).build(SIZES, generator=seeded()).double()
    x = {path: v[:, 0] for path, v in inputs().items()}
    alone = function({path: v[:, None] for path, v in x.items()})
    for path, logits in function(x).items():
        torch.testing.assert_close(logits, alone[path][:, 0])


# --- chunks ----------------------------------------------------------------------------------------


def test_a_chunk_reads_its_own_sites_or_those_it_names():
    chunks = (Chunk(sites=("b",)), Chunk(sites=("a",), reads=("*",)))
    function = GlobalMLPImportanceConfig(chunks=chunks).build(SIZES, generator=seeded()).double()
    x = inputs()
    for path in SIZES:
        x[path].requires_grad_()
    logits = function(x)
    assert {path: tuple(z.shape) for path, z in logits.items()} == {"a": (3, 7, 4), "b": (3, 7, 5)}
    of_b = torch.autograd.grad(logits["b"].sum(), [x["a"], x["b"]], allow_unused=True)
    assert of_b[0] is None and of_b[1] is not None
    of_a = torch.autograd.grad(logits["a"].sum(), [x["a"], x["b"]])
    assert of_a[0].any() and of_a[1].any()


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([{"sites": ["a"]}], "importance.chunks: 'b' is in no chunk; every site needs one"),
        (
            [{"sites": ["a", "b"]}, {"sites": ["b"]}],
            r"importance.chunks.1.sites: 'b' is in chunk 0 already",
        ),
        ([{"sites": ["x*"]}], r"importance.chunks.0.sites: 'x\*' matches no site.*sites: a, b"),
        (
            [{"sites": ["*"], "reads": ["c"]}],
            "importance.chunks.0.reads: 'c' matches no site",
        ),
    ],
)
def test_chunks_that_are_none(chunks: list[Any], message: str):
    with pytest.raises(UserError, match=message):
        spec({**MLPS, "chunks": chunks}).build(SIZES, generator=seeded())


def test_heads_of_an_even_width():
    with pytest.raises(
        UserError, match="d_model is 8 and n_heads 3; each head needs the same even"
    ):
        spec({**TRANSFORMER, "n_heads": 3})


# --- in a model ------------------------------------------------------------------------------------


@KINDS
def test_every_site_gets_its_own_logits(kind: dict[str, Any]):
    model = made(kind)
    inputs = model.target_forward(torch.randn(8, 4)).site_inputs
    assert model.importance is not None
    logits = model.importance_logits(inputs)
    assert {path: z.shape for path, z in logits.items()} == {
        path: (8, C) for path, C in MLP_SITES.items()
    }
    g = model.importances(torch.randn(8, 4)).lower
    assert list(g) == list(model.sites)


@KINDS
def test_parameters_are_there_once_and_saved_whole(kind: dict[str, Any]):
    model, other = made(kind, seed=0), made(kind, seed=1)
    names = model.subcomponent_parameters()
    assert len({id(p) for p in names.values()}) == len(names)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in names.values()}
    assert any(name.startswith("importance.networks.0.") for name in names)
    batch = torch.randn(8, 4)
    first, second = model.importances(batch).lower, other.importances(batch).lower
    assert not torch.equal(first["last"], second["last"])
    other.load_state_dict(model.state_dict())
    for path, g in other.importances(batch).lower.items():
        torch.testing.assert_close(g, first[path])
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin.importances(batch).lower["last"], first["last"])


@KINDS
def test_one_pass_after_another_gives_the_same_gradients(kind: dict[str, Any]):
    batch, grads = torch.rand(6, 4), []
    for sequential in (False, True):
        objective = make_objective(made(kind), ALL_LOSSES)
        noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
        if sequential:
            Sequential(objective)(batch, torch.tensor(0.0), noise)
        else:
            objective(batch, torch.tensor(0.0), noise)[0].backward()
        grads.append({n: p.grad for n, p in objective.model.subcomponent_parameters().items()})
    assert any("importance" in name and g is not None for name, g in grads[0].items())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@KINDS
def test_seeds_side_by_side(kind: dict[str, Any]):
    target = MLP()
    batch, alone, inputs = torch.rand(6, 4), [], []
    objectives = []
    for seed in (0, 1):
        objective = make_objective(made(kind, copy.deepcopy(target), seed=seed), ALL_LOSSES)
        noise = objective.draw_noise(batch, stream="train", seed=seed, step=0)
        objective(batch, torch.tensor(0.0), noise)[0].backward()
        parameters = objective.model.subcomponent_parameters()
        alone.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
        for parameter in parameters.values():
            parameter.grad = None
        inputs.append(StepInputs(batch, torch.tensor(0.0), noise))
        objectives.append(objective)
    ensemble = Ensemble(objectives)
    joint = ensemble.inputs(inputs)
    total, *_ = ensemble.function(*joint)
    total.backward()
    names = objectives[0].model.subcomponent_parameters()
    for name, stack in zip(names, ensemble.parameters, strict=True):
        for member, own in enumerate(alone):
            if stack.grad is None:  # of queries and keys, where a sequence has one position
                assert name not in own and name.endswith(("w_q", "w_k"))
                continue
            torch.testing.assert_close(stack.grad[member], own[name], rtol=1e-4, atol=1e-6)


@KINDS
def test_stopped_and_resumed(kind: dict[str, Any], tmp_path: Path):
    whole = prepared(kind)
    run_steps(whole, Silent(), checkpoints=tmp_path / "whole")
    stops = iter([0, 0, 0, 15])
    with pytest.raises(Interrupted):
        run_steps(
            prepared(kind),
            Silent(),
            checkpoints=tmp_path / "parts",
            stop_requested=lambda: next(stops),
        )
    again = prepared(kind)
    run_steps(again, Silent(), checkpoints=tmp_path / "parts", resume=True)
    own = again.objective.model.subcomponent_parameters()
    for name, value in whole.objective.model.subcomponent_parameters().items():
        assert torch.equal(own[name], value), name


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled():
    objective = make_objective(made(CHUNKED), ALL_LOSSES)
    batch = torch.rand(6, 4)
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    expected, *_ = objective(batch, torch.tensor(0.0), noise)
    compiled, *_ = CompiledStep(objective, True, 10)(batch, torch.tensor(0.0), noise, None, {})
    torch.testing.assert_close(compiled, expected)


def test_saved_without_its_target(tmp_path: Path):
    model = made(CHUNKED)
    Decomposition.of_model(model, spec(CHUNKED)).save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = Decomposition.from_pretrained(tmp_path, target=MLP()).model
    batch = torch.randn(8, 4)
    for path, g in again.importances(batch).lower.items():
        torch.testing.assert_close(g, model.importances(batch).lower[path])


def test_a_language_model_with_its_embedding():
    """An embedding reads ids; its input vectors are the rows that it gives out."""
    torch.manual_seed(0)
    model = ComponentModel(little_model("llama"), LM_SITES, spec(TRANSFORMER))
    tokens = next(RandomBatches(0))
    model.check_importance(tokens)
    g = model.importances(tokens).lower
    assert all(own.shape[:2] == tokens.shape for own in g.values())
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 7
    other = model.importances(changed).lower["lm_head"]
    assert not torch.allclose(other[:, 0], g["lm_head"][:, 0]), "it looks at later positions"
    causal = ComponentModel(little_model("llama"), LM_SITES, spec({**TRANSFORMER, "causal": True}))
    first, second = (causal.importances(x).lower["lm_head"] for x in (tokens, changed))
    torch.testing.assert_close(first[:, :-1], second[:, :-1])
    assert not torch.allclose(first[:, -1], second[:, -1])


# --- what cannot be joined -------------------------------------------------------------------------


class Pooled(nn.Module):
    """One site sees positions, the other their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.pooled = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.each(x).relu().mean(dim=1))


class Flat(nn.Module):
    """Takes the positions of all examples as one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            Pooled(),
            r"'each' has rows of the shape \(2, 3\), but 'pooled' of \(2,\); leave one of them out",
        ),
        (Flat(), r"of 2 examples 'linear' has rows of the shape \(6,\)"),
    ],
)
def test_sites_that_cannot_be_joined_are_refused_in_one_line(target: nn.Module, message: str):
    batch = torch.rand(2, 3, 4)
    losses = {"recon": {"coeff": 1.0}}
    settings = make_config(losses, sites={"*": 3}, importance=TRANSFORMER, n_eval_batches=1)
    with pytest.raises(UserError, match=message) as found:
        prepare(Problem(target, iter([batch]), iter([batch])), settings)
    assert "\n" not in str(found.value)


def test_a_mask_of_the_sites_own_input_is_refused():
    model = made(MLPS)
    with (
        pytest.raises(UserError, match="here one function makes them from the inputs of all sites"),
        model.masked("importances") as target,
    ):
        target(torch.rand(2, 4))


def test_tokens_at_an_embedding_and_vectors_elsewhere_can_be_joined():
    torch.manual_seed(0)
    settings = parse(
        SPDConfig,
        {
            "sites": {"embed": 3, "mid": 2},
            "losses": {"recon": {"coeff": 1.0}},
            "importance": MLPS,
            "steps": 1,
            "lr": 1e-3,
            "n_eval_batches": 1,
        },
        "test",
    )
    tokens = torch.arange(8).reshape(2, 4)
    run = prepare(Problem(TokenModel(), iter([tokens]), iter([tokens]), recon="kl"), settings)
    g = run.objective.model.importances(tokens).lower
    assert {path: tuple(v.shape) for path, v in g.items()} == {"embed": (2, 4, 3), "mid": (2, 4, 2)}
