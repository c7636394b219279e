"""A loss that carries state from step to step, and short runs with it, with groups of parameters and a
phase before the first step; as a script, in two processes.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from spd.component_model import ComponentModel
from spd.engine import checkpoint
from spd.engine.distributed import is_leader, joined
from spd.engine.prepare import Prepared, prepare
from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures
from spd.losses import LossSpec, StepContext
from spd.optimize import Silent, run_steps
from spd.problem import Problem
from spd.spd_config import SPDConfig
from tests.toy import MLP, make_config

LOSSES = {"faithfulness": {"coeff": 1.0}, "stochastic_recon": {"coeff": 1.0}}
GROUPS: dict[str, Any] = {
    "components": {"grad_clip": 0.1},
    "importances": {"lr": 3e-3, "lr_schedule": {"type": "linear"}},
}
WARM_UP: dict[str, Any] = {"steps": 3, "lr": 1e-2}


class RunningMinimality(LossSpec):
    """Σ_l Σ_c of the mean importance times its running mean, which is what the term carries."""

    type: Literal["running_minimality"] = "running_minimality"
    decay: float = 0.5

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.upper:
            yield (self._mean(ctx, path) * ctx.carried(path)).sum()

    def initial_state(self, model: ComponentModel) -> dict[str, Tensor]:
        return {path: torch.ones(site.C) for path, site in model.sites.items()}

    def next_state(self, ctx: StepContext) -> dict[str, Tensor]:
        return {
            path: self.decay * ctx.carried(path) + (1 - self.decay) * self._mean(ctx, path)
            for path in ctx.ci.upper
        }

    def _mean(self, ctx: StepContext, path: str) -> Tensor:
        return torch.stack([ctx.mean(g) for g in ctx.ci.upper[path].unbind(dim=-1)])


def config(**changes: Any) -> SPDConfig:
    settings = {"steps": 6, "log_every": 1, "eval_every": 6, "save_every": 2, "lr": 1e-2}
    own = {**settings, **GROUPS, "faithfulness_warmup": WARM_UP}
    plain = make_config(LOSSES, **{**own, **changes})
    losses = {**plain.losses, "running": RunningMinimality(coeff=1.0)}
    return plain.model_copy(update={"losses": losses})


def prepared(settings: SPDConfig) -> Prepared:
    def batches(stream: str) -> SparseFeatures:
        data = SparseFeatureConfig(feature_probability=0.5)
        return SparseFeatures(data, 4, batch_size=8, seed=settings.seed, stream=stream)

    torch.manual_seed(0)  # one target for all seeds
    return prepare(Problem(MLP(), batches("train"), batches("eval")), settings)


def result_of(run: Prepared, checkpoints: Path) -> dict[str, Tensor]:
    """The parameters at the end, and what the newest checkpoint carries."""
    newest = checkpoint.latest(checkpoints)
    assert newest is not None
    carried = checkpoint.load_state(newest)["carried"]
    parameters = run.objective.model.subcomponent_parameters()
    return {**{n: p.detach().clone() for n, p in parameters.items()}, **carried}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with joined():
        run = prepared(config())
        run_steps(run, Silent(), checkpoints=folder / "checkpoints")
        if is_leader():
            save_file(result_of(run, folder / "checkpoints"), folder / "result.safetensors")
        raise SystemExit(0)  # the other waits for the leader
