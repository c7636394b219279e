"""What a user can get wrong in a configuration: one message, exit status 2, nothing left behind."""

import re

import pytest

from tests.run_fixtures import (
    TMS_SCRIPT,
    Command,
    Finished,
    command_fixture,
    listing,
    target_fixture,
)

__all__ = ["command_fixture", "target_fixture"]

TIED = "tied_sites=[[linear1, linear2]]"

CASES: dict[str, tuple[list[str], list[str]]] = {
    # misspelt names
    "key": (["stepz=5"], ["stepz: unknown key", "did you mean 'steps'", "batch_size"]),
    "key of a loss": (
        ["losses.stochastic_recon.coef=1"],
        ["losses.stochastic_recon.coef: unknown key", "did you mean 'coeff'"],
    ),
    "key of the data": (
        ["data.feature_probabilty=0.1"],
        ["data.feature_probabilty", "did you mean 'feature_probability'"],
    ),
    "loss": (
        ["losses={faithfulnes: {coeff: 1}}"],
        ["losses.faithfulnes", "did you mean 'faithfulness'", "'schatten'"],
    ),
    "metric": (["metrics={sparsty: {}}"], ["metrics.sparsty", "did you mean 'sparsity'"]),
    "figure": (
        ["figures={mean_activty: {}}"],
        ["figures.mean_activty", "did you mean 'mean_activity'", "'tms_vectors'"],
    ),
    "schedule": (["lr_schedule={type: cosin}"], ["lr_schedule.type", "'cosin'", "'cosine'"]),
    "importance function": (["importance={type: mpl}"], ["importance", "'mpl'", "'affine'"]),
    # wrong values
    "text for a number": (["steps=many"], ["steps: ", "valid integer", "'many'"]),
    "fraction of a step": (["steps=1.5"], ["steps: ", "integer", "1.5"]),
    "no value": (["lr="], ["lr: ", "number", "None"]),
    "no steps": (["steps=0"], ["steps: ", "greater than or equal to 1", "got 0"]),
    "negative rate": (["lr=-1e-3"], ["lr: ", "greater than 0", "-1e-3"]),
    "infinite rate": (["lr=.inf"], ["lr: ", "finite", "inf"]),
    "negative seed": (["seed=-1"], ["seed: ", "greater than or equal to 0", "-1"]),
    "nan coefficient": (
        ["losses.stochastic_recon.coeff=.nan"],
        ["losses.stochastic_recon.coeff", "finite", "nan"],
    ),
    "infinite coefficient": (["losses.stochastic_recon.coeff=.inf"], ["coeff", "finite", "inf"]),
    "negative coefficient": (["losses.stochastic_recon.coeff=-1"], ["coeff", "equal to 0", "-1"]),
    "all coefficients 0": (
        ["losses={faithfulness: {coeff: 0}, recon: {coeff: 0}}"],
        ["losses", "above 0"],
    ),
    "no losses": (["losses={}"], ["losses", "above 0"]),
    "warm-up longer than the run": (
        ["lr_schedule={warmup_frac: 1.5}"],
        ["lr_schedule.warmup_frac", "less than 1", "1.5"],
    ),
    "half-life of a cosine": (
        ["lr_schedule={type: cosine, half_life: 100}"],
        ["lr_schedule: ", "half_life", "exponential", "'cosine'"],
    ),
    "exponential without half-life": (
        ["lr_schedule={type: exponential}"],
        ["lr_schedule: ", "half_life", "None"],
    ),
    "empty value range": (["data.value_range=[1, 0]"], ["data: ", "low < high", "(1.0, 0.0)"]),
    "synced input that is not there": (
        ["data.synced_inputs=[[0, 5]]"],
        ["data: ", "input 5", "0 to 4"],
    ),
    "unknown device": (["device=cuba"], ["device: 'cuba'", "allowed: auto"]),
    "device that is not there": (["device=cuda:99"], ["device: 'cuda:99'"]),
    "device that computes nothing": (["device=meta"], ["device: 'meta'"]),
    "experiment with a slash": (["experiment=a/b"], ["experiment: ", "'a/b'", "letters"]),
    "experiment above the output root": (["experiment=.."], ["experiment: ", "'..'"]),
    "experiment without a name": (["experiment=''"], ["experiment: ", "''"]),
    # sites
    "C negative": (["sites.linear1=-3"], ["sites: ", "'linear1'", "-3", "at least 1"]),
    "C zero": (["sites.linear1=0"], ["sites: ", "'linear1'", "0", "at least 1"]),
    "C a word": (["sites.linear1=few"], ["sites.linear1: ", "integer", "'few'"]),
    "no sites": (["sites={}"], ["sites: ", "at least one", "linear1, linear2"]),
    "sites as a list": (["sites=[linear1]"], ["sites: ", "dictionary", "['linear1']"]),
    "pattern without a match": (
        ["sites={linaer1: 6}"],
        ["sites: 'linaer1'", "did you mean 'linear1'", "linear1, linear2"],
    ),
    "two patterns on one module": (
        ["sites={linear1: 6, 'linear*': 6}"],
        ["sites: 'linear1'", "'linear*'", "once"],
    ),
    "pattern on a container": (
        ["sites={hidden_layers: 6}"],
        ["sites: 'hidden_layers'", "ModuleList", "linear1, linear2"],
    ),
    "tied sites of different C": (
        [TIED, "sites.linear2=5"],
        ["tied_sites: 'linear1'", "C = 6", "5"],
    ),
    "tied to what is no site": (
        [TIED, "sites={linear1: 6}"],
        ["tied_sites: 'linear2' is no site", "linear1"],
    ),
    "tied the wrong way": (["tied_sites=[[linear1, linear1]]"], ["tied_sites: ", "'linear1'"]),
    "tie of three": (["tied_sites=[[linear1, linear2, x]]"], ["tied_sites", "2 items"]),
    "metric on what is no site": (
        ["metrics={column_match: {site: linear9}}"],
        ["metrics.column_match.site: 'linear9'", "linear1, linear2"],
    ),
    "embedding loss on a linear site": (
        ["losses={embedding_recon: {coeff: 1}}"],
        ["losses.embedding_recon", "embedding", "linear1, linear2"],
    ),
    # sizes, before anything of such a size is made
    "a batch too large": (
        ["batch_size=1e12"],
        ["batch_size: 1000000000000: a batch of", "60 TB of memory", "are free on cpu"],
    ),
    "a held-out batch too large": (["eval_batch_size=1000000000000"], ["eval_batch_size: ", "TB"]),
    "held-out batches too large together": (
        ["n_eval_batches=10000", "eval_batch_size=5000000"],
        ["n_eval_batches: 10,000 batches", "1 TB of memory"],
    ),
    "C too large": (
        ["sites={linear1: 1000000000000, linear2: 3}"],
        ["sites: 'linear1' with C = 1000000000000 has 56000000000000 parameters", "TB"],
    ),
    "no seeds": (["seeds=[]"], ["seeds: [] names no run"]),
    "a key of many parts": (["a" + ".b" * 2000 + "=1"], ["a key of more than 50 parts"]),
    "a run directory of two lines": (["--run_dir", "a\nb"], ["--run_dir", "'a\\nb'", "printed"]),
    "a run directory without a name": (["--run_dir", ".."], ["--run_dir", "'..'", "folder"]),
    # overrides
    "override without =": (["steps"], ["override 'steps'", "key=value"]),
    "override without a key": (["=5"], ["override '=5'", "key=value"]),
    "override below a number": (["seed.x=1"], ["override 'seed.x=1'", "'seed' is 0"]),
    "override that is no YAML": (["sites={linear1:"], ["override", "{linear1:", "YAML"]),
    "unknown option": (["--stepz", "5"], ["--stepz"]),
}


