"""Small targets that the unit tests decompose, and the shortest way to decompose them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.config import parse
from spd.importance import AffineImportanceConfig, ImportanceConfig, MLPImportanceConfig
from spd.losses import loss_terms
from spd.objective import Objective
from spd.problem import Problem, ReconKind
from spd.spd_config import Execution, SPDConfig

MLP_SITES = {"first": 7, "deep.mid": 5, "last": 9}
N_SAMPLES = 3
ALL_LOSSES: dict[str, Any] = {
    "faithfulness": {"coeff": 1.0},
    "importance_minimality": {"coeff": 0.3, "pnorm": 0.7},
    "schatten": {"coeff": 0.1, "pnorm": 1.3},
    "out_recon": {"coeff": 0.5},
    "recon": {"coeff": 0.6},
    "recon_layerwise": {"coeff": 0.7},
    "stochastic_recon": {"coeff": 0.8, "n_samples": N_SAMPLES},
    "stochastic_recon_layerwise": {"coeff": 0.9, "n_samples": N_SAMPLES},
}


class MLP(nn.Module):
    """last(relu(deep.mid(relu(first(x))))), three matrices of different sizes; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.deep = nn.ModuleDict({"mid": nn.Linear(6, 5, bias=False)})
        self.last = nn.Linear(5, 3)
        self.n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return self.last(self.deep["mid"](self.first(x).relu()).relu())


class Logits(nn.Module):
    """A user's own module around a Hugging Face model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits


class TokenModel(nn.Module):
    """Token ids → embedding → logits."""

    def __init__(self, vocab: int = 11, d: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.mid = nn.Linear(d, d)
        self.lm_head = nn.Linear(d, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.mid(self.embed(tokens)).relu())


class TiedMLP(nn.Module):
    """The toy model of superposition: `dec` is the transpose of `enc`."""

    def __init__(self, n: int = 5, hidden: int = 2) -> None:
        super().__init__()
        self.enc = nn.Linear(n, hidden, bias=False)
        self.dec = nn.Linear(hidden, n)
        self.dec.weight = nn.Parameter(self.enc.weight.detach().T.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.enc(x)).relu()


def decompose(
    target: nn.Module,
    sites: dict[str, int],
    *,
    n_hidden: int = 3,
    **options: Any,
) -> ComponentModel:
    """A `ComponentModel` with hidden neurons in its importance functions; 0: the affine ones."""
    importance: ImportanceConfig = (
        MLPImportanceConfig(n_hidden=n_hidden) if n_hidden else AffineImportanceConfig()
    )
    return ComponentModel(target, sites, importance, **options)


def make_config(losses: dict[str, Any], **changes: Any) -> SPDConfig:
    """Not compiled unless said; `changes` may name the keys of `execution` without it."""
    raw = {"sites": MLP_SITES, "losses": losses, "steps": 1, "lr": 1e-3}
    own = {key: changes.pop(key) for key in Execution.model_fields if key in changes}
    return parse(SPDConfig, {**raw, "execution": {"compile": False, **own}, **changes}, "test")


def make_objective(
    model: ComponentModel, losses: dict[str, Any], recon: ReconKind = "mse"
) -> Objective:
    """The objective of a model that has its sites already."""
    nothing = iter(())
    problem = Problem(model.target, nothing, nothing, recon=recon)
    return Objective(model, make_config(losses).losses, problem.recon)


def terms_of(
    objective: Objective, batch: Tensor, noise: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The unweighted terms, with their graph; without `noise`, that of step 0."""
    if noise is None:
        noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    ctx = objective.context(batch, torch.tensor(0.0), noise)
    return loss_terms(objective.losses, ctx)


def tensors(values: Iterable[object]) -> list[Tensor]:
    """The same, each of which has to be a Tensor."""
    found = list(values)
    for value in found:
        assert isinstance(value, Tensor), type(value)
    return [value for value in found if isinstance(value, Tensor)]


def inputs_of(model: ComponentModel, batch: Tensor) -> dict[str, Tensor]:
    """What the target feeds to sites that read all positions."""
    inputs = model.target_forward(batch).site_inputs
    return dict(zip(inputs, tensors(inputs.values()), strict=True))
