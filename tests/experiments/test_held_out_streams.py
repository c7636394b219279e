"""Whatever is evaluated on held-out data never sees a batch that was trained on."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spd.config import load_config, parse
from spd.experiments.resid_mlp import resid_mlp_decomposition, train_resid_mlp
from spd.experiments.resid_mlp.model import empty_model, initial_weights
from spd.experiments.resid_mlp.resid_mlp_decomposition import ResidMLPConfig
from spd.experiments.resid_mlp.train_resid_mlp import ResidMLPTrainConfig
from spd.experiments.sparse_features import SparseFeatures
from spd.experiments.target_training import N_EVAL_BATCHES, TargetError
from spd.experiments.targets import TrainedTarget, save_target
from spd.experiments.tms import train_tms
from spd.experiments.tms.train_tms import TMSTrainConfig
from spd.settings import PACKAGE_DIR

CPU = torch.device("cpu")
STEPS = 12
TRAINING = {"steps": STEPS, "batch_size": 64, "lr": 1e-3, "n_seeds": 2}
TMS = {"model": {"n_features": 5, "n_hidden": 2}, **TRAINING}
RESID_MLP = {"model": {"n_features": 5, "d_embed": 8, "d_mlp": 4, "n_layers": 1}, **TRAINING}


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return any(torch.equal(a, b) for a in one for b in other)


@pytest.mark.parametrize("name", ["tms", "resid_mlp"])
def test_targets_are_chosen_by_batches_that_they_were_not_trained_on(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, list[Tensor]] = {}
    original = SparseFeatures.__next__

    def watched(self: SparseFeatures) -> Tensor:
        batch = original(self)
        seen.setdefault(self.stream, []).append(batch)
        return batch

    monkeypatch.setattr(SparseFeatures, "__next__", watched)
    with pytest.raises(TargetError):  # too short a training, after all of it
        if name == "tms":
            train_tms.train(parse(TMSTrainConfig, TMS, "test"), CPU)
        else:
            train_resid_mlp.train(parse(ResidMLPTrainConfig, RESID_MLP, "test"), CPU)
    assert set(seen) == {"target train", "target eval"}
    trained, held_out = seen["target train"], seen["target eval"]
    assert len(trained) == STEPS and len(held_out) >= N_EVAL_BATCHES
    assert not same(trained, held_out)
    assert same(held_out, held_out[:1]) and not same(trained[:1], trained[1:])


def test_a_residual_mlp_is_evaluated_on_another_stream_than_it_is_decomposed_on(tmp_path: Path):
    training = parse(ResidMLPTrainConfig, RESID_MLP, "test")
    weights = initial_weights(training.model, generator=torch.Generator().manual_seed(0))
    assert set(weights) == set(empty_model(training.model).state_dict())
    save_target(tmp_path / "target", training, TrainedTarget(weights, {}))
    path = PACKAGE_DIR / "experiments" / "resid_mlp" / "resid_mlp1_config.yaml"
    own = (f"target={tmp_path / 'target'}", "data={}", "batch_size=32", "eval_batch_size=32")
    problem = resid_mlp_decomposition.build(load_config(ResidMLPConfig, path, own), CPU)
    trained = list(islice(iter(problem.train_batches), 5))
    held_out = list(islice(iter(problem.eval_batches), 5))
    assert not same(trained, held_out)
    assert all(batch.any() for batch in (*trained, *held_out))
