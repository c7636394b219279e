"""What comes out of every sort of configuration, as plain values: for tests that change its keys."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import submitit
import torch
from torch import Tensor

from spd.config import UserError, parse
from spd.engine.prepare import prepare
from spd.experiments.lm.train_lm import LM_TARGET, LMTrainConfig
from spd.experiments.resid_mlp.model import (
    LabelConfig,
    ResidMLP,
    ResidMLPModelConfig,
    make_labels,
)
from spd.experiments.resid_mlp.model import initial_weights as resid_mlp_weights
from spd.experiments.resid_mlp.train_resid_mlp import ResidMLPTrainConfig
from spd.experiments.resid_mlp.train_resid_mlp import train_seeds as train_resid_mlp
from spd.experiments.sparse_features import (
    InheritedFeatures,
    SparseFeatureConfig,
    SparseFeatures,
)
from spd.experiments.tms.model import TMSModelConfig, with_tie
from spd.experiments.tms.model import initial_weights as tms_weights
from spd.experiments.tms.train_tms import TMSTrainConfig
from spd.experiments.tms.train_tms import train_seeds as train_tms
from spd.launch.job import Job
from spd.launch.resources import LaunchOptions
from spd.launch.slurm import scripts
from spd.launch.study import Study
from spd.metrics import MetricSpec, Published, Quantity
from spd.optimize import run_steps
from spd.problem import Problem
from spd.reports.evaluations import evaluation_of
from spd.reports.report import merits, site_table
from spd.reports.results import Result, format_table
from spd.schedule import ScheduleConfig, schedule_factor
from spd.spd_config import SPDConfig
from spd.sweeps import optuna_backend, wandb_backend
from spd.sweeps.definition import Definition
from tests.lm_stand_ins import stories
from tests.toy import MLP, MLP_SITES

Raw = dict[str, Any]
CPU = torch.device("cpu")


def plain(value: Any) -> Any:
    """Without tensors, for a comparison."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.flatten().tolist())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


# --- what comes out of a configuration --------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def started(self, step: int, steps: int) -> None:
        pass

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def ended(self) -> None:
        pass


def batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.rand(16, 4, generator=generator)


def decomposition(raw: Raw) -> Any:
    """What is logged, what is learnt, and which checkpoints are left."""
    torch.manual_seed(0)
    problem = Problem(MLP(), batches(0), batches(1))
    prepared = prepare(problem, parse(SPDConfig, raw, "test"))
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        model = run_steps(prepared, recorder, checkpoints=Path(folder))
        kept = sorted(path.name for path in Path(folder).iterdir())
    return [recorder.rows, dict(model.subcomponent_parameters()), kept]


def masked(source: str) -> Callable[[Raw], Any]:
    """Of a source of masks: what is learnt from it."""

    def observe(raw: Raw) -> Any:
        term = {"coeff": 1.0, "source": {"type": source, **raw}}
        settings = {"losses": {"masked_recon": term}, "steps": 6, "lr": 1e-2, "log_every": 2}
        run = {"sites": dict(MLP_SITES), "execution": {"compile": False}, "save_every": 6}
        return decomposition({**run, **settings})

    return observe


def schedule(raw: Raw) -> Any:
    config = parse(ScheduleConfig, raw, "test")
    return [schedule_factor(config, step, 10) for step in range(10)]


def features(raw: Raw) -> Any:
    config = parse(SparseFeatureConfig, raw, "test")
    return next(SparseFeatures(config, 6, batch_size=64, seed=0, stream="x"))


def inherited(raw: Raw) -> Any:
    """Of a target with other inputs; the message where they may not differ."""
    trained = SparseFeatureConfig(feature_probability=0.3, value_range=(-2.0, -1.0))
    try:
        config = parse(InheritedFeatures, raw, "test").like(trained, 6)
    except Exception as error:
        return str(error)
    return next(SparseFeatures(config, 6, batch_size=64, seed=0, stream="x"))


def tms_model(raw: Raw) -> Any:
    config = parse(TMSModelConfig, raw, "test")
    return with_tie(tms_weights(config, generator=torch.Generator().manual_seed(0)))


