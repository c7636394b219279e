"""How good a label is: trials that a language model is given, and the scores that its answers make.

Detection asks which windows a subcomponent is on in, fuzzing at which tokens, intruder which window is not
its own (without any label). 0.5, 0.5 and 1/(n + 1) is chance. A label is scored only once every trial of it
is answered.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from scipy.stats import binom

from spd.analysis.label_windows import Window, Windows

ScoreKind = Literal["detection", "fuzzing", "intruder"]
SCORES: tuple[ScoreKind, ...] = get_args(ScoreKind)
N_TRIALS, N_EACH, N_REAL = 3, 5, 4


class Trial(NamedTuple):
    """One question about several windows, numbered from 1."""

    texts: list[str]
    right: list[int]
    """the numbers that should be named"""


class Rates(NamedTuple):
    """Of one trial: how many of the right ones were named, and of the others were not."""

    hits: int
    n_right: int
    rejections: int
    n_wrong: int


def rates(trial: Trial, named: Sequence[int]) -> Rates:
    right, given = set(trial.right), set(named)
    wrong = set(range(1, len(trial.texts) + 1)) - right
    return Rates(len(right & given), len(right), len(wrong - given), len(wrong))


def detection_score(trials: Sequence[Rates]) -> float:
    """The mean over trials of (TPR + TNR)/2."""
    balanced = [(t.hits / t.n_right + t.rejections / t.n_wrong) / 2 for t in trials]
    return sum(balanced) / len(balanced)


def fuzzing_score(trials: Sequence[Rates]) -> float:
    """(TPR + TNR)/2 of the counts of all trials together."""
    hits, n_right, rejections, n_wrong = (sum(counts) for counts in zip(*trials, strict=True))
    return (hits / n_right + rejections / n_wrong) / 2


def intruder_score(trials: Sequence[Rates]) -> float:
    """The share of trials in which the intruder, and nothing else, was named."""
    return sum(t.hits == 1 and t.rejections == t.n_wrong for t in trials) / len(trials)


def probability_by_chance(n_right: int, n_trials: int, chance: float) -> float:
    """Of so many right answers or more, where each is right with that probability."""
    return float(binom.sf(n_right - 1, n_trials, chance))


def score(kind: ScoreKind, trials: Sequence[Rates]) -> float:
    functions = {
        "detection": detection_score,
        "fuzzing": fuzzing_score,
        "intruder": intruder_score,
    }
    return functions[kind](trials)


def trials_of(kind: ScoreKind, windows: Windows, name: str) -> list[Trial]:
    """The trials of one subcomponent, always the same ones; none where there are too few windows."""
    found = []
    for number in range(N_TRIALS):
        generator = random.Random(f"{kind}/{name}/{number}")
        made = _MAKE[kind](windows, generator)
        if made is not None:
            found.append(made)
    return found


def _detection(windows: Windows, generator: random.Random) -> Trial | None:
    """The middle token is marked in the windows of both kinds: it says nothing by itself."""
    own, others = (
        _some(windows.scores, N_EACH, generator),
        _some(windows.intruders, N_EACH, generator),
    )
    if not own or not others:
        return None
    texts = [(w.marked([w.middle]), True) for w in own] + [
        (w.marked([w.middle]), False) for w in others
    ]
    return _shuffled(texts, generator)


def _fuzzing(windows: Windows, generator: random.Random) -> Trial | None:
    """All windows are its own; some are marked where it is on, others at as many other tokens."""
    usable = [w for w in windows.scores if len(w.pieces) >= 2 * len(w.firing())]
    chosen = _some(usable, 2 * N_EACH, generator)
    if len(chosen) < 2:
        return None
    texts = []
    for place, window in enumerate(chosen):
        on = window.firing()
        elsewhere = [p for p in range(len(window.pieces)) if p not in on]
        right = place % 2 == 0
        marks = on if right else generator.sample(elsewhere, len(on))
        texts.append((window.marked(marks), right))
    return _shuffled(texts, generator)


def _intruder(windows: Windows, generator: random.Random) -> Trial | None:
    own = _some([*windows.label, *windows.scores], N_REAL, generator)
    others = _some(windows.intruders[: 2 * N_EACH], 1, generator)
    if len(own) < N_REAL or not others:
        return None
    texts = [(_both(window), False) for window in own] + [(_both(others[0]), True)]
    return _shuffled(texts, generator)


def _both(window: Window) -> str:
    return f"{window.marked([])} || {window.marked([window.middle])}"


_MAKE = {"detection": _detection, "fuzzing": _fuzzing, "intruder": _intruder}


def _some(windows: Sequence[Window], n: int, generator: random.Random) -> list[Window]:
    return generator.sample(list(windows), min(n, len(windows)))


def _shuffled(texts: list[tuple[str, bool]], generator: random.Random) -> Trial:
    generator.shuffle(texts)
    right = [number for number, (_, own) in enumerate(texts, start=1) if own]
    return Trial([text for text, _ in texts], right)


def scores_of(
    trials: Mapping[ScoreKind, Sequence[Trial]],
    named: Mapping[ScoreKind, Sequence[Sequence[int] | None]],
) -> dict[ScoreKind, float | None]:
    """None for a kind that has no trial, or one without an answer."""
    found: dict[ScoreKind, float | None] = {}
    for kind, own in trials.items():
        answers = named[kind]
        whole = bool(own) and all(answer is not None for answer in answers)
        found[kind] = (
            score(kind, [rates(t, a) for t, a in zip(own, answers, strict=True) if a is not None])
            if whole
            else None
        )
    return found
