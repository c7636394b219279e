"""Labels by a language model: what it is asked, what its answers are worth, and where they are kept."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from spd.analysis import labels as command
from spd.analysis.contexts import OUTSIDE
from spd.analysis.harvest import Gathered, Harvest
from spd.analysis.judge import Judge
from spd.analysis.label_prompts import label_prompt, read_label, read_numbers
from spd.analysis.label_scores import (
    Rates,
    Trial,
    detection_score,
    fuzzing_score,
    intruder_score,
    probability_by_chance,
    rates,
    trials_of,
)
from spd.analysis.label_windows import _window, windows_of
from spd.analysis.labels import FOLDER, LABELS, PROMPTS, Labelling, read_answers
from spd.analysis.observation import observe
from spd.config import Unreachable, UserError
from spd.experiments.lm.problem import LMProblem, TokenReader
from spd.experiments.tms.tms_decomposition import build
from spd.reports.report import write_report
from spd.runs.run import start
from tests.experiments.lm.test_lm_report import byte_level
from tests.little_lm import RandomBatches, decomposed, little_model
from tests.made_up_run import make_run
from tests.runs.little_run import little_config, status_of

pytestmark = pytest.mark.undrawn

SITES = {"model.embed_tokens": 5, "model.layers.1.mlp.down_proj": 4}


@pytest.fixture(scope="module", name="gathered")
def gathered_fixture() -> Gathered:
    """Of a random model on text, 48 sequences."""
    model = decomposed(little_model("llama"), SITES)
    harvest = Harvest({path: site.C for path, site in model.sites.items()}, "tokens", 0)
    for seed in range(12):
        harvest.update(observe(model, None, next(RandomBatches(seed))))
    return harvest.compute()


def text(token: int) -> str:
    return f" t{token}"


def test_a_window_shows_a_character_of_several_tokens_whole(gathered: Gathered):
    tokenizer = byte_level([])
    ids = torch.tensor(tokenizer("ab”c")["input_ids"])  # a b, three bytes, c
    kept, left = gathered.statistics.contexts, gathered.statistics.left
    kept = kept._replace(**{name: getattr(kept, name).clone() for name in kept._fields})
    begin = left - 3  # the middle token is the second byte
    kept.tokens[0, 0] = OUTSIDE
    kept.tokens[0, 0, begin : begin + 6] = ids
    kept.importances[0, 0, begin : begin + 6] = torch.tensor([0.0, 0.2, 0.4, 1.0, 0.6, 0.0])
    kept.activations[0, 0, begin : begin + 6] = torch.arange(6.0)
    window = _window(gathered, kept, 0, 0, TokenReader(tokenizer))
    assert window.pieces == ["a", "b", "”", "c"] and window.middle == 2
    assert window.importances == pytest.approx([0.0, 0.2, 1.0, 0.0])
    assert window.activations == [0.0, 1.0, 3.0, 5.0]
    assert window.marked([window.middle]) == "ab[[”]]c"


# --- scores --------------------------------------------------------------------------------------


def test_detection_is_the_mean_over_trials():
    assert detection_score([Rates(4, 5, 3, 5), Rates(5, 5, 5, 5)]) == pytest.approx(0.85)


def test_fuzzing_pools_the_counts_of_all_trials():
    trials = [Rates(3, 5, 5, 5), Rates(1, 1, 0, 1)]
    assert fuzzing_score(trials) == pytest.approx(0.75)
    assert detection_score(trials) == pytest.approx(0.65)


def test_intruders():
    found = [Rates(1, 1, 4, 4)] * 7 + [Rates(0, 1, 3, 4)] * 2 + [Rates(1, 1, 0, 4)]
    assert intruder_score(found) == pytest.approx(0.7)
    assert probability_by_chance(7, 10, 0.2) == pytest.approx(8.6e-4, abs=5e-6)


def test_rates_of_a_trial():
    trial = Trial(["a", "b", "c", "d", "e"], [2, 4])
    assert rates(trial, [2, 3]) == (1, 2, 2, 3)
    assert rates(trial, [1, 2, 3, 4, 5]) == (2, 2, 0, 3)


# --- windows and prompts -------------------------------------------------------------------------


def test_the_windows_of_label_and_scores_are_of_different_sequences(gathered: Gathered):
    alive = gathered.statistics.n_active.nonzero().flatten().tolist()
    assert len(alive) > 3
    rows, n_intruders = gathered.memberships.rows(), 0
    assert len(rows) == gathered.statistics.n_positions, "all were kept"
    for c in alive:
        found = windows_of(gathered, c, text, rows)
        of_label = {window.sequence for window in found.label}
        of_scores = {window.sequence for window in found.scores}
        assert of_label and not of_label & of_scores
        n_intruders += len(found.intruders)
        assert not {window.sequence for window in found.intruders} & of_label
        for window in found.intruders:
            assert not gathered.memberships.on_at(rows[window.sequence, window.position], c)
        for window in (*found.label, *found.scores):
            assert window.importances[window.middle] > 0.1
            assert window.middle in window.firing()
            assert gathered.memberships.on_at(rows[window.sequence, window.position], c)
    assert n_intruders > len(alive)


def test_marks_of_detection_are_in_the_middle_of_both_kinds_and_of_fuzzing_as_many(
    gathered: Gathered,
):
    (c, *_) = gathered.statistics.n_active.argsort(descending=True).tolist()
    windows = windows_of(gathered, c, text, gathered.memberships.rows())
    (first, *_) = trials = trials_of("fuzzing", windows, "a:0")
    assert len(trials) == 3 and trials == trials_of("fuzzing", windows, "a:0")
    marks = {window.marked(window.firing()) for window in windows.scores}
    for number, shown in enumerate(first.texts, start=1):
        assert shown.count("[[") >= 1
        assert (shown in marks) == (number in first.right)
    plain = {window.marked([]): len(window.firing()) for window in windows.scores}
    for shown in first.texts:
        assert shown.count("[[") == plain[shown.replace("[[", "").replace("]]", "")]
    for trial in trials_of("detection", windows, "a:0"):
        assert all(shown.count("[[") == 1 for shown in trial.texts)


def test_the_prompt_says_what_a_subcomponent_is_and_shows_its_numbers(gathered: Gathered):
    c = int(gathered.statistics.n_active.argmax())
    path, _, number = gathered.names[c].rpartition(":")
    windows = windows_of(gathered, c, text, gathered.memberships.rows())
    prompt = label_prompt(gathered, c, windows.label, text)
    n, of = int(gathered.statistics.n_active[c]), gathered.statistics.n_positions
    for said in (
        "rank-one",
        f"subcomponent {number} of the matrix {path}",
        f"{n:,} of {of:,} positions",
        "by share of firings",
        "by PMI, bits",
        "Next tokens",
        "at most 8 words",
        "sign is arbitrary",
    ):
        assert said in prompt, said
    window = windows.label[0]
    g, a = window.importances[window.middle], window.activations[window.middle]
    assert f"[[{window.pieces[window.middle]}]](g {g:.2f}, a {a:+.2f})" in prompt


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('{"label": "commas", "reasoning": "because"}', "commas"),
        ('Sure!\n```json\n{"label": " two  words "}\n```', "two words"),
        ("{} [1] {'label'", None),
        ('{"label": 3}', None),
        ("commas", None),
    ],
)
def test_reading_labels(answer: str, label: str | None):
    found = read_label(answer)
    assert (found and found.label) == label


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ('{"numbers": [3, 1, 3]}', [1, 3]),
        ("these: [2]", [2]),
        ('{"numbers": []}', []),
        ('{"numbers": [0]}', None),
        ('{"numbers": [6]}', None),
        ('{"numbers": [true]}', None),
        ("all", None),
    ],
)
def test_reading_numbers(answer: str, numbers: list[int] | None):
    assert read_numbers(answer, 5) == numbers


# --- judges --------------------------------------------------------------------------------------


def all_of(prompt: str) -> str:
    """A judge that always says: all."""
    if '"numbers"' not in prompt:
        return json.dumps({"label": "everything", "reasoning": "it is all the same"})
    numbered = [line.partition(". ")[0] for line in prompt.splitlines() if ". " in line]
    return json.dumps({"numbers": [int(n) for n in numbered if n.isdigit()]})


def answered(labelling: Labelling, judge: Callable[[str], str]) -> dict[str, str]:
    answers: dict[str, str] = {}
    for _ in range(2):
        answers |= {key: judge(prompt) for key, prompt in labelling.open_prompts(answers).items()}
    return answers


def test_a_judge_that_always_says_all_scores_one_half(gathered: Gathered):
    labelling = Labelling(gathered, text, kinds=("detection", "fuzzing", "intruder"))
    answers = answered(labelling, all_of)
    assert not labelling.open_prompts(answers)
    results = labelling.results(answers)
    assert len(results) == len(labelling.columns) > 3
    scores = [own.scores for own in results.values()]
    for kind in ("detection", "fuzzing"):
        values = [own[kind] for own in scores if own[kind] is not None]
        assert values and values == [0.5] * len(values)
    assert {own["intruder"] for own in scores} <= {0.0, None}


def test_a_judge_that_knows_scores_one(gathered: Gathered):
    labelling = Labelling(gathered, text)
    right = {}
    answers = answered(labelling, all_of)
    for c in labelling.columns:
        label = labelling.label_of(c, answers)
        assert label is not None
        for _, trial, key, _ in labelling.score_prompts(c, label):
            right[key] = json.dumps({"numbers": trial.right})
    for own in labelling.results(answers | right).values():
        assert {score for score in own.scores.values() if score is not None} == {1.0}


def test_with_one_answer_missing_or_wrong_a_score_is_left_out_and_the_prompt_stays_open(
    gathered: Gathered,
):
    labelling = Labelling(gathered, text)
    answers = answered(labelling, all_of)
    (key, *_) = [key for key in answers if key.startswith("detection/")]
    name = key.split("/")[1]
    for broken in ({**answers, key: "I can't say"}, {k: a for k, a in answers.items() if k != key}):
        scores = labelling.results(broken)[name].scores
        assert scores["detection"] is None and scores["fuzzing"] == 0.5
        assert list(labelling.open_prompts(broken)) == [key]


def test_an_answer_to_another_prompt_is_not_taken(gathered: Gathered):
    labelling = Labelling(gathered, text)
    answers = answered(labelling, all_of)
    other = Labelling(gathered, lambda token: f" u{token}")
    assert other.results(answers) == {}


@contextmanager
def server(judge: Callable[[str], str], statuses: list[int]) -> Iterator[tuple[str, list[Any]]]:
    """An address that answers as a judge; what it was sent. First it fails with `statuses`."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            status = statuses.pop() if statuses else 200
            answer = judge(body["messages"][0]["content"])
            content = {"choices": [{"message": {"content": answer}}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/v1", seen
        made.shutdown()
        thread.join()


def test_an_address_is_asked_again_and_given_the_key_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("MY_KEY", "abc")
    with server(all_of, [503, 429]) as (url, seen):
        judge = Judge(url, "a-model", "MY_KEY", wait=0.0)
        assert read_label(judge.ask("hello")) is not None
        assert len(seen) == 3
        path, key, body = seen[-1]
        assert path == "/v1/chat/completions" and key == "Bearer abc"
        assert body["model"] == "a-model" and body["messages"][0]["content"] == "hello"
        monkeypatch.delenv("MY_KEY")
        judge.ask("hello")
        assert seen[-1][1] is None
    with server(all_of, [401]) as (url, _), pytest.raises(UserError, match="status 401"):
        Judge(url, "a-model", wait=0.0).ask("hello")
    with pytest.raises(Unreachable, match="no answer after 4 tries"):
        Judge(url, "a-model", wait=0.0).ask("hello")


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    return start(little_config(folder), build, directory=folder / "a-run")


def answer_file(run: Path, path: Path) -> Path:
    """What a language model makes of the open prompts."""
    prompts = [json.loads(line) for line in (run / FOLDER / PROMPTS).read_text().splitlines()]
    lines = [json.dumps({"key": own["key"], "answer": all_of(own["prompt"])}) for own in prompts]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_prompts_are_written_and_answers_taken_back(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert status_of(command.main, run, "--most", "3") == 0
    out = capsys.readouterr().out
    assert "no labels yet" in out and "3 prompts are open" in out
    answers = answer_file(run, tmp_path / "answers.jsonl")
    assert status_of(command.main, run, "--most", "3", "--answers", answers) == 0
    out = capsys.readouterr().out
    assert "everything" in out and "prompts are open" in out
    answers = answer_file(run, tmp_path / "answers.jsonl")
    assert status_of(command.main, run, "--most", "3", "--answers", answers) == 0
    assert "prompts are open" not in capsys.readouterr().out
    kept = json.loads((run / FOLDER / LABELS).read_text())
    assert len(kept["labels"]) == 3
    scores = {own["detection"] for own in kept["labels"].values()}
    assert scores <= {0.5, None}


def test_an_address_labels_and_scores_in_one_go_and_nothing_is_asked_twice(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    for path in (run / FOLDER).glob("*"):
        path.unlink()
    with server(all_of, []) as (url, seen):
        words = ("--url", url, "--model", "m", "--most", "2")
        assert status_of(command.main, run, *words, "--max_calls", "1") == 0
        assert len(seen) == 1 and "prompts are open" in capsys.readouterr().out
        assert status_of(command.main, run, *words) == 0
        n = len(seen)
        assert n > 2 and "prompts are open" not in capsys.readouterr().out
        assert status_of(command.main, run, *words) == 0
        assert len(seen) == n
    assert json.loads((run / FOLDER / LABELS).read_text())["model"] == "m"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 2: not valid JSON"),
        ('{"key": "a"}', "line 2: an object with a 'key' and an 'answer' is needed"),
        ('["a"]', "line 2: an object with a 'key'"),
    ],
)
def test_an_answer_file_with_a_wrong_line_changes_nothing(
    run: Path, tmp_path: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]
):
    assert status_of(command.main, run) == 0
    before = {path: path.read_bytes() for path in (run / FOLDER).glob("*")}
    wrong = tmp_path / "answers.jsonl"
    wrong.write_text('{"key": "a", "answer": "b"}\n' + line + "\n")
    assert status_of(command.main, run, "--answers", wrong) == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (run / FOLDER).glob("*")} == before
    assert status_of(command.main, run, "--answers", tmp_path / "none") == 2


