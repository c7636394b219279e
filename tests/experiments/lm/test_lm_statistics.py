"""The statistics of subcomponents on text, against plain loops."""

import pytest
import torch
from torch import Tensor

from spd.analysis.contexts import OUTSIDE, TopContexts, peaks
from spd.analysis.statistics import SubcomponentStatistics

C_OF = {"a": 3, "b.c": 4}
LEFT, RIGHT, K = 3, 2, 4


def made_up_batches(n: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, importances (many 0, some above 1), inner activations; all sites in one tensor."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(6, (2, 25), generator=generator),
            (1.5 * torch.rand(2, 25, 7, generator=generator) - 0.6).clamp(min=0.0),
            torch.randn(2, 25, 7, generator=generator),
        )
        for _ in range(n)
    ]


def split(x: Tensor) -> dict[str, Tensor]:
    return dict(zip(C_OF, x.split(list(C_OF.values()), dim=-1), strict=True))


def statistics_of(batches: list[tuple[Tensor, Tensor, Tensor]], **options: int):
    made = SubcomponentStatistics(C_OF, n_contexts=K, left=LEFT, right=RIGHT, **options)
    for tokens, upper, acts in batches:
        made.update(tokens, split(upper), split(acts))
    return made.compute()


def test_against_a_loop_over_positions():
    batches = made_up_batches()
    found = statistics_of(batches)
    positions = [
        (tokens[b, p].item(), upper[b, p].clamp(max=1).tolist(), acts[b, p].tolist())
        for tokens, upper, acts in batches
        for b in range(2)
        for p in range(25)
    ]
    n = len(positions)
    assert found.n_positions == n == 150
    for c in range(7):
        values = [g[c] for _, g, _ in positions]
        active = [g > 0.1 for g in values]
        signs = [h[c] > 0 for (_, _, h), on in zip(positions, active, strict=True) if on]
        assert found.mean[c].item() == pytest.approx(sum(values) / n, rel=1e-5)
        assert found.highest[c].item() == pytest.approx(max(values))
        assert found.n_active[c] == sum(active)
        assert found.positive[c].item() == pytest.approx(sum(signs) / len(signs))
        for token in range(6):
            on_token = [g for (t, _, _), g in zip(positions, values, strict=True) if t == token]
            row = found.tokens.ids.index(token)
            mean = found.tokens.means(min_count=1)[row, c].item()
            assert mean == pytest.approx(sum(on_token) / len(on_token), rel=1e-5)
            share = found.tokens.shares()[row, c].item()
            assert share == pytest.approx(sum(on_token) / sum(values), rel=1e-5)
        start, joint = found.pairs.with_all(c)
        for d in range(7):
            both = sum(g[c] > 0.1 and g[d] > 0.1 for _, g, _ in positions)
            assert joint[d - start] == both


def test_contexts_against_a_loop():
    batches = made_up_batches()
    found = statistics_of(batches).contexts
    distance = LEFT + RIGHT
    for c in range(7):
        expected = []
        for tokens, upper, _ in batches:
            for b in range(2):
                g = upper[b, :, c].tolist()
                for p, value in enumerate(g):
                    near = g[max(0, p - distance) : p] + g[p + 1 : p + distance + 1]
                    if value > 0.1 and all(value > other for other in near):
                        inside = [0 <= q < 25 for q in range(p - LEFT, p + RIGHT + 1)]
                        window = [
                            (tokens[b, q].item(), min(g[q], 1.0)) if ok else (OUTSIDE, 0.0)
                            for q, ok in zip(range(p - LEFT, p + RIGHT + 1), inside, strict=True)
                        ]
                        expected.append((value, window))
        expected.sort(key=lambda entry: -entry[0])
        assert len(expected) > K
        for place, (value, window) in enumerate(expected[:K]):
            assert found.scores[c, place].item() == pytest.approx(value)
            assert found.tokens[c, place].tolist() == [token for token, _ in window]
            importances = found.importances[c, place].tolist()
            assert importances == pytest.approx([g for _, g in window])