def assert_one_message(done: Finished, said: list[str]) -> None:
    """Exit status 2 and one message, with every part of `said`, below lines of the log at most."""
    assert done.status == 2, done
    log, _, message = done.err.rpartition("error: ")
    assert message and "error: " not in log and "Traceback" not in done.err
    assert re.fullmatch(r"((target: .*|usage: [^\n]*(\n +.*)*)\n)*(\w+\.py: )?", log), done.err
    for part in said:
        assert part in message
    assert done.out == ""


@pytest.mark.parametrize(("args", "said"), CASES.values(), ids=CASES)
def test_a_mistake_in_the_configuration(command: Command, args: list[str], said: list[str]):
    assert_one_message(command.tms(*args), said)
    assert not command.out.exists() and not listing(command.home)


def test_every_mistake_is_listed_at_once(command: Command):
    done = command.tms("steps=0", "lr=-1", "stepz=1")
    assert_one_message(done, ["steps: ", "lr: ", "stepz: "])


def test_compiling_without_a_compiler(command: Command):
    done = command.tms("compile=true", env={"PATH": str(command.home), "CXX": ""})
    assert_one_message(done, ["compile", "true", "C++ compiler"])
    assert not command.out.exists()
    done = command.tms("compile=true", env={"CXX": "/nowhere/g++"})
    assert_one_message(done, ["compile", "/nowhere/g++"])
    assert not command.out.exists()


DOCUMENTS = {
    "cyclic": ("steps: &a [*a]\n", ["line 1: *a stands inside of what it stands for"]),
    "deeply nested": ("steps: " + "[" * 100_000, ["line 1: ", "nest"]),
    "a bomb of aliases": (
        "".join(
            f"k{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(30)
        ),
        ["line 6: more than 200000 values, aliases followed"],
    ),
    "larger than any configuration": ("# " + "x" * 5_000_000, ["more than the 2000000"]),
    "a tag that would make an object": ("steps: !!python/object:os.system x", ["is not read here"]),
}


@pytest.mark.parametrize(("text", "said"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_that_would_exhaust_its_reader(command: Command, text: str, said: list[str]):
    path = command.folder / "odd.yaml"
    path.write_text(text, encoding="utf-8")
    done = command.run(TMS_SCRIPT, path, "steps=2")
    assert_one_message(done, said)
    assert len(done.err) < 1000 and not command.out.exists() and not listing(command.home)


def test_a_file_without_an_end(command: Command):
    assert_one_message(command.run(TMS_SCRIPT, "/dev/zero"), ["/dev/zero", "YAML"])


def test_the_cases_are_many():
    assert len(CASES) >= 25
