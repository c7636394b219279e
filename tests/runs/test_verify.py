"""Nothing of a run changes unnoticed: every file that numbers come from carries a digest."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spd.config import UserError
from spd.experiments.tms import plots
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.problem import Problem
from spd.run_files import FORMAT, sha256_of
from spd.runs import cli
from spd.runs.execution import ExperimentConfig
from spd.runs.library import decompose
from spd.runs.run import load_run, start
from spd.runs.run import resume as resume_run
from spd.spd_config import SPDConfig
from tests.run_fixtures import listing
from tests.runs.little_run import edit_meta, little_run, original_fixture, status_of

__all__ = ["original_fixture"]

pytestmark = pytest.mark.undrawn

FILES_OF_CHECKPOINT = ("model.safetensors", "training_state")
NEWEST, BEFORE = "checkpoints/00000006", "checkpoints/00000004"


@pytest.fixture(name="run")
def run_fixture(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "a-run"))


@pytest.fixture(scope="module", name="other")
def other_fixture(original: Path) -> Path:
    """The run of another seed."""
    return little_run(original.parent, "other", "seed=1")


def resume(argv: list[str]) -> None:
    cli.cli(TMSConfig, build, ["--resume", *argv])


def flip(path: Path, place: float = 0.9) -> None:
    """One bit, at a part of the length of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def _flip(name: str) -> Callable[[Path, Path], None]:
    return lambda run, other: flip(run / name)


def _flip_bias(run: Path, other: Path) -> None:
    path = run / "target/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1  # between two weights that are transposes
    path.write_bytes(content)


def _earlier_files(run: Path, other: Path) -> None:
    for path in (run / BEFORE).iterdir():
        shutil.copy(path, run / NEWEST)


def _earlier_parameters(run: Path, other: Path) -> None:
    shutil.copy(run / BEFORE / "model.safetensors", run / NEWEST)


def _others_files(run: Path, other: Path) -> None:
    shutil.rmtree(run / NEWEST)
    shutil.copytree(other / NEWEST, run / NEWEST)


def _others_parameters(run: Path, other: Path) -> None:
    shutil.copy(other / NEWEST / "model.safetensors", run / NEWEST)


def _edit_config(run: Path, other: Path) -> None:
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8")
    assert "batch_size: 16" in text and "seed: 0" in text
    path.write_text(text.replace("seed: 0", "seed: 7").replace("coeff: 1.0", "coeff: 2.0"))


def _cut_metrics(run: Path, other: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))


def _edit_metrics(run: Path, other: Path) -> None:
    path = run / "metrics.jsonl"
    text = path.read_text()
    first = text.index("loss/total")
    digit = next(i for i in range(first, len(text)) if text[i].isdigit())
    path.write_text(f"{text[:digit]}{9 - int(text[digit])}{text[digit + 1 :]}")


def _lose_digests(run: Path, other: Path) -> None:
    (run / NEWEST / "digests.json").unlink()


def _add_to_target(run: Path, other: Path) -> None:
    (run / "target" / "more.safetensors").write_bytes(b"x")


CHANGES: dict[str, tuple[Callable[[Path, Path], object], list[str]]] = {
    "a bit of the parameters": (
        _flip(f"{NEWEST}/model.safetensors"),
        [f"{NEWEST}/model.safetensors: is not what the run wrote", "from the checkpoint of step 4"],
    ),
    "a bit of the training state": (
        _flip(f"{NEWEST}/training_state"),
        [f"{NEWEST}/training_state", "from the checkpoint of step 4"],
    ),
    "a bit of the target": (_flip_bias, ["target/model.safetensors: is not what the run wrote"]),
    "the target's own settings": (_flip("target/training.json"), ["target/training.json"]),
    "files of an earlier step": (_earlier_files, [NEWEST, "step 4", "from the checkpoint of"]),
    "parameters of an earlier step": (
        _earlier_parameters,
        [f"{NEWEST}/model.safetensors", "step 4", "moved elsewhere"],
    ),
    "another seed's checkpoint": (_others_files, [f"{NEWEST}/digests.json: is of another run"]),
    "another seed's parameters": (_others_parameters, [f"{NEWEST}/model.safetensors: is not what"]),
    "the configuration": (
        _edit_config,
        [
            "config.yaml: was changed",
            "seed is 7, and was 0",
            "stochastic_recon.coeff is 2.0, and was",
        ],
    ),
    "a cut record": (_cut_metrics, ["metrics.jsonl"]),
    "an edited record": (_edit_metrics, ["metrics.jsonl: is not what the run wrote"]),
    "a lost record": (lambda run, other: (run / "metrics.jsonl").unlink(), ["metrics.jsonl"]),
    "lost digests": (_lose_digests, [f"{NEWEST}/digests.json: is missing"]),
    "a file more": (_add_to_target, ["target/more.safetensors: is no file of the run's target"]),
}
STILL_LOADED = [
    *("a bit of the parameters", "a bit of the target", "the target's own settings"),
    *("another seed's checkpoint", "another seed's parameters", "the configuration"),
    *("a cut record", "an edited record", "lost digests", "a file more"),
]
"""what can be gone on with"""


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_one_message_wherever_the_run_is_used(
    run: Path,
    other: Path,
    change: Callable[[Path, Path], object],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
):
    change(run, other)
    before = listing(run)
    with pytest.raises(UserError) as caught:
        load_run(run)
    assert all(part in str(caught.value) for part in said), caught.value
    for command in (cli.report, plots.main, resume):
        assert status_of(command, run) == 2
        err = capsys.readouterr().err
        assert err.count("error: ") == 1 and "Traceback" not in err
        assert all(part in err for part in said), err
        assert "delete" not in err and "remove" not in err and "rm " not in err
    assert listing(run) == before


