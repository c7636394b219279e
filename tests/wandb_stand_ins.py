"""What stands in for W&B: a run that keeps what it is told, and a server that holds one run."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class FakeRun:
    """Stands in for a run of W&B: keeps what it is told, and fails in one of its methods."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[str] = []
        self.history: list[Mapping[str, Any]] = []
        self.files: dict[str, Path] = {}
        self.summary: dict[str, Any] = {}
        self.offline, self.url = False, "https://wandb.example/me/project/runs/1"

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise OSError(f"{name} does not work\nand here is why")

    def log(self, values: Mapping[str, Any]) -> None:
        self._note("log")
        self.history.append(values)

    def save(self, path: str, base_path: str, policy: str) -> None:
        self._note("save")
        self.files[str(Path(path).relative_to(base_path))] = Path(path)

    def finish(self, exit_code: int) -> None:
        self._note(f"finish {exit_code}")


class FakeFile(NamedTuple):
    name: str
    source: Path

    def download(self, root: str, replace: bool) -> None:
        assert replace
        path = Path(root) / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.source, path)


class FakeApi:
    """A server that holds the files of one run."""

    def __init__(self, files: Mapping[str, Path], path: str = "me/project/run-1") -> None:
        self.stored, self.path = files, path

    def run(self, path: str) -> "FakeApi":
        if path != self.path:
            raise ValueError(f"could not find run {path}\n(HTTP 404)")
        return self

    def files(self) -> list[FakeFile]:
        return [FakeFile(name, path) for name, path in self.stored.items()]
