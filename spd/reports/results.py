"""The figures of merit of a finished run beside the published ones; pure functions on data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spd.registry import EXPERIMENTS

LABELS = {
    "mmcs": "MMCS",
    "ml2r": "ML2R",
    "mmcs_paper": "MMCS (paper's definition)",
    "ml2r_paper": "ML2R (paper's definition)",
    "errors": "errors",
    "ce": "cross-entropy",
    "recovered": "cross-entropy recovered",
    "kl": "KL from the target",
    "correlation": "correlation",
    "slope": "slope",
    "mse_to_labels": "MSE to labels",
    "l0": "L0",
    "alive": "alive",
    "density": "density",
    "loss": "held-out",
}
COLUMNS = {
    "mmcs/linear1": ("MMCS", 16),
    "ml2r/linear1": ("ML2R", 16),
    "correlation/neuron_contributions": ("correlation", 12),
    "slope/neuron_contributions": ("slope", 7),
    "errors/total": ("errors", 7),
}
"""Of a table of runs: metric key → heading and width."""


def result_of(
    config: Any, history: Sequence[Mapping[str, float]], seconds: float
) -> dict[str, Any]:
    """What result.json holds: one row per figure of the last evaluation, and the verdict."""
    evaluations = [line for line in history if any(key.startswith("eval/") for key in line)]
    last = {key.removeprefix("eval/"): value for key, value in evaluations[-1].items()}
    experiment = EXPERIMENTS.get(config.experiment)
    published = experiment.published if experiment else {}
    rows = []
    for key, value in last.items():
        name, _, place = key.partition("/")
        if name not in LABELS:
            continue
        reference = published.get(f"{name.removesuffix('_paper')}/{place}")
        rows.append(
            {
                "metric": f"{LABELS[name]} {place}",
                "key": key,
                "value": value,
                "spread": last.get(f"{name}_sd/{place}"),
                "published": reference.value if reference else None,
                "published_spread": reference.spread if reference else None,
            }
        )
    return {
        "experiment": config.experiment,
        "seed": config.seed,
        "steps": config.steps,
        "seconds": round(seconds, 1),
        "solved": bool(last["solved"]) if "solved" in last else None,
        "rows": rows,
    }


def verdict(result: Mapping[str, Any]) -> str:
    """One line: solved, or the errors of each site."""
    if result["solved"] is None:
        kept = recovered(result)
        return f"{kept[0]} {kept[1]}" if kept else "no known solution to compare with"
    if result["solved"]:
        return "solved: every site matches the known importance pattern"
    errors = [
        f"{row['key'].removeprefix('errors/')} {row['value']:.0f}"
        for row in result["rows"]
        if row["key"].startswith("errors/") and row["key"] != "errors/total"
    ]
    return f"not solved: errors against the known pattern: {', '.join(errors)}"


def recovered(result: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a language model keeps, as a headline and how it goes on; None where it was not measured."""
    values = {row["key"]: row["value"] for row in result.get("rows", [])}
    if not {"recovered/masked", "recovered/rounded"} <= values.keys():
        return None
    return (
        f"{values['recovered/masked']:.1%} of the cost of ablation avoided",
        f"with the importances as masks, {values['recovered/rounded']:.1%} with rounded ones (g > 0.5)",
    )


def format_result(result: Mapping[str, Any]) -> str:
    """One run as text: its figures, the published ones beside them, the verdict."""
    lines = [
        f"{result['experiment']}, seed {result['seed']}, {result['steps']} steps,"
        f" {result['seconds']:.0f} s",
        f"  {'':34} {'this run':>18} {'published':>18}",
    ]
    for row in result["rows"]:
        own = format_value(row["value"], row["spread"])
        other = format_value(row["published"], row["published_spread"])
        lines.append(f"  {row['metric']:34} {own:>18} {other:>18}")
    lines.append(f"  {verdict(result)}")
    return "\n".join(lines)


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Several runs, one line each; the key is the run's name."""
    width = max(len(name) for name in results)
    found = {row["key"] for result in results.values() for row in result["rows"]}
    shown = {key: column for key, column in COLUMNS.items() if key in found}
    heads = " ".join(f"{head:>{size}}" for head, size in shown.values())
    lines = [f"{'run':{width}}  {'seed':>4} {'steps':>7}  {heads}  solved"]
    for name, result in results.items():
        rows = {row["key"]: row for row in result["rows"]}
        cells = [
            f"{format_value(rows[key]['value'], rows[key]['spread']) if key in rows else '–':>{size}}"
            for key, (_, size) in shown.items()
        ]
        solved = {True: "yes", False: "no", None: "–"}[result["solved"]]
        lines.append(
            f"{name:{width}}  {result['seed']:>4} {result['steps']:>7}  {' '.join(cells)}  {solved}"
        )
    return "\n".join(lines)


def format_value(value: float | None, spread: float | None) -> str:
    """`0.993 ± 0.002`; whole numbers without decimals, small ones in powers of ten; `–` for none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        text = str(value)
    elif value == int(value) and spread is None:
        text = f"{int(value)}"
    elif abs(value) < 1e-3 and value != 0:
        text = f"{value:.2e}"
    else:
        text = f"{value:.3f}"
    return text if spread is None else f"{text} ± {spread:.3f}"
