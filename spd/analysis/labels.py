"""python -m spd.analysis.labels RUN_DIR [--answers FILE | --url URL --model NAME]: labels.

They come from a language model. Without an address nothing is asked: the prompts that are open are written
as JSON lines, each with a `key` and a `prompt`; lines with a `key` and an `answer` are taken back with
`--answers`. First come the prompts for labels, then, of what has a label, those for its scores,
which are made of other sequences.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from spd.analysis.harvest import Gathered
from spd.analysis.importances import FOLDER as IMPORTANCES
from spd.analysis.importances import RECORD, importances, load_importances
from spd.analysis.judge import Judge, check_url
from spd.analysis.label_prompts import (
    Label,
    key_of,
    label_prompt,
    read_label,
    read_numbers,
    score_prompt,
)
from spd.analysis.label_scores import (
    N_REAL,
    N_TRIALS,
    SCORES,
    ScoreKind,
    Trial,
    probability_by_chance,
    scores_of,
    trials_of,
)
from spd.analysis.label_windows import TokenText, windows_of
from spd.config import UserError
from spd.run_files import atomic_write, read_json, write_json
from spd.runs.cli import add_ways_in
from spd.runs.console import console_log, user_errors
from spd.runs.run import Run, load_run

logger = logging.getLogger(__name__)

FOLDER = Path("analysis", "labels")
PROMPTS, ANSWERS, LABELS = "prompts.jsonl", "answers.jsonl", "labels.json"
MOST = 10_000
MAX_CALLS = 1000
AT_ONCE = 4
DEFAULT_SCORES: tuple[ScoreKind, ...] = ("detection", "fuzzing")


@runtime_checkable
class ReadsTokens(Protocol):
    """A problem that knows what its tokens are as text."""

    def token_text(self, token: int) -> str: ...


class Scored(NamedTuple):
    """A subcomponent with a label."""

    label: Label
    scores: dict[ScoreKind, float | None]
    """None: a trial has no answer, or there are too few windows"""


class Labelling:
    """Which prompts there are about a run's subcomponents, and what answers make of them."""

    def __init__(
        self,
        found: Gathered,
        text: TokenText,
        *,
        most: int = MOST,
        kinds: Sequence[ScoreKind] = DEFAULT_SCORES,
    ) -> None:
        """Of the `most` subcomponents that are on most often."""
        n_active = found.statistics.n_active
        order = n_active.argsort(descending=True, stable=True)[:most].tolist()
        self.found, self.text, self.kinds = found, text, tuple(kinds)
        self.columns = [c for c in order if n_active[c] > 0]
        self.prompts: dict[int, str] = {}
        self.trials: dict[int, dict[ScoreKind, list[Trial]]] = {}
        rows = found.memberships.rows()
        for c in self.columns:
            windows = windows_of(found, c, text, rows)
            self.prompts[c] = label_prompt(found, c, windows.label, text)
            name = found.name(c)
            self.trials[c] = {kind: trials_of(kind, windows, name) for kind in self.kinds}

    def label_of(self, c: int, answers: Mapping[str, str]) -> Label | None:
        answer = answers.get(key_of("label", self.found.name(c), self.prompts[c]))
        return None if answer is None else read_label(answer)

    def score_prompts(self, c: int, label: Label) -> Iterator[tuple[ScoreKind, Trial, str, str]]:
        """Kind, trial, key and prompt of each trial."""
        for kind, trials in self.trials[c].items():
            for number, trial in enumerate(trials):
                prompt = score_prompt(kind, label.label, trial)
                yield kind, trial, key_of(kind, f"{self.found.name(c)}/{number}", prompt), prompt

    def open_prompts(self, answers: Mapping[str, str]) -> dict[str, str]:
        """Key → prompt of what has no answer that can be read: labels, and scores of what has one."""
        found = {}
        for c in self.columns:
            label = self.label_of(c, answers)
            if label is None:
                found[key_of("label", self.found.name(c), self.prompts[c])] = self.prompts[c]
                continue
            for _, trial, key, prompt in self.score_prompts(c, label):
                if self._named(trial, answers.get(key)) is None:
                    found[key] = prompt
        return found

    def results(self, answers: Mapping[str, str]) -> dict[str, Scored]:
        """By name, of what has a label."""
        found = {}
        for c in self.columns:
            label = self.label_of(c, answers)
            if label is None:
                continue
            named: dict[ScoreKind, list[list[int] | None]] = {kind: [] for kind in self.kinds}
            for kind, trial, key, _ in self.score_prompts(c, label):
                named[kind].append(self._named(trial, answers.get(key)))
            found[self.found.name(c)] = Scored(label, scores_of(self.trials[c], named))
        return found

    @staticmethod
    def _named(trial: Trial, answer: str | None) -> list[int] | None:
        return None if answer is None else read_numbers(answer, len(trial.texts))


