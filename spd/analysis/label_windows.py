"""The contexts of a subcomponent as text for a language model, and which of them serve for what.

The windows that a label is made of and those by which it is scored are of different sequences, so that they
have no token in common.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from spd.analysis.contexts import OUTSIDE, Contexts, by_quantile
from spd.analysis.harvest import Gathered
from spd.metrics import ALIVE_THRESHOLD

N_HIGHEST, N_LOWER, N_QUANTILES, N_INTRUDERS = 6, 9, 3, 30
RARELY = 0.1
"""of the positions of another subcomponent, at which the one in question may be on too"""
LIKE_INPUTS = 0.02
"""an input of a toy below it is not shown"""

TokenText = Callable[[int], str]


@runtime_checkable
class WholeTexts(Protocol):
    """A `TokenText` that knows which tokens make a character only together."""

    def whole(self, tokens: Sequence[int]) -> list[tuple[str, int]]:
        """Pieces of text, each with how many tokens it takes."""
        ...


class Window(NamedTuple):
    """A context: pieces of text, or the input of a toy as one piece."""

    pieces: list[str]
    importances: list[float]
    activations: list[float]
    middle: int
    sequence: int
    position: int
    """of the middle in its sequence"""

    def firing(self) -> list[int]:
        """Where it is on; the middle always is."""
        on = {place for place, g in enumerate(self.importances) if g > ALIVE_THRESHOLD}
        return sorted(on | {self.middle})

    def marked(self, places: Sequence[int]) -> str:
        """The text with `[[` and `]]` around these pieces."""
        return _joined(
            f"[[{piece}]]" if place in places else piece for place, piece in enumerate(self.pieces)
        )

    def annotated(self) -> str:
        """The text with g and the activation at the pieces at which it is on."""
        on = self.firing()
        return _joined(
            f"[[{piece}]](g {self.importances[p]:.2f}, a {self.activations[p]:+.2f})"
            if p in on
            else piece
            for p, piece in enumerate(self.pieces)
        )


def _joined(pieces: Iterable[str]) -> str:
    return "".join(pieces).replace("\n", "⏎")


class Windows(NamedTuple):
    """Of one subcomponent."""

    label: list[Window]
    """the highest, then from quantiles"""
    scores: list[Window]
    """of other sequences, drawn uniformly"""
    intruders: list[Window]
    """of other subcomponents, where it is not on, and of no sequence of `label`"""


def windows_of(
    found: Gathered,
    c: int,
    text: TokenText,
    rows: Mapping[tuple[int, int], int],
    *,
    n_intruders: int = N_INTRUDERS,
) -> Windows:
    """All of one subcomponent, always the same ones; `rows` are those of the memberships."""
    sampled, top = found.sampled, found.statistics.contexts
    left = found.statistics.left
    sequences = list(dict.fromkeys(sampled.sequences[c][sampled.scores[c] > -torch.inf].tolist()))
    for_scores = set(sequences[1::2])
    highest = [
        place
        for place in range(len(top.scores[c]))
        if top.scores[c, place] > -torch.inf and int(top.sequences[c, place]) not in for_scores
    ][:N_HIGHEST]
    label = [_window(found, top, c, place, text) for place in highest]
    shown = {window.sequence for window in label}
    for group in by_quantile(sampled, c, left, N_QUANTILES):
        own = [p for p in group if int(sampled.sequences[c, p]) not in for_scores | shown]
        label += [_window(found, sampled, c, p, text) for p in own[: N_LOWER // N_QUANTILES]]
    scores = [
        _window(found, sampled, c, place, text)
        for place in range(len(sampled.scores[c]))
        if sampled.scores[c, place] > -torch.inf and int(sampled.sequences[c, place]) in for_scores
    ]
    shown = {window.sequence for window in label}
    return Windows(label, scores, _intruders(found, c, shown, text, rows, n_intruders))


def _intruders(
    found: Gathered,
    c: int,
    shown: set[int],
    text: TokenText,
    rows: Mapping[tuple[int, int], int],
    n: int,
) -> list[Window]:
    """One window of each of up to n others, those of similar density, at whose middle c is not on.

    Where that was not kept of a position, another subcomponent must rarely be on together with c.
    """
    start, joint = found.statistics.pairs.with_all(c)
    n_active, sampled = found.statistics.n_active, found.sampled
    alive = (n_active[start : start + len(joint)].nonzero().flatten() + start).tolist()
    others = [other for other in alive if other != c]
    generator = random.Random(f"intruders/{found.name(c)}")
    others = generator.sample(others, min(4 * n, len(others)))
    density = max(1, int(n_active[c]))
    others = sorted(others, key=lambda o: abs(float(n_active[o]) / density - 1))
    windows = []
    for other in others:
        rarely = int(joint[other - start]) <= RARELY * int(n_active[other])
        there = [
            place
            for place in range(len(sampled.scores[other]))
            if sampled.scores[other, place] > -torch.inf
            and (sequence := int(sampled.sequences[other, place])) not in shown
            and (
                rarely
                if (row := rows.get((sequence, int(sampled.positions[other, place])))) is None
                else not found.memberships.on_at(row, c)
            )
        ]
        if there:
            windows.append(_window(found, sampled, other, generator.choice(there), text))
    return windows[:n]


def _window(found: Gathered, kept: Contexts, c: int, place: int, text: TokenText) -> Window:
    left = found.statistics.left
    g, a = kept.importances[c, place].tolist(), kept.activations[c, place].tolist()
    sequence, position = int(kept.sequences[c, place]), int(kept.positions[c, place])
    content = kept.tokens[c, place]
    if found.kind != "tokens":
        piece = _of_input(content[0].tolist()) if found.kind == "inputs" else f"row {sequence}"
        return Window([piece], g, a, 0, sequence, position)
    tokens = content.tolist()
    inside = [p for p, token in enumerate(tokens) if token != OUTSIDE]
    pieces, places = _pieces([tokens[p] for p in inside], text)
    groups = [[inside[i] for i in group] for group in places]
    # of the tokens of a character that one counts at which the importance is highest
    highest = [max(group, key=lambda p: g[p]) for group in groups]
    return Window(
        pieces,
        [min(1.0, max(0.0, g[p])) for p in highest],
        [a[p] for p in highest],
        next(i for i, group in enumerate(groups) if left in group),
        sequence,
        position,
    )


def _pieces(tokens: Sequence[int], text: TokenText) -> tuple[list[str], list[list[int]]]:
    """The pieces of text that tokens make, and which tokens each is made of, by their places."""
    if not isinstance(text, WholeTexts):
        return [text(token) for token in tokens], [[i] for i in range(len(tokens))]
    found = text.whole(tokens)
    ends = list(accumulate(n for _, n in found))
    places = [list(range(end - n, end)) for (_, n), end in zip(found, ends, strict=True)]
    return [piece for piece, _ in found], places


def _of_input(values: Sequence[float]) -> str:
    shown = [f"x{j}={x:.2f}" for j, x in enumerate(values) if abs(x) >= LIKE_INPUTS]
    return " ".join(shown) or "all inputs 0"
