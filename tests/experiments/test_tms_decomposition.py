"""Mistakes between a decomposition and a target that is still to be trained."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spd import settings
from spd.config import UserError, load_config, parse, read_yaml, to_yaml
from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures
from spd.experiments.targets import TrainedTarget, save_target
from spd.experiments.tms.model import initial_weights, with_tie
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.experiments.tms.train_tms import TMSTrainConfig
from spd.problem import Problem

CONFIG = settings.PACKAGE_DIR / "experiments" / "tms" / "tms_5-2_config.yaml"


def trained(folder: Path, **changes: Any) -> Path:
    """A target directory of `tms_5-2`, whose training differed in this."""
    path = CONFIG.with_name("tms_5-2_target.yaml")
    raw = read_yaml(path)
    for key, value in changes.items():
        raw[key] = {**raw[key], **value}
    config = parse(TMSTrainConfig, raw, str(path))
    weights = initial_weights(config.model, generator=torch.Generator().manual_seed(0))
    own = {name: value.contiguous().clone() for name, value in with_tie(weights).items()}
    save_target(folder, config, TrainedTarget(own, {}))
    return folder


def built(folder: Path, *overrides: str) -> Problem:
    own = (f"target={folder}", *overrides)
    return build(load_config(TMSConfig, CONFIG, own), torch.device("cpu"))


ODD = {"value_range": [-3.0, -1.0], "synced_inputs": [[0, 1], [2, 3, 4]]}


def test_what_is_not_given_is_as_the_target_was_trained(tmp_path: Path):
    folder = trained(tmp_path / "odd", data={**ODD, "feature_probability": 0.3})
    problem = built(folder, "data={}", "tied_sites=null")
    assert problem.tied_sites == (("linear1", "linear2"),)
    batch = next(iter(problem.train_batches))
    active = batch != 0
    assert batch[active].max() <= -1.0 and batch[active].min() >= -3.0
    assert torch.equal(active[:, 0], active[:, 1]) and torch.equal(active[:, 2], active[:, 4])
    assert active[:, 0].float().mean() == pytest.approx(1 - 0.7**2, abs=0.05)
    assert (active[:, 0] != active[:, 2]).any()


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (
            "{value_range: [0, 1]}",
            [
                r"data.value_range: \[0.0, 1.0\] here, but the target was trained with \[-3.0, -1.0\]"
            ],
        ),
        (
            "{synced_inputs: []}",
            [r"data.synced_inputs: \[\] here, .* with \[\[0, 1\], \[2, 3, 4\]\]"],
        ),
        (
            "{feature_probability: 0.5, value_range: [0, 1]}",
            [
                "data.feature_probability: 0.5 here, but the target was trained with 0.05",
                "value_range",
            ],
        ),
    ],
)
def test_a_difference_names_both_values(data: str, messages: list[str], tmp_path: Path):
    folder = trained(tmp_path / "odd", data=ODD)
    with pytest.raises(UserError) as caught:
        built(folder, f"data={data}")
    for message in messages:
        assert re.search(message, str(caught.value))
    wanted = built(folder, f"data={data}", "data.unlike_target=true")
    assert isinstance(wanted.train_batches, SparseFeatures)
    own = wanted.train_batches.config
    assert any(getattr(own, key) != getattr(SparseFeatureConfig(**ODD), key) for key in ODD)


def test_the_tie_is_that_of_the_target(tmp_path: Path):
    tied = trained(tmp_path / "tied")
    untied = trained(tmp_path / "untied", model={"tied_weights": False})
    assert built(tied, "tied_sites=null").tied_sites == (("linear1", "linear2"),)
    assert built(tied, "tied_sites=[]").tied_sites == ()  # each matrix by itself
    assert built(tied, "tied_sites=null", "sites={linear1: 20}").tied_sites == ()
    assert built(untied, "tied_sites=null").tied_sites == ()
    with pytest.raises(UserError, match=r"linear1', 'linear2.* here, .*tied_weights false"):
        built(untied)
    with pytest.raises(UserError, match="sites: linear1 20, linear2 5, but one matrix"):
        built(tied, "tied_sites=null", "sites.linear2=5")


def test_a_run_keeps_what_it_was_given_and_inherits_the_rest_again(tmp_path: Path):
    path = tmp_path / "config.yaml"
    given = load_config(TMSConfig, CONFIG, ["data={value_range: [-3, -1]}", "tied_sites=null"])
    path.write_text(to_yaml(given), encoding="utf-8")
    assert load_config(TMSConfig, path) == given
    assert given.data.synced_inputs is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{n_active: 2}", "n_active goes with"),
        ("{n_active: 2, generation: at_least_zero_active}", "n_active goes with"),
        ("{generation: exactly_n_active}", "n_active goes with"),
        ("{value_range: [1, 0]}", "low < high"),
    ],
)
def test_inputs_that_do_not_go_together_or_with_the_target(data: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        built(trained(tmp_path / "target"), f"data={data}")


def test_a_target_of_another_sort_of_inputs(tmp_path: Path):
    exactly = {"generation": "exactly_n_active", "n_active": 2}
    folder = trained(tmp_path / "target", data=exactly)
    batches = built(folder, "data={}").train_batches
    assert torch.equal((next(iter(batches)) != 0).sum(dim=-1), torch.full((4096,), 2))
    other = "data={generation: at_least_zero_active, unlike_target: true}"
    assert (next(iter(built(folder, other).train_batches)) != 0).float().mean() < 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sites={linaer1: 20}", "sites: 'linaer1' matches no module; did you mean 'linear1'"),
        ("sites={'*': 20}", "once|only"),
        ("data.synced_inputs=[[0, 5]]", "data: synced_inputs names input 5"),
        ("data.value_range=[-1, 1]", "data.value_range: .*-1.0, 1.0.* here"),
    ],
)
def test_nothing_is_trained_for_a_mistake(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    config = load_config(TMSConfig, CONFIG, [override])
    with pytest.raises(UserError, match=message):
        build(config, torch.device("cpu"))
    assert not (tmp_path / "out").exists()
