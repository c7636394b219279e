"""The back end without account or server: an Optuna study in a journal file, for several agents.

The points of a grid wait in it, each to be claimed once. A trial whose agent is gone, killed or
stopped, is taken over by the next agent that looks for work, and goes on from its checkpoint.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import optuna
from filelock import FileLock
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from spd.config import Exit, UserError
from spd.launch.job import Ended
from spd.launch.study import Study
from spd.sweeps.definition import (
    Definition,
    Parameter,
    Point,
    choices,
)
from spd.sweeps.journal import open_journal
from spd.sweeps.trials import (
    Trial,
    Watcher,
    definition_of,
    run_seeds,
    run_trial,
    set_aside,
    try_lock,
)

JOURNAL, CLAIM_LOCK = "journal.log", ".claim.lock"
POINT, AGENT, VOID = "point", "agent", "void"
SUPPORTED = (
    *("constant", "categorical", "int_uniform", "uniform", "q_uniform", "log_uniform"),
    "log_uniform_values",
)


class Claim(NamedTuple):
    """A trial that is this agent's as long as the lock is held."""

    number: int
    trial_id: int
    point: Point
    lock: FileLock


def check(definition: Definition) -> None:
    """`UserError` if the sweep holds what only W&B can do, or has no end."""
    if definition.method != "grid" and definition.run_cap is None:
        raise UserError(f"run_cap: is needed: a {definition.method} search here has no other end")
    for key, parameter in definition.parameters.items():
        if parameter.kind not in SUPPORTED or parameter.probabilities is not None:
            raise UserError(
                f"parameters.{key}: {parameter.kind} is for W&B alone (allowed here:"
                f" {', '.join(SUPPORTED)})"
            )
    if definition.early_terminate is not None and definition.early_terminate.strict:
        raise UserError("early_terminate.strict: true is for W&B alone (allowed here: false)")


def create(study: Study) -> None:
    """Make the journal; the points of a grid wait in it."""
    definition = definition_of(study)
    direction = definition.metric.goal
    with _quiet():
        made = optuna.create_study(
            study_name=study.id, storage=_storage(study), direction=direction
        )
        _enqueue(study, made, definition)


def extend(study: Study) -> int:
    """Add the points that the study's definition now has and the journal has not; how many."""
    with _quiet(), FileLock(study.directory / CLAIM_LOCK):
        return _enqueue(study, _load(study), definition_of(study))


def begin_anew(study: Study) -> None:
    """What failed so far counts no more, and its points wait again: the metric had a wrong name.

    They get new numbers, and so new runs. Waits for `extend`; the study is to be saved after it.
    """
    trials = _load(study).get_trials(deepcopy=False)
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    study.record[VOID] = failed
    set_aside(study, [_name(number) for number in failed])


def n_waiting(study: Study) -> int:
    """Points that no agent has begun, and those that an agent has left unfinished."""
    definition, trials = definition_of(study), _load(study).get_trials(deepcopy=False)
    n_begun, n_left = len(trials) - len(_void(study)), 0
    for trial in trials:
        if trial.state == TrialState.RUNNING and (lock := try_lock(study, _name(trial.number))):
            lock.release()
            n_left += 1
    if definition.method != "grid":
        return max(0, (definition.run_cap or 0) - n_begun) + n_left
    return sum(trial.state == TrialState.WAITING for trial in trials) + n_left


def work(study: Study, agent: str) -> int:
    """Run trials until none is left, as many at once as the study says; the agent's exit status."""
    while taken := _claim_up_to(study.record.get("at_once", 1), study, agent):
        try:
            trials, ended = _run(study, taken, agent)
            for own, trial in zip(taken, trials, strict=True):
                if ended.signum is None or trial.state == "finished":
                    tell(study, own, trial)
            if ended.signum is not None:  # an unfinished trial is for whoever goes on with it
                return Exit.TERMINATED
        finally:
            for own in taken:
                own.lock.release()
    return 0


def _claim_up_to(n: int, study: Study, agent: str) -> list[Claim]:
    taken: list[Claim] = []
    while len(taken) < n and (own := claim(study, agent)) is not None:
        taken.append(own)
    return taken


def _run(study: Study, taken: Sequence[Claim], agent: str) -> tuple[list[Trial], Ended]:
    if study.record.get("at_once", 1) > 1:
        return run_seeds(study, {_name(own.number): own.point for own in taken}, agent=agent)
    (own,) = taken
    watcher = pruning(study, own)
    trial, ended = run_trial(study, _name(own.number), own.point, agent=agent, watcher=watcher)
    return [trial], ended


def distributions(definition: Definition) -> dict[str, BaseDistribution]:
    """What Optuna samples from; a value that is no scalar goes by its place in the list."""
    return {
        key: _distribution(parameter)
        for key, parameter in definition.parameters.items()
        if parameter.kind != "constant"
    }


