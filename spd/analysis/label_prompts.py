"""What a language model is asked about a subcomponent, and how its answers are read."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spd.analysis.harvest import Gathered, Pmi
from spd.analysis.label_scores import ScoreKind, Trial
from spd.analysis.label_windows import TokenText, Window
from spd.analysis.statistics import TokenImportances
from spd.metrics import ALIVE_THRESHOLD

N_TOKENS = 12
LEAST_FIRINGS = 2.0
"""on a token, for its place in a table by PMI"""
MOST_WORDS = 8

INTRODUCTION = """\
A neural network was taken apart: each of its weight matrices is written as a sum of rank-one matrices,
its subcomponents. Subcomponent c reads its input x along a direction V_c and writes along U_c. Two
numbers tell what it does at a position:
- importance g, from 0 to 1: how little it can be removed there without changing the output. It is "on"
  where g > {threshold}. g decides whether it matters; only where it is on the activation means something.
- activation a = |U_c| V_c·x: how much it writes. Its sign is arbitrary for a subcomponent as a whole; but
  if it is on with both signs, these may be two roles.
"""


class Label(NamedTuple):
    """What a language model says of a subcomponent."""

    label: str
    reasoning: str


def key_of(kind: str, name: str, prompt: str) -> str:
    """Names a prompt, whose text is part of it: an answer to another text is not taken for it."""
    return f"{kind}/{name}#{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"


def label_prompt(found: Gathered, c: int, windows: Sequence[Window], text: TokenText) -> str:
    """Asks for a label of at most eight words and a reasoning."""
    statistics = found.statistics
    path, _, number = found.name(c).rpartition(":")
    block = re.search(r"\d+", path)
    n_active, positive = int(statistics.n_active[c]), statistics.positive[c].item()
    where = f" (block {block[0]})" if block else ""
    parts = [
        INTRODUCTION.format(threshold=ALIVE_THRESHOLD),
        f"This is subcomponent {number} of the matrix {path}{where}. It is on at {n_active:,} of"
        f" {statistics.n_positions:,} positions ({n_active / statistics.n_positions:.3%}), with positive"
        f" activation at {positive:.0%} of them, negative at {1 - positive:.0%}.\n",
    ]
    if found.kind == "tokens":
        own = found.input_tokens([c]), found.firings, "Input tokens where it is on"
        parts += _tables(*own, c, text)
        own = found.output_tokens([c]), found.outputs, "Next tokens that the network predicts there"
        parts += _tables(*own, c, text)
        shown = "Pieces of text; where it is on, the token stands in [[ ]] with g and a behind it:"
    elif found.inputs is not None:
        parts.append(_of_inputs(found.inputs[c]))
        shown = "Inputs for which it is on, with g and a behind them:"
    else:
        shown = "Rows for which it is on, with g and a behind them:"
    parts.append("\n".join([shown, *(f"- {window.annotated()}" for window in windows)]) + "\n")
    parts.append(
        f'What is it that switches this subcomponent on? Answer with JSON alone: {{"label": "at most'
        f' {MOST_WORDS} words", "reasoning": "one or two sentences"}}'
    )
    return "\n".join(parts)


def _tables(pmi: Pmi, table: TokenImportances, title: str, c: int, text: TokenText) -> list[str]:
    """Of one column: by recall, and by PMI among what it fired on twice."""
    if not table.ids:
        return []
    by_recall = pmi.recall[:, 0]
    often = table.sums[:, c] >= LEAST_FIRINGS
    by_pmi = pmi.pmi[:, 0].masked_fill(~often, -torch.inf)
    lines = []
    for name, values, form in (
        ("share of firings", by_recall, ".0%"),
        ("PMI, bits", by_pmi, ".1f"),
    ):
        shown = _highest(values, table, text, form)
        if shown:
            lines.append(f"{title}, by {name}: {shown}")
    return [*lines, ""] if lines else []


def _highest(values: Tensor, table: TokenImportances, text: TokenText, form: str) -> str:
    highest, rows = values.topk(min(N_TOKENS, len(values)))
    return ", ".join(
        f"{text(table.ids[row])!r} {value:{form}}"
        for value, row in zip(highest.tolist(), rows.tolist(), strict=True)
        if value > 0
    )


def _of_inputs(sizes: Tensor) -> str:
    highest, places = sizes.topk(min(N_TOKENS, len(sizes)))
    shown = ", ".join(
        f"x{j} {size:.2f}" for size, j in zip(highest.tolist(), places.tolist(), strict=True)
    )
    return f"Mean sizes of the inputs where it is on, the largest: {shown}\n"


def score_prompt(kind: ScoreKind, label: str, trial: Trial) -> str:
    """Asks for the numbers of windows."""
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(trial.texts, start=1))
    if kind == "detection":
        asked = (
            f"A part of a neural network is described as: {label!r}. Of the texts below some are from where"
            " it is on, at the token in [[ ]]; in the others another token is marked, at which it is not"
            " on. Which are those where it is on?"
        )
    elif kind == "fuzzing":
        asked = (
            f"A part of a neural network is described as: {label!r}. It is on somewhere in each text below."
            " In some the tokens at which it is on are marked with [[ ]], in the others as many wrong"
            " tokens. Which texts are marked rightly?"
        )
    else:
        asked = (
            "In all texts below but one the same part of a neural network is on, at the token in [[ ]] of"
            " the second copy of each. Which text does not belong to the others?"
        )
    form = '{"numbers": [1, 2]}'
    return f"{asked}\n\n{numbered}\n\nAnswer with JSON alone, the numbers of the texts: {form}"


# --- answers -------------------------------------------------------------------------------------


def read_label(answer: str) -> Label | None:
    """None where the answer holds no label."""
    for found in _objects(answer):
        label = found.get("label") if isinstance(found, dict) else None
        if isinstance(label, str) and label.strip():
            reasoning = found.get("reasoning")
            said = reasoning if isinstance(reasoning, str) else ""
            return Label(" ".join(label.split()), " ".join(said.split()))
    return None


def read_numbers(answer: str, n: int) -> list[int] | None:
    """Numbers from 1 to n; None where the answer holds none, or others."""
    for found in _objects(answer):
        numbers = found.get("numbers") if isinstance(found, dict) else found
        if isinstance(numbers, list) and all(
            isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= n for x in numbers
        ):
            return sorted(set(numbers))
    return None


def _objects(text: str) -> list[Any]:
    """Every JSON object or array in a text, in its order."""
    decoder, found, place = json.JSONDecoder(), [], 0
    while (begin := re.search(r"[\[{]", text[place:])) is not None:
        place += begin.start()
        try:
            value, length = decoder.raw_decode(text[place:])
            found.append(value)
            place += length
        except (ValueError, RecursionError):
            place += 1
    return found