@pytest.mark.parametrize("name", STILL_LOADED)
def test_unverified_it_is_used_as_it_is_and_said(
    run: Path, other: Path, name: str, caplog: pytest.LogCaptureFixture
):
    change, said = CHANGES[name]
    change(run, other)
    with caplog.at_level(logging.WARNING):
        assert load_run(run, verify=False).step == 6
    (record,) = [r for r in caplog.records if "used as it is" in r.message]
    assert "\n" not in record.message and said[0].split(": ")[0] in record.message


def test_the_commands_go_on_unverified(run: Path, capsys: pytest.CaptureFixture[str]):
    flip(run / NEWEST / "model.safetensors")
    for command in (cli.report, plots.main):
        assert status_of(command, run, "--unverified") == 0
        err = capsys.readouterr().err
        assert err.count("used as it is") == 1 and "model.safetensors" in err


@pytest.mark.parametrize("file", ["model.safetensors", "training_state"])
def test_any_bit_counts(run: Path, file: str):
    """Whether or not the file can still be read: it is an error, and its name is said."""
    whole = (run / NEWEST / file).read_bytes()
    places = random.Random(0)
    for _ in range(12):
        flip(run / NEWEST / file, places.random())
        with pytest.raises(UserError, match=rf"{NEWEST}/{file}: .* step 4"):
            load_run(run)
        (run / NEWEST / file).write_bytes(whole)
    assert load_run(run).step == 6


def test_what_a_message_advises_works(run: Path, original: Path, tmp_path: Path):
    flip(run / NEWEST / "training_state")
    (run / NEWEST).rename(tmp_path / "moved-elsewhere")
    assert load_run(run, verify=False).step == 4
    assert status_of(resume, run) == 0
    for name in ("metrics.jsonl", f"{NEWEST}/model.safetensors", f"{NEWEST}/training_state"):
        assert (run / name).read_bytes() == (original / name).read_bytes(), name
    assert load_run(run).step == 6


def test_a_damaged_checkpoint_before_is_not_recommended(run: Path):
    for folder in (NEWEST, BEFORE):
        flip(run / folder / "model.safetensors")
    with pytest.raises(UserError, match="there is no whole checkpoint before it"):
        load_run(run)


def test_a_changed_result_is_noticed(run: Path):
    path = run / "result.json"
    text = path.read_text()
    assert '"value": 6' in text or '"value"' in text
    path.write_text(text.replace('"seed": 0', '"seed": 8'))
    with pytest.raises(UserError, match=r"result\.json: is not what the run wrote there"):
        load_run(run)


def test_of_an_interrupted_run_what_a_checkpoint_saw_counts(run: Path):
    """Lines that came later belong to no checkpoint yet; a resume writes them again."""
    edit_meta(run, lambda meta: meta.update(status="interrupted"))
    (run / "result.json").unlink()
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + '{"step": 6, "eval/lo')
    assert load_run(run).step == 6
    path.write_text("".join(lines[:4]))
    with pytest.raises(
        UserError, match=r"metrics\.jsonl: was cut short; it has \d+ of the \d+ bytes"
    ):
        load_run(run)


def test_a_run_of_before_there_were_digests_is_read(run: Path):
    for folder in (NEWEST, BEFORE):
        (run / folder / "digests.json").unlink()
    added = ("format", "run_id", "config", "digests")
    edit_meta(run, lambda meta: [meta.pop(key) for key in added])
    assert load_run(run).step == 6
    assert status_of(resume, run) == 0 and status_of(cli.report, run) == 0
    assert load_run(run).step == 6
    for path in (run / BEFORE).iterdir():
        shutil.copy(path, run / NEWEST)
    with pytest.raises(UserError, match="is of step 4, not of the step that its folder names"):
        load_run(run)


