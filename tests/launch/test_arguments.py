"""Command lines that cannot hurt: each trap of fire, and what is said of mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

from spd.config import parse
from spd.evals.run_evals import COMMAND as EVALS
from spd.evals.run_evals import EvalsOptions
from spd.evals.run_evals import main as evals
from spd.launch.arguments import Command, read_arguments
from spd.launch.resources import with_surroundings
from spd.sweeps.sweep import COMMAND as SWEEP
from spd.sweeps.sweep import SweepOptions
from spd.sweeps.sweep import main as sweep


def evals_options(*words: str) -> EvalsOptions:
    given = read_arguments(EVALS, words).options
    return parse(EvalsOptions, with_surroundings(given, EVALS.name), EVALS.name)


def sweep_options(*words: str) -> SweepOptions:
    given = read_arguments(SWEEP, words).options
    return parse(SweepOptions, with_surroundings(given, SWEEP.name), SWEEP.name)


# --- what fire does by itself ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["tms_5-2-id,tms_40-10", "[tms_5-2-id, tms_40-10]"])
def test_a_list_is_a_list_whatever_its_names_look_like(text: str):
    assert evals_options("--experiments", text).experiments == ("tms_5-2-id", "tms_40-10")
    assert evals_options(f"--experiments={text}").experiments == ("tms_5-2-id", "tms_40-10")


def test_a_single_name_is_a_list_of_one():
    assert evals_options("--experiments", "tms_5-2").experiments == ("tms_5-2",)


@pytest.mark.parametrize(
    ("words", "cpu"),
    [
        (["--cpu"], True),
        (["--cpu", "false"], False),
        (["--cpu=False"], False),
        (["--cpu", "true"], True),
        (["--cpu", "steps=5"], True),
        ([], False),
    ],
)
def test_a_switch_means_what_it_says_and_swallows_nothing(words: list[str], cpu: bool):
    assert evals_options(*words).cpu is cpu
    assert read_arguments(EVALS, words).positional == [w for w in words if w == "steps=5"]


@pytest.mark.parametrize("suffix", ["1e3", "5m", "007", "true", "1_000", "None"])
def test_a_suffix_stays_the_text_that_it_is(suffix: str):
    assert sweep_options("--job_suffix", suffix).job_suffix == suffix
    assert sweep_options(f"--job-suffix={suffix}").job_suffix == suffix


def test_overrides_stay_the_text_that_they_are():
    words = ["lr=1e-3", "losses={a: {coeff: 1}}", "steps=1_000", "seeds=[0,1]"]
    assert read_arguments(EVALS, words).positional == words


def test_an_override_that_begins_with_a_number_or_a_sign_is_no_option():
    assert read_arguments(SWEEP, ["tms_5-2", "-1"]).positional == ["tms_5-2", "-1"]


def test_nothing_runs_before_the_command_line_is_read(capsys: pytest.CaptureFixture[str]):
    """fire would call the function, and only then complain about a word that is left over."""
    command = Command("spd-x", "", "", EvalsOptions)
    arguments = read_arguments(command, ["a", "b", "--what", "c", "--ever=d"])
    assert arguments.positional == ["a", "b"]
    assert arguments.options == {"what": "c", "ever": "d"}
    assert capsys.readouterr() == ("", "")


# --- mistakes, which exit with 2 before anything is written or submitted ----------------------------

MISTAKES = {
    "misspelt option": (
        evals,
        ["--experimints", "tms_5-2"],
        ["experimints: unknown key; did you mean 'experiments'?"],
    ),
    "misspelt switch": (evals, ["--cpux"], ["cpux: unknown key; did you mean 'cpu'?"]),
    "unknown experiment": (
        evals,
        ["--experiments", "tms_5-3"],
        ["unknown experiment 'tms_5-3'; did you mean 'tms_5-2'?"],
    ),
    "unknown experiment, second": (
        evals,
        ["--experiments", "tms_5-2,tms40-10"],
        ["did you mean 'tms_40-10'?"],
    ),
    "experiment twice": (evals, ["--experiments", "tms_5-2,tms_5-2"], ["'tms_5-2' is named twice"]),
    "no experiment": (evals, ["--experiments", ","], ["experiments"]),
    "no seeds": (evals, ["--seeds", "0"], ["seeds: from 1 to 100,000 are allowed, got 0"]),
    "seeds in words": (evals, ["--seeds", "five"], ["seeds", "'five'"]),
    "negative seed": (evals, ["--seeds", "-1,2"], ["seeds: a seed is at least 0"]),
    "switch that is no truth": (evals, ["--cpu=perhaps"], ["cpu", "'perhaps'"]),
    "option without value": (evals, ["--experiments"], ["--experiments: a value is required"]),
    "option twice": (evals, ["--seeds", "2", "--seeds", "3"], ["--seeds: given more than once"]),
    "fire's own flags": (evals, ["--", "--interactive"], ["'--' has no meaning here"]),
    "fire's separator": (evals, ["-", "x"], ["'-' has no meaning here"]),
    "cpu with gpus": (evals, ["--cpu", "--gpus", "2"], ["--cpu and gpus=2 contradict each other"]),
    "override of the seed": (evals, ["seed=3"], ["override 'seed=3': say it with --seeds"]),
    "unknown setting": (
        evals,
        ["--experiments", "tms_5-2", "stepz=3"],
        ["stepz: unknown key; did you mean 'steps'?"],
    ),
    "word that is no override": (
        evals,
        ["--experiments", "tms_5-2", "tms_5-2-id"],
        ["override 'tms_5-2-id': expected key=value"],
    ),
    "unknown study": (evals, ["--collect", "yesterday"], ["'yesterday': no such ID", "newest"]),
    "study with overrides": (evals, ["--collect", "x", "steps=3"], ["takes the study as it is"]),
    "no agents": (sweep, ["tms_5-2"], ["EXPERIMENT and N_AGENTS are needed"]),
    "agents in words": (sweep, ["tms_5-2", "four"], ["N_AGENTS", "'four'"]),
    "zero agents": (sweep, ["tms_5-2", "0"], ["N_AGENTS", "'0'"]),
    "swapped": (sweep, ["4", "tms_5-2"], ["N_AGENTS", "'tms_5-2'"]),
    "unknown experiment to sweep": (
        sweep,
        ["tms_5-3", "2"],
        ["unknown experiment 'tms_5-3'; did you mean 'tms_5-2'?"],
    ),
    "stray word": (sweep, ["tms_5-2", "2", "resid"], ["override 'resid': expected key=value"]),
    "suffix with a space": (sweep, ["tms_5-2", "2", "--job_suffix", "a b"], ["job_suffix: 'a b'"]),
    "no such file": (sweep, ["tms_5-2", "2", "--params", "none.yaml"], ["none.yaml: no such file"]),
    "status of nothing": (sweep, ["--status", "yesterday"], ["'yesterday': no such ID"]),
    "status with a word": (
        sweep,
        ["tms_5-2", "--status", "x"],
        ["--status: 'tms_5-2' has no meaning"],
    ),
}


@pytest.mark.parametrize(("command", "words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message_and_nothing_else(
    command,
    words: list[str],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(words)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("error: ") == 1
    for part in said:
        assert part in err
    assert not list(tmp_path.iterdir())


# --- help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["spd.evals.run_evals", "spd.sweeps.sweep"])
def test_help_is_complete_and_imports_nothing_heavy(module: str):
    code = f"""
import sys
sys.argv = ["x", "--help"]
from {module} import main
try:
    main()
finally:
    print(*{{"torch", "numpy", "matplotlib", "wandb", "optuna"}} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "\n", done.stderr
    assert done.stdout.startswith("usage: spd-")
    fields = (EvalsOptions if "evals" in module else SweepOptions).model_fields
    assert all(f"--{name} " in done.stdout and field.description for name, field in fields.items())
