"""One pass over data: against plain loops, killed and gone on with, and on toys and text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spd.analysis import importances as command
from spd.analysis.contexts import SampledContexts, by_quantile
from spd.analysis.harvest import Gathered, Harvest, association
from spd.analysis.importances import (
    FILE,
    FOLDER,
    PARTIAL,
    RECORD,
    Options,
    importances,
    load_importances,
    rows,
)
from spd.analysis.memberships import MembershipSample
from spd.analysis.observation import observe, parts_of
from spd.config import UserError
from spd.experiments.tms.tms_decomposition import build
from spd.runs.run import Run, load_run, start
from spd.runs.verify import check_run
from tests.little_lm import RandomBatches, decomposed, little_model
from tests.runs.little_run import little_config, status_of
from tests.solved_toy import columns_of, solved_toy

pytestmark = pytest.mark.undrawn


@pytest.fixture(scope="module", name="directory")
def directory_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gathered")
    return start(little_config(folder), build, directory=folder / "a-run")


@pytest.fixture(name="run")
def run_fixture(directory: Path) -> Run:
    """Without what earlier tests have left."""
    for path in (directory / FOLDER).glob("*"):
        path.unlink()
    return load_run(directory)


class KilledError(Exception):
    pass


def test_killed_and_gone_on_with_it_leaves_the_same_bytes(
    run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch
):
    options = Options(batches=9)
    importances(run, options)
    expected = [(directory / FOLDER / name).read_bytes() for name in (FILE, RECORD)]
    for path in (directory / FOLDER).glob("imp*"):
        path.unlink()
    calls = 0

    def dies(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls in (3, 10):
            raise KilledError
        return observe(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(command, "observe", dies)
    for _ in range(2):
        with pytest.raises(KilledError):
            importances(load_run(directory), options, save_every=2)
        assert (directory / FOLDER / PARTIAL).is_file()
        assert not (directory / FOLDER / RECORD).exists()
    importances(load_run(directory), options, save_every=2)
    assert calls < 3 + 9 + 4, "it goes on, and does not begin anew"
    assert [(directory / FOLDER / name).read_bytes() for name in (FILE, RECORD)] == expected
    assert not (directory / FOLDER / PARTIAL).exists()


def test_a_second_pass_with_the_same_options_reads_what_is_there(
    run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch
):
    first = importances(run, Options(batches=3))
    again = load_importances(directory)
    assert torch.equal(first.statistics.mean, again.statistics.mean)
    assert torch.equal(first.memberships.columns, again.memberships.columns)
    with monkeypatch.context() as patch:
        patch.setattr(command, "observe", None)
        importances(run, Options(batches=3))
    other = importances(load_run(directory), Options(batches=4))
    assert other.statistics.n_positions > first.statistics.n_positions


def test_a_finished_run_stays_what_it_was(run: Run, directory: Path):
    importances(run, Options(batches=2))
    check_run(directory)


def test_damage_and_other_checkpoints_are_one_message(run: Run, directory: Path):
    with pytest.raises(UserError, match="nothing there yet"):
        load_importances(directory)
    importances(run, Options(batches=2))
    path, record = directory / FOLDER / FILE, directory / FOLDER / RECORD
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="is not what was written there"):
        load_importances(directory)
    path.write_bytes(whole)
    told = json.loads(record.read_text())
    record.write_text(json.dumps({**told, "about": {**told["about"], "checkpoint": 4}}))
    with pytest.raises(UserError, match="of the checkpoint of step 4, and the run has come to 6"):
        load_importances(directory)
    record.write_text("[]")
    with pytest.raises(UserError, match="not the record"):
        load_importances(directory)


def test_the_command_prints_the_sites(run: Run, capsys: pytest.CaptureFixture[str]):
    assert status_of(command.main, run.directory, "--batches", "3") == 0
    out = capsys.readouterr().out
    assert "linear1" in out and "on 48 positions of 3 held-out batches" in out
    assert status_of(command.main, run.directory, "--batches", "0") == 2
    assert status_of(command.main, run.directory.parent) == 2
    found = rows(load_importances(run.directory))
    assert len(found) == 12 and found[6]["site"] == "linear2" and found[6]["c"] == 0


# --- what is gathered ----------------------------------------------------------------------------


def of_toy(n_batches: int = 20) -> tuple[Gathered, Tensor]:
    """Of a solved toy, and the rows that were looked at."""
    prepared = solved_toy()
    model = prepared.objective.model
    harvest = Harvest({path: site.C for path, site in model.sites.items()}, "inputs", 5)
    seen = [next(prepared.problem.eval_batches) for _ in range(n_batches)]
    for batch in seen:
        harvest.update(observe(model, prepared.problem, batch))
    return harvest.compute(), torch.cat(seen)  # pyright: ignore[reportArgumentType]


def test_the_contexts_of_a_toy_are_its_inputs():
    """Feature j's subcomponent of linear1 has g = 2 x_j − 0.5."""
    found, inputs = of_toy()
    assert found.kind == "inputs" and found.inputs is not None
    for j, c in enumerate(columns_of(5, 20)):
        on = 2 * inputs[:, j] - 0.5 > 0.1
        assert found.statistics.n_active[c] == on.sum()
        assert found.inputs[c].argmax() == j
        torch.testing.assert_close(found.inputs[c], inputs[on].abs().mean(dim=0))
        best = found.statistics.contexts
        logit = (2 * inputs[:, j] - 0.5).max()
        torch.testing.assert_close(best.scores[c, 0], 1 + 0.01 * (logit - 1))
        assert best.tokens[c, 0, 0, j] == inputs[:, j].max()
        row = int(best.sequences[c, 0])
        assert torch.equal(inputs[row], best.tokens[c, 0, 0])
        torch.testing.assert_close(best.activations[c, 0, 0], inputs[row, j])
        torch.testing.assert_close(found.rms[c], inputs[:, j].square().mean().sqrt())


