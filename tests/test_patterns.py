"""Errors against known importance patterns: one matrix made by hand for every kind of error."""

import pytest
import torch
from torch import Tensor

from spd.metrics import dense_errors, identity_errors
from spd.problem import Dense

# --- identity n ------------------------------------------------------------------------------------

PERFECT = torch.tensor(
    [
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
        [1.0, 0.0, 0.0, 0.0],
    ]
)


def changed(entries: dict[tuple[int, int], float]) -> Tensor:
    g = PERFECT.clone()
    for place, value in entries.items():
        g[place] = value
    return g


@pytest.mark.parametrize(
    ("entries", "errors"),
    [
        ({}, 0),
        ({(0, 1): 0.9, (0, 0): 0.1, (2, 2): 0.1}, 0),  # at the tolerance
        ({(0, 1): 0.89}, 1),  # too weak
        ({(0, 0): 0.11}, 1),  # another probe's subcomponent
        ({(1, 2): 0.11}, 1),  # a subcomponent that no probe should use
        ({(0, 2): 1.0}, 1),  # one feature split over two
        ({(0, 1): 0.0}, 1),  # one feature lost
        ({(0, 1): 0.0, (0, 3): 1.0}, 2),  # two features on one subcomponent
        ({(0, 1): 0.5, (0, 2): 0.5}, 2),  # split in halves
    ],
)
def test_identity_errors(entries: dict[tuple[int, int], float], errors: int):
    g = changed(entries)
    assert identity_errors(g, 3) == errors
    for _ in range(5):
        assert identity_errors(g[:, torch.randperm(4)], 3) == errors
        assert identity_errors(g[torch.randperm(3)], 3) == errors


def test_fewer_subcomponents_than_features():
    assert identity_errors(PERFECT[:, [1, 3]], 3) == 1
    assert identity_errors(torch.zeros(3, 1), 3) == 3
    assert identity_errors(torch.zeros(3, 5), 3) == 3


def test_the_number_of_probes_must_be_that_of_the_pattern():
    with pytest.raises(AssertionError, match="3 probes for a pattern of 4"):
        identity_errors(PERFECT, 4)


# --- dense k ---------------------------------------------------------------------------------------
# Three probes, k = 2. Subcomponents 0 and 1 make up W, 2 and 3 are empty and unused.

W = torch.diag(torch.tensor([2.0, 1.0]))
V = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
U = torch.tensor([[2.0, 0], [0, 1.0], [0, 0], [0, 0]])
TWO = Dense(2)
G = torch.tensor(
    [
        [0.9, 0.4, 0.0, 0.0],
        [0.3, 1.0, 0.1, 0.0],
        [0.2, 0.0, 0.0, 0.0],
    ]
)


def errors_of(
    g: Tensor = G, weight: Tensor = W, V: Tensor = V, U: Tensor = U, pattern: Dense = TWO
) -> int:
    found = dense_errors(g, pattern, weight=weight, V=V, U=U)
    for _ in range(3):
        order = torch.randperm(V.shape[1])
        assert found == dense_errors(
            g[:, order], pattern, weight=weight, V=V[:, order], U=U[order]
        ), "the order of the subcomponents does not matter"
    return found


def test_whichever_probes_use_the_right_number_of_subcomponents():
    assert errors_of() == 0
    assert errors_of(G[[2, 0, 1]]) == 0


def test_too_many_columns_in_use():
    g = G.clone()
    g[0, 2] = 1.0
    assert errors_of(g) == 1
    g[1, 3] = 1.0
    assert errors_of(g) == 2


def test_too_few_columns_in_use():
    """One subcomponent of the two makes up all but a little of a matrix of rank one."""
    weight = torch.diag(torch.tensor([2.0, 0.0]))
    g = G.clone()
    g[:, 1] = 0.0
    assert errors_of(g, weight) == 1


def test_a_column_in_use_that_is_never_fully_on():
    g = G.clone()
    g[1, 1] = 0.89
    assert errors_of(g) == 1
    g[0, 0] = 0.5
    assert errors_of(g) == 2


def test_columns_in_use_that_leave_a_part_of_the_matrix():
    assert errors_of(U=0.91 * U) == 0
    assert errors_of(U=0.89 * U) == 1
    # an unused subcomponent that would supply the rest does not count
    rest = torch.cat([0.8 * U[:2], torch.tensor([[0.4, 0], [0, 0]])])
    assert errors_of(U=rest, V=V + torch.tensor([[0, 0, 1.0, 0], [0, 0, 0, 0]])) == 1


def test_columns_in_use_that_lack_rank():
    """Both share the first direction; the second is small enough to be left, but a part all the same."""
    weight = torch.diag(torch.tensor([2.0, 0.15]))
    shared = torch.tensor([[1.0, 1.0, 0, 0], [0, 0, 0, 0]])
    halves = torch.tensor([[1.0, 0], [1.0, 0], [0, 0], [0, 0]])
    assert errors_of(weight=weight, V=shared, U=halves) == 1
    a_tenth = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    assert (
        errors_of(weight=weight, V=a_tenth, U=torch.diag(torch.tensor([2, 0.016, 0, 0]))[:, :2])
        == 0
    )


def test_what_nothing_reads_downstream_does_not_count():
    """W writes to two directions that are read and, strongly, to one that is not."""
    wide = torch.cat([W, 5 * torch.ones(2, 1)], dim=1)
    flat = torch.cat([U, torch.zeros(4, 1)], dim=1)
    read = torch.eye(3)[:, :2]
    assert errors_of(weight=wide, U=flat, pattern=Dense(2, read_basis=read)) == 0
    assert errors_of(weight=wide, U=flat) >= 1
    turned = torch.linalg.qr(torch.randn(3, 3))[0]  # the same in a basis along no axis
    basis = turned[:, :2]
    assert errors_of(weight=wide @ turned.T, U=flat @ turned.T, pattern=Dense(2, basis)) == 0