def test_answers_may_be_objects_and_the_last_of_a_key_counts(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "answer": "x"}\n\n{"key": "a", "answer": {"label": "y"}}\n')
    assert read_answers(path) == {"a": '{"label": "y"}'}


@pytest.mark.parametrize(
    "words",
    [
        ("--url", "http://localhost:1"),
        ("--url", "file:///etc/passwd", "--model", "m"),
        ("--most", "0"),
        ("--scores", "luck"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Path, words: tuple[str, ...]):
    assert status_of(command.main, run, *words) == 2


def test_a_language_model_s_problem_reads_its_tokens():
    assert issubclass(LMProblem, command.ReadsTokens)


# --- the report ----------------------------------------------------------------------------------


def test_the_report_shows_what_the_analyses_left(tmp_path: Path):
    run = make_run(tmp_path)
    sections = {
        "importances": {
            **{"n_positions": 4096, "n_batches": 32, "threshold": 0.1},
            "sites": {"linear1": {"C": 20, "alive": 5, "l0": 0.25, "mean_g": 0.2}},
        },
        "clustering": {
            **{"k": 3, "n_clusters": 2, "best_round": 1, "n_positions": 4096, "alpha": 7.5},
            **{"share": 0.8, "threshold": 0.01, "costs": [9000.0, 8192.0, 8400.0]},
            "clusters": [
                {
                    "members": ["a:0", "a:7", "b:1"],
                    "positions": 40,
                    "density": 0.01,
                    "cohesion": 0.9,
                },
                {"members": ["a:3"], "positions": 4, "density": 0.001, "cohesion": 1.0},
            ],
            "stability": {
                **{
                    "n_samples": 3,
                    "n": 3,
                    "by_round": {"0": {"hamming": 0.0}, "2": {"hamming": 1.5}},
                },
                "at_best": {"hamming": 1.0, "matching": 2.0},
                "by_chance": {"hamming": 2.5, "matching": 3.0},
            },
        },
        "labels": {
            "model": "<a model>",
            "labels": {"a:0": {"label": "<b>commas</b>", "detection": 0.85, "fuzzing": None}},
        },
    }
    for name, told in sections.items():
        path = run / "analysis" / name / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(told))
    page = write_report(run).read_text()
    for words in (
        *("Importances on more data", "4,096 positions of 32", "<td>0.25</td>"),
        *("3 subcomponents form 2 groups, 1 of them of several", "2 bits for each", "α, here 7.5"),
        *("a 0, 7; b 1", "<td>90%</td>", "1 are in another group, by chance 2.5"),
        *("&lt;b&gt;commas", "0.85", "–", "&lt;a model&gt;", 'href="#clustering"'),
    ):
        assert words in page, words
    (run / "analysis" / "labels" / "labels.json").write_text('{"labels": 3}')
    with pytest.raises(UserError, match="not what the analysis writes there"):
        write_report(run)


def test_without_analyses_the_report_has_no_section_of_them(tmp_path: Path):
    page = write_report(make_run(tmp_path)).read_text()
    assert 'id="clustering"' not in page and 'id="labels"' not in page
