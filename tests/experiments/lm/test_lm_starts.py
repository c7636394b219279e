"""Several starts of a decomposition of a language model, one after the other."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spd.config import UserError
from spd.experiments.lm.lm_decomposition import LMConfig, build
from spd.reports.results import read_starts
from spd.runs.run import load_run, resume, start
from tests.experiments.lm.test_lm_decomposition import changed, little_fixture, stream_of
from tests.toy import tensors

__all__ = ["little_fixture"]

CPU = torch.device("cpu")
STARTS = {"starts": 3, "n_choice_batches": 2, "halve_at": [0.5]}


def rows(batches: list[Tensor]) -> set[tuple[int, ...]]:
    return {tuple(row) for batch in batches for row in batch.tolist()}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_text_of_the_choice_is_held_out_of_training_evaluation_and_report(
    little: LMConfig, tmp_path: Path, streaming: bool
):
    little = changed(little, **STARTS, eval_batch_size=1)
    config = stream_of(little, tmp_path) if streaming else little
    problem = build(config, CPU)
    choice, held_out = (
        rows(tensors(batches)) for batches in (problem.choice_batches, problem.eval_batches)
    )
    train = rows([next(problem.train_batches) for _ in range(30)])
    assert len(choice) == 2 and len(held_out) == 3, "the report's are among the latter"
    assert not choice & held_out and not choice & train
    assert rows(tensors(build(config, CPU).choice_batches)) == choice


def test_too_little_text_for_the_choice_is_said_before_anything_is_written(
    little: LMConfig, tmp_path: Path
):
    config = changed(little, **STARTS | {"n_choice_batches": 500})
    with pytest.raises(UserError, match="n_choice_batches: 500 batches of 2 held-out sequences"):
        start(config, build)
    assert not (tmp_path / "out" / "little").exists()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_ends_with_the_same_numbers(
    little: LMConfig, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
):
    little = changed(little, **STARTS, eval_batch_size=1)
    config = stream_of(little, tmp_path) if streaming else little
    whole = start(config, build)
    record = read_starts(whole)
    assert record is not None and record.chosen is not None and not record.together
    assert load_run(whole).prepared.config.seed == record.chosen.seed
    assert "All starts side by side" in (whole / "report.html").read_text(encoding="utf-8")

    place = tmp_path / "stopped"
    seen = []

    def copied(source: Path, target: Path, **options: object) -> Path:
        if not seen:
            seen.append(target)
            raise KeyboardInterrupt
        return original(source, target, **options)  # pyright: ignore[reportArgumentType]

    original = shutil.copytree
    monkeypatch.setattr("spd.runs.kept_starts.shutil.copytree", copied)
    with pytest.raises(KeyboardInterrupt):
        start(config, build, directory=place)
    assert seen[0].parent == place / "checkpoints"
    resume(LMConfig, build, place)
    for name in ("metrics.jsonl", "starts.json", "checkpoints/00000004/model.safetensors"):
        assert (place / name).read_bytes() == (whole / name).read_bytes()
