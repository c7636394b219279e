"""Groups by description length: the numbers of a small table, plain loops, and known mechanisms."""

import json
import math
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from spd.analysis import clustering
from spd.analysis.clustering import Settings, cluster, labels_over, stability
from spd.analysis.description_length import (
    Merging,
    RankPicker,
    alpha_for,
    break_even_alpha,
    change,
    cost,
    merge_all,
    rank_of,
)
from spd.analysis.harvest import Harvest
from spd.analysis.memberships import MembershipSample
from spd.analysis.observation import observe
from spd.analysis.partitions import hamming_distance, matching_distance, rand_distance
from spd.config import UserError
from spd.experiments.tms.tms_decomposition import build
from spd.runs.run import start
from spd.runs.verify import check_run
from tests.runs.little_run import little_config, status_of
from tests.solved_toy import columns_of, solved_toy

# eight positions, five subcomponents
ON = np.array([[int(c) for c in row] for row in ["11000"] * 3 + ["10000", "00110"] + ["00100"] * 2])
ON = np.vstack([ON, [[0, 0, 0, 1, 1]]])


def merged(alpha: float, *, together: bool = False) -> Merging:
    return merge_all(sp.csr_array(ON), alpha=alpha, together=together)


@pytest.mark.parametrize(
    ("alpha", "changes"),
    [
        (1.0, [-9.185065, -4.735337, -1.264663, 12.0]),
        (0.5, [-9.685065, -5.235337, -3.764663, 2.0]),
    ],
)
def test_the_merges_of_a_small_table(alpha: float, changes: list[float]):
    found = merged(alpha)
    assert found.sizes.tolist() == [4, 3, 3, 2, 1]
    assert [(m.i, m.j) for m in found.merges] == [(0, 1), (3, 4), (2, 3), (0, 2)]
    assert [m.change for m in found.merges] == pytest.approx(changes, abs=1e-6)
    assert found.best_round() == 3
    assert found.labels().tolist() == [0, 0, 2, 2, 2]


def test_the_costs_of_a_small_table():
    assert merged(1.0).start == pytest.approx(43.185065, abs=1e-6)
    assert merged(1.0).costs().min() == pytest.approx(28.0)
    strict = merged(2.0)
    assert strict.best_round() == 2
    assert strict.costs().min() == pytest.approx(44.264663, abs=1e-6)
    assert strict.labels().tolist() == [0, 0, 2, 3, 3]


def test_with_the_joint_count_in_place_of_the_union_a_pair_that_is_never_on_together_would_win():
    s, k, S = (4, 1), 5, 13

    def with_count(o: int) -> float:
        rest = (S - sum(s)) * math.log2((k - 1) / k) - sum(s) * math.log2(k)
        return rest + o * math.log2(k - 1) + 1.0 * (o * 2 - sum(s))

    assert with_count(0) == pytest.approx(-19.19, abs=5e-3)
    right = change(0, s, (1, 1), S=S, k=k, alpha=1.0)
    assert right == pytest.approx(0.814935, abs=1e-6) == with_count(sum(s))
    assert (merged(1.0).merges[0].i, merged(1.0).merges[0].j) == (0, 1)


def cost_of(groups: dict[int, tuple[np.ndarray, int]], alpha: float) -> float:
    s, r = [own.sum() for own, _ in groups.values()], [r for _, r in groups.values()]
    return cost(np.array(s), np.array(r), alpha, len(groups))


