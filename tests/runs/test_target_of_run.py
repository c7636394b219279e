"""Runs of toys over a target that is given, and arguments that mean nothing for them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd.config import UserError, load_config
from spd.experiments.tms.model import TMSModel
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.runs.run import load_run, start
from tests.run_fixtures import QUICK, TMS_CONFIG, make_tms_target

pytestmark = pytest.mark.undrawn

BATCH = torch.eye(5)


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    target = make_tms_target(folder / "target")
    config = load_config(TMSConfig, TMS_CONFIG, [*QUICK, f"target={target}", "steps=2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return start(config, build, directory=folder / "run")


def test_a_place_and_a_module(run: Path, tmp_path: Path):
    whole = load_run(run)
    place = Path(shutil.copytree(run / "target", tmp_path / "elsewhere"))
    of_place = load_run(run, target=place)
    assert of_place.problem.target_dir == place
    module = load_run(run).problem.target
    assert isinstance(module, TMSModel)
    for path, site in list(module.named_modules()):
        if path in whole.model.sites:
            module.set_submodule(path, site.original)  # pyright: ignore
    of_module = load_run(run, target=module)
    assert of_module.problem.target is module
    for other in (of_place, of_module):
        assert torch.equal(other.model(BATCH), whole.model(BATCH))
    with pytest.raises(UserError, match="TMSModel that is given is decomposed already"):
        load_run(run, target=module)


def test_another_target_is_refused(run: Path, tmp_path: Path):
    other = make_tms_target(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=f"target '{other}': its matrices are others"):
        load_run(run, target=other)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear3 = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear3(x)

    with pytest.raises(UserError, match=f"a Named does not fit the run {run}: .*no module"):
        load_run(run, target=Named())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype: bfloat16; the target of 'tms_5-2' is no model of Hugging"),
        ({"device_map": "auto"}, "device_map: 'auto'; the target of 'tms_5-2' is no model of"),
        ({"target": "/no/such/place"}, "target '/no/such/place': no such file or directory"),
    ],
)
def test_arguments_that_mean_nothing_here(run: Path, arguments: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        load_run(run, **arguments)


def test_a_target_that_the_experiment_makes_has_no_place(tmp_path: Path):
    from tests.little_lm import build as build_little
    from tests.little_lm import little_config, little_model

    directory = start(little_config(), build_little, directory=tmp_path / "run")
    with pytest.raises(UserError, match="'x'; the experiment 'little' makes its target itself"):
        load_run(directory, target="x")
    module = little_model("llama")
    assert load_run(directory, target=module).problem.target is module
