"""Run every command and snippet that README.md and docs/ show, shortened.

    python scripts/run_docs.py [--folder DIR] [--list]

The commands run one after another in a folder of their own, where the runs that the documents name are made
first. A rule says how a command is shortened, or why something else is run in its place. A command without
a rule is an error. `docs/extending.md` is left out: tests/test_docs.py applies its diffs and runs what they
add.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    *("README.md", "docs/running.md", "docs/language_models.md", "docs/results.md"),
    *("docs/architecture.md", "docs/performance.md", "docs/from_published.md"),
    "docs/analysis.md",
    "benchmarks/README.md",
    "docs/causes_and_edits.md",
)
SHORT = "steps=3 eval_every=3 n_eval_batches=1 batch_size=64 eval_batch_size=64 compile=false"
SHORT_LM = "steps=2 eval_every=2 n_eval_batches=1 batch_size=2 eval_batch_size=2 compile=false"
NAMED_RUNS = {
    "out/tms_5-2/20261123-101112-abcdef": f"spd-run tms_5-2 {SHORT}",
    "out/resid_mlp1/20261123-101112-abcdef": f"spd-run resid_mlp1 {SHORT}",
    "out/pydoc_mlp/20261124-071829-9deea1": f"spd-run pydoc_mlp {SHORT_LM}",
}
"""the runs that the documents name, and what makes them"""


class Rule(NamedTuple):
    """How the commands that a pattern matches at their beginning are run."""

    pattern: str
    extra: str = ""
    """words that shorten it, put after it"""
    instead: tuple[str, str] = ("", "")
    """a pattern within it, and what is put in its place"""
    statuses: tuple[int, ...] = (0,)
    """exit statuses that are right"""
    reason: str = ""
    """why it is not run as it is shown, where more than its length is changed"""


RULES = (
    Rule(
        "make ",
        instead=("^make ", f"make -n -C '{REPO}' "),
        reason="makes an environment, or runs the tests themselves: its recipe is printed",
    ),
    Rule(
        "python -m spd.analysis.causes",
        statuses=(0, 1),
        reason="a shortened run is not solved, which is status 1",
    ),
    Rule("python -m spd.analysis.adversary"),
    Rule("python -m spd.analysis.agreement"),
    Rule("python -m spd.evals.confusion"),
    Rule("python -m spd.analysis.importances"),
    Rule("python -m spd.analysis.clustering", extra="--samples 2"),
    Rule(
        "python -m spd.analysis.labels .*(--answers|--url)",
        extra="--help",
        reason="needs the answers of a language model",
    ),
    Rule("python -m spd.analysis.labels"),
    Rule("source ", instead=(".*", "true"), reason="changes an interactive shell"),
    Rule(
        r"(spd-run ss_emb|.*/ts_config\.yaml)",
        statuses=(3,),
        reason="needs the Hugging Face hub: without it the exit status is 3",
    ),
    Rule("spd-run pydoc", extra=SHORT_LM),
    Rule("spd-run ", extra=SHORT),
    Rule(r"python .*/tms_decomposition\.py .*\.yaml", extra=SHORT),
    Rule(r"torchrun .*", extra=SHORT),
    Rule(r"python -m spd\.experiments\.tms\.tms_decomposition --resume "),
    Rule(r"python -m spd\.experiments\.\w+\.plots "),
    Rule(r"python .*/train_tms\.py "),
    Rule("spd-report "),
    Rule(
        "spd-evals .*--nodes",
        extra="--dry_run",
        statuses=(0, 2),
        reason="needs SLURM: without it a message says so",
    ),
    Rule(
        "spd-evals .*--ensemble", instead=("--seeds 20", "--seeds 2"), extra=f"--local {SHORT}"
    )._replace(statuses=(0, 1)),
    Rule("spd-evals --collect ID", statuses=(0, 1)),
    Rule("spd-evals", extra="--local --dry_run", reason="trains for hours"),
    Rule("spd-sweep --status ID"),
    Rule("spd-sweep tms_5-2 4", extra=f"--local --backend local {SHORT}"),
    Rule(
        "spd-sweep ",
        extra="--local --backend local --dry_run",
        reason="trains for hours",
    ),
    Rule(
        r"python scripts/results\.py ",
        instead=(r"results\.py", "results.py --docs documents/docs"),
    ),
    Rule("python -m spd.analysis.editing"),
    Rule(
        "python -m spd.analysis.attribution .*--prune",
        instead=("--prune 2000", "--prune 2"),
        reason="trains for minutes",
    ),
    Rule("python -m spd.analysis.attribution"),
    Rule(
        "spd-import ",
        instead=(".*", "spd-import --help"),
        reason="needs a directory of the published implementation",
    ),
    Rule(r"python -m benchmarks\.", extra="--help", reason="measures for minutes"),
)
"""the first that matches counts"""


class Command(NamedTuple):
    """A line that a document tells people to type."""

    document: str
    line: str

    @property
    def program(self) -> str:
        """The line without comment and without settings of the environment before it."""
        bare = re.sub(r"\s+#\s.*$", "", self.line)
        return re.sub(r"^(\w+=\S+ )+", "", bare).strip()

    def rule(self) -> Rule:
        """What says how it is run; `LookupError` if nothing does."""
        for rule in RULES:
            if re.match(rule.pattern, self.program):
                return rule
        raise LookupError(f"{self.document}: no rule of scripts/run_docs.py is for: {self.line}")

    def shortened(self) -> str:
        """What is run."""
        rule, program = self.rule(), self.program
        settings = self.line[: self.line.index(program[:8])]
        if rule.instead[0]:
            program = re.sub(rule.instead[0], rule.instead[1], program, count=1)
        return f"{settings}{program} {rule.extra}".strip()


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    text = (REPO / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[Command]:
    """Every line of every bash block, in the order in which they are read."""
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            for line in block.splitlines():
                if line.strip() and not line.startswith("#"):
                    yield Command(document, line)


def snippets() -> Iterator[tuple[str, str]]:
    """Of each document: its Python blocks, one after another, since later ones use names of earlier."""
    for document in DOCUMENTS:
        if found := blocks(document, "python"):
            yield document, "\n".join(found)


def written_files() -> dict[str, str]:
    """The YAML files that the documents show, by the names under which commands use them."""
    names = {
        "method": "my_params.yaml",
        "experiment": "my_model.yaml",
        "execution": "execution.yaml",
        "starts": "starts.yaml",
    }
    found = {}
    for document in DOCUMENTS:
        for block in blocks(document, "yaml"):
            found[names[block.partition(":")[0]]] = block
    return found


# --- running ---------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """What the commands find: the package, a copy of the documents, the files that are shown."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("spd", "scripts", "benchmarks"):
        if not (folder / name).exists():
            (folder / name).symlink_to(REPO / name)
    copy = folder / "documents"
    shutil.copytree(REPO / "docs", copy / "docs", dirs_exist_ok=True)
    shutil.copy(REPO / "README.md", copy / "README.md")
    for name, text in written_files().items():
        (folder / name).write_text(text, encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """This one, with the present package, without network and without any login."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {
        **{"PATH": programs, "PYTHONPATH": str(REPO), "SPD_OUT_DIR": str(folder / "out")},
        **{"WANDB_MODE": "disabled", "WANDB_API_KEY": "", "HF_HUB_OFFLINE": "1"},
    }


def with_id(line: str, folder: Path) -> str:
    """The line with the ID of the study that was made last in place of the word ID."""
    kind = "sweeps" if line.startswith("spd-sweep") else "evals"
    studies = sorted((folder / "out" / kind).glob("*/")) if " ID" in line else []
    return line.replace(" ID", f" {studies[-1].name}") if studies else line


def run_one(
    line: str, folder: Path, variables: Mapping[str, str], statuses: Sequence[int]
) -> str | None:
    """Run a line; None, or what it said if it ended with another status."""
    begun = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    right = done.returncode in statuses
    print(f"{'ok  ' if right else 'FAIL'} {time.perf_counter() - begun:6.1f} s  {line}", flush=True)
    return None if right else f"{line}\n  status {done.returncode}\n{done.stdout}{done.stderr}"


def run_all(folder: Path) -> list[str]:
    """Run everything; what failed."""
    prepare(folder)
    variables = environment(folder)
    failures = []
    for directory, line in NAMED_RUNS.items():
        failures.append(run_one(f"{line} --run_dir {directory}", folder, variables, (0,)))
    for command in commands():
        line = with_id(command.shortened(), folder)
        failures.append(run_one(line, folder, variables, command.rule().statuses))
    for document, code in snippets():
        name = f"snippets of {Path(document).stem}.py"
        (folder / name).write_text(code, encoding="utf-8")
        failures.append(run_one(f"python '{name}'", folder, variables, (0,)))
    return [failure for failure in failures if failure]


def main() -> None:
    """The command. Exit status 1 if something that a document shows fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary one")
    parser.add_argument("--list", action="store_true", help="show what would be run, and why so")
    args = parser.parse_args()
    if args.list:
        for command in commands():
            reason = command.rule().reason
            print(command.shortened() + (f"\n    # {reason}" if reason else ""))
        return
    with tempfile.TemporaryDirectory() as temporary:
        failures = run_all((args.folder or Path(temporary)).resolve())
    print(*failures, sep="\n\n", file=sys.stderr)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