def naive(on: np.ndarray, alpha: float, together: bool) -> list[tuple[int, int, float]]:
    """Every round all pairs, by the difference of two costs of whole partitions."""
    groups = {c: (on[:, c] > 0, 1) for c in range(on.shape[1])}
    found = []
    while len(groups) > 1:
        options = []
        for i in groups:
            for j in (j for j in groups if j > i):
                if together and not (groups[i][0] & groups[j][0]).any():
                    continue
                (on_i, r_i), (on_j, r_j) = groups[i], groups[j]
                after = {**groups, i: (on_i | on_j, r_i + r_j)}
                del after[j]
                both = [cost_of(g, alpha) for g in (after, groups)]
                options.append((both[0] - both[1], i, j, after))
        if not options:
            break
        difference, i, j, after = min(options, key=lambda o: (round(o[0], 9), o[1], o[2]))
        groups = after
        found.append((i, j, difference))
    return found


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_against_all_pairs_of_all_rounds(alpha: float, together: bool):
    """Every change is the difference of the costs, and no pair would have been better."""
    generator = np.random.default_rng(0)
    for _ in range(4):
        on = (generator.random((40, 9)) < 0.5 * generator.random(9)).astype(int)
        on = on[:, on.any(axis=0)]
        found = merge_all(sp.csr_array(on), alpha=alpha, together=together)
        expected = naive(on, alpha, together)
        assert len(found.merges) == len(expected)
        changes = [m.change for m in found.merges]
        assert changes == pytest.approx([d for *_, d in expected], abs=1e-8)
        for n, total in enumerate(found.costs()):
            labels = found.labels(n)
            s = [on[:, labels == own].any(axis=1).sum() for own in np.unique(labels)]
            r = [(labels == own).sum() for own in np.unique(labels)]
            assert total == pytest.approx(cost(np.array(s), np.array(r), alpha, len(s)))


def test_rare_ones_that_are_never_on_together_merge_only_if_that_is_allowed():
    """s = 10 each and S = 1000 k: for any α < 72 the shorter index outweighs it."""
    k = 1024
    assert change(0, (10, 10), (1, 1), S=1000 * k, k=k, alpha=72) < 0
    assert change(0, (10, 10), (1, 1), S=1000 * k, k=k, alpha=73) > 0
    on = np.zeros((400, 6), int)
    on[:, :4] = np.random.default_rng(0).random((400, 4)) < 0.7
    on[:2, 4], on[2:4, 5] = 1, 1
    allowed = merge_all(sp.csr_array(on[:, 4:]), alpha=0.1, together=False)
    assert allowed.labels().tolist() == [0, 0]
    assert merge_all(sp.csr_array(on[:, 4:]), alpha=0.1).labels().tolist() == [0, 1]
    assert merge_all(sp.csr_array(on), alpha=10.0, together=False).labels()[4:].tolist() == [4, 4]
    assert (4, 5) not in [(m.i, m.j) for m in merge_all(sp.csr_array(on), alpha=10.0).merges]


def test_the_threshold_of_alpha():
    assert alpha_for(0.8, 1024) == pytest.approx(20.0)
    assert break_even_alpha(800, 1000, k=1024) == pytest.approx(19.997, abs=5e-4)
    assert break_even_alpha(800, 1000, k=1024, S=1000 * 1024) == pytest.approx(23.606, abs=5e-4)


def test_picks_by_rank():
    assert rank_of(0.259, 0.2, 6) == 0 and rank_of(0.2595, 0.2, 6) == 1
    assert -math.expm1(-0.2) / -math.expm1(-1.2) == pytest.approx(0.259399, abs=1e-6)
    assert rank_of(0.5, 0.2, 6) == 2 and rank_of(0.9, 0.2, 6) == 4
    assert rank_of(1 - 1e-16, 0.2, 6) == 5
    pick = RankPicker(0.2, 0)
    drawn = np.array([pick(10**6) for _ in range(4000)])
    assert (drawn < 5).mean() == pytest.approx(-math.expm1(-1.0), abs=0.03)  # 63 %