def resid_mlp_model(raw: Raw) -> Any:
    config = parse(ResidMLPModelConfig, raw, "test")
    weights = resid_mlp_weights(config, generator=torch.Generator().manual_seed(0))
    model = ResidMLP(config)
    model.load_state_dict(weights)
    return [weights, model(torch.linspace(-1, 1, config.n_features)[None])]


def labels(raw: Raw) -> Any:
    model = ResidMLPModelConfig(n_features=6, d_embed=4, d_mlp=2, n_layers=1)
    return make_labels(parse(LabelConfig, raw, "test"), model)(torch.linspace(-1, 1, 6)[None])


def tms_training(raw: Raw) -> Any:
    return train_tms(parse(TMSTrainConfig, raw, "test"), CPU)


def resid_mlp_training(raw: Raw) -> Any:
    return train_resid_mlp(parse(ResidMLPTrainConfig, raw, "test"), CPU)


def slurm_script(raw: Raw) -> Any:
    job = Job("a", Path("/a/jobs/a"), ["true"], {}, 1.0)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name in ("srun", "scontrol"):
            stand_in = Path(folder) / name
            stand_in.write_text("#!/bin/sh\n")
            stand_in.chmod(0o755)
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setattr(submitit, "SlurmExecutor", Recording)
        made = list(scripts(Path("/study"), [job] * 3, parse(LaunchOptions, raw, "test")))
        return [made, Recording.made[-1]]


class Recording(submitit.SlurmExecutor):
    """Keeps how often a job may go on, which stands in no script."""

    made: list[int] = []  # noqa: RUF012

    def __init__(self, folder: Path, max_num_timeout: int, **more: Any) -> None:
        self.made.append(max_num_timeout)
        super().__init__(folder=folder, max_num_timeout=max_num_timeout, **more)


def figures(raw: Raw) -> Any:
    """How the figures of a metric are shown: in a report, and in a table of many runs."""
    made = type("Made", (MetricSpec,), {"quantities": {"x": Quantity.model_validate(raw)}})
    references = {"x/a": {"value": 0.3, "spread": 0.1}, "y/b": {"value": 0.7}}
    spec = made().model_copy(
        update={"published": {k: Published.model_validate(v) for k, v in references.items()}}
    )
    values = {"x/a": 0.5, "x_sd/a": 0.125, "x/b": 0.25, "x_sd/b": 0.5}
    evaluation = evaluation_of(values, {"made": spec})
    own = {"experiment": "e", "seed": 0, "steps": 1, "seconds": 1.0}
    table = format_table({"run": Result(**own, **dict(evaluation))})
    return [merits(evaluation, {"a": 1, "b": 1}), site_table(evaluation, {"a": 1, "b": 1}), table]


def reference(raw: Raw) -> Any:
    published = {"x/a": parse(Published, raw, "test")}
    made = type("Made", (MetricSpec,), {"quantities": {"x": Quantity(label="X")}})
    spec = made().model_copy(update={"published": published})
    return merits(evaluation_of({"x/a": 0.5}, {"made": spec}), {})


def sweep(raw: Raw) -> Any:
    """What W&B gets, what Optuna samples from, and what the local back end refuses."""
    definition = parse(Definition, raw, "test")
    record = {"definition": definition.model_dump(mode="json", exclude_unset=True)}
    study = Study(Path("/study"), {**record, "name": "n", "project": "p"})
    try:
        optuna_backend.check(definition)
        local = repr(optuna_backend.distributions(definition))
    except UserError as error:
        local = str(error)
    return [wandb_backend.sent(study), local, definition.n_points]


SWEEP: Raw = {
    **{"method": "random", "run_cap": 4, "metric": {"name": "x"}},
    "parameters": {"lr": {"min": 0.1, "max": 0.5}},
}


def sweep_with(key: str) -> Callable[[Raw], Any]:
    return lambda raw: sweep({**SWEEP, key: raw})


def one_parameter(raw: Raw) -> Any:
    return sweep({**SWEEP, "parameters": {"lr": raw}})


def language_model(raw: Raw) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stories.txt"
        path.write_text("<end>".join(stories(25, seed=1)), encoding="utf-8")
        text = {"source": str(path), "separator": "<end>", "eval_frac": 0.2, "context_length": 16}
        training = parse(LMTrainConfig, {**raw, "data": {**text, "lowercase": True}}, "test")
        return LM_TARGET.train(training, CPU).weights
