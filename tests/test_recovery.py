"""The known solution of a toy model of superposition is found, from nothing to the verdict."""

from pathlib import Path

import pytest
import torch

from spd import settings
from spd.config import load_config
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.optimize import evaluate, prepare, run_steps
from spd.tracking import NullTracker

CONFIG = settings.PACKAGE_DIR / "experiments" / "tms" / "tms_5-2_config.yaml"
FASTER = (
    "steps=12000",
    "batch_size=512",
    "lr=1e-2",
    "lr_schedule={type: half_cosine}",
    "tied_sites=[]",
    "lower_leak=gradient",
    "figures={}",
)


@pytest.mark.slow
@pytest.mark.compiled
def test_tms_5_2_is_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The published problem, with settings that need 27 times fewer examples than the published ones.

    Seed 0 is the first of those tried and not chosen for its result. With these settings seeds 0, 3
    and 4 were tried and all three solved, first without an error after 4,000 to 7,000 steps, with an
    ML2R of 1.006 to 1.007. Over 16,000 steps seeds 0, 1 and 2 were solved, over 8,000 steps seeds 0,
    1 and 2, but not seed 3.
    """
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))  # so that the target is trained here, too
    torch.set_num_threads(1)
    config = load_config(TMSConfig, CONFIG, [*FASTER, "seed=0"])
    prepared = prepare(build(config, torch.device("cpu")), config)
    model = run_steps(prepared, NullTracker())
    values = evaluate(prepared)

    assert values["eval/solved"] == 1.0 and values["eval/errors/total"] == 0.0
    assert values["eval/mmcs/linear1"] >= 0.999
    assert abs(values["eval/ml2r/linear1"] - 1) <= 0.01
    assert values["eval/alive/linear1"] == values["eval/alive/linear2"] == 5
    assert values["eval/loss/faithfulness"] < 1e-4

    # the same without the figures of merit: the subcomponents that feature j needs alone rebuild
    # what the matrix makes of it, one for every feature, each another one
    site = model.sites["linear1"]
    probes = 0.75 * torch.eye(5)
    g = model.causal_importances(model.target_forward(probes).site_inputs).lower["linear1"]
    needed = g.argmax(dim=-1)
    assert len(set(needed.tolist())) == 5
    for j, c in enumerate(needed.tolist()):
        alone = site.subcomponents.V[j, c] * site.subcomponents.U[c]
        column = site.weight[:, j]
        assert (alone - column).norm() < 0.03 * column.norm()