def test_groups_by_quantile_go_from_the_highest_to_the_lowest():
    found, _ = of_toy()
    c = columns_of(5, 20)[0]
    groups = by_quantile(found.sampled, c, 0, 4)
    assert [len(own) for own in groups] == [8] * 4
    levels = [found.sampled.importances[c, own, 0] for own in groups]
    for high, low in zip(levels[:-1], levels[1:], strict=True):
        assert high.min() >= low.max()
    assert levels[0].max() > 0.9 and levels[-1].min() < 0.4


def test_the_sample_is_uniform_over_the_positions_at_which_one_is_on():
    """Of 4,000 rows of which every second is on, the mean of the chosen rows' numbers."""
    means = []
    for seed in range(20):
        kept = SampledContexts(k=32, left=0, right=0, threshold=0.1, seed=seed)
        for part in torch.arange(4000).split(400):
            g = (part % 2).float()[:, None, None]
            kept.update(part[:, None], g, g)
        chosen = kept.kept.tokens.flatten()
        assert len(chosen.unique()) == 32 and (chosen % 2 == 1).all()
        assert torch.equal(kept.kept.sequences.flatten(), chosen)
        means.append(chosen.double().mean().item())
    spread = 4000 / math.sqrt(12 * 32 * 20)
    assert np.mean(means) == pytest.approx(2000, abs=4 * spread)


def test_the_memory_of_memberships_is_bounded_and_what_is_kept_is_right():
    generator = torch.Generator().manual_seed(0)
    g = torch.rand(3000, 7, generator=generator) * (torch.rand(3000, 7, generator=generator) < 0.3)
    for limits in ({"n_positions": 500}, {"n_entries": 900}):
        made = MembershipSample(7, seed=0, **limits)
        for part in torch.arange(3000).split(100):
            made.update(g[part], part, 0 * part)
        kept = made.compute()
        assert len(made.keys) <= 500 if "n_positions" in limits else len(made.columns) <= 900
        assert kept.n_positions > 100
        expected = g[kept.sequences]
        assert np.array_equal(kept.on().toarray(), (expected > 0.01).int().numpy())
        together = (expected > 0.01).int().mT @ (expected > 0.01).int()
        assert np.array_equal(kept.co_activation().toarray(), together.numpy())
        half = expected.half().float() > 0.5
        assert np.array_equal(kept.on(0.5).toarray(), half.int().numpy())
        with pytest.raises(UserError, match=r"threshold: 0.001; from 0.01"):
            kept.on(0.001)


