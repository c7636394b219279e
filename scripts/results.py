"""The records of finished runs in docs/results/, and the page that is made of them.

    python scripts/results.py record out/tms_5-2/*/    # docs/results/tms_5-2/0.json, one for each seed
    python scripts/results.py rates out/evals/STUDY    # docs/results/rates/: one line for each of its runs
    python scripts/results.py page                     # docs/results.md, and the table of README.md

A record holds what result.json says, the configuration, the versions and the commit of a run, and the
numbers of its objective on fixed problems. Where the present code computes others, the page says so.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spd.config import UserError, differences, load_config
from spd.engine.fingerprint import is_stale, objective_fingerprint
from spd.metrics import deepest, rung
from spd.metrics.ladder import IN_SHORT
from spd.registry import EXPERIMENTS
from spd.reports.results import format_value
from spd.run_files import CONFIG_FILE, META_FILE, RESULT_FILE, has_finished, read_json, write_json
from spd.runs.cli import checked_config
from spd.runs.console import user_errors
from spd.runs.verify import check_run
from spd.settings import REPO_DIR

if __package__:
    from scripts.rates import confusion_part, rates_part, rates_record, write_rates
else:  # run as a script
    from rates import confusion_part, rates_part, rates_record, write_rates

DOCS = REPO_DIR / "docs"
RECORDS, EARLIER = "results", "earlier.json"
LARGEST_RECORD = 20_000
"""bytes"""
BEGIN, END = "<!-- results: made by scripts/results.py -->", "<!-- end of results -->"
NOT_A_SETTING = (
    *("seed", "target", "device", "wandb_project", "metrics", "figures", "figures_every"),
    *("log_every", "eval_every", "save_every", "keep_checkpoints"),
)
"""keys in which the configuration of a run may differ from the registered one, with the same result"""
HEADLINES = ("mmcs/", "ml2r/", "correlation/", "recovered/rounded")

PAGE_HEAD = """\
# Results

Made by `python scripts/results.py page` from the records in `docs/results/`, one for each finished run; do
not edit it. `python scripts/results.py record RUN_DIR` makes a record. *Solved* counts the runs that are
right by what their subcomponents cause (docs/running.md); a dash: a run was made before that was judged.
*Pattern* counts those in which every site shows the known importance pattern on one-hot inputs of 0.75
without an error. That is the published criterion, and a weak one: a run can match and be wrong, and a
right one can miss a threshold.
Cosine and length (MMCS, ML2R) are of `linear1`, inert subcomponents left out, and ± is over the features
(n − 1) of one run. In a headline figures are means over the seeds. A commit with a `+` had changes in its
checkout. A *stale* record is of a run whose code computed other numbers for the objective than this code
does. Minutes are those of the whole run without its target's training, whatever else the machine did.
"""
EARLIER_HEAD = """\
## Measured before records were kept

On code whose numbers at exactly-zero logits differed: both hard sigmoids had slope 1 there instead of 0.01
and 0. No record was kept of these runs; the figures are as they were noted, with every seed that was run.
A run marked *not yet* was stopped before its end.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exit status 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(description="Records of finished runs, and their page.")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the documents")
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="write the records of finished runs")
    record.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    record.add_argument(
        "--unverified",
        action="store_true",
        help="use files that are not as their run left them, and say so",
    )
    rates = commands.add_parser("rates", help="write the record of a study of many seeds")
    rates.add_argument("study", type=Path, metavar="STUDY_DIR")
    commands.add_parser("page", help="write docs/results.md and the table of README.md")
    args = parser.parse_args(argv)
    with user_errors():
        if args.command == "record":
            # all are read before one is written
            records = [record_of(run, verify=not args.unverified) for run in args.runs]
            for one in records:
                print(write_record(one, args.docs / RECORDS))
        elif args.command == "rates":
            print(write_rates(rates_record(args.study), args.study, args.docs / RECORDS))
        else:
            for path, text in pages(args.docs).items():
                path.write_text(text, encoding="utf-8")
                print(path)


# --- records ---------------------------------------------------------------------------------------


