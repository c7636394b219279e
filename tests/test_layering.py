"""What may import what, and that importing does nothing else."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from spd import settings

SPD = settings.PACKAGE_DIR

# A module imports only from lines above its own; those on one line do not know each other.
# Experiments stand below all of them, their shared modules above the folders; evals and sweeps come
# last, and do not know each other.
CORE = """
settings config components problem reassociation precision __init__
snapshot arguments resources distributed
compilation command provenance registry run_files schedule importance data checkpoint divergence
job component_model noise results tracking
slurm watch prefix
launch
losses activation_checkpointing silent_rows
metrics passes
drawing
figures
objective report
ensemble compiled_passes
prepared
optimize
reporting
execution
run
report_command pretrained redraw
"""
LAYERS = [line.split() for line in CORE.strip().splitlines()]
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line}
LAST = ("evals.", "sweeps.")
MAY_IMPORT = {
    "wandb": ("tracking",),
    "matplotlib": ("drawing", "figures", "experiments.", "sweeps.figures"),
    "submitit": ("slurm",),
    "optuna": ("sweeps.local_study",),
    "fire": ("arguments",),
    "rich": ("watch",),
    "transformers": ("experiments.lm.",),
    "datasets": ("experiments.lm.",),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SPD).with_suffix("").parts)


FILES = {module_name(path): path for path in sorted(SPD.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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


def test_every_module_of_the_core_has_its_layer():
    core = [name for name in FILES if not name.startswith(("experiments.", *LAST))]
    assert sorted(LEVEL) == sorted(core)


@pytest.mark.parametrize("name", LEVEL)
def test_the_core_imports_from_layers_below(name: str):
    for other in own_modules(FILES[name]):
        assert other in LEVEL, f"{name} imports {other}: the core knows no experiment"
        assert LEVEL[other] < LEVEL[name], f"{name} (layer {LEVEL[name]}) imports {other}"


def test_experiments_do_not_know_each_other():
    for name in FILES.keys() - LEVEL.keys():
        if name.startswith(LAST):
            continue
        folder = name.rpartition(".")[0]
        for other in own_modules(FILES[name]):
            other_folder = other.rpartition(".")[0]
            if other not in LEVEL and other_folder != "experiments":
                assert folder == other_folder, f"{name} imports {other}"


def test_evals_and_sweeps_come_last():
    """They know the core and what experiments share, but neither an experiment nor each other."""
    for name in FILES.keys() - LEVEL.keys():
        for other in own_modules(FILES[name]):
            if other.startswith(LAST):
                assert name.partition(".")[0] == other.partition(".")[0], f"{name} imports {other}"
            elif name.startswith(LAST) and other not in LEVEL:
                assert other.count(".") == 1, f"{name} imports {other}"


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


def test_names_of_experiments_are_known_without_heavy_imports():
    code = "import sys, spd.registry; print('torch' in sys.modules or 'matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SPD.parent
    )
    assert done.stdout.strip() == "False"
