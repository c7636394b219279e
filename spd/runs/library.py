"""For a library user: `decompose`, what it shows on the way, and what it returns. It leaves no file."""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm.auto import tqdm

from spd.component_model import ComponentModel
from spd.config import UserError, counted
from spd.engine.alarm import GradientAlarm, alarms_of
from spd.engine.prepare import Prepared, eval_contexts, prepare
from spd.engine.starts import as_chosen, with_choice
from spd.metrics import SiteUsage, site_usage
from spd.noise import own_generators
from spd.optimize import Observer, Silent, run_steps
from spd.problem import Problem
from spd.reports.results import Start, choice_of
from spd.runs.starts import Keeping, halve
from spd.spd_config import SPDConfig


def decompose(
    problem: Problem,
    config: SPDConfig,
    *,
    observer: Observer | None = None,
    quiet: bool = False,
) -> "Result":
    """Decompose `problem.target`, in place.

    Progress and evaluations are told to `observer`, by default the console, or with `quiet` to nobody. Of
    several `starts` it is told those of the best, once that is chosen; meanwhile checkpoints lie in a
    temporary folder.
    torch's global generators are seeded meanwhile, and left as they were.

    `UserError` if problem and configuration do not fit each other, before anything is trained.
    """
    for what, given, kind in (("problem", problem, Problem), ("config", config, SPDConfig)):
        if not isinstance(given, kind):
            raise UserError(f"{what}: a {type(given).__name__}; a spd.{kind.__name__} is needed")
    with own_generators("decompose", config.seed):
        prepared = prepare(problem, config)
        shown = observer or (Silent() if quiet else Console())
        if config.starts > 1:
            aside = None if quiet or observer is not None else Console
            return _best_of(with_choice(prepared), shown, aside or Silent)
        history = _History(shown)
        model = run_steps(prepared, history)
        return Result(prepared, history.rows, site_usage(model, eval_contexts(prepared)))


def _best_of(prepared: Prepared, shown: Observer, aside: Callable[[], Observer]) -> "Result":
    """The same where several starts are compared; `aside` shows the progress of those that are left."""
    histories: dict[int, _History] = {}

    def observer(index: int, label: str | None) -> Observer:
        history = histories.setdefault(index, _History(Silent()))
        history.other = aside() if label is not None else Silent()
        return history

    with TemporaryDirectory() as folder:

        def checkpoints(index: int) -> Path:
            return Path(folder) / str(index)

        starts = halve(prepared, Keeping(checkpoints, observer, lambda _: {}, lambda _: None))
        chosen = starts.chosen
        assert chosen is not None, "a start has been chosen"
        best = as_chosen(prepared, chosen.seed)
        history = _History(shown, histories[chosen.index].rows)
        model = run_steps(best, history, checkpoints=checkpoints(chosen.index), resume=True)
        usage = site_usage(model, eval_contexts(best))
        return Result(best, history.rows, usage, starts.starts)


class Console:
    """An observer that shows a bar of progress, also in a notebook, and a line for every evaluation."""

    def started(self, step: int, steps: int) -> None:
        self.bar = tqdm(total=steps, initial=step, unit="step", mininterval=0.5)
        self.alarm = GradientAlarm(steps)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        l0 = sum(value for key, value in values.items() if key.startswith("l0/"))
        self.bar.set_postfix(loss=f"{values['loss/total']:.2e}", L0=f"{l0:.2f}", refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        alarm = self.alarm.heard(step, values)
        if alarm is not None:
            self.bar.write(f"Warning: {alarm}")

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        shown = [f"{key.removeprefix('eval/')} {value:.4g}" for key, value in values.items()]
        self.bar.write(f"step {step}:  {'  '.join(shown)}")

    def ended(self) -> None:
        self.bar.close()


class _History:
    """An observer that keeps what it is told, and tells it another one, who first hears what was before."""

    def __init__(self, other: Observer, before: Sequence[Mapping[str, float]] = ()) -> None:
        self.other = other
        self.before = before
        self.rows: list[dict[str, float]] = []

    def started(self, step: int, steps: int) -> None:
        self.other.started(0 if self.before else step, steps)
        for row in self.before:
            values = {key: value for key, value in row.items() if key != "step"}
            evaluated = any(key.startswith("eval/") for key in values)
            (self.evaluated if evaluated else self.stepped)(int(row["step"]), values)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})
        self.other.stepped(step, values)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})
        self.other.evaluated(step, values)

    def ended(self) -> None:
        self.other.ended()


HEADINGS = ("site", "C", "L0", "alive", "always on")


@dataclass(frozen=True, repr=False)
class Result:
    """What `decompose` returns; a notebook shows its summary, its curves and its main figure."""

    prepared: Prepared
    """the problem and its configuration, as they were run"""
    history: list[dict[str, float]]
    """a flat row for every step that was logged or evaluated, for example for `pandas.DataFrame`"""
    usage: dict[str, SiteUsage]
    """of each site, on the held-out batches"""
    starts: tuple[Start, ...] = ()
    """of several, what became of each"""

    @property
    def model(self) -> ComponentModel:
        return self.prepared.objective.model

    def summary(self) -> str:
        """The final losses, the subcomponents in use, and a warning where that is no decomposition."""
        rows = [HEADINGS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join([*self._sentences(), *table])

    def __repr__(self) -> str:
        return self.summary()

    def figures(self) -> dict[str, bytes]:
        """PNGs: the curves of the terms, and importances on probes, or on held-out data without any."""
        # imported here: whoever asks for no picture needs no matplotlib
        from spd.reports import figures

        main = (
            figures.MeanActivity()
            if self.prepared.problem.probes is None
            else figures.ProbeImportances()
        )
        drawn = figures.draw(self.prepared, {main.type: main})
        drawn = {"loss_curves": figures.loss_curves(self.history), **drawn}
        return {name: figures.png_bytes(figure) for name, figure in drawn.items()}

    def _repr_html_(self) -> str:
        """For notebooks."""
        row = "<tr>{}</tr>".format
        head = row("".join(f"<th>{escape(cell)}</th>" for cell in HEADINGS))
        body = "".join(
            row("".join(f"<td>{escape(cell)}</td>" for cell in cells)) for cells in self._cells()
        )
        pictures = "".join(
            f'<p><img alt="{escape(name)}" style="max-width: 100%"'
            f' src="data:image/png;base64,{b64encode(png).decode()}"></p>'
            for name, png in self.figures().items()
        )
        sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in self._sentences())
        return f"{sentences}<table>{head}{body}</table>{pictures}"

    def _sentences(self) -> list[str]:
        last = self.history[-1]
        losses = [
            f"{key.removeprefix('eval/loss/')} {value:.4g}"
            for key, value in last.items()
            if key.startswith("eval/loss/")
        ]
        warnings = [
            f"Warning: {path} is not decomposed: {site.problem}."
            for path, site in self.usage.items()
            if site.problem
        ]
        steps = self.prepared.config.steps
        warnings += [f"Warning: {alarm}." for alarm in alarms_of(self.history, steps)]
        choice = choice_of(self.starts)
        return [
            f"{counted(last['step'], 'step')}; losses on held-out data: {', '.join(losses)}.",
            *([choice] if choice else []),
            *warnings,
        ]

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (path, str(site.C), f"{site.l0:.2f}", str(site.alive), str(site.always_on))
            for path, site in self.usage.items()
        ]
