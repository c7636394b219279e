"""The runs of `scripts/soak.py`: small ones of every kind, and in what two of them must not differ."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spd.run_files import is_run
from spd.settings import PACKAGE_DIR, REPO_DIR

COMPARED = ("metrics.jsonl", "config.yaml", "result.json", "report.html", "target", "checkpoints")

TMS_TARGET = """
kind: tms
model: {n_features: 5, n_hidden: 5}
n_seeds: 4
steps: 300
batch_size: 64
lr: 2e-2
"""
LM_TARGET = """
kind: lm
data: {source: text.txt, separator: "\\n\\n", eval_frac: 0.2, context_length: 16}
vocab_size: 300
model: {n_layers: 1, n_heads: 2, n_kv_heads: 1, d_model: 16, d_mlp: 32}
steps: 40
batch_size: 8
lr: 3e-3
"""
OFTEN = ("steps=300", "log_every=10", "eval_every=60", "save_every=40", "n_eval_batches=2")
TMS = (
    *("tms_5-2", "target=tms_target.yaml", *OFTEN, "batch_size=32", "eval_batch_size=32"),
    *("sites={linear1: 6, linear2: 6}", "data.feature_probability=0.5", "data.unlike_target=true"),
    *("tied_sites=[]", "metrics={pattern_errors: {}}", "figures={probe_importances: {}}"),
)
LM = (
    *(
        "pydoc_mlp",
        "target=lm_target.yaml",
        *OFTEN,
        "steps=120",
        "sites={model.layers.*.mlp.up_proj: 8}",
    ),
    *("batch_size=4", "eval_batch_size=4", "n_eval_batches=1"),
    *("metrics={cross_entropy: {}}", "figures={mean_activity: {}}"),
)


class Kind(NamedTuple):
    """A way to run an experiment."""

    name: str
    arguments: tuple[str, ...]
    """the experiment, and its overrides"""
    processes: int = 1
    seeds: tuple[int, ...] = ()

    @property
    def ranks(self) -> tuple[str, ...]:
        """The processes that can be struck."""
        return ("alone",) if self.processes == 1 else ("0", "1", "launcher")

    def begin(self) -> list[str]:
        """`spd-run` with the experiment, or torchrun with its script."""
        if self.processes == 1:
            return [sys.executable, "-m", "spd.registry", *self.arguments]
        script, config = self._files()
        return [*self._torchrun(), str(script), str(config), *self.arguments[1:]]

    def resume(self, run: Path) -> list[str]:
        if self.processes == 1:
            return [sys.executable, "-m", "spd.registry", "--resume", str(run)]
        return [*self._torchrun(), str(self._files()[0]), "--resume", str(run)]

    def _torchrun(self) -> list[str]:
        count = f"--nproc_per_node={self.processes}"
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", count]

    def _files(self) -> tuple[Path, Path]:
        folder = PACKAGE_DIR / "experiments" / "tms"
        return folder / "tms_decomposition.py", folder / f"{self.arguments[0]}_config.yaml"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain", (*TMS, "compile=false")),
        Kind("compiled", (*TMS, "compile=true")),
        Kind("side by side", (*TMS, "compile=false", "seeds=[0, 1]"), seeds=(0, 1)),
        Kind("two processes", (*TMS, "compile=false"), processes=2),
        Kind("language model", LM),
    )
}


def new_folder(root: Path, name: str) -> Path:
    folder = root / name.replace(" ", "-")
    folder.mkdir()
    (folder / "tms_target.yaml").write_text(TMS_TARGET, encoding="utf-8")
    (folder / "lm_target.yaml").write_text(LM_TARGET, encoding="utf-8")
    pages = (REPO_DIR / "docs" / name for name in ("running.md", "reliability.md"))
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def runs_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("out/*/*") if is_run(path))


def differences(folder: Path, other: Path) -> Iterator[str]:
    """In what the runs of one folder are not those of the other."""
    own, expected = runs_in(folder), runs_in(other)
    if len(own) != len(expected):
        yield f"{len(own)} runs instead of {len(expected)}"
        return
    for run, model in zip(own, expected, strict=True):
        files = {path.relative_to(model) for path in model.rglob("*") if path.is_file()}
        files = {path for path in files if path.parts[0] in COMPARED}
        last = max(path.parts[1] for path in files if path.parts[0] == "checkpoints")
        for path in sorted(files):
            if path.name == "digests.json" or (
                path.parts[0] == "checkpoints" and path.parts[1] != last
            ):
                continue
            if not (run / path).is_file():
                yield f"{run}: {path} is missing"
            elif path.name != "report.html" and content(run / path) != content(model / path):
                yield f"{run}: {path} differs from that of {model}"


def content(path: Path) -> Any:
    """Of a file what must not depend on who was killed: times do."""
    if path.suffix != ".json":
        return path.read_bytes()
    record = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in record.items() if key != "seconds"}
