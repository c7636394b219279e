"""Mistakes between a decomposition and a target that is still to be trained."""

from pathlib import Path

import pytest
import torch

from spd import settings
from spd.config import UserError, load_config
from spd.experiments.tms.tms_decomposition import TMSConfig, build

CONFIG = settings.PACKAGE_DIR / "experiments" / "tms" / "tms_5-2_config.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sites={linaer1: 20}", "sites: 'linaer1' matches no module; did you mean 'linear1'"),
        ("sites={'*': 20}", "once|only"),
        ("data.synced_inputs=[[0, 5]]", "data: synced_inputs names input 5"),
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
