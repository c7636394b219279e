"""A run directory as others meet it: loading it, holding it, tables of several."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd.config import UserError
from spd.experiments.tms.tms_decomposition import TMSConfig
from spd.run_files import sole_use
from spd.runs.cli import results_table
from spd.runs.console import resolve_device
from spd.runs.run import load_run
from tests.run_fixtures import (
    QUICK,
    TMS_CONFIG,
    TMS_SCRIPT,
    Command,
    Stop,
    command_fixture,
    finished_run,
    listing,
    target_fixture,
)

__all__ = ["command_fixture", "target_fixture"]

pytestmark = pytest.mark.undrawn


@pytest.fixture(scope="module", name="finished")
def finished_fixture(tmp_path_factory: pytest.TempPathFactory, tms_target: Path) -> Path:
    command = Command(tmp_path_factory.mktemp("finished"), tms_target)
    finished_run(command)
    return command.only_run()


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copies" / "a-run"))


def test_a_run_needs_nothing_but_its_directory(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = listing(run_copy)
    run = load_run(str(run_copy))
    assert run.directory == run_copy and run.step == 6 and isinstance(run.config, TMSConfig)
    assert [line["step"] for line in run.metrics] == [0, 0, 1, 2, 3, 4, 4, 5, 6]
    saved = load_file(run_copy / "checkpoints/00000006/model.safetensors")
    parameters = run.model.subcomponent_parameters()
    assert parameters.keys() == saved.keys()
    assert all(torch.equal(parameters[name], value) for name, value in saved.items())
    assert run.problem.target_dir == run_copy / "target"
    batch = torch.eye(5)
    output = run.model.target_forward(batch).output
    assert torch.equal(output, run.model(batch, {}))
    assert listing(run_copy) == before


def test_a_run_that_was_killed_is_loaded_at_its_newest_checkpoint(command: Command):
    command.tms(stop=Stop(9, "open *.00000006.partial"))
    directory = command.only_run()
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "eval/lo')
    run = load_run(directory)
    assert run.step == 4 and run.metrics[-1]["step"] == 5


@pytest.mark.parametrize("name", ["config.yaml", "meta.json"])
def test_what_is_no_run_is_refused(run_copy: Path, name: str):
    (run_copy / name).unlink()
    with pytest.raises(UserError, match=f"{run_copy}: no {name} there; a run directory"):
        load_run(run_copy)


def test_a_run_without_a_checkpoint_or_with_a_damaged_one_is_refused(run_copy: Path):
    newest = run_copy / "checkpoints/00000006"
    (newest / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=f"{newest}/model.safetensors: the checkpoint is damaged"):
        load_run(run_copy)
    shutil.rmtree(newest)
    assert load_run(run_copy).step == 4
    shutil.rmtree(run_copy / "checkpoints")
    with pytest.raises(UserError, match=f"{run_copy}: the run has no checkpoint yet"):
        load_run(run_copy)


@pytest.mark.parametrize(
    ("entry", "said"),
    [("spd.experiments.gone", "the module of this experiment"), ("/x/gone.py", "the file of this")],
)
def test_a_run_whose_experiment_is_gone_is_refused(run_copy: Path, entry: str, said: str):
    meta = json.loads((run_copy / "meta.json").read_text())
    meta["entry"]["module"] = entry
    (run_copy / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match=f"{entry}: {said}"):
        load_run(run_copy)


def test_an_experiment_of_ones_own_is_found_by_its_file(command: Command):
    """Also where its name is that of another module."""
    script = command.home / "json.py"
    text = TMS_SCRIPT.read_text(encoding="utf-8")
    assert "class TMSConfig(" in text
    script.write_text(text.replace("class TMSConfig(", "class Mine(").replace("TMSConfig", "Mine"))
    done = command.run(script, TMS_CONFIG, f"target={command.target}", *QUICK, "experiment=mine")
    assert done.status == 0, done.err
    directory = command.only_run()
    entry = json.loads((directory / "meta.json").read_text())["entry"]
    assert entry == {"module": str(script), "config": "Mine", "build": "build"}
    with pytest.raises(UserError, match=r"'.*json\.py' is no code of the installed package"):
        load_run(directory)
    run = load_run(directory, trust=True)
    assert directory.parent.name == "mine" and type(run.config).__name__ == "Mine"
    assert json.loads("1") == 1


def test_two_processes_do_not_work_on_one_run(command: Command, run_copy: Path):
    with sole_use(run_copy):
        before = listing(run_copy)
        done = command.resume(run_copy)
        assert done.status == 2 and f"{run_copy}: another process is working on" in done.err
        assert listing(run_copy) == before
    assert command.resume(run_copy).status == 0


def test_a_table_has_a_line_for_each_finished_run(finished: Path, run_copy: Path):
    lines = results_table([finished, run_copy]).splitlines()
    assert len(lines) == 3 and lines[0].split()[:3] == ["run", "seed", "steps"]
    assert lines[1].startswith(f"tms_5-2/{finished.name} ") and lines[2].startswith("copies/a-run ")
    (run_copy / "result.json").unlink()
    with pytest.raises(UserError, match=f"{run_copy}: no result.json; the run has not finished"):
        results_table([finished, run_copy])


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device: 'cuba' cannot be used .allowed: auto"):
        resolve_device("cuba")


# --- a directory of one's own --------------------------------------------------------------------


def test_a_run_in_a_named_directory_goes_on_whenever_it_is_named_again(
    command: Command, finished: Path
):
    """One command, given again and again until it has finished, wherever it was killed."""
    own = command.out / "study" / "seed0"
    args = ("--run_dir", own)
    for event in ("*.seed0.partial/.meta.json*", "*.00000004.partial", "*.result.json.partial"):
        assert command.tms(*args, stop=Stop(signal.SIGKILL, event)).status == -9
    done = command.tms(*args)
    assert done.status == 0 and f"report: {own / 'report.html'}" in done.out
    for name in ("metrics.jsonl", "checkpoints/00000006/model.safetensors"):
        assert (own / name).read_bytes() == (finished / name).read_bytes()
    assert [path.name for path in own.parent.iterdir()] == ["seed0"]
    assert not list(command.out.glob("tms_5-2"))


def test_a_named_directory_keeps_its_configuration_and_what_is_no_run(
    command: Command, run_copy: Path
):
    before = listing(run_copy)
    done = command.tms("--run_dir", run_copy, "lr=0.5")
    assert done.status == 2 and "lr is 0.5 here" in done.err and listing(run_copy) == before
    (run_copy / "meta.json").unlink()
    done = command.tms("--run_dir", run_copy)
    assert done.status == 2 and f"--run_dir {run_copy}: holds something else" in done.err
    done = command.resume(run_copy, "--run_dir", run_copy)
    assert done.status == 2 and "--run_dir needs a configuration, and no --resume" in done.err
