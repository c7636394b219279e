"""A run directory with invented contents, for tests of what is made of one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spd.metrics import (
    CausesMetric,
    ColumnMatchMetric,
    PatternErrorsMetric,
    Published,
    SparsityMetric,
)
from spd.reports.evaluations import result_of
from spd.reports.figures import save_figures
from spd.reports.png import DescribedFigure, FigureText


def make_run(root: Path, **changes: Any) -> Path:
    """A run directory as a finished run leaves it; `changes` replace or (None) leave out files."""
    run = root / "20260101-120000-abcdef"
    files: dict[str, Any] = {
        "config.yaml": (
            "experiment: tms_5-2\nseed: 3\nsteps: 40000\nsites: {linear*: 20}\n"
            "losses: {faithfulness: {type: faithfulness, coeff: 1.0}}\n"
            "figures: {second: {}, first: {}}\n"
        ),
        "meta.json": {
            "status": "finished",
            "command": "python spd/experiments/tms/tms_decomposition.py config.yaml seed=3",
            "entry": {"module": "spd.experiments.tms.tms_decomposition"},
            "commit": "0123456789abcdef",
            "dirty": False,
            "versions": {"torch": "2.13.0"},
            "seconds": 754.2,
            "tracker": None,
        },
        "metrics.jsonl": [
            {"step": 0, "eval/loss/total": 2.0, "eval/l0/linear1": 3.0, "eval/errors/linear1": 7.0},
            {"step": 0, "loss/total": 2.0},
            {"step": 1200, "eval/loss/total": 0.5, "eval/l0/linear1": 0.25, "eval/matches": 1.0}
            | {"eval/errors/linear1": 0.0, "eval/errors/total": 0.0},
        ],
        "timings.jsonl": [{"step": 0, "seconds": 1.0, "steps_per_second": 51.5}],
        "result.json": result(solved=True, errors=0),
        "target/training.json": {
            "chosen_seed": 4,
            "n_features": 5,
            "probe": 0.75,
            "required_output": 0.375,
            "seconds": 18.3,
            "seeds": [
                {"seed": 4, "final_loss": 0.01, "n_represented": 5, "outputs_at_probe": [0.7] * 5},
                {"seed": 5, "final_loss": None, "n_represented": 0, "outputs_at_probe": [None]},
            ],
        },
        "target/config.yaml": "kind: tms\n",
    } | changes
    for name, content in files.items():
        if content is None:
            continue
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return run


METRICS = {
    "column_match": ColumnMatchMetric(
        site="linear1",
        published={
            "mmcs/linear1": Published(value=1.0, spread=0.0),
            "ml2r/linear1": Published(value=0.993, spread=0.002),
        },
        expected={"mmcs/linear1": (0.99, 1.001), "ml2r/linear1": (0.95, 1.05)},
    ),
    "pattern_errors": PatternErrorsMetric(),
    "causes": CausesMetric(expected={"solved": (0.5, 1.0)}),
    "sparsity": SparsityMetric(),
}


def result(*, solved: bool | None, errors: int, **values: float) -> dict[str, Any]:
    """What a result.json holds; `solved` None: as of a target without a known solution."""
    figures = {
        "mmcs/linear1": 0.9997,
        "mmcs_sd/linear1": 0.0001,
        "ml2r/linear1": 0.991,
        "ml2r_sd/linear1": 0.004,
        "l0/linear1": 0.251,
        "alive/linear1": 5.0,
        "loss/faithfulness": 1.25e-6,
        **values,
    }
    metrics = dict(METRICS)
    if solved is None:
        del metrics["pattern_errors"], metrics["causes"]
    else:
        figures |= {"errors/linear1": float(errors), "errors/total": float(errors)}
        figures |= {"matches": float(errors == 0), "solved": float(solved)}
        figures |= {"unfaithful/linear1": 0.01, "effect_errors/linear1": float(errors)}
    config = SimpleNamespace(experiment="tms_5-2", seed=3, steps=40000, metrics=metrics)
    last = {"step": 40000, **{f"eval/{key}": value for key, value in figures.items()}}
    return json.loads(json.dumps(result_of(config, [last], 754.2).as_json()))


def add_figures(run: Path) -> dict[str, bytes]:
    """Two figures, one of them drawn twice; what the newest files hold."""
    for step in (0, 1200):
        for name in ("first", "second"):
            text = FigureText(f"Title of {name}", f"Read {name} & look.", f"{name} at {step}.")
            figure = DescribedFigure(text, figsize=(12.0, 3.0))
            figure.subplots().plot([0, step])
            save_figures(run / "figures", step, {name: figure})
    return {n: (run / "figures" / n / "00001200.png").read_bytes() for n in ("first", "second")}
