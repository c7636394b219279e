"""Finding, training on first use, saving and reading targets."""

import logging
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
import torch

from spd import settings
from spd.config import BaseConfig, UserError
from spd.experiments.target_training import TargetError
from spd.experiments.targets import (
    TargetKind,
    TrainedTarget,
    cached_target,
    load_weights,
    read_target,
    resolve_target,
    save_target,
)

CPU = torch.device("cpu")
WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
RECORD = {"chosen_seed": 0}


class LineConfig(BaseConfig):
    kind: Literal["line"] = "line"
    steps: int = 10


class Trainer:
    """Counts how often it trains; `error` is raised half-way."""

    def __init__(self, error: BaseException | None = None, seconds: float = 0.0) -> None:
        self.calls, self.error, self.seconds = 0, error, seconds

    def __call__(self, config: BaseConfig, device: torch.device) -> TrainedTarget:
        self.calls += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return TrainedTarget(WEIGHTS, RECORD)

    @property
    def kind(self) -> TargetKind:
        return TargetKind("line", LineConfig, self)


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "line.yaml"
    path.write_text("steps: 3\n", encoding="utf-8")
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_target(tmp_path / "saved", LineConfig(steps=5), TrainedTarget(WEIGHTS, RECORD))
    return tmp_path / "saved"


def resolve(target: object, trainer: Trainer | None = None, **options: object) -> Path:
    kind = (trainer or Trainer(error=AssertionError("must not train"))).kind
    return resolve_target(str(target), kind, device=CPU, **options)  # pyright: ignore


def cached() -> list[str]:
    root = settings.targets_root()
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.exists() else []


def test_a_training_yaml_is_trained_on_first_use_and_then_found(yaml_file: Path):
    trainer = Trainer()
    first, second = resolve(yaml_file, trainer), resolve(yaml_file, trainer)
    assert first == second and trainer.calls == 1
    assert cached() == [first.name] and first.name.startswith("line-")
    assert sorted(p.name for p in first.iterdir()) == [
        "config.yaml",
        "model.safetensors",
        "training.json",
    ]
    config, weights = read_target(first, LineConfig)
    assert config == LineConfig(steps=3)
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())


def test_the_cache_knows_the_resolved_configuration(yaml_file: Path):
    trainer = Trainer()
    first = resolve(yaml_file, trainer)
    yaml_file.write_text("# the same in other words\nkind: line\nsteps: 3\n", encoding="utf-8")
    assert resolve(yaml_file, trainer) == first
    yaml_file.write_text("steps: 4\n", encoding="utf-8")
    assert resolve(yaml_file, trainer) != first
    assert trainer.calls == 2


def test_a_directory_is_taken_as_it_is_and_a_run_directory_gives_its_target(
    directory: Path, tmp_path: Path
):
    assert resolve(directory) == directory
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("experiment: tms\n", encoding="utf-8")
    directory.rename(run / "target")
    assert resolve(run) == run / "target"


