"""The commands that look at a finished run: what they print, and the status that they end with."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spd.analysis import adversary, causes
from spd.experiments.tms.tms_decomposition import build
from spd.runs.run import start
from tests.runs.little_run import little_config, status_of
from tests.solved_toy import solved_toy


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysed")
    config = little_config(folder, "n_eval_batches=2", "metrics={}", "figures={}")
    return start(config, build, directory=folder / "a-run")


def test_a_run_that_is_not_solved_ends_with_1_and_names_every_point(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    assert status_of(causes.main, run) == 1
    out = capsys.readouterr().out
    assert "not solved:" in out and "linear1: faithful: W - V U is" in out
    assert "20 steps of 0.1, the worst of 3 starts" in out
    assert "held-out rows with input" in out


def test_a_checkpoint_changed_by_hand_is_judged_unverified_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    (path,) = run.glob("checkpoints/00000006/model.safetensors")
    tensors = load_file(path)
    before = path.read_bytes()
    save_file({name: 0 * t if name.endswith("U") else t for name, t in tensors.items()}, path)
    try:
        assert status_of(causes.main, run) == 2
        assert "model.safetensors" in capsys.readouterr().err
        assert status_of(causes.main, run, "--unverified") == 1
        assert "linear1: faithful: W - V U is 1 of W" in capsys.readouterr().out
    finally:
        path.write_bytes(before)


def test_where_there_is_no_run_nothing_can_be_judged(tmp_path: Path):
    assert status_of(causes.main, tmp_path) == 2
    assert status_of(adversary.main, tmp_path) == 2


def test_the_ladder_is_printed_and_kept(run: Path, capsys: pytest.CaptureFixture[str]):
    assert status_of(adversary.main, run, "--steps", "3", "--restarts", "2") == 0
    out = capsys.readouterr().out
    for rung in ("unmasked", "stochastic", "importances", "rounded at 0.5", "ablated"):
        assert rung in out
    assert "one source for the whole batch, 3 steps" in out
    kept = json.loads((run / adversary.ANALYSIS).read_text(encoding="utf-8"))
    assert kept["n_steps"] == 3 and kept["n_restarts"] == 2 and kept["checkpoint"] == 6
    assert [len(curve) for curve in kept["adversary"].values()] == [4, 4]


@pytest.mark.parametrize("words", [("--steps", "0"), ("--restarts", "-1"), ("--steps", "many")])
def test_a_wrong_number_is_named(run: Path, words: tuple[str, str]):
    assert status_of(adversary.main, run, *words) == 2


def test_the_table_has_a_line_for_each_site():
    prepared = solved_toy()
    found = causes.causes_of(
        prepared.objective.model,
        prepared.problem,
        prepared.eval_batches,  # pyright: ignore
    )
    head, allowed, *lines = causes.table(found)
    assert head.split()[0] == "site" and "at most" in allowed
    assert [line.split()[0] for line in lines] == list(prepared.objective.model.sites)