# --- files ---------------------------------------------------------------------------------------


def read_answers(path: Path) -> dict[str, str]:
    """Key → answer of JSON lines, the last of a key; `UserError` that names a line which is none."""
    found = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text in UTF-8") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number}: not valid JSON: {error}") from None
        key = value.get("key") if isinstance(value, dict) else None
        answer = value.get("answer") if isinstance(value, dict) else None
        if isinstance(answer, dict | list):
            answer = json.dumps(answer)
        if not isinstance(key, str) or not isinstance(answer, str):
            raise UserError(
                f"{path}: line {number}: an object with a 'key' and an 'answer' is needed, found"
                f" {line[:80]!r}"
            )
        found[key] = answer
    return found


def as_lines(values: Mapping[str, str], name: str) -> str:
    return "".join(
        json.dumps({"key": key, name: value}, ensure_ascii=False) + "\n"
        for key, value in values.items()
    )


def token_text_of(run: Run) -> TokenText:
    """What a token is as text: the problem knows it, or it is its number."""
    problem = run.prepared.problem
    return problem.token_text if isinstance(problem, ReadsTokens) else "#{}".format


def gathered_of(run: Run) -> Gathered:
    """The importances that a run has, or those of a pass with the usual options."""
    if (run.directory / IMPORTANCES / RECORD).is_file():
        return load_importances(run.directory)
    return importances(run)


def ask_open(
    labelling: Labelling,
    answers: dict[str, str],
    judge: Judge,
    folder: Path,
    *,
    max_calls: int,
    n_at_once: int = AT_ONCE,
) -> int:
    """Ask what is open, labels first, and keep each answer as it comes; how many calls were made."""
    n_calls = 0
    for _ in ("labels", "scores"):
        pending = labelling.open_prompts(answers)
        chosen = list(pending.items())[: max_calls - n_calls]
        for key, answer in judge.ask_all(chosen, n_at_once):
            answers[key] = answer
            n_calls += 1
            with (folder / ANSWERS).open("a", encoding="utf-8") as file:
                file.write(as_lines({key: answer}, "answer"))
    return n_calls


def record(results: Mapping[str, Scored], model: str) -> dict[str, Any]:
    """What the report shows."""
    labels = {name: {**own.label._asdict(), **own.scores} for name, own in results.items()}
    return {"model": model, "labels": labels}


