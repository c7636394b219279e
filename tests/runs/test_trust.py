"""Nothing is executed, read or written because a run's own files say so."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from spd.analysis import adversary, agreement, causes
from spd.config import UserError
from spd.experiments.resid_mlp import plots as resid_mlp_plots
from spd.experiments.tms import plots
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.registry import command_line
from spd.runs import cli
from spd.runs.pretrained import Decomposition
from spd.runs.provenance import code_state, package_files
from spd.runs.run import load_run
from spd.runs.trust import UntrustedError, check_code
from spd.runs.wandb_run import WandbRun, download_run
from spd.settings import load_env
from tests.run_fixtures import TMS_SCRIPT, listing
from tests.runs.little_run import edit_meta, original_fixture, status_of
from tests.wandb_stand_ins import FakeApi, FakeRun

__all__ = ["original_fixture"]

pytestmark = pytest.mark.undrawn

MARK = "it-was-run"
CODE = f"""
import os
from pathlib import Path
from spd.experiments.tms.tms_decomposition import TMSConfig, build as build_tms
Path(os.environ["MARK_FOLDER"], "{MARK}").touch()

class Own(TMSConfig):
    pass

def build(config, device):
    return build_tms(config, device)
"""


class Stranger:
    """A run from somewhere, with code of its own in its folder, and the mark that this leaves."""

    def __init__(self, run: Path, root: Path) -> None:
        self.run, self.mark = run, root / MARK

    def names(self, module: str, config: str = "Own", build: str = "build") -> None:
        entry = {"module": module, "config": config, "build": build}
        edit_meta(self.run, lambda meta: meta.update(entry=entry))


@pytest.fixture(name="stranger")
def stranger_fixture(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    run = Path(shutil.copytree(original, tmp_path / "theirs"))
    (run / "evil.py").write_text(CODE)
    package = run / "evil_package"
    package.mkdir()
    for name in ("__init__.py", "inner.py"):
        (package / name).write_text(CODE)
    monkeypatch.setenv("MARK_FOLDER", str(tmp_path))
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    monkeypatch.delenv("SPD_TRUSTED", raising=False)
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(run)
    for name in [n for n in sys.modules if n.startswith(("spd_entry_evil", "evil_package"))]:
        monkeypatch.delitem(sys.modules, name)
    return Stranger(run, tmp_path)


MODULES = {
    "a file in the run": "{run}/evil.py",
    "a relative file": "evil.py",
    "a module on the path": "evil_package",
    "a module below it": "evil_package.inner",
}
COMMANDS: dict[str, Callable[..., object]] = {
    "spd-report": cli.report,
    "plots": plots.main,
    "other plots": resid_mlp_plots.main,
    "resume": lambda words: cli.main(["--resume", *words]),
    "causes": causes.main,
    "adversary": lambda words: adversary.main([*words, "--steps", "1", "--restarts", "1"]),
    "agreement": lambda words: agreement.main([words[0], *words]),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_code_that_only_the_run_names_is_not_imported(stranger: Stranger, module: str):
    stranger.names(module.format(run=stranger.run))
    with pytest.raises(UntrustedError, match=r"--trust \(in Python trust=True\).*SPD_TRUSTED"):
        load_run(stranger.run)
    with pytest.raises(UntrustedError):
        Decomposition.of(stranger.run)
    assert not stranger.mark.exists()
    assert load_run(stranger.run, trust=True).step == 6
    assert stranger.mark.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_imports_it_unless_told_to(
    stranger: Stranger, name: str, capsys: pytest.CaptureFixture[str]
):
    stranger.names(f"{stranger.run}/evil.py")
    (stranger.run / "report.html").unlink()
    before = listing(stranger.run)
    status = status_of(COMMANDS[name], stranger.run)
    said = capsys.readouterr().err
    assert not stranger.mark.exists() and "--trust" in said and "evil.py" in said
    if name == "spd-report":
        page = (stranger.run / "report.html").read_text()
        assert status == 0 and "of the files of the run alone" in said
        assert "Made of the run's files alone" in page and "data:image/png" in page
    else:
        assert status == 2 and said.count("error: ") == 1 and "Traceback" not in said
        assert listing(stranger.run) == before
    trusted = status_of(COMMANDS[name], stranger.run, "--trust")
    assert trusted == (1 if name == "causes" else 0)  # a run of six steps is not solved
    assert stranger.mark.exists()


def test_a_run_on_wandb_is_not_trusted_either(
    stranger: Stranger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stranger.names("evil.py")
    sent = FakeRun()
    WandbRun(sent).upload(stranger.run)
    reference = f"wandb:me/project/{stranger.run.name}"
    found = download_run(reference, FakeApi(sent.files, reference.removeprefix("wandb:")))
    assert (found / "evil.py").is_file()
    with pytest.raises(UntrustedError, match=r"evil\.py"):
        load_run(reference)
    assert status_of(cli.report, reference) == 0 and "--trust" in capsys.readouterr().err
    assert status_of(plots.main, reference) == 2
    assert not stranger.mark.exists()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x/y", "a\\..\\x"])
def test_a_file_on_wandb_never_lies_outside_of_its_run(stranger: Stranger, name: str):
    api = FakeApi({name: stranger.run / "evil.py"})
    with pytest.raises(UserError, match="would lie outside of the run"):
        download_run("wandb:me/project/run-1", api)


# --- who may vouch for code ----------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_code_below_a_trusted_folder_is_imported(
    stranger: Stranger, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    stranger.names(module.format(run=stranger.run))
    monkeypatch.setenv("SPD_TRUSTED", f"{tmp_path / 'elsewhere'}:{stranger.run.parent}x")
    with pytest.raises(UntrustedError):
        load_run(stranger.run)
    assert not stranger.mark.exists()
    monkeypatch.setenv("SPD_TRUSTED", f"{tmp_path / 'elsewhere'}:{stranger.run.parent}")
    assert load_run(stranger.run).step == 6
    assert stranger.mark.exists()


def test_a_link_in_a_trusted_folder_is_not_what_it_leads_to(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    (trusted / "good.py").symlink_to(stranger.run / "evil.py")
    monkeypatch.setenv("SPD_TRUSTED", str(trusted))
    with pytest.raises(UntrustedError):
        check_code(str(trusted / "good.py"), "entry")


def test_code_that_the_caller_has_imported_is_his_own(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
):
    module = ModuleType("mine_already")
    exec(CODE, module.__dict__)
    stranger.mark.unlink()
    monkeypatch.setitem(sys.modules, "mine_already", module)
    stranger.names("mine_already")
    assert load_run(stranger.run).step == 6
    module.__file__ = str(stranger.run / "evil.py")
    check_code(str(stranger.run / "evil.py"), "entry")


def test_a_dot_env_cannot_vouch_for_code(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    text = f"SPD_TRUSTED={stranger.run}\nPYTHONPATH={stranger.run}\nLD_PRELOAD=x.so\nSPD_FREE=1\n"
    (stranger.run / ".env").write_text(text)
    for name in ("PYTHONPATH", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPD_FREE", "")
    monkeypatch.delenv("SPD_FREE")
    with caplog.at_level(logging.WARNING):
        load_env(stranger.run)
    assert os.environ["SPD_FREE"] == "1"
    assert not {"SPD_TRUSTED", "PYTHONPATH", "LD_PRELOAD"} & os.environ.keys()
    assert "SPD_TRUSTED" in caplog.text
    stranger.names(f"{stranger.run}/evil.py")
    assert status_of(plots.main, stranger.run) == 2 and not stranger.mark.exists()
    monkeypatch.setenv("SPD_TRUSTED", "/the/shells/own")
    load_env(stranger.run)
    assert os.environ["SPD_TRUSTED"] == "/the/shells/own"


OF_THE_SHELL = {
    "the compiler of a compiled step": ("CXX", "{run}/evil.sh"),
    "what git reads": ("HOME", "{run}"),
    "what git reads besides": ("XDG_CONFIG_HOME", "{run}"),
    "a repository": ("GIT_DIR", "{run}"),
    "what torch imports": ("TORCH_DEVICE_BACKEND_AUTOLOAD", "1"),
    "where compiled code lies": ("TORCHINDUCTOR_CACHE_DIR", "{run}"),
    "headers": ("CPLUS_INCLUDE_PATH", "{run}"),
    "what matplotlib imports": ("MPLBACKEND", "module://evil"),
    "code beside data": ("HF_DATASETS_TRUST_REMOTE_CODE", "1"),
    "the process behind wandb": ("_WANDB_CORE_PATH", "{run}/evil.sh"),
}


@pytest.mark.parametrize(("name", "value"), OF_THE_SHELL.values(), ids=OF_THE_SHELL)
def test_a_dot_env_names_no_code(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, name: str, value: str
):
    monkeypatch.delenv(name, raising=False)
    (stranger.run / ".env").write_text(f"{name}={value.format(run=stranger.run)}\n")
    load_env(stranger.run)
    assert name not in os.environ


def test_git_reads_no_settings_that_a_dot_env_names(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
):
    script = stranger.run / "evil.sh"
    script.write_text(f"#!/bin/sh\ntouch '{stranger.mark}'\n")
    script.chmod(0o755)
    (stranger.run / ".gitconfig").write_text(f'[core]\n\tfsmonitor = "{script}"\n')
    (stranger.run / ".env").write_text(f"HOME={stranger.run}\nXDG_CONFIG_HOME={stranger.run}\n")
    monkeypatch.delenv("HOME", raising=False)
    load_env(stranger.run)
    code_state()
    assert not stranger.mark.exists()


ODD_ENTRIES = {
    "a function of Python's": ("os", "system", "remove"),
    "no configuration": ("spd.experiments.tms.tms_decomposition", "Path", "build"),
    "a function from elsewhere": ("spd.experiments.tms.tms_decomposition", "TMSConfig", "cli"),
    "nothing": ("spd.experiments.tms.tms_decomposition", "Nothing", "build"),
    "a way up": ("spd.experiments..tms", "TMSConfig", "build"),
}


@pytest.mark.parametrize("entry", ODD_ENTRIES.values(), ids=ODD_ENTRIES)
def test_an_entry_that_is_no_experiment(stranger: Stranger, entry: tuple[str, str, str]):
    stranger.names(*entry)
    with pytest.raises(UserError, match=rf"{stranger.run}/meta.json: entry|missing"):
        load_run(stranger.run, trust=True)


# --- what the user names himself -----------------------------------------------------------------


def test_a_script_of_ones_own_goes_on_with_its_run(stranger: Stranger, tmp_path: Path):
    """`python my.py --resume DIR`, as far as `cli` is called by it; the run names another file."""
    stranger.names(f"{stranger.run}/evil.py")
    words = ["--resume", str(stranger.run)]
    assert status_of(lambda argv: cli.cli(TMSConfig, build, argv), *words) == 0
    assert not stranger.mark.exists()


def test_a_yaml_of_ones_own_goes_on_with_its_run(stranger: Stranger, tmp_path: Path):
    """`spd-run my.yaml --resume DIR`: the file names the code, and the run was made by it."""
    mine = tmp_path / "my.yaml"
    text = TMS_SCRIPT.with_name("tms_5-2_config.yaml").read_text()
    script = stranger.run / "evil.py"
    mine.write_text(
        f"{text}\nmodule: {script}\n".replace("experiment: tms_5-2", "experiment: mine")
    )
    stranger.names(str(script))
    command = command_line(str(mine), ["--resume", str(stranger.run)])
    assert command[2:] == ["spd.runs.cli", "--made_by", str(mine), "--resume", str(stranger.run)]
    assert status_of(cli.main, *command[3:]) == 0 and stranger.mark.exists()
    stranger.names("evil_package")
    with pytest.raises(UserError, match="a run of evil_package, but"):
        command_line(str(mine), ["--resume", str(stranger.run)])


# --- paths ---------------------------------------------------------------------------------------


def _link(name: str) -> Callable[[Path, Path], None]:
    def link(run: Path, outside: Path) -> None:
        place = run / name
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.symlink_to(outside)

    return link


@pytest.mark.parametrize(
    "name",
    ["figures", "metrics.jsonl", ".lock", ".report.html.partial", "target/config.yaml", "log.txt"],
)
@pytest.mark.parametrize("module", ["spd.experiments.tms.tms_decomposition", "evil.py"])
def test_no_link_leads_out_of_a_run(
    stranger: Stranger, tmp_path: Path, name: str, module: str, capsys: pytest.CaptureFixture[str]
):
    stranger.names(module, "TMSConfig" if module.startswith("spd") else "Own")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    _link(name)(stranger.run, outside if name == "figures" else outside / "mine")
    before = listing(tmp_path)
    with pytest.raises(UntrustedError, match="a link that leads out of the run, to"):
        load_run(stranger.run)
    for command in COMMANDS.values():
        assert status_of(command, stranger.run) == 2
        assert name in capsys.readouterr().err
    assert listing(tmp_path) == before


def test_a_link_within_a_run_is_followed(stranger: Stranger):
    (stranger.run / "metrics.jsonl").rename(stranger.run / "kept.jsonl")
    (stranger.run / "metrics.jsonl").symlink_to("kept.jsonl")
    assert load_run(stranger.run).step == 6


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "a/b"])
def test_runs_beside_it_are_names(stranger: Stranger, tmp_path: Path, name: str):
    (tmp_path / "elsewhere").mkdir()
    beside = {"page": "x.html", "runs": ["theirs", name]}
    edit_meta(stranger.run, lambda meta: meta.update(side_by_side=beside, commit="0; rm -rf x"))
    assert status_of(cli.report, stranger.run) == 0
    page = (stranger.run / "report.html").read_text()
    assert "Trained side by side" not in page
    assert "git checkout &#39;0; rm -rf x&#39;" in page


# --- the copy of the code ------------------------------------------------------------------------


@pytest.mark.needs("git")
@pytest.mark.parametrize("checkout", [True, False])
def test_the_copy_of_the_code_holds_no_keys(tmp_path: Path, checkout: bool):
    package = tmp_path / "repo" / "spd"
    files = ("__init__.py", "new.py", "ignored.bin", ".env", ".env.mine", "deep/.env", "deep/a.py")
    for name in (*files, "__pycache__/a.pyc"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    if checkout:
        (package.parent / ".gitignore").write_text("*.bin\n__pycache__\n")
        for words in (["init"], ["add", "spd/__init__.py", "spd/.env"]):
            subprocess.run(["git", *words], cwd=package.parent, check=True, capture_output=True)
    found = [path.as_posix() for path in package_files(package)]
    ignored = [] if checkout else ["ignored.bin"]
    assert found == sorted(["__init__.py", "deep/a.py", *ignored, "new.py"])
