"""What may import what, and that importing does nothing else."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import spd
from spd import settings

SPD = settings.PACKAGE_DIR

# The floors, from the ground up, are those that docs/architecture.md shows. A room is a file of `spd/` or
# a folder of it. It imports only from floors below its own: those on one floor do not know each other.
ARCHITECTURE = SPD.parent / "docs" / "architecture.md"
FLOORS = [
    line.split()
    for line in re.findall(
        r"```floors\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.DOTALL
    )[0].splitlines()
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MAY_IMPORT = {
    "wandb": ("runs.wandb_run", "sweeps.wandb_backend"),
    "matplotlib": ("reports.", "experiments.", "sweeps.figures"),
    "submitit": ("launch.slurm",),
    "optuna": ("sweeps.optuna_backend", "sweeps.journal"),
    "fire": ("launch.arguments",),
    "rich": ("launch.watch",),
    "transformers": ("experiments.lm.",),
    "datasets": ("experiments.lm.",),
}


def module_name(path: Path) -> str:
    """Of a package the name of its folder."""
    name = ".".join(path.relative_to(SPD).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(SPD.rglob("*.py"))}


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full names of everything a file imports, also inside functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def own_modules(path: Path) -> Iterator[str]:
    """Those of the package, by the names that they have in `LAYERS`."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "spd":
            continue
        candidates = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        known = [candidate for candidate in candidates if candidate in FILES]
        assert known, f"{path}: {name} is no module of the package"
        yield known[0]


def room_of(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_stands_on_one_floor():
    rooms = {room_of(name) for name in FILES} - {"__init__"}
    assert sorted(room for floor in FLOORS for room in floor) == sorted(rooms)
    assert len(FLOORS) <= 12


def test_the_ground_floor_of_the_package_has_few_files():
    assert len(list(SPD.glob("*.py"))) <= 18


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str):
    room = room_of(name)
    for other in own_modules(FILES[name]):
        below = room_of(other)
        if name != "__init__" and below != room:
            assert FLOOR[below] < FLOOR[room], f"{name} (floor {FLOOR[room]}) imports {other}"


def test_experiments_do_not_know_each_other():
    for name in FILES:
        if not name.startswith("experiments."):
            continue
        folder = name.split(".")[1]
        for other in own_modules(FILES[name]):
            if other.startswith("experiments.") and other.count(".") > 1:
                assert other.split(".")[1] == folder, f"{name} imports {other}"


def test_no_module_imports_itself_in_a_roundabout_way():
    TopologicalSorter({name: set(own_modules(path)) for name, path in FILES.items()}).prepare()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_heavy_packages_are_imported_where_they_belong(package: str):
    for name, path in FILES.items():
        found = any(full.split(".")[0] == package for full in imports(path))
        allowed = any(
            name == p or (p[-1] == "." and name.startswith(p)) for p in MAY_IMPORT[package]
        )
        assert allowed or not found, f"{name} imports {package}"


SIDE_EFFECTS = """
import importlib, json, logging, os, random, sys, threading
import numpy, torch, matplotlib.figure

def state():
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "python generator": str(random.getstate()),
        "numpy generator": str(numpy.random.get_state()),
        "torch generator": torch.get_rng_state().tolist(),
        "torch threads": torch.get_num_threads(),
        "torch default type": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "log handlers": [str(logging.getLogger(name).handlers) for name in (None, "spd")],
        "log levels": [logging.getLogger(name).level for name in (None, "spd")],
        "threads": threading.active_count(),
        "import path": sys.path[:],
        "matplotlib settings": str(matplotlib.rcParams),
        "hook": str(sys.excepthook),
    }

def others():
    return {name for name in sys.modules if name.split(".")[0] in ("wandb", "transformers", "datasets")}

before, loaded = state(), []
changed = {}
for name in json.loads(sys.argv[1]):
    if name.startswith("spd.experiments.lm.") and "datasets" not in sys.modules:
        import datasets, transformers

        transformers.PreTrainedModel  # imports the rest; its effects are not ours
        before = state()
    had = others()
    importlib.import_module(name)
    if not name.startswith("spd.experiments.lm."):
        loaded += sorted(others() - had)
    after = state()
    if after != before:
        changed[name] = [key for key in after if after[key] != before[key]]
        before = after
print(json.dumps({"changed": changed, "loaded": loaded}))
"""


@pytest.mark.slow
def test_importing_has_no_effects(tmp_path: Path):
    names = ["spd" + f".{name}".removesuffix(".__init__") for name in FILES if name != "__init__"]
    names.sort(key=lambda name: name.startswith("spd.experiments.lm."))  # last: they may load more
    done = subprocess.run(
        [sys.executable, "-c", SIDE_EFFECTS, json.dumps(names)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"changed": {}, "loaded": []}
    assert done.stderr == ""
    assert not list(tmp_path.iterdir()), "nothing is written"


HEAVY = ("matplotlib", "scipy.optimize", "wandb", "transformers", "datasets")


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("spd", ("torch", *HEAVY)),
        ("spd.registry", ("torch", *HEAVY)),
        ("spd.optimize", HEAVY),
        ("spd.evals.summary", ("torch", *HEAVY[1:])),
        ("spd.sweeps.page", ("torch", *HEAVY[1:])),
    ],
)
def test_what_importing_does_not_load(module: str, without: tuple[str, ...]):
    code = f"import sys, {module}; print([name for name in {without} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SPD.parent
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_type_checkers_see_the_public_names():
    stub = ast.parse((SPD / "__init__.pyi").read_text(encoding="utf-8"))
    seen = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert len(seen) == len(stub.body), "nothing but imports"
    names = sorted(alias.asname or "" for node in seen for alias in node.names)
    assert names == sorted(vars(spd)["__all__"])
    for node in seen:
        for alias in node.names:
            assert alias.name == alias.asname and alias.name in dir(spd)
            assert getattr(spd, alias.name) is getattr(
                importlib.import_module(str(node.module)), alias.name
            )


def test_a_name_that_is_not_public_is_an_error():
    with pytest.raises(AttributeError, match="module 'spd' has no attribute 'decomposed'"):
        spd.decomposed  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_what_a_batch_holds_is_asked_in_one_place():
    """A dtype tells no language model from a toy, and no axis from another: problem and site say it."""
    asking = {
        name
        for name, path in FILES.items()
        if re.search(r"batch\w*(\[0\])?\.is_floating_point|tokens\.is_f", path.read_text("utf-8"))
    }
    assert asking == {"problem"}, f"{asking - {'problem'}} may call spd.problem.of_ids"
