"""A toy model of superposition decomposed by hand: the known solution, with known indices."""

import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.engine.prepare import Prepared, prepare
from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures
from spd.experiments.tms.model import TMSModel
from spd.importance import AffineImportance, AffineImportanceConfig
from spd.losses import Faithfulness
from spd.problem import Dense, Identity, Problem
from spd.spd_config import Execution, SPDConfig

PROBE = 0.75


def columns_of(n_features: int, C: int) -> list[int]:
    """Feature j is implemented by subcomponent `columns_of(...)[j]`."""
    return torch.randperm(C, generator=torch.Generator().manual_seed(1))[:n_features].tolist()


def solved_toy(
    n_features: int = 5, n_hidden: int = 2, C: int = 20, *, hidden_layer: bool = False
) -> Prepared:
    """Every site at its solution; `hidden_layers.0` uses subcomponents 3, 4, … ."""
    problem = toy_problem(n_features, n_hidden, hidden_layer=hidden_layer)
    paths = ["linear1", *(["hidden_layers.0"] if hidden_layer else []), "linear2"]
    config = SPDConfig(
        sites=dict.fromkeys(paths, C),
        losses={"faithfulness": Faithfulness(coeff=1.0)},
        importance=AffineImportanceConfig(),
        steps=1,
        lr=1e-3,
        execution=Execution(compile=False),
        n_eval_batches=2,
    )
    prepared = prepare(problem, config)
    _solve(prepared.objective.model, columns_of(n_features, C))
    return prepared


def toy_problem(n_features: int, n_hidden: int, *, hidden_layer: bool = False) -> Problem:
    """A random target whose columns are long enough to count, and its known solution."""
    target = TMSModel(n_features, n_hidden, int(hidden_layer))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = torch.nn.functional.normalize(
            torch.randn(n_hidden, n_features, generator=generator), dim=0
        )
        target.linear1.weight.copy_(weight)
        target.linear2.weight.copy_(weight.mT)
        for layer in target.hidden_layers.parameters():
            layer.copy_(torch.eye(n_hidden))
    hidden = {"hidden_layers.0": Dense(n_hidden)} if hidden_layer else {}
    return Problem(
        target=target,
        train_batches=_batches(n_features, "train"),
        eval_batches=_batches(n_features, "eval"),
        tied_sites=(("linear1", "linear2"),),
        probes=PROBE * torch.eye(n_features),
        solution={
            "linear1": Identity(n_features),
            **hidden,
            "linear2": Identity(n_features, writes=True),
        },
    )


def set_importance(model: ComponentModel, path: str, weight: Tensor, bias: Tensor) -> None:
    """g_c = weight_c · h_c + bias_c, then clipped."""
    function = model.sites[path].importance
    assert isinstance(function, AffineImportance)
    with torch.no_grad():
        function.weight.copy_(weight)
        function.bias.copy_(bias)


@torch.no_grad()
def _solve(model: ComponentModel, columns: list[int]) -> None:
    for path, site in model.sites.items():
        weight, C = site.target_weight, site.C
        slope, offset = torch.zeros(C), torch.full((C,), -0.05)
        if (
            path == "linear2"
        ):  # shares linear1's subcomponents: h is a cosine, 1 for its own feature
            slope[columns], offset[:] = 40.0, -40.0 * PROBE + 1.0
        else:
            own = columns if path == "linear1" else list(range(3, 3 + len(weight)))
            site.subcomponents.V.zero_()
            site.subcomponents.U.zero_()
            site.subcomponents.V[:, own] = torch.eye(len(weight))
            site.subcomponents.U[own] = weight
            slope[own] = 2.0 if path == "linear1" else 0.0
            offset[own] = -0.5 if path == "linear1" else 1.0
        set_importance(model, path, slope, offset)


def _batches(n_features: int, stream: str) -> SparseFeatures:
    data = SparseFeatureConfig(feature_probability=0.3)
    return SparseFeatures(
        data, n_features, batch_size=64, seed=0, stream=stream, device=torch.device("cpu")
    )
