"""Files that are missing, damaged or of another kind: one message, status 2, nothing changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spd.registry import EXPERIMENTS
from spd.settings import PACKAGE_DIR
from tests.run_fixtures import (
    TMS_SCRIPT,
    Command,
    command_fixture,
    finished_run,
    listing,
    make_tms_target,
    target_fixture,
)
from tests.test_bad_input import assert_one_message

__all__ = ["command_fixture", "target_fixture"]

pytestmark = pytest.mark.undrawn

# --- the YAML file -------------------------------------------------------------------------------

YAML_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file"),
    "empty": (b"# nothing yet\n", "found nothing"),
    "a list": (b"- steps: 5\n", "found a list"),
    "not YAML": (b"steps: [1, 2\n", "not valid YAML"),
    "not UTF-8": (b"experiment: caf\xe9\n", "cannot be read"),
    "keys that are no text": (b"1: 2\n", "1: keys should be strings"),
    "settings missing": (b"experiment: tms_5-2\n", "losses: a value is required"),
}


@pytest.mark.parametrize(("content", "said"), YAML_FILES.values(), ids=YAML_FILES)
def test_a_yaml_file_that_cannot_be_used(command: Command, content: bytes | None, said: str):
    path = command.home / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    assert_one_message(command.run(TMS_SCRIPT, path), [str(path), said])
    assert not command.out.exists()


def test_a_folder_for_a_yaml_file(command: Command):
    done = command.run(TMS_SCRIPT, command.home)
    assert_one_message(done, [str(command.home), "cannot be read", "directory"])


def test_neither_configuration_nor_run(command: Command):
    done = command.run(TMS_SCRIPT)
    assert done.status == 2 and "--resume RUN_DIR" in done.err


# --- the target ----------------------------------------------------------------------------------


def _without(name: str) -> Callable[[Path], None]:
    return lambda target: (target / name).unlink()


def _with_config(old: str, new: str) -> Callable[[Path], None]:
    def change(target: Path) -> None:
        path = target / "config.yaml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return change


def _cut_weights(target: Path) -> None:
    path = target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _replace_by_file(target: Path) -> None:
    shutil.rmtree(target)
    target.write_bytes(b"")


def _untie(target: Path) -> None:
    path = target / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "linear2.weight": weights["linear2.weight"] + 1}, path)


TARGETS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (shutil.rmtree, ["no such file or directory", "wandb:entity"]),
    "without weights": (_without("model.safetensors"), ["model.safetensors is missing"]),
    "without a configuration": (_without("config.yaml"), ["config.yaml is missing"]),
    "with corrupt weights": (_cut_weights, ["model.safetensors", "not a readable safetensors"]),
    "of another kind": (_with_config("kind: tms", "kind: resid_mlp"), ["'resid_mlp'", "'tms'"]),
    "of another size": (_with_config("n_hidden: 2", "n_hidden: 3"), ["does not fit", "linear1"]),
    "with a damaged configuration": (_with_config("lr: ", "lrr: "), ["lrr", "did you mean 'lr'"]),
    "a file of another sort": (_replace_by_file, ["of an unknown sort", "training YAML"]),
    "not transposes but tied": (_untie, ["tied_sites", "not the transpose"]),
}


@pytest.mark.parametrize(("damage", "said"), TARGETS.values(), ids=TARGETS)
def test_a_target_that_cannot_be_used(
    command: Command, damage: Callable[[Path], object], said: list[str]
):
    target = make_tms_target(command.folder / "mine")
    damage(target)
    done = command.tms(f"target={target}", "tied_sites=[[linear1, linear2]]")
    assert_one_message(done, said)
    assert str(target) in done.err or "tied_sites" in said
    assert not command.out.exists()


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("wandb:mine", "wandb:entity/project/run-id"),
        ("wandb:me/../../x", "wandb:entity/project/run-id"),
        ("wandb:me/project/run", "WANDB_API_KEY"),
    ],
)
def test_a_target_on_wandb_that_cannot_be_fetched(command: Command, reference: str, said: str):
    assert_one_message(command.tms(f"target={reference}"), [reference, said])
    assert not command.out.exists()


# --- the output root -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["trained", "yaml"])
def test_an_output_root_that_cannot_be_written(command: Command, target: str):
    """Below a file, where nobody can write, whoever runs the tests."""
    blocked = command.folder / "file"
    blocked.write_bytes(b"")
    args = ["target=tms_5-2_target.yaml"] if target == "yaml" else []
    done = command.tms(*args, env={"SPD_OUT_DIR": str(blocked / "out")})
    assert_one_message(done, [str(blocked / "out"), "SPD_OUT_DIR"])
    assert blocked.read_bytes() == b""


# --- a run to go on with -------------------------------------------------------------------------


def newest(run: Path, name: str) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1] / name


def _cut(name: str) -> Callable[[Path], object]:
    def cut(run: Path) -> None:
        path = newest(run, name)
        path.write_bytes(path.read_bytes()[:-100])

    return cut


def _empty(name: str) -> Callable[[Path], object]:
    return lambda run: newest(run, name).write_bytes(b"")


def _reshape(run: Path) -> None:
    path = newest(run, "model.safetensors")
    save_file({name: tensor[:-1].clone() for name, tensor in load_file(path).items()}, path)


def _rename_parameter(run: Path) -> None:
    path = newest(run, "model.safetensors")
    tensors = load_file(path)
    tensors["linear9.V"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def _foreign_pickle(run: Path) -> None:
    torch.save({"optimizer": Path("anything")}, newest(run, "training_state"))


def _meta(content: str) -> Callable[[Path], object]:
    return lambda run: (run / "meta.json").write_text(content, encoding="utf-8")


RUNS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "parameters cut short": (_cut("model.safetensors"), ["model.safetensors", "damaged"]),
    "parameters empty": (_empty("model.safetensors"), ["model.safetensors", "damaged"]),
    "parameters missing": (
        lambda run: newest(run, "model.safetensors").unlink(),
        ["model.safetensors", "no such file"],
    ),
    "parameters of another shape": (_reshape, ["shape", "expected"]),
    "parameters of another model": (_rename_parameter, ["linear9.V"]),
    "state cut short": (_cut("training_state"), ["training_state", "damaged"]),
    "state empty": (_empty("training_state"), ["training_state", "damaged"]),
    "state missing": (
        lambda run: newest(run, "training_state").unlink(),
        ["training_state", "no such file"],
    ),
    "state that would run code": (_foreign_pickle, ["training_state", "damaged"]),
    "no configuration": (lambda run: (run / "config.yaml").unlink(), ["no config.yaml"]),
    "no record": (lambda run: (run / "meta.json").unlink(), ["no meta.json"]),
    "record cut short": (_meta('{"entry": '), ["meta.json", "not valid JSON"]),
    "record of something else": (_meta(json.dumps([1])), ["meta.json", "'entry'"]),
    "target lost": (lambda run: _cut_weights(run / "target"), ["target", "safetensors"]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tms_target: Path) -> Path:
    command = Command(tmp_path_factory.mktemp("finished"), tms_target)
    finished_run(command)
    return command.only_run()


@pytest.mark.parametrize(("damage", "said"), RUNS.values(), ids=RUNS)
def test_a_run_that_cannot_go_on(
    command: Command, finished: Path, damage: Callable[[Path], object], said: list[str]
):
    run = command.out / "tms_5-2" / "20260101-000000-abcdef"
    shutil.copytree(finished, run)
    damage(run)
    before = listing(command.out)
    assert_one_message(command.resume(run), [str(run), *said])
    assert listing(command.out) == before


def test_what_is_no_run_cannot_go_on(command: Command):
    assert_one_message(command.resume(command.home), [str(command.home), "run directory"])
    assert_one_message(command.resume(command.home / "x"), [str(command.home / "x"), "no config"])
    assert not command.out.exists() and not listing(command.home)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("config.yaml", "steps=7"), ["steps is 7 here", "6 in the run's config.yaml"]),
        (
            ("config.yaml", "losses.stochastic_recon.coeff=2", "figures={mean_activity: {}}"),
            ["losses.stochastic_recon.coeff is 2.0 here, but 1.0", "figures.mean_activity", "None"],
        ),
        (("steps=7",), ["'steps=7'", "its own configuration"]),
        (("nowhere.yaml",), ["nowhere.yaml", "no such file"]),
    ],
)
def test_a_run_goes_on_under_its_own_configuration_alone(
    command: Command, finished: Path, args: tuple[str, ...], said: list[str]
):
    before = listing(finished)
    shutil.copy(finished / "config.yaml", command.home)
    assert_one_message(command.resume(finished, *args), said)
    assert listing(finished) == before


# --- by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tms_5_2", "resid", "--name"])
def test_an_unknown_experiment(command: Command, name: str):
    done = command.run(PACKAGE_DIR / "registry.py", name)
    assert done.status == 2 and done.err.count("error: ") == 1
    if not name.startswith("-"):
        assert name in done.err and all(known in done.err for known in EXPERIMENTS)
    assert ("did you mean 'tms_5-2'" in done.err) == (name == "tms_5_2")
    assert not command.out.exists()
