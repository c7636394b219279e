"""What `spd.analysis` has left in a run, for its page. Reads files alone: no analysis is imported."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from spd.config import UserError
from spd.reports.drawing import BLUE, GREY, ORANGE, DescribedFigure, count, panel_grid
from spd.reports.images import Image, drawn
from spd.reports.png import FigureText
from spd.reports.reading import made_elsewhere, object_of

IMPORTANCES = Path("analysis", "importances", "importances.json")
CLUSTERING = Path("analysis", "clustering", "clustering.json")
LABELS = Path("analysis", "labels", "labels.json")
SHOWN_CLUSTERS, SHOWN_MEMBERS, SHOWN_LABELS = 100, 12, 500


class Section(NamedTuple):
    """One analysis on the page."""

    key: str
    title: str
    said: list[str]
    """paragraphs"""
    heads: list[str]
    lines: list[list[str]]
    more: str
    """what the table leaves out; empty, if nothing"""
    figure: Image | None = None


def analyses_of(run_dir: Path, step: int | None = None) -> list[Section]:
    """The sections of the analyses that a run holds, in their order.

    One that was made at another checkpoint than that of `step`, which the page shows, begins by saying so.
    """
    found = []
    for path, section in (
        (IMPORTANCES, _importances),
        (CLUSTERING, partial(_clustering, run_dir=run_dir)),
        (LABELS, _labels),
    ):
        told = object_of(run_dir / path)
        if not told:
            continue
        try:
            made = section(told)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{run_dir / path}: not what the analysis writes there ({type(error).__name__}: {error});"
                f" python -m spd.analysis.{path.parts[1]} {run_dir} writes it anew"
            ) from None
        elsewhere = made_elsewhere(_checkpoint_of(told, run_dir), step)
        found.append(made._replace(said=[elsewhere, *made.said]) if elsewhere else made)
    return found


def _checkpoint_of(told: Mapping[str, Any], run_dir: Path) -> Any:
    """The step whose checkpoint an analysis looked at; None where its record does not tell.

    What was made of importances is of their checkpoint, as long as these are the same ones.
    """
    about = told.get("about")
    if isinstance(about, dict):
        return about.get("checkpoint")
    if "importances" in told:
        importances = object_of(run_dir / IMPORTANCES)
        same = importances.get("sha256") == told["importances"]
        return _checkpoint_of({"about": importances.get("about")}, run_dir) if same else None
    return told.get("checkpoint")


def _importances(told: Mapping[str, Any]) -> Section:
    said = (
        f"One pass over {told['n_positions']:,} positions of {told['n_batches']:,} held-out batches. A"
        f" subcomponent is on where its importance g is above {told['threshold']}; alive is what is on at"
        " least once, L0 how many are on at a time."
    )
    lines = [
        [path, str(own["C"]), str(own["alive"]), f"{own['l0']:.4g}", f"{own['mean_g']:.4g}"]
        for path, own in told["sites"].items()
    ]
    heads = ["matrix", "C", "alive", "L0", "mean of Σ g"]
    return Section("importances", "Importances on more data", [said], heads, lines, "")


def _clustering(told: Mapping[str, Any], run_dir: Path) -> Section:
    costs, best, n = told["costs"], told["best_round"], told["n_positions"]
    clusters = [own for own in told["clusters"] if len(own["members"]) > 1]
    share = told.get("share")
    chosen = (
        "" if share is None else f", at which two that share {share:.0%} of their positions merge"
    )
    said = [
        f"{told['k']:,} subcomponents form {count(told['n_clusters'], 'group')}, {len(clusters):,} of them"
        " of several, if groups are merged as long as it takes fewer bits to say which are on:"
        f" {costs[best] / n:.4g} bits for each of {n:,} positions, {costs[0] / n:.4g} with single ones. How"
        f" large groups become depends on α, here {told['alpha']:.4g}{chosen}. On is g"
        f" > {told['threshold']}."
    ]
    stable = told.get("stability")
    if stable is not None:
        own, chance = stable["at_best"], stable["by_chance"]
        said.append(
            f"Between {stable['n_samples']} disjoint samples of the data, on average, of"
            f" {stable['n']:,} subcomponents"
            f" {own['hamming']:.4g} are in another group, by chance {chance['hamming']:.4g};"
            f" {own['matching']:.4g} pairs are together in one sample alone, by chance"
            f" {chance['matching']:.4g}."
        )
    shown = clusters[:SHOWN_CLUSTERS]
    lines = [
        [
            _members(own["members"]),
            str(len(own["members"])),
            f"{own['density']:.4g}",
            f"{own['cohesion']:.0%}",
        ]
        for own in shown
    ]
    more = (
        f"{len(clusters) - len(shown):,} smaller groups are in {CLUSTERING}."
        if shown != clusters
        else ""
    )
    heads = ["members", "size", "share of positions on", "a member on, of that"]
    table = (run_dir / CLUSTERING).with_suffix(".csv")
    figure = drawn("clustering", _curves(told), table, run_dir)
    return Section("clustering", "Clusters", said, heads, lines, more, figure)


def _members(names: Sequence[str]) -> str:
    """Site by site, so that a long path stands there once."""
    by_site: dict[str, list[str]] = {}
    for name in names[:SHOWN_MEMBERS]:
        path, _, c = name.rpartition(":")
        by_site.setdefault(path, []).append(c)
    said = "; ".join(f"{path} {', '.join(own)}" for path, own in by_site.items())
    left = len(names) - SHOWN_MEMBERS
    return f"{said} and {left} more" if left > 0 else said


def _curves(told: Mapping[str, Any]) -> DescribedFigure:
    costs, best, n = told["costs"], told["best_round"], told["n_positions"]
    stable = told.get("stability")
    reading = "Bits for each position over the number of merges; the dot is the lowest, with these groups."
    if stable is not None:
        reading += (
            " Right: how many subcomponents are in another group in another sample of the data."
        )
    alt = "The cost of saying which groups are on, over the number of merges."
    text = FigureText("What merging costs", reading, alt)
    figure = DescribedFigure(text, figsize=(8.0, 3.2))
    panels = panel_grid(figure, 1 if stable is None else 2)
    panels[0].plot(range(len(costs)), [cost / n for cost in costs], color=BLUE, linewidth=1.4)
    panels[0].plot([best], [costs[best] / n], "o", color=ORANGE, markersize=5)
    panels[0].set_xlabel("merges", fontsize=9)
    panels[0].set_ylabel("bits for each position", fontsize=9)
    if stable is not None:
        rounds = [int(name) for name in stable["by_round"]]
        values = [own["hamming"] for own in stable["by_round"].values()]
        panels[1].plot(rounds, values, "o-", color=BLUE, markersize=3, linewidth=1.2)
        panels[1].axhline(stable["by_chance"]["hamming"], color=GREY, linestyle="--", linewidth=1)
        panels[1].set_xlabel("merges (dashed: by chance, at the lowest cost)", fontsize=9)
        panels[1].set_ylabel("subcomponents elsewhere", fontsize=9)
    return figure


def _labels(told: Mapping[str, Any]) -> Section:
    labels = told["labels"]
    said = [
        f"{len(labels):,} subcomponents have a label, given by {told['model']} from contexts, and"
        f" {sum(own.get('detection') is not None for own in labels.values()):,} have scores on other"
        " contexts: detection is whether the label tells where a subcomponent is on, fuzzing whether it"
        " tells at which token. 0.5 is chance. A label is a guess of a language model and no finding."
    ]
    shown = list(labels.items())[:SHOWN_LABELS]
    lines = [
        [name, own["label"], *(_score(own.get(kind)) for kind in ("detection", "fuzzing"))]
        for name, own in shown
    ]
    left = len(labels) - len(shown)
    more = f"{left:,} more are in {LABELS}." if left else ""
    heads = ["subcomponent", "label", "detection", "fuzzing"]
    return Section("labels", "Labels", said, heads, lines, more)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
