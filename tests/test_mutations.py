"""The shipped configurations and command lines, mutated at random: read, or refused in one message.

Deterministic: the same mutations every time. The thousand are slow, a hundred of them always run.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spd.config import BaseConfig, UserError, load_config
from spd.experiments.lm.lm_decomposition import LMConfig
from spd.experiments.lm.train_lm import LMTrainConfig
from spd.experiments.resid_mlp.resid_mlp_decomposition import ResidMLPConfig
from spd.experiments.resid_mlp.train_resid_mlp import ResidMLPTrainConfig
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.experiments.tms.train_tms import TMSTrainConfig
from spd.runs.cli import parser_of
from spd.runs.execution import ExperimentConfig, load_experiment
from tests.run_fixtures import (
    EXPERIMENTS,
    TMS_CONFIG,
    TMS_SCRIPT,
    Command,
    Finished,
    command_fixture,
    listing,
    target_fixture,
)

__all__ = ["command_fixture", "target_fixture"]

CLASSES: dict[str, tuple[type[ExperimentConfig], type[BaseConfig]]] = {
    "tms": (TMSConfig, TMSTrainConfig),
    "resid_mlp": (ResidMLPConfig, ResidMLPTrainConfig),
    "lm": (LMConfig, LMTrainConfig),
}
SHIPPED = {
    path: CLASSES[path.parent.name][path.stem.endswith("_target")]
    for path in sorted(EXPERIMENTS.glob("*/*.yaml"))
}
ODD = (
    *(
        "",
        "~",
        "true",
        "yes",
        "x",
        "-1",
        "0",
        "1.5",
        "1.0",
        "1e12",
        "-1e400",
        ".nan",
        ".inf",
        "010",
    ),
    *("0x10", "1:30", "2026-01-31", "9" * 30, "9" * 5000, "[]", "{}", "[[]]", "{a: {b: 1}}"),
    *("[1, x, ~]", "{1: 2}", "{~: ~}", "{[a]: 1}", "{type: [1]}", "{type: {a: b}}", "{coeff: x}"),
    *("&a [*a]", "*nothing", "&a {<<: *a}", "{<<: 3}", "!!python/object:os.system x", "!!bool x"),
    *(
        "!!int",
        "!!binary x",
        "!!set {a}",
        "!!timestamp x",
        "[" * 100,
        "{a: " * 60,
        "'",
        '"\\x"',
        "|",
    ),
    *("@", "%", "\t", "a: b: c", "\x00", "\x1b[31m", "\ud800", "\u2028", "ä", "x" * 100_000),
    *("- " * 100 + "1", "[" + ", ".join(["{a: 1}"] * 500) + "]", "../../etc/passwd", "wandb:a/b/c"),
)
KEYS = (
    *("steps", "seed", "seeds", "lr", "sites", "sites.linear1", "losses", "losses.faithfulness"),
    *("losses.stochastic_recon.n_samples", "losses.stochastic_recon.coeff", "metrics", "figures"),
    *("importance", "importance.n_hidden", "lr_schedule", "lr_schedule.type", "data", "batch_size"),
    *("data.value_range", "data.feature_probability", "data.synced_inputs", "eval_batch_size"),
    *("n_eval_batches", "tied_sites", "execution", "compile", "passes", "grad_clip", "components"),
    *("faithfulness_warmup", "experiment", "device", "figures_every", "keep_checkpoints", "module"),
    *(
        "wandb_tags",
        "",
        "a",
        "a.b",
        "a" + ".b" * 100,
        '"sites',
        "'sites'.x",
        "sites..x",
        ".",
        "=",
        "ä",
    ),
)
WORDS = (
    *(
        "--resume",
        "--run_dir",
        "--trust",
        "--help",
        "--",
        "-",
        "-x",
        "--run_dir=",
        "--run_dir=a\nb",
    ),
    *("--run_dir=a\0b", "--resume=", "--run_dir=..", "--run_dir=/", "x" * 5000, "", " ", "\ud800"),
)
values = st.sampled_from(ODD)
overrides = st.builds("{}={}".format, st.sampled_from(KEYS), values)

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
"""of a busy machine these say nothing about the examples"""


@st.composite
def documents(draw: st.DrawFn) -> tuple[type[BaseConfig], bytes]:
    """A shipped file with one to three mutations, as bytes."""
    path = draw(st.sampled_from(list(SHIPPED)))
    lines = path.read_text(encoding="utf-8").splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        key = lines[at].partition(":")[0]
        lines[at] = draw(
            st.sampled_from([f"{key}: ", "", f"  {lines[at]}", lines[at].strip(), f"{lines[at]} "])
        ) + draw(st.one_of(st.just(""), values))
        if draw(st.booleans()):
            lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from([lines[at], key])))
    text = "\n".join(lines).encode("utf-8", errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(text)))
        text = text[:cut] + draw(st.binary(max_size=4)) + text[cut:]
    return SHIPPED[path], text


def at_random(n: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same `n` examples every time, of which nothing is kept on the disk."""
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[*SLOW],
    )


