"""report.html of a language model: the page of every run, with a browser of its subcomponents.

Reads and shows: what is counted is in `statistics`, what is projected in `directions`.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spd.analysis.contexts import OUTSIDE
from spd.analysis.observation import at_every_position, at_positions
from spd.analysis.statistics import Statistics, SubcomponentStatistics
from spd.component_model import ComponentModel
from spd.config import UserError
from spd.engine.prepare import Prepared
from spd.experiments.lm.report.directions import (
    Extremes,
    Surroundings,
    look_around,
    token_directions,
)
from spd.experiments.lm.report.token_texts import TokenTexts, readable_tokens
from spd.metrics import MetricSpec
from spd.reports.page import inline_json, inline_script, render_page
from spd.reports.report import REPORT_FILE, report_contents, write_report

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
TEMPLATE, SCRIPT = "lm_report.html.j2", "lm_report.js"
N_TOKENS, N_COMPANIONS = 10, 8
MIN_COUNT = 5
"""a token seen less often has no mean importance worth showing"""


class Gathered(NamedTuple):
    """What one pass over held-out text gives."""

    C_of: dict[str, int]
    """the sites that the page shows"""
    left_out: list[str]
    """sites that are not applied at every position"""
    statistics: Statistics
    around: Surroundings | None


def write_lm_report(
    run_dir: Path,
    prepared: Prepared,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    unembed: str | None,
    n_batches: int,
    at_least: int = 1,
) -> Path:
    """Look at up to `n_batches` held-out batches, those of the evaluation first, and write the page.

    `UserError` if there are less than `at_least`.
    """
    logger.info("report: looking at up to %d held-out batches", n_batches)
    held_out = chain(prepared.eval_batches, prepared.problem.eval_batches)
    # these are token ids, a few megabytes
    batches = [batch for batch in islice(held_out, n_batches) if isinstance(batch, Tensor)]
    if len(batches) < at_least:
        raise UserError(
            f"--batches: {at_least} are wanted, but {run_dir} keeps {len(batches)} of held-out text"
            " (its n_report_batches, or what there was)"
        )
    weights = prepared.problem.position_weights
    gathered = gather(prepared.objective.model, batches, unembed, weights)
    if gathered is None:
        logger.warning("report: no site is applied at every position; subcomponents are not shown")
        return write_report(run_dir, prepared.config.metrics)
    data = page_data(prepared.objective.model, gathered, tokenizer)
    return write_subcomponents(run_dir, data, prepared.config.metrics)


def write_subcomponents(
    run_dir: Path, data: Mapping[str, Any], metrics: Mapping[str, MetricSpec] | None = None
) -> Path:
    """Write the page of a run around what `page_data` gives; `metrics` are those of the run."""
    script, policy = inline_script((HERE / SCRIPT).read_text(encoding="utf-8"))
    contents = {
        "sites": data["sites"],
        "left_out": data["left_out"],
        "n_positions": data["positions"],
        "data": inline_json(data),
        "script": script,
        "script_policy": policy,
    }
    contents |= report_contents(run_dir, metrics)
    return render_page(run_dir / REPORT_FILE, TEMPLATE, contents, folder=HERE)


@torch.no_grad()
def gather(
    model: ComponentModel,
    batches: Iterable[Int[Tensor, "batch position"]],
    unembed: str | None,
    position_weights: Callable[[Tensor], Tensor] | None = None,
) -> Gathered | None:
    """Statistics of every site that is applied at every position, in one pass; None if there is none."""
    statistics, around, C_of = None, None, {}
    for batch in batches:
        site_inputs = model.target_forward(batch).site_inputs
        upper = model.causal_importances(site_inputs).upper
        if statistics is None:
            around = look_around(model, batch[:1], unembed)
            C_of = {p: g.shape[-1] for p, g in upper.items() if at_every_position(g, batch.shape)}
            if not C_of:
                return None
            statistics = SubcomponentStatistics(C_of)
        acts = {p: model.sites[p].acts(site_inputs[p]) for p in C_of}
        statistics.update(
            batch,
            {path: at_positions(upper[path], batch.shape) for path in C_of},
            {path: at_positions(acts[path], batch.shape) for path in C_of},
            None if position_weights is None else position_weights(batch) > 0,
        )
    assert statistics is not None, "no batch to look at"
    left_out = [path for path in model.sites if path not in C_of]
    return Gathered(C_of, left_out, statistics.compute(), around)


def page_data(
    model: ComponentModel, gathered: Gathered, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """What the page's script shows, with every token text once (see `lm_report.js` for the form)."""
    statistics = gathered.statistics
    alive = statistics.n_active.nonzero().flatten()
    row_of = {c: row for row, c in enumerate(alive.tolist())}
    texts = TokenTexts(tokenizer)
    words = _token_lists(statistics, alive, texts)
    contexts = context_lists(statistics, alive, texts)
    around = gathered.around
    readable = None if around is None else readable_tokens(tokenizer, around.n_vocab)
    sites, rows, start = [], [], 0
    for index, (path, C) in enumerate(gathered.C_of.items()):
        own = [c for c in range(start, start + C) if c in row_of]
        columns = torch.tensor([c - start for c in own], dtype=torch.long)
        sign = torch.where(statistics.positive[own] < 0.5, -1.0, 1.0)
        found = (
            token_directions(model, path, columns, around, n=N_TOKENS, sign=sign, readable=readable)
            if around is not None and own
            else {}
        )
        for place, (c, column) in enumerate(zip(own, columns.tolist(), strict=True)):
            positive = statistics.positive[c].item()
            rows.append(
                {
                    "site": index,
                    "c": column,
                    "mean": _short(statistics.mean[c]),
                    "active": int(statistics.n_active[c]),
                    "highest": _short(statistics.highest[c]),
                    "agree": _short(max(positive, 1 - positive)),
                    "flipped": positive < 0.5,
                    **{name: _signed(extremes, place, texts) for name, extremes in found.items()},
                    **words[row_of[c]],
                    "companions": _companions(statistics, c, row_of),
                    "contexts": contexts[row_of[c]],
                }
            )
        site = {"name": path, "C": C, "alive": len(own)}
        if around is not None:
            site |= around.places[path]._asdict()
        sites.append(site)
        start += C
    return {
        "sites": sites,
        "left_out": gathered.left_out,
        "positions": statistics.n_positions,
        "across": statistics.pairs.across_sites,
        "rows": rows,
        "tokens": texts.texts,
    }


