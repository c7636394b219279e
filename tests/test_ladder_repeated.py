"""The adversary's figures of one run, had in several ways: sign steps magnify rounding."""

from pathlib import Path

import pytest

from spd.config import to_yaml
from spd.experiments.tms.tms_decomposition import build
from spd.run_files import read_metrics
from spd.runs.run import run_seeds, start
from tests.engine.test_distributed import said, torchrun
from tests.runs.little_run import little_config

LADDER = ("metrics={ladder: {}}", "steps=30", "eval_every=10", "lr=1e-2", "eval_batch_size=256")
CLOSE = 0.02


def figures(run: Path) -> dict[tuple[int, str], float]:
    """Every figure of the ladder, by step and key."""
    return {
        (int(line["step"]), key): value
        for line in read_metrics(run)
        for key, value in line.items()
        if key.startswith("eval/ladder")
    }


@pytest.mark.slow
def test_alone_side_by_side_and_in_two_processes(tmp_path: Path):
    """Bit-equal twice, and within 2 % however the run is executed."""
    config = little_config(tmp_path, *LADDER)
    once, again = (figures(start(config, build, directory=tmp_path / n)) for n in ("a", "b"))
    assert once == again
    n_adversarial = sum(key.startswith("eval/ladder/adversarial_20") for _, key in once)
    assert n_adversarial == 8, "at steps 0, 10, 20 and 30, with one source and with one each"

    beside, failures = run_seeds(
        config.model_copy(update={"seeds": (0, 1)}), build, base=tmp_path / "beside"
    )
    assert not failures

    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    module = "spd.experiments.tms.tms_decomposition"
    process = torchrun("-m", module, path, "--run_dir", tmp_path / "two", folder=tmp_path)
    output = said(process)
    assert process.returncode == 0, output

    for name, other in (("side by side", beside[0]), ("two processes", tmp_path / "two")):
        found = figures(other)
        assert found.keys() == once.keys()
        for place, value in once.items():
            assert found[place] == pytest.approx(value, rel=CLOSE, abs=1e-9), (name, place)