@pytest.mark.parametrize("rank", [0, 1, 5, 30])
def test_the_pair_of_a_rank_is_that_of_all_pairs_sorted(rank: int):
    generator = np.random.default_rng(1)
    on = (generator.random((60, 9)) < 0.4).astype(int)
    found = merge_all(sp.csr_array(on), alpha=1.0, pick=lambda n: min(rank, n - 1))
    groups = {c: (on[:, c] > 0, 1) for c in range(9)}
    for merge in found.merges:
        k, S = len(groups), sum(int(own.sum()) for own, _ in groups.values())
        pairs = []
        for i in groups:
            for j in (j for j in groups if j > i and (groups[i][0] & groups[j][0]).any()):
                (on_i, r_i), (on_j, r_j) = groups[i], groups[j]
                s = (int(on_i.sum()), int(on_j.sum()))
                n = int((on_i & on_j).sum())
                pairs.append((change(n, s, (r_i, r_j), S=S, k=k, alpha=1.0), i, j))
        pairs.sort()
        expected = pairs[min(rank, len(pairs) - 1)]
        assert merge.change == pytest.approx(expected[0], abs=1e-8)
        i, j = merge.i, merge.j
        groups[i] = (groups[i][0] | groups[j][0], groups[i][1] + groups[j][1])
        del groups[j]


def test_distances_of_partitions():
    a, b = np.array([0, 0, 1, 1, 2]), np.array([1, 1, 0, 2, 2])
    assert matching_distance(a, b) == 2
    assert hamming_distance(a, b) == 1
    assert rand_distance(a, b) == pytest.approx(0.2)
    ordered = (a[:, None] == a) ^ (b[:, None] == b)
    assert ordered.sum() == 4
    generator = np.random.default_rng(0)
    for _ in range(5):
        a, b = generator.integers(0, 5, 30), generator.integers(0, 4, 30)
        together = (a[:, None] == a) ^ (b[:, None] == b)
        assert matching_distance(a, b) == together.sum() // 2
        assert hamming_distance(a, 7 - a) == 0 == matching_distance(a, 7 - a)
        assert hamming_distance(a, b) == hamming_distance(b, a)


BOTH = ("linear1", "linear2")

# --- known mechanisms ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n_hidden", "C", "apart"), [(2, 20, ("linear1",)), (24, 40, BOTH)])
def test_the_identity_layer_of_a_solved_toy_is_one_group_and_its_features_stay_apart(
    n_hidden: int, C: int, apart: tuple[str, ...]
):
    """In two dimensions neighbouring features are the same inputs to `linear2`, in 24 they are not."""
    prepared = solved_toy(5, n_hidden, C, hidden_layer=True)
    model = prepared.objective.model
    harvest = Harvest({path: site.C for path, site in model.sites.items()}, "inputs", 5)
    for _ in range(20):
        harvest.update(observe(model, prepared.problem, next(prepared.problem.eval_batches)))
    gathered = harvest.compute()
    found = cluster(gathered.memberships.on())
    groups = [[gathered.names[c] for c in own] for own in found.groups()]
    assert groups[0] == [f"hidden_layers.0:{c}" for c in range(3, 3 + n_hidden)]
    assert all(name.startswith(BOTH) for own in groups[1:] for name in own)
    for path in apart:
        assert all([f"{path}:{c}"] in groups for c in columns_of(5, C))


def test_the_dense_matrix_of_a_residual_mlp_is_one_group_and_its_features_stay_apart():
    """50 subcomponents that are on for any input, 100 that are each on for a feature of their own."""
    generator = np.random.default_rng(0)
    features = generator.random((6000, 100)) < 0.01
    dense = np.repeat(features.any(axis=1, keepdims=True), 50, axis=1)
    dense &= generator.random(dense.shape) < 0.97
    found = cluster(sp.csr_array(np.hstack([features, dense]).astype(np.int32)))
    groups = [own.tolist() for own in found.groups()]
    assert groups[0] == list(range(100, 150))
    assert groups[1:] == [[c] for c in range(100)]


def sample_of(on: np.ndarray) -> MembershipSample:
    made = MembershipSample(on.shape[1], seed=0)
    made.update(
        torch.as_tensor(on, dtype=torch.float32),
        torch.arange(len(on)),
        torch.zeros(len(on), dtype=torch.long),
    )
    return made


def planted(n: int = 3000, seed: int = 0) -> np.ndarray:
    """Six groups of three, each member on at 95 % of its group's positions."""
    generator = np.random.default_rng(seed)
    groups = generator.random((n, 6)) < 0.1
    return np.repeat(groups, 3, axis=1) & (generator.random((n, 18)) < 0.95)