def assert_readable(error: UserError) -> None:
    """One message, of a length that is read."""
    text = str(error)
    assert 0 < len(text) < 10_000 and len(text.splitlines()) < 30, text


def read_mutated(path: Path, document: tuple[type[BaseConfig], bytes]) -> None:
    config_class, content = document
    path.write_bytes(content)
    try:
        load_config(config_class, path)
    except UserError as error:
        assert_readable(error)


def override_mutated(words: list[str]) -> None:
    try:
        load_experiment(TMSConfig, TMS_CONFIG, words)
    except UserError as error:
        assert_readable(error)


def parse_mutated(words: list[str]) -> None:
    try:
        parsed = parser_of(build).parse_intermixed_args([str(TMS_CONFIG), *words])
    except SystemExit as end:
        assert end.code in (0, 2)
        return
    for place in (parsed.resume, parsed.run_dir):
        assert place is None or str(place).isprintable()
    override_mutated(parsed.overrides)


command_lines = st.lists(st.one_of(overrides, st.sampled_from(WORDS)), min_size=1, max_size=4)


def check_all(folder: Path, n: int) -> None:
    path = folder / "mutated.yaml"

    @at_random(n)
    @given(documents())
    def read(document: tuple[type[BaseConfig], bytes]) -> None:
        read_mutated(path, document)

    @at_random(n)
    @given(command_lines)
    def parse(words: list[str]) -> None:
        parse_mutated(words)

    read()
    parse()
    assert list(folder.iterdir()) == [path]


def test_a_hundred_mutations(tmp_path: Path):
    check_all(tmp_path, 100)


@pytest.mark.slow
def test_a_thousand_mutations(tmp_path: Path):
    check_all(tmp_path, 1000)


@pytest.mark.slow
def test_every_odd_value_of_every_setting():
    for key in KEYS:
        for value in ODD[:: 1 + len(key) % 3]:
            override_mutated([f"{key}={value}"])


def assert_no_traceback(done: Finished, command: Command) -> None:
    assert done.status in (0, 1, 2), done
    assert "Traceback" not in done.err and len(done.err) < 10_000
    if done.status == 2:
        assert not command.out.exists() and not listing(command.home), done
    for left in (command.out, command.home / "a-run"):
        assert not [*left.rglob(".*.partial"), *left.rglob(".*.mode")], done


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """So many of a processor, and ten times as many by the clock: others may be at work too."""
    clock, before = time.perf_counter(), os.times()
    yield
    after = os.times()
    worked = after.children_user + after.children_system
    assert worked - before.children_user - before.children_system < seconds
    assert time.perf_counter() - clock < 10 * seconds


@pytest.mark.slow
def test_forty_commands(command: Command):
    """Of a run of six steps; whatever they say, they end within ten seconds."""
    of_a_command = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=5)
    odd = [v for v in ODD if "\0" not in v and "\ud800" not in v and len(v) < 100_000]
    words = st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(odd) | of_a_command)

    @at_random(40)
    @given(st.lists(words, min_size=1, max_size=2))
    def run(overrides: list[str]) -> None:
        shutil.rmtree(command.out, ignore_errors=True)
        with ends_within(10):
            done = command.tms(*overrides)
        assert_no_traceback(done, command)

    run()
    path = command.folder / "mutated.yaml"

    @at_random(20)
    @given(documents().filter(lambda found: found[0] is TMSConfig))
    def run_file(document: tuple[type[BaseConfig], bytes]) -> None:
        shutil.rmtree(command.out, ignore_errors=True)
        path.write_bytes(document[1])
        quick = (
            f"target={command.target}",
            "steps=2",
            "batch_size=16",
            "compile=false",
            "metrics={}",
        )
        with ends_within(10):
            done = command.run(TMS_SCRIPT, path, *quick, "figures={}", "eval_batch_size=16")
        assert_no_traceback(done, command)

    run_file()
