"""Pages of runs that were stopped, failed or cut short, and the command that writes them anew."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from spd.engine.prepare import evaluate
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.reports.report import write_report
from spd.reports.results import Result, format_result
from spd.runs.cli import redraw, report
from spd.runs.run import load_run, start
from tests.made_up_run import METRICS, make_run, result
from tests.run_fixtures import (
    QUICK,
    TMS_CONFIG,
    Command,
    Stop,
    command_fixture,
    finished_run,
    target_fixture,
)

__all__ = ["command_fixture", "target_fixture"]

pytestmark = pytest.mark.undrawn

OWN = ("metrics={sparsity: {}}", "figures={mean_activity: {}}", "eval_every=3", "figures_every=3")


def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_of_a_stopped_run_shows_one_checkpoint(command: Command):
    """It was evaluated and drawn at step 3, logged until step 5; its newest checkpoint is of step 4."""
    command.tms(*OWN, stop=Stop(signal.SIGKILL, "open *.00000006.partial"))
    run = command.only_run()
    report([str(run), "--device", "cpu"])
    text = page(run)
    assert "at step 4 of 6" in text
    assert "All of this page shows the checkpoint of step 4." in text
    assert "The run had come to step 5." in text
    loaded = load_run(run)
    expected = evaluate(loaded.prepared)
    found = json.loads((run / "evaluation.json").read_text())
    assert found == {"step": 4, **expected}
    l0 = expected["eval/l0/linear1"]
    assert re.search(rf"<code>linear1</code></th><td>6</td><td>{l0:.3f}</td>", text)
    drawn = {path.name for path in (run / "figures/mean_activity").glob("*.png")}
    assert drawn == {"00000000.png", "00000003.png", "00000004.png"}
    assert text.count("data:image/png") == 2, "the figure of step 4, and the curves"

    before = (run / "metrics.jsonl").read_bytes()
    assert b'"step": 5' in before, "the log is as it was"
    assert command.resume(run).status == 0
    assert not (run / "evaluation.json").exists() and "checkpoint of step" not in page(run)


def stopped_at_4(command: Command) -> Path:
    """A finished run of 4 steps, its files as if it had been stopped after it had logged step 5."""
    finished_run(command, "steps=4", *OWN)
    run = command.only_run()
    (run / "result.json").unlink()
    meta = json.loads((run / "meta.json").read_text())
    (run / "meta.json").write_text(json.dumps({**meta, "status": "interrupted"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss/total": 9.0, "eval/loss/total": 9.0}) + "\n")
    return run


def test_figures_that_are_drawn_anew_end_where_the_checkpoint_is(command: Command):
    run = stopped_at_4(command)
    redraw(load_run(run, verify=False))
    assert "All of this page shows the checkpoint of step 4." in page(run)
    with (run / "figures/loss_curves/00000004.csv").open() as file:
        steps = {float(row["x"]) for row in csv.DictReader(file)}
    assert max(steps) == 4


def test_an_analysis_of_another_checkpoint_says_of_which(command: Command):
    run = stopped_at_4(command)
    redraw(load_run(run, verify=False))
    site = {"C": 6, "alive": 5, "l0": 1.5, "mean_g": 2.0}
    told = {"n_positions": 8, "n_batches": 1, "threshold": 0.1, "sites": {"linear1": site}}
    (run / "analysis/importances").mkdir(parents=True)
    for made in (4, 3):
        about = {"about": {"checkpoint": made}}
        (run / "analysis/importances/importances.json").write_text(json.dumps({**told, **about}))
        write_report(run)
        said = "Made at the checkpoint of step 3, while this page shows step 4."
        assert (said in page(run)) == (made == 3)


def test_the_command_passes_over_what_is_no_run(
    command: Command, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    finished_run(command)
    run = command.only_run()
    begun = Path(shutil.copytree(run, run.with_name("begun")))
    shutil.rmtree(begun / "checkpoints")
    others = [command.out / "targets" / name for name in ("a", "b")]
    for other in others:
        other.mkdir(parents=True)
    (run / "report.html").unlink()
    report([*map(str, others), str(run), str(begun)])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    said = [line for line in caplog.messages if "passed over" in line]
    assert said == [
        f"report: passed over, as they hold no run: 2 ({others[0]}, {others[1]})",
        f"report: passed over, as they hold a run without a checkpoint: 1 ({begun})",
    ]
    for none, words in ((others, "a run directory is expected"), ([begun], "no checkpoint yet")):
        with pytest.raises(SystemExit) as stopped:
            report(list(map(str, none)))
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_the_reason_of_a_failure_stands_at_the_top(command: Command):
    done = command.tms("lr=1e30", "steps=60", "save_every=2", "log_every=10")
    assert done.status == 1
    run = command.only_run()
    reason = json.loads((run / "meta.json").read_text())["reason"]
    assert reason.startswith("step ") and reason in done.err
    write_report(run)
    text = page(run)
    assert text.index(f'<p class="reason">{reason}') < text.rindex("Failed at step")


def test_another_failure_is_kept_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from spd.config import load_config
    from spd.runs import execution
    from tests.run_fixtures import make_tms_target

    def fails(*_: object) -> None:
        raise KeyError("a mistake of the code")

    monkeypatch.setattr(execution, "_finish", fails)
    target = make_tms_target(tmp_path / "target")
    config = load_config(TMSConfig, TMS_CONFIG, [*QUICK, f"target={target}", "steps=2"])
    with pytest.raises(KeyError, match="a mistake of the code"):
        start(config, build, directory=tmp_path / "run")
    meta = json.loads((tmp_path / "run/meta.json").read_text())
    assert meta["status"] == "failed"
    assert meta["reason"] == "KeyError: 'a mistake of the code'"


def test_a_run_that_was_cut_short_says_so_beside_its_verdict(tmp_path: Path):
    config = "experiment: tms_5-2\nseed: 3\nsteps: 5\n"
    run = make_run(tmp_path, **{"config.yaml": config})
    write_report(run, METRICS)
    said = "Cut short: 5 steps, where tms_5-2 has 40,000."
    verdict = page(run).partition('aria-label="Verdict"')[2].partition("</section>")[0]
    assert said in verdict
    whole = make_run(tmp_path / "whole")
    write_report(whole, METRICS)
    assert "Cut short" not in page(whole)
    raw = result(solved=False, errors=1)
    assert format_result(Result.model_validate({**raw, "steps": 5})).endswith(f"  {said}")
    assert "Cut short" not in format_result(Result.model_validate({**raw, "experiment": "mine"}))
