"""`null: true`: the same pipeline on a target that was never trained, beside which a report shows a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spd.config import UserError, load_config, parse, read_yaml, to_yaml
from spd.experiments.resid_mlp.resid_mlp_decomposition import ResidMLPConfig
from spd.experiments.resid_mlp.resid_mlp_decomposition import build as build_resid_mlp
from spd.experiments.targets import CONFIG_FILE
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.experiments.tms.train_tms import load_tms_target
from spd.reports.report import write_report
from spd.reports.results import read_result
from spd.runs.run import load_run, start
from tests.run_fixtures import EXPERIMENTS, make_resid_mlp_target
from tests.runs.little_run import little_config

pytestmark = pytest.mark.undrawn

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


def test_the_key_is_a_word_in_a_file_and_in_an_override(tmp_path: Path):
    given = little_config(tmp_path)
    path = tmp_path / "null.yaml"
    path.write_text(f"{to_yaml(given)}".replace("'null': false", "null: true"), encoding="utf-8")
    assert "null: true" in path.read_text(encoding="utf-8")
    config = load_config(TMSConfig, path)
    assert config.null and load_config(TMSConfig, path, ["null=false"]) == given
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(TMSConfig, path) == config


def test_the_target_is_as_its_training_begins(tmp_path: Path):
    config = little_config(tmp_path, "null=true", "losses.stochastic_recon.coeff=1")
    trained = build(config.model_copy(update={"null": False}), CPU).target
    null, again = (build(config, CPU) for _ in range(2))
    weight = null.target.get_parameter("linear1.weight")
    assert not torch.equal(weight, trained.get_parameter("linear1.weight"))
    assert torch.equal(weight, again.target.get_parameter("linear1.weight"))
    bound = weight.shape[1] ** -0.5
    assert weight.abs().max() <= bound, "as nn.Linear is initialised"
    assert torch.equal(null.target.get_parameter("linear2.weight"), weight.mT)
    assert null.solution.keys() == {"linear1", "linear2"}
    assert null.target_dir is not None
    _, training = load_tms_target(null.target_dir, CPU)
    own = tmp_path / "made-target" / CONFIG_FILE
    assert training == parse(type(training), read_yaml(own), str(own))


def test_a_training_that_was_never_done_is_enough(tmp_path: Path):
    """Of a training YAML the null target costs no training."""
    config = little_config(tmp_path, "null=true", "target=tms_5-2_target.yaml")
    problem = build(config, CPU)
    assert problem.target_dir is not None and "-null-" in problem.target_dir.name
    assert [path.name for path in problem.target_dir.parent.iterdir()] == [problem.target_dir.name]


def test_residual_mlps_have_it_too(tmp_path: Path):
    make_resid_mlp_target(tmp_path / "target", "resid_mlp1")
    path = EXPERIMENTS / "resid_mlp" / "resid_mlp1_config.yaml"
    overrides = [f"target={tmp_path / 'target'}", "batch_size=8", "eval_batch_size=8"]
    config = load_config(ResidMLPConfig, path, [*overrides, "null=true"])
    null, trained = (
        build_resid_mlp(c, CPU).target for c in (config, config.model_copy(update={"null": False}))
    )
    place = "layers.0.mlp_in.weight"
    assert not torch.equal(null.get_parameter(place), trained.get_parameter(place))


def test_a_null_run_loads_and_says_what_it_is(tmp_path: Path):
    config = little_config(tmp_path, "null=true", "metrics={sparsity: {}}")
    run = start(config, build, directory=tmp_path / "a-null-seed0")
    assert load_run(run).config.null
    assert "A null run:" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_report_shows_the_null_run_beside_or_named(tmp_path: Path):
    own = start(
        little_config(tmp_path, "metrics={sparsity: {}}"), build, directory=tmp_path / "a-seed0"
    )

    def page(config: str = "") -> str:
        given = (own / CONFIG_FILE).read_text(encoding="utf-8")
        (own / CONFIG_FILE).write_text(given.replace("null_run: null", config or "null_run: null"))
        text = write_report(own).read_text(encoding="utf-8")
        (own / CONFIG_FILE).write_text(given)
        return text

    assert 'id="null"' not in page()
    shutil.copytree(own, tmp_path / "a-null-seed0")
    assert 'href="../a-null-seed0/report.html"' in page()
    assert "cannot be shown: it has not finished" in page(f"null_run: {tmp_path / 'nothing'}")
    (tmp_path / "a-null-seed0").rename(tmp_path / "elsewhere")
    named = page(f"null_run: {tmp_path / 'elsewhere'}")
    assert '<th scope="col">null run</th>' in named and "L0 linear1</th>" in named
    assert 'id="null"' not in page()


# --- anchors -----------------------------------------------------------------------------------------


def test_an_inserted_identity_changes_nothing_and_is_to_be_decomposed(tmp_path: Path):
    anchor = ("anchor=[linear1, linear2]", 'sites."anchors.linear1"=6', 'sites."anchors.linear2"=6')
    config = little_config(tmp_path, *anchor)
    plain, anchored = build(little_config(tmp_path), CPU), build(config, CPU)
    x = torch.rand(7, 5)
    assert torch.equal(plain.target(x), anchored.target(x))
    found = {path: anchored.solution[path] for path in anchored.solution.keys() - plain.solution}
    assert {path: (type(p).__name__, p.k) for path, p in found.items()} == {  # pyright: ignore
        "anchors.linear1": ("Dense", 5),
        "anchors.linear2": ("Dense", 2),
    }
    run = start(config, build, directory=tmp_path / "run")
    assert {"anchors.linear1", "anchors.linear2"} <= load_run(run).model.sites.keys()


def test_an_identity_that_is_no_site_is_one_message(tmp_path: Path):
    with pytest.raises(UserError, match=r"anchor: linear1: .* is no site"):
        build(little_config(tmp_path, "anchor=[linear1]"), CPU)


@pytest.mark.slow
def test_an_identity_comes_out_as_exactly_one_part_for_each_of_its_inputs(tmp_path: Path):
    """Rank one each, and no sixth one does anything on any probe."""
    anchor = ["anchor=[linear1]", 'sites."anchors.linear1"=20', "seed=0", "figures={}"]
    path = EXPERIMENTS / "tms" / "tms_5-2_fast_config.yaml"
    done = subprocess.run(
        [sys.executable, "-m", build.__module__, path, *anchor, "--run_dir", tmp_path / "run"],
        env={**os.environ, "SPD_OUT_DIR": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {row.key: row.value for row in read_result(tmp_path / "run" / "result.json").rows}
    assert rows["effect_errors/anchors.linear1"] == 0, "exactly five, which make up the identity"
    assert rows["alive/anchors.linear1"] == 5 and rows["solved"] == 1
