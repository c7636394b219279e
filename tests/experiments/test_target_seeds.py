"""`target_seed`: other targets by the same training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spd import settings
from spd.config import UserError, load_config
from spd.experiments.resid_mlp import resid_mlp_decomposition
from spd.experiments.target_training import TargetTrainConfig
from spd.experiments.targets import config_hash, with_seed
from spd.experiments.tms import tms_decomposition
from spd.experiments.tms.train_tms import TMSTrainConfig
from spd.runs.run import load_run, start
from tests.run_fixtures import EXPERIMENTS, make_tms_target
from tests.runs.little_run import little_config

TRAINING = EXPERIMENTS / "tms" / "tms_5-2_target.yaml"
ASKED = ("target=tms_5-2_target.yaml", "target_seed=1", "metrics={}", "figures={}")


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


def test_no_seed_of_one_training_is_one_of_another():
    config = load_config(TMSTrainConfig, TRAINING)
    others = [with_seed(config, seed) for seed in (0, 1, 2)]
    assert others[0] == with_seed(config, None) == config
    seeds = [own.seeds for own in others if isinstance(own, TargetTrainConfig)]
    assert len({seed for own in seeds for seed in own}) == 3 * config.n_seeds
    assert len({own.data_seed for own in others if isinstance(own, TargetTrainConfig)}) == 3
    same = {"seed", "data_seed"}
    assert others[2].model_dump(exclude=same) == config.model_dump(exclude=same)


def test_a_run_on_another_target_is_opened_again_with_its_own_copy(tmp_path: Path):
    """The target is found where its training would have put it."""
    training = with_seed(load_config(TMSTrainConfig, TRAINING), 1)
    name = f"{TRAINING.stem}-{config_hash(training)}"
    target = make_tms_target(settings.targets_root() / name, seed=5)
    run = start(
        little_config(tmp_path, *ASKED), tms_decomposition.build, directory=tmp_path / "a-run"
    )
    loaded = load_run(run)
    assert loaded.config.target_seed == 1
    own = load_run(run, target=target).model.sites["linear1"].target_weight
    assert torch.equal(loaded.model.sites["linear1"].target_weight, own)


def test_a_target_that_is_trained_already_has_no_other_seed(tmp_path: Path):
    config = little_config(tmp_path, "target_seed=3")
    with pytest.raises(
        UserError, match=r"target_seed: 3; the target .*made-target is trained already"
    ):
        tms_decomposition.build(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("module", "config_class", "yaml"),
    [
        (tms_decomposition, "TMSConfig", "tms/tms_5-2_fast_config.yaml"),
        (resid_mlp_decomposition, "ResidMLPConfig", "resid_mlp/resid_mlp1_config.yaml"),
    ],
)
def test_every_toy_asks_for_the_target_of_its_seed(
    module: Any, config_class: str, yaml: str, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int | None] = []

    def resolve(target: str, kind: Any, *, seed: int | None, **_: object) -> Path:
        asked.append(seed)
        raise UserError("enough")

    monkeypatch.setattr(module, "resolve_target", resolve)
    config = load_config(getattr(module, config_class), EXPERIMENTS / yaml, ["target_seed=2"])
    with pytest.raises(UserError, match="enough"):
        module.build(config, torch.device("cpu"))
    assert asked == [2]