def test_planted_groups_are_stable_over_samples_and_picks():
    memberships = sample_of(planted()).compute()
    settings = Settings(gamma=1.0)
    found = stability(memberships, settings, n_samples=3, alpha=alpha_for(0.8, 18))
    assert found.n == 18
    assert found.at_best.hamming < 0.25 * found.by_chance.hamming
    assert found.at_best.matching < 0.25 * found.by_chance.matching
    assert found.by_round[0] == (0, 0, 0), "single subcomponents are one partition"
    greedy = stability(memberships, Settings(), n_samples=3, alpha=alpha_for(0.8, 18))
    assert greedy.at_best == (0, 0, 0)
    with pytest.raises(UserError, match="3000 sequences"):
        stability(memberships, settings, n_samples=3001, alpha=1.0)


def test_what_a_clustering_does_not_have_is_a_group_of_its_own():
    own = cluster(sp.csr_array(np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]])))
    labels = labels_over(np.arange(4), own, own.labels)
    assert labels[0] == labels[2] and len(set(labels.tolist())) == 3


def test_groups_that_were_planted_are_found():
    on = planted(20_000)
    found = cluster(sp.csr_array(on.astype(np.int32)))
    assert [own.tolist() for own in found.groups()] == [
        list(range(3 * i, 3 * i + 3)) for i in range(6)
    ]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clustered")
    return start(little_config(folder), build, directory=folder / "a-run")


def test_the_command_gathers_importances_once_and_leaves_its_clusters(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    assert status_of(clustering.main, run, "--share", "0.6") == 0
    out, err = capsys.readouterr()
    assert "importances: none yet" in err
    kept = json.loads((run / clustering.ANALYSIS).read_text(encoding="utf-8"))
    assert f"{kept['k']} subcomponents in {kept['n_clusters']} groups" in out
    assert "3 samples of the data" in out
    assert sum(len(own["members"]) for own in kept["clusters"]) == kept["k"]
    assert kept["alpha"] == pytest.approx(alpha_for(0.6, kept["k"]))
    assert min(kept["costs"]) == pytest.approx(kept["costs"][kept["best_round"]])
    assert status_of(clustering.main, run, "--alpha", "3", "--gamma", "0.2", "--samples", "0") == 0
    out, err = capsys.readouterr()
    assert "α = 3" in out and "none yet" not in err
    check_run(run)


@pytest.mark.parametrize(
    "words",
    [
        ("--share", "1"),
        ("--alpha", "-1"),
        ("--gamma", "0"),
        ("--threshold", "0.001"),
        ("--min_count", "1000000"),
        ("--alpha", "1", "--share", "0.5"),
        ("--samples", "100000"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    run: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    assert status_of(clustering.main, run, *words) == 2
    assert capsys.readouterr().err


@pytest.mark.slow
def test_ten_thousand_subcomponents_in_minutes():
    """2,500 planted groups of four, 200 on at a time; a minute of one core, and 1.2 GB."""
    generator = np.random.default_rng(0)
    density = np.exp(generator.uniform(np.log(1e-4), np.log(0.5), 2500))
    density *= 200 / (4 * 0.9 * density.sum())
    rows, columns = [], []
    for group in range(2500):
        on = np.union1d(
            np.flatnonzero(generator.random(65536) < min(density[group], 0.99)), [group]
        )
        for c in range(4 * group, 4 * group + 4):
            kept = on[(generator.random(len(on)) < 0.9) | (on == group)]
            rows.append(kept)
            columns.append(np.full(len(kept), c))
    ones = np.ones(sum(map(len, rows)), np.int32)
    on = sp.csr_array(
        (ones, (np.concatenate(rows), np.concatenate(columns))), shape=(65536, 10_000)
    )
    begun = time.process_time()
    found = cluster(on)
    assert time.process_time() - begun < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 4e9
    right = sum(
        own.tolist() == list(range(own[0], own[0] + 4)) and own[0] % 4 == 0
        for own in found.groups()
    )
    assert right > 2200
