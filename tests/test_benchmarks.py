"""The baseline of the benchmarks computes what the package computes; two checkouts are timed in turn."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import step_time
from benchmarks.against import compare
from benchmarks.cases import Case, load
from benchmarks.naive import Naive
from spd.config import RunError
from spd.engine.prepare import prepare

CASES = [
    Case("tms_5-2-id", ("batch_size=64",)),
    Case(
        "resid_mlp2",
        ("batch_size=16", "sites={layers.*.mlp_in: 6, layers.*.mlp_out: 4}"),
        ("model.n_features=10", "model.d_embed=8", "model.d_mlp=5"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.experiment)
def test_naive_and_package_agree(case: Case, tmp_path: Path):
    config, problem = load(
        case, tmp_path / "target", "n_eval_batches=1", "metrics={}", "figures={}"
    )
    target = copy.deepcopy(problem.target)
    objective = prepare(problem, config).objective
    parameters = objective.model.subcomponent_parameters()
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    naive = Naive(target, copies, config.losses, problem.tied_sites)
    assert naive.paths == list(objective.model.sites)

    batch = next(problem.train_batches)
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    total, _, _ = objective(batch, torch.tensor(0.0), noise)
    total.backward()
    terms = ("stochastic_recon", "stochastic_recon_layerwise")
    own = naive.total(
        batch, iter([noise[f"{term}.0.{path}"] for term in terms for path in naive.paths])
    )
    own.backward()

    torch.testing.assert_close(own, total)
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.any(), name
        torch.testing.assert_close(
            copies[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )


# --- two checkouts ---------------------------------------------------------------------------------

STUB = """
import json, sys
from pathlib import Path
settings = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
run_dir = Path(sys.argv[sys.argv.index("--run_dir") + 1])
run_dir.mkdir(parents=True)
n, every, pace = int(settings["steps"]), int(settings["log_every"]), {pace}
with open({log!r}, "a") as log:
    log.write(f"{name} {{n}} {{settings['compile']}}\\n")
with open(run_dir / "timings.jsonl", "w") as file:
    for step in range(0, n, every):
        seconds = 100.0 + step / pace + (50.0 if step == every else 0.0)  # one interval is disturbed
        file.write(json.dumps({{"step": step, "seconds": seconds}}) + "\\n")
"""
"""a checkout that pretends to make so many steps per second"""


def make_stub(folder: Path, name: str, pace: float) -> Path:
    module = folder / name / "spd" / "registry.py"
    module.parent.mkdir(parents=True)
    text = STUB.format(pace=pace, log=str(folder / "log"), name=name)
    module.write_text(text, encoding="utf-8")
    (module.parent / "__init__.py").write_text("")
    return folder / name


def test_two_checkouts_are_run_in_turn(tmp_path: Path):
    here, there = make_stub(tmp_path, "here", 50.0), make_stub(tmp_path, "there", 40.0)
    found = compare(Case("tms_5-2"), here, there, compiled=True, n_rounds=3, seconds=2.5)
    assert found.here == pytest.approx([50.0] * 3) and found.there == pytest.approx([40.0] * 3)
    assert found.ratios == pytest.approx([1.25] * 3)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["here 50 true", "there 50 true", *["here 100 true", "there 100 true"] * 3]


@pytest.mark.slow
def test_a_checkout_is_timed_by_its_own_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.against.SHORT_RUN", 4)
    there = make_stub(tmp_path, "there", 1e-6)
    arguments = ["tms_5-2", "--variants", "eager", "--blocks", "1", "--seconds", "0.01"]
    step_time.main([*arguments, "--against", str(there)])
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[:2] == ["`tms_5-2`", "eager"] and lines[-3].count("|") == 6
    own, other, ratio = (float(cell.split()[0]) for cell in cells[2:])
    assert own > 0 and other == pytest.approx(1e-6) and ratio == pytest.approx(own * 1e6, rel=0.02)
    assert (tmp_path / "log").read_text() == "there 4 false\n" * 2


def test_what_is_no_checkout_or_fails_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        step_time.main(["tms_5-2", "--against", str(tmp_path)])
    assert ended.value.code == 2 and "a checkout of this project" in capsys.readouterr().err
    broken = make_stub(tmp_path, "broken", 1.0)
    (broken / "spd" / "registry.py").write_text("raise SystemExit('no such luck')")
    with pytest.raises(RunError, match=r"broken: the run of tms_5-2 failed:\nno such luck"):
        compare(Case("tms_5-2"), broken, broken, compiled=False, n_rounds=1, seconds=1.0)
