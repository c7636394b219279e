"""What is installed: the wheel, built as a release would be."""

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator

import pytest

from spd import settings

REPO, SPD = settings.REPO_DIR, settings.PACKAGE_DIR


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """By the build backend of pyproject.toml in this environment, which needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_every_file_of_the_package_is_inside(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    wanted = [
        p for p in SPD.rglob("*") if p.suffix in (".py", ".pyi", ".typed", ".yaml", ".j2", ".css")
    ]
    assert {path.relative_to(REPO).as_posix() for path in wanted} <= names
    for name in (
        "spd/py.typed",
        "spd/reports/report.html.j2",
        "spd/experiments/tms/tms_5-2_config.yaml",
    ):
        assert wheel.read(name) == (REPO / name).read_bytes()


def test_nothing_else_is_inside(wheel: zipfile.ZipFile):
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"spd"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name or "test" in name]


def test_metadata_licence_and_command(wheel: zipfile.ZipFile):
    (info,) = {n.partition("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {project['version']}" in metadata and "Name: spd\n" in metadata
    assert wheel.read(f"{info}/licenses/LICENSE") == (REPO / "LICENSE").read_bytes()
    commands = wheel.read(f"{info}/entry_points.txt").decode()
    for command in (
        "run = spd.registry",
        "evals = spd.evals.run_evals",
        "sweep = spd.sweeps.sweep",
    ):
        assert f"spd-{command}:main" in commands
