"""docs/methods.md: what it shows is accepted, and what it names is there."""

import re
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter

from spd.config import read_yaml
from spd.config.yaml_file import parse_yaml
from spd.importance import ImportanceConfig
from spd.losses import Loss
from spd.metrics import SCOPES, rung
from spd.registry import EXPERIMENTS
from spd.schedule import ScheduleConfig, Scheduled, value_at
from spd.settings import PACKAGE_DIR, REPO_DIR
from tests.toy import make_config

TEXT = (REPO_DIR / "docs" / "methods.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
VPD = [name for name in EXPERIMENTS if name.endswith("_vpd")]


def test_the_importance_functions_are_accepted():
    shown = parse_yaml(BLOCKS[0])
    spec = TypeAdapter(ImportanceConfig).validate_python(shown["importance"])
    assert [chunk.reads for chunk in spec.chunks] == [None, ("*",)]  # pyright: ignore


def test_the_schedules_are_accepted():
    shown = parse_yaml(BLOCKS[1])
    assert shown.keys() == {"gamma", "p", "coeff", "lr_schedule"}
    ScheduleConfig.model_validate(shown.pop("lr_schedule"))
    ends = {}
    for name, raw in shown.items():
        value = TypeAdapter(Scheduled).validate_python(raw)
        ends[name] = float(value_at(value, torch.tensor(1.0)))
    assert ends == pytest.approx({"gamma": 0.01, "p": 0.4, "coeff": 1e-4})


def test_the_names_are_those_of_the_code():
    losses = {spec.model_fields["type"].default for spec in get_args(Loss)}
    assert {"activity", "frequency", "faithfulness", "masked_recon"} <= losses
    for name in ("activity", "frequency", "masked_recon"):
        assert f"`{name}" in TEXT
    assert f"`ladder/{rung(20, SCOPES[0])}`" in TEXT
    for name in re.findall(r"`((?:tms|resid_mlp|pydoc|pile)\w*[-\w]*_vpd)`", TEXT):
        assert name in VPD
    config = make_config({"faithfulness": {"coeff": 1.0}})
    assert {"components", "importances", "lr_schedule"} <= config.model_dump().keys()


@pytest.mark.parametrize("name", VPD)
def test_the_recipes_are_what_the_page_says_of_them(name: str):
    """The same target as without `_vpd`, untied; half of the examples adversarial; γ from 1 to 0.01."""
    raw = read_yaml(PACKAGE_DIR / EXPERIMENTS[name].config)
    of_2025 = EXPERIMENTS.get(name.replace("_vpd", "")) or EXPERIMENTS["pydoc_mlp"]
    if name != "pile_67m_vpd":
        assert raw["target"] == read_yaml(PACKAGE_DIR / of_2025.config)["target"]
    assert "tied_sites" not in raw and raw["lower_leak"] == "gradient"
    source, losses = raw["losses"]["masked_recon"]["source"], raw["losses"]
    assert (source["type"], source["adv_fraction"]) == ("merged", 0.5)
    assert losses["activity"]["penalty"] == losses["frequency"]["penalty"]
    gamma = losses["activity"]["penalty"]["gamma"]
    assert gamma == {"peak": 1.0, "segments": [{"to": 0.01}]}
    assert losses["activity"]["coeff"] == pytest.approx(2 * losses["frequency"]["coeff"])
    assert losses["faithfulness"]["normalization"] == "relative"
    assert raw["components"] == raw["importances"] == {"grad_clip": 1.0}
