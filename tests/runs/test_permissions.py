"""The modes of a run's files, and files that may not be read."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from spd.config import UserError, load_config
from spd.experiments.lm.data.batches import HELD_OUT_FILE, BatchSettings, read_held_out
from spd.experiments.lm.data.text import TextConfig
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.run_files import write_safetensors
from spd.runs.console import user_errors
from spd.runs.pretrained import Decomposition
from spd.runs.run import load_run, start
from tests.lm_stand_ins import little_llama, make_tokenizer, save_model
from tests.run_fixtures import QUICK, TMS_CONFIG, make_tms_target

pytestmark = pytest.mark.undrawn


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def not_the_superuser() -> Iterator[None]:
    """As somebody whom modes concern."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def modes(folder: Path) -> set[str]:
    return {oct(stat.S_IMODE(p.stat().st_mode)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that everybody may look into, unlike those of pytest."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def toy_run(folder: Path) -> Path:
    target = make_tms_target(folder / "target")
    config = load_config(TMSConfig, TMS_CONFIG, [*QUICK, f"target={target}", "steps=2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return start(config, build, directory=folder / "run")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, "0o644"), (0o027, "0o640"), (0o002, "0o664")])
def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(
    tmp_path: Path, mask: int, mode: str
):
    with umask(mask):
        run = toy_run(tmp_path)
        Decomposition.of_run(load_run(run)).save_pretrained(tmp_path / "saved")
    assert len(list(run.rglob("*.safetensors"))) == 2
    assert modes(tmp_path) == {mode}
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


def test_a_copy_of_a_language_model_too(tmp_path: Path):
    from spd.experiments.lm.loading import Wanted, load_lm, save_copy

    source = save_model(tmp_path / "model", little_llama(), make_tokenizer())
    wanted = Wanted(
        str(source), None, "transformers.AutoModelForCausalLM", "logits", "float32", None, True
    )
    loaded = load_lm(wanted, torch.device("cpu"), folders=())
    with umask(0o027):
        save_copy(loaded.model, loaded.tokenizer, loaded.origin, tmp_path / "copy", max_megabytes=1)
    assert (tmp_path / "copy" / "model.safetensors").is_file() and modes(tmp_path / "copy") == {
        "0o640"
    }


NAMES = (
    *("checkpoints/00000002/model.safetensors", "checkpoints/00000002/training_state"),
    *("target/model.safetensors", "target/config.yaml", "meta.json", "config.yaml"),
    "metrics.jsonl",
)


def test_a_file_that_may_not_be_read_is_said_to_be_that(folder: Path):
    from spd.engine import checkpoint

    run = toy_run(folder)
    for name in NAMES:
        path = run / name
        path.chmod(0)
        with not_the_superuser(), pytest.raises(UserError) as caught:
            checkpoint.load_state(path.parent) if name.endswith("state") else load_run(run)
        path.chmod(0o644)
        said = str(caught.value)
        assert str(path) in said and "ermission denied" in said
        assert not any(word in said for word in ("damaged", "missing", "no such", "not valid"))
    run.chmod(0)
    with not_the_superuser(), pytest.raises(UserError, match=f"{run}/config.yaml: may not be read"):
        load_run(run)
    run.chmod(0o755)


def test_a_decomposition_and_a_held_out_text_too(folder: Path):
    Decomposition.of_run(load_run(toy_run(folder))).save_pretrained(folder / "saved")
    (folder / "saved/model.safetensors").chmod(0)
    with not_the_superuser(), pytest.raises(UserError, match="may not be read"):
        Decomposition.from_pretrained(folder / "saved")
    held_out = folder / HELD_OUT_FILE
    write_safetensors(held_out, {"ids": torch.zeros(1, 2)})
    text = TextConfig(source="x", context_length=2, eval_frac=0.5)
    settings = BatchSettings(text, None, 5, 0, 1, 1, 1, 1, torch.device("cpu"))
    assert read_held_out(folder, settings) is None, "it was made under other settings"
    held_out.chmod(0)
    with not_the_superuser(), pytest.raises(UserError, match=f"{held_out}: may not be read"):
        read_held_out(folder, settings)
    held_out.chmod(0o644)
    held_out.write_bytes(b"x")
    with pytest.raises(UserError, match=f"{held_out}: damaged"):
        read_held_out(folder, settings)


def test_the_weights_of_a_language_model_too(folder: Path):
    from spd.experiments.lm.loading import Wanted, load_lm

    source = save_model(folder / "model", little_llama(), make_tokenizer())
    (source / "model.safetensors").chmod(0)
    for path in source.iterdir():
        path.chmod(0 if path.name == "model.safetensors" else 0o644)
    source.chmod(0o755)
    wanted = Wanted(
        str(source), None, "transformers.AutoModelForCausalLM", "logits", "float32", None, True
    )
    said = f"{source / 'model.safetensors'}: may not be read"
    with not_the_superuser(), pytest.raises(UserError, match=said):
        load_lm(wanted, torch.device("cpu"), folders=())


def test_a_command_says_it_in_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise PermissionError(13, "Permission denied", "/x/y")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: /x/y: Permission denied\n"
    with pytest.raises(PermissionError), user_errors():
        raise PermissionError("of no file")
