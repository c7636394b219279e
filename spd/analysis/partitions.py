"""How far two partitions of the same things are apart, whatever their groups are called."""

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int
from numpy import ndarray
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components


def contingency(a: Int[ndarray, " n"], b: Int[ndarray, " n"]) -> sp.csr_array:
    """How many things are in each group of `a` and each group of `b`, `[groups of a, groups of b]`."""
    _, rows = np.unique(a, return_inverse=True)
    _, columns = np.unique(b, return_inverse=True)
    shape = (rows.max(initial=-1) + 1, columns.max(initial=-1) + 1)
    table = sp.csr_array((np.ones(len(a), np.int64), (rows, columns)), shape=shape)
    table.sum_duplicates()
    return table


def matching_distance(a: Int[ndarray, " n"], b: Int[ndarray, " n"]) -> int:
    """Unordered pairs of things that are grouped together in exactly one of the two partitions."""
    table = contingency(a, b)

    def pairs(sizes: ndarray) -> int:
        return int((sizes * (sizes - 1) // 2).sum())

    of_a, of_b = np.asarray(table.sum(axis=1)), np.asarray(table.sum(axis=0))
    return pairs(of_a) + pairs(of_b) - 2 * pairs(table.data)


def rand_distance(a: Int[ndarray, " n"], b: Int[ndarray, " n"]) -> float:
    """1 − Rand index: the matching distance as a share of all n(n − 1)/2 pairs."""
    n = len(a)
    return matching_distance(a, b) / (n * (n - 1) / 2) if n > 1 else 0.0


def hamming_distance(a: Int[ndarray, " n"], b: Int[ndarray, " n"]) -> int:
    """Things whose group differs under the best renaming of groups, one to one.

    n − the maximum-weight matching of the contingency table, which is solved for each connected part of it.
    """
    table = contingency(a, b)
    n_rows = len(np.unique(a))
    joined = sp.block_array([[None, table], [table.T, None]], format="csr")
    n_parts, part = connected_components(joined, directed=False)
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(n_parts + 1))
    matched = 0
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        own = order[begin:end]
        rows, columns = own[own < n_rows], own[own >= n_rows] - n_rows
        if len(rows) == 1 or len(columns) == 1:
            matched += int(table[rows][:, columns].max())
            continue
        block = table[rows][:, columns].toarray()
        matched += int(block[linear_sum_assignment(block, maximize=True)].sum())
    return len(a) - matched
