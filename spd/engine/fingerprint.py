"""What the present code computes on a few tiny fixed problems: numbers by which a record is found stale.

A run stores them when it begins. A record of it still speaks of this code as long as the same problems
give the same numbers. Nothing here is drawn from torch's global generator.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spd.config import parse
from spd.engine.prepare import prepare
from spd.objective import Objective
from spd.problem import Problem
from spd.spd_config import SPDConfig

RELATIVE_TOLERANCE = 1e-4
"""float32 on another machine stays within it; a changed formula does not"""

_MATRIX_LOSSES = {
    "faithfulness": {"coeff": 1.0},
    "importance_minimality": {"coeff": 0.3, "pnorm": 0.7},
    "schatten": {"coeff": 0.1, "pnorm": 2.0},
    "out_recon": {"coeff": 0.5},
    "recon": {"coeff": 0.6},
    "recon_layerwise": {"coeff": 0.7},
    "stochastic_recon": {"coeff": 0.8, "n_samples": 2},
    "stochastic_recon_layerwise": {"coeff": 0.9},
}
_PENALTIES = {
    "faithfulness": {"coeff": 1.0, "normalization": "relative"},
    "activity": {
        "coeff": {"peak": 0.4, "segments": [{"to": 0.5}]},
        "penalty": {"type": "smooth_l0", "gamma": {"peak": 1.0, "segments": [{"to": 0.01}]}},
    },
    "frequency": {
        "coeff": 0.2,
        "penalty": {"type": "lp", "p": {"peak": 2.0, "segments": [{"to": 0.2}]}},
        "reference_count": 64,
        "half_life": 5.0,
    },
}


@cache
def objective_fingerprint() -> Mapping[str, float]:
    """What `compute_fingerprint` gives, once per process: its code stays what it is."""
    return MappingProxyType(compute_fingerprint())


def compute_fingerprint() -> dict[str, float]:
    """Terms of the objective and norms of its gradient, by problem and name."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        found: dict[str, float] = {}
        for name, (problem, settings) in _problems().items():
            raw = {"steps": 1, "lr": 1e-3, "n_eval_batches": 1, **settings}
            objective = prepare(problem, parse(SPDConfig, raw, name)).objective
            numbers = _numbers(objective, next(problem.train_batches))
            found |= {f"{name}/{key}": value for key, value in numbers.items()}
    return found


def is_stale(stored: Mapping[str, float] | None, present: Mapping[str, float]) -> bool:
    """Whether a stored fingerprint names a number that the present code computes otherwise.

    None, of a run that stored nothing, is stale. What only the present code computes does not count: a
    loss that was added later changes no earlier result.
    """
    return not stored or any(
        key not in present or not math.isclose(value, present[key], rel_tol=RELATIVE_TOLERANCE)
        for key, value in stored.items()
    )


def _numbers(objective: Objective, batch: Tensor) -> dict[str, float]:
    model = objective.model
    parameters = model.subcomponent_parameters()
    values = {
        # every bias 0: on a row of zeros every logit is exactly 0, where the sigmoids have a kink
        name: _fixed(name, parameter.shape) * (0.0 if name.endswith("bias") else 0.8)
        for name, parameter in parameters.items()
    }
    model.load_subcomponents(values)
    draws = objective.draw_noise(batch, stream="train", seed=0, step=0)
    noise = {key: _fixed(key, draw.shape).abs().frac() for key, draw in draws.items()}
    state = objective.begun(objective.initial_state(), batch, seed=0)
    total, terms, _ = objective(batch, torch.tensor(0.25), noise, state=state)
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    numbers = {name: float(value) for name, value in terms.items() if name.startswith("loss/")}
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            numbers[f"gradient/{name}"] = float(gradient.norm())
    return numbers


def _problems() -> dict[str, tuple[Problem, dict[str, Any]]]:
    """By name: a problem, and the settings in which it differs from the others."""
    rows = _fixed("rows", (6, 5)).abs()
    rows[2] = 0.0
    tokens = torch.arange(12).reshape(2, 6) * 5 % 7
    linear, embedding = {"layers.0": 5, "layers.1": 4}, {"embed": 6}
    return {
        "tied": (
            _problem(_Tied(), rows, tied_sites=(("linear1", "linear2"),)),
            {
                "sites": {"linear*": 6},
                # with p = 1 the slope of the sigmoid at exactly 0 tells
                "losses": {**_MATRIX_LOSSES, "importance_minimality": {"coeff": 0.3, "pnorm": 1.0}},
                "importance": _mlp(),
            },
        ),
        "two_layers": (
            _problem(_TwoLayers(), _fixed("inputs", (6, 4)), recon="kl"),
            {
                "sites": linear,
                "losses": _MATRIX_LOSSES,
                "importance": {"type": "affine"},
                "lower_leak": "gradient",
            },
        ),
        "penalties": (
            _problem(_TwoLayers(), _fixed("inputs", (6, 4))),
            {
                "sites": linear,
                "losses": _PENALTIES,
                "importance": {"type": "shared_mlp", "hidden_widths": [3]},
                "lower_leak": "gradient",
            },
        ),
        "adversaries": (
            _problem(_TwoLayers(), _fixed("inputs", (6, 4))),
            {
                "sites": linear,
                "losses": {
                    "masked_recon": {"coeff": 0.5, "source": {"type": "merged", "scope": "bc"}},
                    "stochastic_recon": {"coeff": 0.5, "delta": True},
                },
                "importance": _mlp(),
                "lower_leak": "gradient",
            },
        ),
        "embedding": (
            _problem(_Embedding(), tokens, recon="kl"),
            {
                "sites": embedding,
                "losses": {"embedding_recon": {"coeff": 1.0}, "faithfulness": {"coeff": 1.0}},
                "importance": _mlp(),
            },
        ),
        "unembedding": (
            _problem(_Embedding(), tokens, recon="kl"),
            {
                "sites": embedding,
                "losses": {"embedding_recon": {"coeff": 1.0, "unembed": "head"}},
                "importance": {"type": "affine"},
            },
        ),
    }


def _problem(target: nn.Module, batch: Tensor, **options: Any) -> Problem:
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(_fixed(name, parameter.shape))
        if isinstance(target, _Tied):
            target.linear2.weight = nn.Parameter(target.linear1.weight.mT.clone())
    return Problem(target, _forever(batch), _forever(batch), **options)


def _forever(batch: Tensor) -> Iterator[Tensor]:
    while True:
        yield batch


def _mlp() -> dict[str, Any]:
    return {"type": "mlp", "n_hidden": 3}


def _fixed(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers between −1 and 1 that depend on the name and the shape alone, on every machine."""
    offset = sum(map(ord, name)) % 97
    n = math.prod(shape)
    return ((torch.arange(n) * 37 + offset) % 101).reshape(shape) / 50.0 - 1.0


class _Tied(nn.Module):
    """A toy model of superposition."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(5, 2, bias=False)
        self.linear2 = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x)).relu()


class _TwoLayers(nn.Module):
    """Two matrices with a nonlinearity in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x)))


class _Embedding(nn.Module):
    """Token ids, their embeddings, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))