def test_relative_paths_mean_the_working_directory_then_the_given_folders(
    yaml_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = resolve("line.yaml", Trainer(), folders=[yaml_file.parent])
    (elsewhere / "line.yaml").write_text("steps: 77\n", encoding="utf-8")
    nearer = resolve("line.yaml", Trainer(), folders=[yaml_file.parent])
    assert read_target(found, LineConfig)[0].steps == 3
    assert read_target(nearer, LineConfig)[0].steps == 77


def test_the_log_says_what_happened_and_how_long_it_took(
    yaml_file: Path, directory: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    for target in (yaml_file, yaml_file, directory):
        resolve(target, Trainer())
    last_words = [r.getMessage() for r in caplog.records if r.getMessage().endswith(" s)")]
    assert [line.split(":")[1].split("/")[0].strip() for line in last_words] == [
        "trained from",
        "trained earlier from",
        "trained directory",
    ]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_interrupted_training_leaves_no_directory_and_can_be_repeated(
    error: BaseException, yaml_file: Path
):
    with pytest.raises(type(error)):
        resolve(yaml_file, Trainer(error=error))
    assert cached() == []
    assert resolve(yaml_file, Trainer()).is_dir()


@pytest.mark.parametrize(
    "error", [TargetError("lost"), RuntimeError("broken"), KeyboardInterrupt()]
)
def test_a_training_that_failed_leaves_nothing_at_all(error: BaseException, yaml_file: Path):
    with pytest.raises(type(error)):
        resolve(yaml_file, Trainer(error=error))
    assert list(settings.targets_root().iterdir()) == []


def test_what_a_killed_training_left_is_gone_when_it_is_repeated(yaml_file: Path):
    directory = resolve(yaml_file, Trainer())
    remains = directory.rename(directory.with_name(f".{directory.name}.4711.partial"))
    directory.with_name(f".{directory.name}.lock").touch()
    other = remains.with_name(".another-0123abcd.4711.partial")
    other.mkdir()
    assert resolve(yaml_file, Trainer()) == directory
    assert sorted(settings.targets_root().iterdir()) == sorted([other, directory])


def test_of_two_trainings_at_once_one_target_is_kept(yaml_file: Path):
    """As where the one had waited for a lock that is gone, while the other made a new one."""

    class Overtaken(Trainer):
        def __call__(self, config: BaseConfig, device: torch.device) -> TrainedTarget:
            for lock in settings.targets_root().glob(".*.lock"):
                lock.unlink()
            first.append(resolve(yaml_file, Trainer()))
            return super().__call__(config, device)

    first: list[Path] = []
    assert [resolve(yaml_file, Overtaken())] == first
    assert list(settings.targets_root().iterdir()) == first


def test_an_interrupted_saving_leaves_no_directory(tmp_path: Path):
    shared = torch.ones(2, 2)
    target = TrainedTarget({"a": shared, "b": shared.T}, RECORD)
    with pytest.raises(RuntimeError):
        save_target(tmp_path / "new" / "target", LineConfig(), target)
    assert list((tmp_path / "new").iterdir()) == []


def test_two_at_once_train_once():
    trainer = Trainer(seconds=0.3)
    found = []

    def use() -> None:
        found.append(cached_target("line", LineConfig(), trainer.kind, device=CPU))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trainer.calls == 1
    assert len({path for path, _ in found}) == 1
    assert sorted(trained for _, trained in found) == [False, True]
    assert [path.name for path in settings.targets_root().iterdir()] == cached()


@pytest.mark.parametrize("target", ["nowhere", "nowhere.yaml", "wrong/folder"])
def test_a_missing_target_is_named_with_what_is_allowed(target: str):
    with pytest.raises(UserError, match="wandb:entity/project/name") as caught:
        resolve(target)
    assert repr(target) in str(caught.value)
    assert str(Path(target).absolute()) in str(caught.value)


def test_a_malformed_wandb_reference_is_refused():
    with pytest.raises(UserError, match="wandb:entity/project"):
        resolve("wandb:somewhere")


def test_a_file_of_another_sort_is_refused(tmp_path: Path):
    path = tmp_path / "model.pt"
    path.touch()
    with pytest.raises(UserError, match="model.pt"):
        resolve(path)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_a_directory_that_lacks_a_file_is_refused(name: str, directory: Path):
    (directory / name).unlink()
    with pytest.raises(UserError, match=f"{directory}.*{name} is missing"):
        resolve(directory)


def test_a_target_of_another_kind_is_refused(directory: Path):
    (directory / "config.yaml").write_text("kind: plane\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{directory}.*'plane'.*'line'"):
        resolve(directory)


@pytest.mark.parametrize("damage", ["not safetensors", "cut off", "empty"])
def test_corrupt_weights_are_refused(damage: str, directory: Path):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"not safetensors": b"x" * 200, "cut off": whole[:-8], "empty": b""}[damage])
    with pytest.raises(UserError, match=f"{path}.*safetensors"):
        read_target(directory, LineConfig)


def test_a_damaged_configuration_is_refused(directory: Path):
    (directory / "config.yaml").write_text("kind: line\nstepz: 4\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{directory}.*stepz"):
        read_target(directory, LineConfig)


def test_a_training_yaml_with_mistakes_is_refused_before_anything_is_written(yaml_file: Path):
    yaml_file.write_text("steps: many\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{yaml_file}.*steps"):
        resolve(yaml_file)
    assert not settings.output_root().exists()


def test_an_output_root_that_cannot_be_written_is_named(
    yaml_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SPD_OUT_DIR", str(yaml_file / "below-a-file"))
    with pytest.raises(UserError, match=f"{yaml_file}.*SPD_OUT_DIR"):
        resolve(yaml_file)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"weight": WEIGHTS["weight"]}, "bias"),
        ({**WEIGHTS, "extra": torch.ones(1)}, "extra"),
        ({**WEIGHTS, "bias": torch.ones(9)}, r"9"),
    ],
)
def test_weights_of_another_model_are_refused(weights: dict[str, torch.Tensor], said: str):
    with pytest.raises(UserError, match=f"here.*does not fit.*{said}"):
        load_weights(torch.nn.Linear(3, 2), weights, Path("here"))