# --- one subcomponent's entries ------------------------------------------------------------------


def _token_lists(
    statistics: Statistics, alive: Int[Tensor, " alive"], texts: TokenTexts
) -> list[dict[str, list[Any]]]:
    """On which tokens the importance of each falls (token, share), and is high (token, mean, count)."""
    table = statistics.tokens
    n = min(N_TOKENS, len(table.ids))
    shares, share_rows = table.shares()[:, alive].topk(n, dim=0)
    means, mean_rows = table.means(MIN_COUNT)[:, alive].topk(n, dim=0)
    lists = []
    for column in range(len(alive)):
        share = zip(share_rows[:, column].tolist(), shares[:, column].tolist(), strict=True)
        mean = zip(mean_rows[:, column].tolist(), means[:, column].tolist(), strict=True)
        lists.append(
            {
                "shares": [[texts(table.ids[r]), _short(x)] for r, x in share if x >= 0.005],
                "means": [
                    [texts(table.ids[r]), _short(x), int(table.counts[r])]
                    for r, x in mean
                    if x >= 0.005
                ],
            }
        )
    return lists


def context_lists(
    statistics: Statistics, alive: Int[Tensor, " alive"], texts: TokenTexts
) -> list[list[list[Any]]]:
    """Of each context: place of the middle token, importances as two hex digits each, tokens.

    Tokens that make a character together stand as one, with the highest of their importances.
    """
    kept = statistics.contexts
    scores = kept.scores[alive].tolist()
    tokens = kept.tokens[alive].tolist()
    levels = (kept.importances[alive] * 255).round().to(torch.uint8).tolist()
    middle = statistics.left
    lists = []
    for row in range(len(alive)):
        contexts = []
        for score, window, level in zip(scores[row], tokens[row], levels[row], strict=True):
            if score == -torch.inf:
                continue
            inside = [place for place, token in enumerate(window) if token != OUTSIDE]
            groups = texts.whole([window[place] for place in inside])
            sizes = [len(group) for group in groups]
            ends = [inside[0] + end for end in accumulate(sizes)]
            spans = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
            shades = bytes(max(level[place] for place in span) for span in spans).hex()
            at = next(index for index, span in enumerate(spans) if middle in span)
            contexts.append([at, shades, *(texts(*group) for group in groups)])
        lists.append(contexts)
    return lists


def _signed(extremes: Extremes, place: int, texts: TokenTexts) -> list[list[list[Any]]]:
    """The highest and the lowest tokens with their values."""
    ends = (extremes[:2], extremes[2:])
    return [
        [
            [texts(token), _short(value)]
            for token, value in zip(tokens[place].tolist(), values[place].tolist(), strict=True)
        ]
        for tokens, values in ends
    ]


def _companions(statistics: Statistics, c: int, row_of: Mapping[int, int]) -> list[list[float]]:
    """Each companion's row of the page, its Jaccard index with c, and its share of c's positions."""
    start, joint = statistics.pairs.with_all(c)
    n_active = statistics.n_active
    own = int(n_active[c])
    either = own + n_active[start : start + len(joint)] - joint
    jaccard = joint / either.clamp(min=1)
    jaccard[c - start] = 0.0
    values, others = jaccard.topk(min(N_COMPANIONS, len(jaccard)))
    return [
        [row_of[start + other], _short(value), _short(int(joint[other]) / own)]
        for value, other in zip(values.tolist(), others.tolist(), strict=True)
        if value > 0
    ]


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.3g}")