def record_of(run: Path, *, verify: bool = True) -> dict[str, Any]:
    """What is kept of a finished run of a registered experiment; `UserError` if it is none."""
    if not has_finished(run):
        raise UserError(f"{run}: no finished run; a run directory with status finished is allowed")
    check_run(run, verify=verify)
    meta, result = read_json(run / META_FILE), read_json(run / RESULT_FILE)
    registered = checked_config(result["experiment"])
    config = load_config(type(registered), run / CONFIG_FILE)
    changed = {
        key: own
        for key, own, _ in differences(config, registered)
        if key.partition(".")[0] not in NOT_A_SETTING
    }
    return {
        "result": _without_nothing(result),
        "changed": changed,
        "commit": meta["commit"],
        "dirty": meta["dirty"],
        "versions": meta["versions"],
        "device": meta.get("device"),
        "num_threads": meta.get("num_threads"),
        "started": meta.get("started"),
        "config": yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8")),
        "objective": meta.get("objective", {}),
    }


def _without_nothing(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what its rows leave empty, and what its figures mean, which the code says."""
    rows = [{k: v for k, v in row.items() if v is not None} for row in result["rows"]]
    return {**result, "rows": rows, "quantities": {}}


def write_record(record: Mapping[str, Any], root: Path) -> Path:
    """Write a record to `<experiment>/<seed>.json`; an earlier one of that seed is replaced."""
    result = record["result"]
    path = root / result["experiment"] / f"{result['seed']}.json"
    size = len(json.dumps(record, indent=2))
    if size >= LARGEST_RECORD:
        raise UserError(f"{path}: {size} bytes; a record below {LARGEST_RECORD} is allowed")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path


def read_records(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Experiment → its records in the order of the seeds; experiments as they are registered."""
    found = {
        name: [read_json(path) for path in sorted(root.glob(f"{name}/*.json"), key=_seed)]
        for name in EXPERIMENTS
    }
    return {name: records for name, records in found.items() if records}


def _seed(path: Path) -> int:
    return int(path.stem)


# --- pages -----------------------------------------------------------------------------------------


def pages(docs: Path = DOCS) -> dict[Path, str]:
    """What every file that is made of the records has to hold; README.md lies beside `docs`."""
    records, present = read_records(docs / RECORDS), objective_fingerprint()
    readme = docs.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{readme}: the lines {BEGIN} and {END} are needed, once each")
    before, _, rest = text.partition(BEGIN)
    table = f"{BEGIN}\n{summary(records, present)}\n{END}"
    return {
        docs / "results.md": results_page(docs, records, present),
        readme: before + table + rest.partition(END)[2],
    }


def results_page(
    docs: Path, records: Mapping[str, Sequence[Mapping[str, Any]]], present: Mapping[str, float]
) -> str:
    """The whole of docs/results.md."""
    rates = docs / RECORDS
    parts = [PAGE_HEAD, summary(records, present) + "\n"]
    parts += [rates_part(rates, present), confusion_part(rates)]
    for name, of_experiment in records.items():
        parts.append(f"## `{name}`\n\n{experiment_table(of_experiment, present)}\n")
    parts.append(earlier_part(docs / RECORDS / EARLIER))
    return "\n".join(parts)


def summary(
    records: Mapping[str, Sequence[Mapping[str, Any]]], present: Mapping[str, float]
) -> str:
    """One line for each experiment that has records."""
    lines = []
    for name, of_experiment in records.items():
        seeds = [record["result"]["seed"] for record in of_experiment]
        by_pattern = [matches_pattern(record["result"]) for record in of_experiment]
        by_causes = [solved_by_causes(record["result"]) for record in of_experiment]
        n_stale = sum(is_stale(record["objective"], present) for record in of_experiment)
        minutes = sum(record["result"]["seconds"] for record in of_experiment) / len(seeds) / 60
        lines.append(
            [
                f"`{name}`",
                _ranges(seeds),
                _count(by_causes),
                _count(by_pattern),
                _headline(of_experiment, "published"),
                _headline(of_experiment, "value"),
                f"{minutes:.0f}" if minutes >= 9.5 else f"{minutes:.1f}",
                f"{n_stale} stale" if n_stale else "current",
            ]
        )
    heads = ["experiment", "seeds", "solved", "pattern", "published", "here", "min", "records"]
    return _table(heads, lines)


def matches_pattern(result: Mapping[str, Any]) -> bool | None:
    """Whether every site shows the known pattern; None where none is known."""
    errors = [row["value"] for row in result["rows"] if row["key"] == "errors/total"]
    return errors[0] == 0 if errors else None


def solved_by_causes(result: Mapping[str, Any]) -> bool | None:
    """None where that was not judged, as in records of runs that were made before it could be."""
    judged = any(row["key"].startswith("effect_errors/") for row in result["rows"])
    return result["solved"] if judged else None


def _count(verdicts: Sequence[bool | None]) -> str:
    return "–" if None in verdicts else f"{sum(map(bool, verdicts))} of {len(verdicts)}"


def experiment_table(records: Sequence[Mapping[str, Any]], present: Mapping[str, float]) -> str:
    """Every figure of every recorded seed of one experiment."""
    rows: dict[str, list[str]] = {}
    results = [record["result"] for record in records]
    for column, result in enumerate(results):
        for row in result["rows"]:
            published = format_value(row.get("published"), row.get("published_spread"))
            own = format_value(row["value"], row.get("spread"))
            if row["key"].startswith("loss/"):  # digits enough to tell runs apart
                own = f"{row['value']:.4g}"
            if row["key"] == "solved" and solved_by_causes(result) is None:
                continue  # before runs were judged by causes it was another word for the pattern
            cells = rows.setdefault(row["metric"], [published, *["–"] * len(results)])
            cells[column + 1] = own
    said = {True: "yes", False: "no", None: "–"}
    lines = [[metric, *cells] for metric, cells in rows.items()]
    lines += [
        ["solved by causes", "", *(said[solved_by_causes(result)] for result in results)],
        ["matches the pattern", "", *(said[matches_pattern(result)] for result in results)],
        ["seconds", "", *(f"{result['seconds']:.0f}" for result in results)],
        ["threads, device", "", *(f"{r['num_threads']}, {r['device']}" for r in records)],
        ["torch", "", *(record["versions"]["torch"] for record in records)],
        ["commit", "", *(_commit(record) for record in records)],
        ["record", "", *(_state(record, present) for record in records)],
    ]
    heads = ["", "published", *(f"seed {result['seed']}" for result in results)]
    commands = dict.fromkeys(_command(record) for record in records)
    return "".join(f"`{command}`\n\n" for command in commands) + _table(heads, lines)


def earlier_part(path: Path) -> str:
    """The figures of runs of which no record was kept."""
    if not path.is_file():
        return ""
    lines = [
        [f"`{row['experiment']}`", row["settings"], row["seeds"], row["figures"], row["pattern"]]
        for row in read_json(path)
    ]
    heads = ["experiment", "settings", "seeds", "figures", "matches the pattern"]
    return f"{EARLIER_HEAD}\n{_table(heads, lines)}\n"


def _command(record: Mapping[str, Any]) -> str:
    changed = " ".join(f"{key}={json.dumps(value)}" for key, value in record["changed"].items())
    return f"spd-run {record['result']['experiment']} seed=SEED {changed}".rstrip()


def _commit(record: Mapping[str, Any]) -> str:
    commit = record["commit"]
    return "–" if commit is None else commit[:8] + ("+" if record["dirty"] else "")


def _state(record: Mapping[str, Any], present: Mapping[str, float]) -> str:
    return "stale" if is_stale(record["objective"], present) else "current"


def _headline(records: Sequence[Mapping[str, Any]], kind: str) -> str:
    """The figures that tell most, as the mean over the seeds.

    Of a language model what masks recover means little by itself: before it stand how much is on, and
    what masks cost that an adversary has chosen.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        rows = record["result"]["rows"]
        if kind == "value" and any(row["key"] == "recovered/rounded" for row in rows):
            for label, value in _of_masks({row["key"]: row["value"] for row in rows}).items():
                found.setdefault(label, []).append(value)
        for row in rows:
            if row["key"].startswith(HEADLINES) and row.get(kind) is not None:
                found.setdefault(row["metric"], []).append(row[kind])
    means = {metric: sum(values) / len(values) for metric, values in found.items()}
    texts = [f"{metric} {mean:.{0 if mean > 10 else 3}f}" for metric, mean in means.items()]
    return ", ".join(texts) or "–"


def _of_masks(values: Mapping[str, float]) -> dict[str, float]:
    """How much is on, and what adversarial masks cost over what ablating everything does."""
    on = {
        label: sum(value for key, value in values.items() if key.startswith(name))
        for label, name in (("L0", "l0/"), ("of C", "ladder_C"), ("alive", "alive/"))
        if any(key.startswith(name) for key in values)
    }
    shares = {
        f"adversary over ablation ({n} steps, {words})": values[f"ladder/{rung(n, scope)}"]
        / values["ladder/ablated"]
        for scope, words in IN_SHORT.items()
        if (n := deepest(values, scope)) and values.get("ladder/ablated")
    }
    return on | shares


def _ranges(seeds: Sequence[int]) -> str:
    """`0–4` for seeds without a gap, else all of them."""
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds))


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