def test_a_run_of_a_newer_format_names_the_release(run: Path, capsys: pytest.CaptureFixture[str]):
    newer = {"format": FORMAT + 1, "versions": {"spd": "9.8.7"}, "seconds": "another kind"}
    edit_meta(run, lambda meta: meta.update(newer))
    before = listing(run)
    for command in (cli.report, plots.main, resume):
        assert status_of(command, run) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "spd 9.8.7, which reads it" in err
    assert listing(run) == before


def test_what_is_recorded(original: Path):
    meta = json.loads((original / "meta.json").read_text())
    assert meta["format"] == FORMAT and meta["versions"]["spd"]
    target = {path.name for path in (original / "target").iterdir()}
    assert set(meta["digests"]) == {
        *(f"target/{n}" for n in target),
        "metrics.jsonl",
        "result.json",
    }
    for step, folder in ((4, BEFORE), (6, NEWEST)):
        record = json.loads((original / folder / "digests.json").read_text())
        assert record["step"] == step and record["run"] == meta["run_id"]
        assert record["files"] == {
            name: sha256_of(original / folder / name)
            for name in ("model.safetensors", "training_state")
        }
        lines = (original / "metrics.jsonl").read_bytes()[: record["metrics.jsonl"]["bytes"]]
        steps = [json.loads(line)["step"] for line in lines.splitlines()]
        assert max(steps) == step - 1


# --- the global generator ------------------------------------------------------------------------


def test_two_equal_runs_have_the_same_training_state(original: Path):
    """Byte for byte, whatever has been drawn before; and what others draw is left as it was."""
    torch.rand(7)
    state = torch.get_rng_state()
    again = little_run(original.parent, "again")
    assert torch.equal(torch.get_rng_state(), state)
    for name in (f"{NEWEST}/training_state", f"{BEFORE}/training_state", "metrics.jsonl"):
        assert (again / name).read_bytes() == (original / name).read_bytes(), name
    load_run(again)
    assert torch.equal(torch.get_rng_state(), state)


class Drawn(nn.Module):
    """A target whose weights come from torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class DrawnConfig(ExperimentConfig):
    """Of an experiment that draws its target where nobody asked it to."""


class Batches:
    """Data from there, too."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Tensor:
        self.position += 1
        return torch.rand(2, 4)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def build_drawn(config: DrawnConfig, device: torch.device) -> Problem:
    return Problem(Drawn(), train_batches=Batches(), eval_batches=Batches(), recon="mse")


def test_a_target_that_draws_from_the_global_generator(tmp_path: Path):
    """Its weights and its data are the same in a run, in another, and in one that was resumed."""
    raw = {
        **{"experiment": "drawn", "sites": {"linear": 3}, "steps": 4, "lr": 1e-2, "save_every": 2},
        **{"losses": {"stochastic_recon": {"coeff": 1.0}}, "eval_every": 1, "log_every": 1},
        **{"n_eval_batches": 1, "device": "cpu", "execution": {"compile": False}},
    }
    config = DrawnConfig.model_validate(raw)
    runs = [start(config, build_drawn, directory=tmp_path / name) for name in ("one", "two")]
    weights = [load_run(run).problem.target.state_dict() for run in runs]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    shutil.rmtree(runs[1] / "checkpoints/00000004")  # as if killed before it
    resume_run(DrawnConfig, build_drawn, runs[1])
    for name in ("metrics.jsonl", *(f"checkpoints/00000004/{n}" for n in FILES_OF_CHECKPOINT)):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name


def test_what_a_library_user_draws_is_left_as_it_was():
    state = torch.get_rng_state()
    settings = {"sites": {"linear": 3}, "steps": 2, "lr": 1e-2, "execution": {"compile": False}}
    config = SPDConfig.model_validate({**settings, "losses": {"stochastic_recon": {"coeff": 1.0}}})
    histories = []
    for _ in range(2):
        torch.manual_seed(5)
        problem = build_drawn(DrawnConfig.model_construct(), torch.device("cpu"))
        torch.rand(len(histories))  # another place in the stream of the user's own
        before = torch.get_rng_state()
        histories.append(decompose(problem, config, quiet=True).history)
        assert torch.equal(torch.get_rng_state(), before)
    assert histories[0] == histories[1]
    torch.set_rng_state(state)