def test_what_is_not_kept_counts_nowhere():
    """As if its importances were 0 for the contexts, and as if it were not there for the rest."""
    batches = made_up_batches()
    made = SubcomponentStatistics(C_OF, n_contexts=K, left=LEFT, right=RIGHT)
    zeroed = SubcomponentStatistics(C_OF, n_contexts=K, left=LEFT, right=RIGHT)
    alone = SubcomponentStatistics(C_OF, n_contexts=K, left=LEFT, right=RIGHT)
    for tokens, upper, acts in batches:
        kept = tokens != 3
        made.update(tokens, split(upper), split(acts), kept)
        zeroed.update(tokens, split(upper * kept[..., None]), split(acts))
        alone.update(tokens[kept][None], split(upper[kept][None]), split(acts[kept][None]))
    found, contexts, rest = made.compute(), zeroed.compute().contexts, alone.compute()
    assert found.n_positions == rest.n_positions < 150
    for name in ("mean", "highest", "n_active", "positive"):
        assert torch.equal(getattr(found, name), getattr(rest, name))
    assert sorted(found.tokens.ids) == sorted(rest.tokens.ids) and 3 not in found.tokens.ids
    assert torch.equal(found.pairs.with_all(0)[1], rest.pairs.with_all(0)[1])
    for one, other in zip(found.contexts, contexts, strict=True):
        assert torch.equal(one, other)


def test_peaks_are_far_apart_and_a_plateau_has_one():
    g = torch.tensor([0.2, 0.9, 0.9, 0.9, 0.3, 0.5, 0.1, 0.7])[None, :, None]
    assert peaks(g, 2).flatten().nonzero().flatten().tolist() == [1, 7]
    assert peaks(torch.ones(1, 50, 1), 3).sum() == 1
    assert peaks(g, 0).all()


def test_the_same_words_are_kept_once_and_what_is_not_alive_has_no_context():
    kept = TopContexts(2, k=3, left=1, right=1, threshold=0.1)
    g = torch.zeros(2, 9, 2)
    g[0, [1, 4, 7], 0] = torch.tensor([0.9, 0.8, 0.7])
    g[1, 3, 0], g[1, 3, 1] = 0.6, 0.05
    tokens = torch.tensor([[5, 6, 7, 5, 6, 7, 1, 2, 3], [0, 0, 0, 0, 9, 9, 9, 9, 9]])
    for _ in range(2):
        kept.update(tokens, g)
    contexts = kept.kept
    assert contexts.scores[0].tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert contexts.tokens[0].tolist() == [[5, 6, 7], [1, 2, 3], [0, 0, 9]]
    assert contexts.scores[1].tolist() == [-torch.inf] * 3


def test_memory_does_not_grow_with_the_text():
    """Nor with the vocabulary: tokens that come too late share one row, so that shares stay exact."""
    batches = made_up_batches(12)

    def size(n: int) -> int:
        found = SubcomponentStatistics(C_OF, n_contexts=K, left=LEFT, right=RIGHT, table_entries=28)
        for tokens, upper, acts in batches[:n]:
            found.update(tokens, split(upper), split(acts))
        tensors = [
            *found.contexts.kept,
            *found.pairs.blocks,
            found.tokens.sums,
            found.tokens.others,
        ]
        return sum(tensor.numel() for tensor in tensors) + len(found.tokens.ids)

    assert size(2) == size(12)
    small, whole = (
        statistics_of(batches, table_entries=entries).tokens for entries in (28, 10_000)
    )
    assert len(small.ids) == 4 and len(whole.ids) == 6
    for row, token in enumerate(small.ids):
        torch.testing.assert_close(small.shares()[row], whole.shares()[whole.ids.index(token)])


def test_a_token_seen_rarely_has_no_mean():
    tokens = torch.tensor([[0, 1, 1, 1]])
    made = SubcomponentStatistics({"a": 1}, n_contexts=1, left=1, right=1)
    made.update(tokens, {"a": torch.ones(1, 4, 1)}, {"a": torch.ones(1, 4, 1)})
    assert made.compute().tokens.means(min_count=3).tolist() == [[0.0], [1.0]]


def test_too_many_pairs_are_counted_within_each_site():
    batches = made_up_batches()
    whole = statistics_of(batches).pairs
    parts = statistics_of(batches, pair_entries=48).pairs
    assert whole.across_sites and not parts.across_sites
    for c in range(7):
        start, joint = parts.with_all(c)
        assert (start, len(joint)) == ((0, 3) if c < 3 else (3, 4))
        assert torch.equal(joint, whole.with_all(c)[1][start : start + len(joint)])