def decoded(definition: Definition, params: Mapping[str, Any]) -> Point:
    """The point that Optuna's parameters stand for."""
    point: Point = {}
    for key, parameter in definition.parameters.items():
        listed = parameter.kind in ("constant", "categorical")
        point[key] = choices(parameter)[params.get(key, 0)] if listed else params[key]
    return point


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == "categorical":
        return CategoricalDistribution(list(range(len(choices(parameter)))))
    assert parameter.min is not None and parameter.max is not None, "checked"
    low, high = parameter.min, parameter.max
    match parameter.kind:
        case "int_uniform":
            return IntDistribution(int(low), int(high))
        case "uniform":
            return FloatDistribution(low, high)
        case "q_uniform":
            return FloatDistribution(low, high, step=parameter.q or 1.0)
        case "log_uniform_values":
            return FloatDistribution(low, high, log=True)
        case _:  # log_uniform: the bounds are exponents of e
            return FloatDistribution(math.exp(low), math.exp(high), log=True)


def _name(number: int) -> str:
    return f"trial{number}"


def _void(study: Study) -> list[int]:
    """The numbers of trials that count no more."""
    return study.record.get(VOID, [])


def _enqueue(study: Study, made: optuna.Study, definition: Definition) -> int:
    if definition.method != "grid":
        return 0
    void = set(_void(study))
    trials = made.get_trials(deepcopy=False)
    known = {_hashable(trial.user_attrs[POINT]) for trial in trials if trial.number not in void}
    new = [point for point in definition.points() if _hashable(point) not in known]
    cap = definition.run_cap
    new = new if cap is None else new[: max(0, cap - len(known))]
    with open_journal(study.directory / JOURNAL)[0].in_one_go():
        for point in new:
            made.enqueue_trial({}, user_attrs={POINT: point})
    return len(new)


def _hashable(value: Any) -> Any:
    """A point, or a value of one, as something to look up: equal where the values are."""
    if isinstance(value, dict):
        return frozenset((key, _hashable(own)) for key, own in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def claim(study: Study, agent: str) -> Claim | None:
    """A trial to work on: one that was left, else a new one; None if there is no more.

    One agent looks at a time. Who is killed in here leaves a running trial without a lock, which the
    next one finds.
    """
    definition = definition_of(study)
    with _quiet(), FileLock(study.directory / CLAIM_LOCK):
        made = _load(study, definition)
        trials = made.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING and (lock := try_lock(study, _name(trial.number))):
                if _still_running(made, trial):
                    return _claimed(made, definition, trial, agent, lock)
                lock.release()
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        n_begun = len(trials) - len(_void(study))
        ended = definition.method == "grid" or n_begun >= (definition.run_cap or 0)
        if not waiting and ended:
            return None
        made.sampler = _sampler(definition, len(trials))
        new = made.ask(distributions(definition) if definition.method != "grid" else None)
        lock = try_lock(study, _name(new.number))
        assert lock is not None, "nobody else claims at the same time"
        frozen = made.get_trials(deepcopy=False)[new.number]
        return _claimed(made, definition, frozen, agent, lock)


def _still_running(made: optuna.Study, trial: FrozenTrial) -> bool:
    """Whether a trial was left, or ended between a look at the journal and one at its lock."""
    return made.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING


def _claimed(
    made: optuna.Study, definition: Definition, trial: FrozenTrial, agent: str, lock: FileLock
) -> Claim:
    point = trial.user_attrs.get(POINT) or decoded(definition, trial.params)
    storage = made._storage
    storage.set_trial_user_attr(trial._trial_id, POINT, point)
    storage.set_trial_user_attr(trial._trial_id, AGENT, agent)
    return Claim(trial.number, trial._trial_id, point, lock)


def pruning(study: Study, taken: Claim) -> Watcher:
    """Tells Optuna how the run is doing, and asks whether it is hopeless."""
    definition = definition_of(study)
    made = _load(study, definition)
    pruner, storage = _pruner(definition), made._storage

    def heard(n: int, value: float) -> None:
        if math.isfinite(value):
            storage.set_trial_intermediate_value(taken.trial_id, n + 1, value)

    def hopeless() -> bool:
        with _quiet():
            return pruner.prune(made, storage.get_trial(taken.trial_id))

    return Watcher(heard, hopeless)


def tell(study: Study, taken: Claim, trial: Trial) -> None:
    """What became of a trial; nobody takes it up again."""
    states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    state = states.get(trial.state, TrialState.FAIL)
    value = trial.value if state == TrialState.COMPLETE else None
    with _quiet():
        _load(study).tell(taken.number, value, state=state)


def _load(study: Study, definition: Definition | None = None) -> optuna.Study:
    sampler = None if definition is None else _sampler(definition, 0)
    return optuna.load_study(study_name=study.id, storage=_storage(study), sampler=sampler)


def _storage(study: Study) -> JournalStorage:
    return open_journal(study.directory / JOURNAL)[1]


def _sampler(definition: Definition, number: int) -> optuna.samplers.BaseSampler:
    """Seeded by the trial's number: a random search does not depend on who asks."""
    if definition.method == "bayes":
        return optuna.samplers.TPESampler(seed=number, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=number)


def _pruner(definition: Definition) -> optuna.pruners.BasePruner:
    wanted = definition.early_terminate
    if wanted is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=wanted.first, reduction_factor=max(2, round(wanted.eta))
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own lines and its warnings about what is still experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
