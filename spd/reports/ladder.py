"""The ladder of a run for its page: a table of masks and what they cost, and how that grows with search.

Reads figures by their names, as `LadderMetric` writes them, and what `spd.analysis.adversary` has left.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from spd.adversary import STEP_SIZE, Scope
from spd.masks import rounded_name
from spd.metrics import SCOPES, SOURCES, deepest, rung
from spd.metrics.baselines import NAMES as BASELINES
from spd.reports.drawing import DescribedFigure
from spd.reports.panels import BLUE, GREY, ORANGE, PALETTE, panel_grid
from spd.reports.png import FigureText
from spd.reports.reading import made_elsewhere, object_of
from spd.reports.results import format_value

LADDER = "ladder"
PREFIX, RECOVERED = "ladder/", "ladder_recovered/"
ANALYSIS = Path("analysis", "adversary", "ladder.json")
TICKS = (1, 5, 20, 80, 320)
COLOURS: Mapping[Scope, str] = {"batch": BLUE, "row": ORANGE}
MASKS = {
    "unmasked": ("all subcomponents on", "none"),
    "stochastic": ("g + (1 − g) r", "none: r drawn at random, once"),
    "importance_masked": ("g", "none"),
    "rounded": ("1 where g > 0.5, else 0", "none"),
    "random": ("r, whatever g is", "none: r drawn at random, once"),
    "permuted": ("g of another row or position", "none: a control, drawn at random"),
    "ablated": ("all subcomponents off", "none"),
}
"""name of a rung → its masks, and how r is chosen"""


class Ladder(NamedTuple):
    """What the page says of it."""

    heads: list[str]
    lines: list[list[str]]
    on: str
    """how much is on at a time, and on which rows that was looked at: a sentence"""
    figure: DescribedFigure


def is_of_ladder(key: str) -> bool:
    return key.startswith((PREFIX, "ladder_"))


def ladder_of(
    values: Mapping[str, float],
    history: Sequence[Mapping[str, float]],
    run_dir: Path,
    step: int | None = None,
) -> Ladder | None:
    """The ladder among the figures of the evaluation at `step`; None where there is none.

    What an analysis has found at another step is left out, and a sentence says so.
    """
    whole = values.get(f"{PREFIX}ablated")
    if whole is None:
        return None
    analysis: dict[str, Any] = object_of(run_dir / ANALYSIS)
    elsewhere = made_elsewhere(analysis.get("checkpoint"), step)
    left_out = f" Not drawn: spd.analysis.adversary. {elsewhere}" if elsewhere else ""
    known = any(key.startswith(RECOVERED) for key in values)
    names = [key.removeprefix(PREFIX) for key in values if key.startswith(PREFIX)]
    beside = [name for name in BASELINES if any(k.startswith(f"ladder_{name}/") for k in values)]
    return Ladder(
        [
            *("masks", "adversary and its budget", "D", "of ablating all"),
            *["CE recovered"] * known,
            *(f"D of {BASELINES[other]}" for other in beside),
        ],
        [
            [
                *described(name),
                format_value(values[f"{PREFIX}{name}"], None, ".3g"),
                _share(values[f"{PREFIX}{name}"], whole),
                *[_percent(values.get(f"{RECOVERED}{name}"))] * known,
                *(format_value(values.get(f"ladder_{b}/{name}"), None, ".3g") for b in beside),
            ]
            for name in names
        ],
        how_much_is_on(values) + left_out,
        ladder_figure(values, history, {} if elsewhere else analysis),
    )


def described(name: str) -> tuple[str, str]:
    """The masks of a rung, and who chose them at what cost."""
    for scope in SCOPES:
        n = name.removeprefix("adversarial_").removesuffix(f"_{scope}")
        if name == f"adversarial_{n}_{scope}":
            steps = f"{n} step{'' if n == '1' else 's'} of {STEP_SIZE}"
            return "g + (1 − g) r", f"{steps}, one start, {SOURCES[scope]}"
    threshold = name.removeprefix(rounded_name(0.0)[:-1])
    if threshold != name:
        return f"1 where g > {threshold}, else 0", "none"
    return MASKS.get(name, (name, ""))


def how_much_is_on(values: Mapping[str, float]) -> str:
    """A sentence: masks that leave everything on cost nothing and decompose nothing."""
    alive = [value for key, value in values.items() if key.startswith("alive/")]
    C = values.get("ladder_C", math.nan)
    said = (
        f"{values.get('ladder_l0', math.nan):.4g} of {C:,.0f} subcomponents are on at a time (L0)"
    )
    if alive:
        said += f", {sum(alive):,.0f} are alive"
    return f"On {values.get('ladder_rows', math.nan):,.0f} held-out rows or positions, {said}."


def ladder_figure(
    values: Mapping[str, float],
    history: Sequence[Mapping[str, float]],
    analysis: Mapping[str, Any],
) -> DescribedFigure:
    """D over that of ablating all, over the steps of the adversary, and over the steps of the run."""
    text = FigureText(
        "What masks cost, over that of ablating all",
        "Left: the largest error until so many steps of the adversary, at the last evaluation, and where"
        " spd.analysis.adversary was run, its own on more rows; more steps are a stronger adversary."
        " Right: the same figures over the run, beside those of masks that nobody chose. At 1, the dashed"
        " line, masks cost as much as ablating everything.",
        "Curves of the errors under adversarial masks, over the steps of the search and over the run.",
    )
    figure = DescribedFigure(text, figsize=(8.0, 4.2))
    search, run = panel_grid(figure, 2)
    for scope in SCOPES:
        _search_line(search, values, scope)
    _lines_of_analysis(search, analysis)
    search.set_xscale("log")
    search.set_xticks(TICKS, [str(n) for n in TICKS])
    search.minorticks_off()
    search.set_title("search for masks", fontsize=10)
    search.set_xlabel("steps of the adversary", fontsize=9)
    names = ["stochastic", "importance_masked", "rounded"]
    names += [rung(n, scope) for scope in SCOPES if (n := _deepest_on_the_way(history, scope))]
    for colour, name in zip(PALETTE, names, strict=False):
        points = [
            (line["step"], line[f"eval/{PREFIX}{name}"] / line[f"eval/{PREFIX}ablated"])
            for line in history
            if f"eval/{PREFIX}{name}" in line and line.get(f"eval/{PREFIX}ablated", 0) > 0
        ]
        label = name.replace("_", " ")
        run.plot(*_columns(points), ".-", color=colour, linewidth=1.2, markersize=4, label=label)
    run.set_title("over the run", fontsize=10)
    run.set_xlabel("step", fontsize=9)
    for ax in (search, run):
        if any(value > 0 for line in ax.lines for value in list(line.get_ydata())):  # pyright: ignore[reportArgumentType]
            ax.set_yscale("log", nonpositive="mask")
        ax.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
        ax.set_ylabel("D, over that of ablating all", fontsize=9)
        ax.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure


def _search_line(ax: Axes, values: Mapping[str, float], scope: Scope) -> None:
    whole = values[f"{PREFIX}ablated"]
    last = deepest(values, scope)
    shown = [n for n in range(1, (last or 0) + 1) if f"{PREFIX}{rung(n, scope)}" in values]
    points = [(n, values[f"{PREFIX}{rung(n, scope)}"] / whole) for n in shown if whole > 0]
    label = SOURCES[scope]
    ax.plot(*_columns(points), "o-", color=COLOURS[scope], markersize=4, label=label)


def _lines_of_analysis(ax: Axes, found: Mapping[str, Any]) -> None:
    """What `python -m spd.analysis.adversary` has found of this run, if it was asked."""
    rungs, curves = found.get("rungs"), found.get("adversary")
    if not isinstance(rungs, dict) or not isinstance(curves, dict) or not rungs.get("ablated"):
        return
    for scope in SCOPES:
        curve = curves.get(scope)
        if isinstance(curve, list) and all(isinstance(value, int | float) for value in curve):
            points = [(n, value / rungs["ablated"]) for n, value in enumerate(curve) if n]
            label = f"the same, spd.analysis.adversary, starts: {found.get('n_restarts')}"
            ax.plot(*_columns(points), ":", color=COLOURS[scope], linewidth=1.4, label=label)


def _deepest_on_the_way(history: Sequence[Mapping[str, float]], scope: Scope) -> int | None:
    """The most steps that every evaluation has."""
    lines = [
        {key.removeprefix("eval/"): value for key, value in line.items()}
        for line in history
        if f"eval/{PREFIX}ablated" in line
    ]
    found = [n for line in lines if (n := deepest(line, scope)) is not None]
    return min(found, default=None)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in finite], [y for _, y in finite]


def _share(value: float, whole: float) -> str:
    return f"{value / whole:.3f}" if whole else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
