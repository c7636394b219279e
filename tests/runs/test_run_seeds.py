"""`seeds: […]` from the command line: ordinary runs, made by one process."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from spd.reports.report import write_report
from spd.reports.results import read_result
from spd.reports.seeds import write_seeds_page
from spd.runs.run import load_run
from tests.run_fixtures import (
    TMS_CONFIG,
    TMS_SCRIPT,
    Command,
    Stop,
    command_fixture,
    finished_run,
    listing,
    log_lines,
    sign_again,
    target_fixture,
)
from tests.runs.test_wandb import OFFLINE, history

__all__ = ["command_fixture", "target_fixture"]

SEEDS = (0, 3)
METRICS = "metrics={pattern_errors: {}}"


def members(command: Command) -> list[Path]:
    found = sorted(command.out.glob("tms_5-2/*-seed*"))
    assert [path.name.rpartition("-seed")[2] for path in found] == [str(seed) for seed in SEEDS]
    return found


def side_by_side(command: Command, *args: str, **options):
    return command.tms("seeds=[0, 3]", METRICS, *args, **options)


@pytest.fixture(scope="module", name="singles")
def singles_fixture(tmp_path_factory: pytest.TempPathFactory, tms_target: Path) -> dict[int, Path]:
    """The run of each seed alone."""
    found = {}
    for seed in SEEDS:
        command = Command(tmp_path_factory.mktemp(f"seed{seed}"), tms_target)
        finished_run(command, f"seed={seed}", METRICS)
        found[seed] = command.only_run()
    return found


def files(run: Path) -> set[str]:
    """All but the last checkpoint but one, whose step depends on where the run was stopped."""
    return {name for name in listing(run) if not name.startswith("checkpoints/")} | {
        str(path.relative_to(run)) for path in run.glob("checkpoints/00000006/*")
    }


def assert_are_single_runs(command: Command, singles: dict[int, Path]) -> None:
    for run, (seed, single) in zip(members(command), singles.items(), strict=True):
        assert files(run) == files(single)
        assert (run / "config.yaml").read_bytes() == (single / "config.yaml").read_bytes()
        assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == seed
        for values, own in zip(log_lines(run), log_lines(single), strict=True):
            assert values == pytest.approx(own, rel=1e-5, abs=1e-6)
        weights, own = (
            load_file(path / "checkpoints/00000006/model.safetensors") for path in (run, single)
        )
        for name, value in own.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
        results, own_results = (json.loads((p / "result.json").read_text()) for p in (run, single))
        assert results["seed"] == seed and results["solved"] == own_results["solved"]
        meta = json.loads((run / "meta.json").read_text())
        assert meta["status"] == "finished"
        assert load_run(run).step == 6


@pytest.mark.slow
def test_each_seed_is_an_ordinary_run(command: Command, singles: dict[int, Path]):
    done = side_by_side(command)
    assert done.status == 0, done.err
    assert_are_single_runs(command, singles)
    runs = members(command)
    head, *rows = done.out.splitlines()
    columns = head.split()
    assert columns[:3] == ["run", "seed", "steps"] and columns[-3:] == ["errors", "total", "solved"]
    for run, row, seed in zip(runs, rows, SEEDS, strict=False):
        assert re.match(rf"tms_5-2/{run.name} +{seed} +6 .* \d+ +–$", row)
    assert rows[2:] == ["reports:", *(f"  {run}/report.html" for run in runs)]
    assert "seed 0, first of 2: step 6/6" in done.err and done.err.count("step 6/6") == 1


@pytest.mark.slow
def test_a_single_run_goes_on_from_a_members_checkpoint(command: Command, singles: dict[int, Path]):
    assert side_by_side(command, stop=Stop(signal.SIGKILL, "*seed3*.00000006.partial")).status == -9
    first, second = members(command)
    assert command.resume(second).status == 0
    assert command.resume(first).status == 0
    assert_are_single_runs(command, singles)


PLACES = {
    "before any": "open */x-seed0/metrics.jsonl",
    "between the first checkpoints": "open *x-seed3/checkpoints/.00000002.partial/*",
    "between later checkpoints": "os.rename *x-seed3/checkpoints/.00000004.partial",
    "between the directories": "os.rename *.x-seed3.partial",
    "between the results": "os.rename *x-seed0/.result.json.partial",
}


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(
            event, id=name, marks=() if name == "between later checkpoints" else pytest.mark.slow
        )
        for name, event in PLACES.items()
    ],
)
def test_killed_and_begun_again(command: Command, singles: dict[int, Path], event: str):
    """Runs whose checkpoints are of different steps go on one after the other."""
    place = ("--run_dir", str(command.out / "tms_5-2" / "x"))
    assert side_by_side(command, *place, stop=Stop(signal.SIGKILL, event)).status == -9
    done = side_by_side(command, *place)
    assert done.status == 0, done.err
    assert_are_single_runs(command, singles)


@pytest.mark.parametrize(
    ("signum", "status"),
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)],
    ids=["TERM", "INT"],
)
def test_a_signal_has_all_write_their_checkpoints(
    command: Command, singles: dict[int, Path], signum: int, status: int
):
    done = side_by_side(command, stop=Stop(signum, "open *seed0/*.00000004.partial"))
    assert done.status == status and "Traceback" not in done.err
    base = str(members(command)[0]).removesuffix("-seed0")
    how = f"continue with --run_dir {base} and the same configuration\n"
    assert done.err.endswith(f"stopped before step 5 of 6; {how}")
    for run in members(command):
        assert (run / "checkpoints/00000005").is_dir() and not (run / "result.json").exists()
        assert json.loads((run / "meta.json").read_text())["status"] == "interrupted"
    assert side_by_side(command, "--run_dir", base).status == 0
    assert_are_single_runs(command, singles)


def test_one_that_fails_does_not_stop_the_others(command: Command, singles: dict[int, Path]):
    base = command.out / "tms_5-2" / "x"
    stop = Stop(signal.SIGTERM, "open *seed3/*.00000002.partial")
    assert side_by_side(command, "--run_dir", str(base), stop=stop).status == 143
    good, bad = members(command)
    file = sorted(bad.glob("checkpoints/*"))[-1] / "model.safetensors"
    weights = load_file(file)
    weights["linear1.subcomponents.V"].fill_(torch.nan)
    save_file(weights, file, {"step": str(int(file.parent.name))})
    sign_again(file.parent)
    done = side_by_side(command, "--run_dir", str(base))
    assert done.status == 1 and "Traceback" not in done.err
    assert "error: 1 of 2 runs failed\n  x-seed3: step 3: loss/" in done.err
    assert [line.split()[:2] for line in done.out.splitlines()[1:2]] == [["tms_5-2/x-seed0", "0"]]
    assert "x-seed3" not in done.out
    for run, status in ((good, "finished"), (bad, "failed")):
        assert json.loads((run / "meta.json").read_text())["status"] == status
        assert (run / "result.json").exists() == (status == "finished")
    shutil.rmtree(bad)  # as if it had never been begun
    assert side_by_side(command, "--run_dir", str(base)).status == 0
    assert_are_single_runs(command, singles)


def test_all_that_fail_are_named(command: Command):
    done = side_by_side(command, "lr=1e30")
    assert done.status == 1 and not done.out and "Traceback" not in done.err
    assert "error: 2 of 2 runs failed\n" in done.err
    assert re.search(r"seed0: step .*\n  .*seed3: step ", done.err)


@pytest.mark.slow
def test_each_has_a_run_of_its_own_on_wandb(command: Command):
    done = side_by_side(command, env=OFFLINE)
    assert done.status == 0, done.err
    for run in members(command):
        rows = [row for row in history(run) if row != {"step": 6}]  # that of no figures
        assert rows == log_lines(run)


MISTAKES = {
    "seeds=[0, 0]": "seeds: 0 is named twice",
    "seeds=[-1]": "seeds.0: input should be greater than or equal to 0",
    "passes=one_by_one": "seeds: runs side by side are one graph",
}


@pytest.mark.parametrize(("override", "said"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_said_before_anything_is_written(command: Command, override: str, said: str):
    done = side_by_side(command, override)
    assert done.status == 2 and said in done.err
    assert not command.out.exists()


def test_another_configuration_does_not_go_on(command: Command):
    base = ("--run_dir", str(command.out / "tms_5-2" / "x"))
    assert side_by_side(command, *base).status == 0
    done = side_by_side(command, *base, "lr=1e-4")
    assert done.status == 2 and "lr is 0.0001 here, but 0.001 in the run's config.yaml" in done.err
    done = command.run(TMS_SCRIPT, TMS_CONFIG, "seeds=[0]", "--resume", members(command)[0])
    assert done.status == 2 and "seeds is [0] here, but [] in the run's" in done.err


def test_a_page_shows_the_seeds_side_by_side_and_each_report_leads_to_the_others(command: Command):
    base = command.out / "tms_5-2" / "x"
    assert side_by_side(command, "--run_dir", str(base)).status == 0
    first, second = members(command)
    page = (base.parent / "x.seeds.html").read_text(encoding="utf-8")
    for run in (first, second):
        assert f'<a href="{run.name}/report.html">{run.name}</a>' in page
        found = read_result(run / "result.json")
        (row,) = (row for row in found.rows if row.key == "loss/total")
        assert f'<td class="number">{found.own(row)}</td>' in page
    report = (first / "report.html").read_text(encoding="utf-8")
    assert "with other seeds" in report
    assert '<a href="../x.seeds.html">all of them</a>' in report
    assert f'<a href="../{second.name}/report.html">{second.name}</a>' in report
    assert f"../{first.name}/report.html" not in report
    shutil.rmtree(second)
    write_report(first)
    assert "with other seeds" not in (first / "report.html").read_text(encoding="utf-8")


def test_runs_that_were_stopped_have_their_page_too(command: Command):
    base = command.out / "tms_5-2" / "x"
    stop = Stop(signal.SIGTERM, "open *seed3/*.00000002.partial")
    assert side_by_side(command, "--run_dir", str(base), stop=stop).status == 143
    first, second = members(command)
    page = base.with_name("x.seeds.html")
    for run in (first, second):
        assert run.name in page.read_text(encoding="utf-8")
    write_report(first)
    report = (first / "report.html").read_text(encoding="utf-8")
    assert '<a href="../x.seeds.html">all of them</a>' in report
    page.unlink()
    write_report(first)
    report = (first / "report.html").read_text(encoding="utf-8")
    assert second.name in report and "x.seeds.html" not in report


def test_the_page_names_a_run_that_failed_first(command: Command):
    base = command.out / "tms_5-2" / "x"
    assert side_by_side(command, "--run_dir", str(base)).status == 0
    runs = members(command)
    shutil.rmtree(runs[1])
    page = write_seeds_page(base, runs, {runs[1]: "step 3: loss/total = nan"})
    text = page.read_text(encoding="utf-8")
    assert text.index(f"<li>{runs[1].name}: step 3: loss/total = nan</li>") < text.index("<table>")
    assert '<td class="number">–</td>' in text