def label(
    run: Run,
    *,
    answers_file: Path | None = None,
    judge: Judge | None = None,
    max_calls: int = MAX_CALLS,
    most: int = MOST,
    kinds: Sequence[ScoreKind] = DEFAULT_SCORES,
) -> tuple[dict[str, Scored], dict[str, str]]:
    """Labels and scores by name, and the prompts that are open; both are kept in the run."""
    found = read_answers(answers_file) if answers_file is not None else {}
    labelling = Labelling(gathered_of(run), token_text_of(run), most=most, kinds=kinds)
    folder = run.directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    answers = read_answers(folder / ANSWERS) if (folder / ANSWERS).is_file() else {}
    if found:
        answers |= found
        atomic_write(folder / ANSWERS, as_lines(answers, "answer"))
    elif (folder / ANSWERS).is_file():  # a last line that was cut short would swallow the next
        atomic_write(folder / ANSWERS, as_lines(answers, "answer"))
    if judge is not None:
        n_calls = ask_open(labelling, answers, judge, folder, max_calls=max_calls)
        logger.info("labels: %d calls of %s", n_calls, judge.model)
    pending, results = labelling.open_prompts(answers), labelling.results(answers)
    atomic_write(folder / PROMPTS, as_lines(pending, "prompt"))
    if results:
        path = folder / LABELS
        before = read_json(path).get("model") if path.is_file() else None
        model = judge.model if judge is not None else before or "a language model"
        write_json(path, record(results, model))
    return results, pending


def main(argv: Sequence[str] | None = None) -> None:
    """Labels of a run's subcomponents by a language model, and how well they predict."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.url is None) != (args.model is None):
        parser.error("--url and --model go together")
    for name in ("most", "max_calls"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1 is needed")
    with console_log(), user_errors():
        judge = None
        if args.url is not None:
            check_url(args.url)
            judge = Judge(args.url, args.model, args.key_variable)
        run = load_run(args.run_dir, trust=args.trust, verify=not args.unverified)
        results, pending = label(
            run,
            answers_file=args.answers,
            judge=judge,
            max_calls=args.max_calls,
            most=args.most,
            kinds=args.scores,
        )
    print(*lines(results), sep="\n")
    folder = args.run_dir / FOLDER
    if pending:
        print(
            f"{len(pending):,} prompts are open, in {folder / PROMPTS}; --answers FILE takes answers back"
        )
    if results:
        print(f"in {folder / LABELS}")


def lines(results: Mapping[str, Scored]) -> list[str]:
    """One for each label, and the means of the scores."""
    if not results:
        return ["no labels yet"]
    shown = [
        f"{name}  {own.label.label}  "
        + "  ".join(f"{kind} {_shown(value)}" for kind, value in own.scores.items())
        for name, own in results.items()
    ]
    means = []
    for kind in next(iter(results.values())).scores:
        values = [v for own in results.values() if (v := own.scores[kind]) is not None]
        if values:
            mean = sum(values) / len(values)
            means.append(
                f"{kind} {mean:.3f} over {len(values)} ({_chance(kind, mean, len(values))})"
            )
    return [*shown, *([f"mean: {', '.join(means)}"] if means else [])]


def _chance(kind: str, mean: float, n: int) -> str:
    if kind != "intruder":
        return "chance 0.5"
    chance, n_trials = 1 / (N_REAL + 1), n * N_TRIALS
    p = probability_by_chance(round(mean * n_trials), n_trials, chance)
    return f"chance {chance:.1f}, which gives as much or more with probability {p:.1e}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--answers", type=Path, metavar="FILE", help="JSON lines with key and answer")
    one.add_argument(
        "--url",
        metavar="URL",
        help="ask the language model there: an address with OpenAI's chat completions, up to /v1",
    )
    parser.add_argument("--model", metavar="NAME", help="which one, as that address calls it")
    parser.add_argument(
        "--key_variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="variable of the environment that holds the key (default OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--max_calls",
        type=int,
        default=MAX_CALLS,
        metavar="N",
        help=f"ask so often at most (default {MAX_CALLS:,})",
    )
    parser.add_argument(
        "--most",
        type=int,
        default=MOST,
        metavar="N",
        help=f"of the subcomponents that are on most often (default {MOST:,})",
    )
    parser.add_argument(
        "--scores",
        nargs="*",
        choices=SCORES,
        default=DEFAULT_SCORES,
        help="which (default detection and fuzzing)",
    )
    add_ways_in(parser)
    return parser


if __name__ == "__main__":
    main()