def test_recall_precision_and_information_of_a_token():
    """1,000 tokens, one of them 50 times, 20 firings, 10 on it."""
    found = association(
        torch.tensor([[10.0], [0.0]]), torch.tensor([50.0, 3.0]), torch.tensor([20]), 1000
    )
    assert found.recall[0].item() == pytest.approx(0.5)
    assert found.precision[0].item() == pytest.approx(0.2)
    assert found.pmi[0].item() == pytest.approx(3.3219, abs=5e-5) == math.log2(10)
    assert found.pmi[1].item() == -math.inf


def test_on_text_tokens_at_firings_and_the_model_s_next_tokens_are_counted():
    model = decomposed(
        little_model("llama"), {"model.embed_tokens": 5, "model.layers.1.mlp.down_proj": 4}
    )
    batches = [next(RandomBatches(seed)) for seed in range(3)]
    C_of = {path: site.C for path, site in model.sites.items()}
    harvest = Harvest(C_of, "tokens", 0)
    probabilities, active, acts = [], [], []
    for batch in batches:
        for part in parts_of(batch, 9):
            harvest.update(observe(model, None, part))
        output, inputs = model.target_forward(batch)
        probabilities.append(output.softmax(dim=-1).flatten(0, 1))
        g = torch.cat(list(model.causal_importances(inputs).upper.values()), dim=-1)
        active.append((g.flatten(0, 1) > 0.1).detach().float())
        own = [
            site.acts(inputs[path]) * site.subcomponents.U.norm(dim=1)
            for path, site in model.sites.items()
        ]
        acts.append(torch.cat(own, dim=-1).flatten(0, 1).detach())
    found = harvest.compute()
    p, on, tokens = torch.cat(probabilities), torch.cat(active), torch.cat(batches).flatten()
    torch.testing.assert_close(found.rms, torch.cat(acts).square().mean(dim=0).sqrt())
    for row, token in enumerate(found.firings.ids):
        assert torch.equal(found.firings.sums[row], on[tokens == token].sum(dim=0))
        assert found.firings.counts[row] == (tokens == token).sum()
    likely = p.topk(16).indices
    shown = torch.zeros_like(p).scatter(1, likely, p.gather(1, likely))
    order = torch.tensor(found.outputs.ids)
    torch.testing.assert_close(found.outputs.sums, (shown.mT @ on)[order])
    recall = found.input_tokens().recall
    alive = found.statistics.n_active > 0
    torch.testing.assert_close(recall.sum(dim=0)[alive], torch.ones(int(alive.sum())))
    middle = found.sampled.importances[:, :, 20]
    assert (middle[found.sampled.scores > -torch.inf] > 0.1).all()


def test_positions_without_weight_count_nowhere():
    prepared = solved_toy()
    model, batch = prepared.objective.model, next(prepared.problem.eval_batches)
    seen = observe(model, prepared.problem, batch)
    kept = torch.arange(64)[:, None] < 40
    C_of = {path: site.C for path, site in model.sites.items()}
    whole, part = Harvest(C_of, "inputs", 5), Harvest(C_of, "inputs", 5)
    whole.update(seen._replace(kept=kept))
    part.update(observe(model, prepared.problem, batch[:40]))
    found, alone = whole.compute(), part.compute()
    assert found.statistics.n_positions == 40
    assert torch.equal(found.statistics.n_active, alone.statistics.n_active)
    assert torch.equal(found.inputs, alone.inputs)  # pyright: ignore[reportArgumentType]
    assert torch.equal(found.memberships.columns, alone.memberships.columns)
