"""The page of a language model's run: what is on it, and how it gets there."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spd.analysis.contexts import OUTSIDE, Contexts
from spd.config import UserError
from spd.engine.prepare import prepare
from spd.experiments.lm.report.directions import look_around, token_directions
from spd.experiments.lm.report.page import (
    context_lists,
    gather,
    inline_json,
    page_data,
    write_subcomponents,
)
from spd.experiments.lm.report.token_texts import TokenTexts, readable_tokens, token_text
from spd.problem import Problem
from spd.reports.report import report_on
from spd.runs import cli as report_command
from spd.runs.run import load_run, resume, start
from tests.little_lm import (
    AWKWARD,
    VOCAB,
    LittleConfig,
    RandomBatches,
    awkward_tokenizer,
    build,
    decomposed,
    little_config,
    little_model,
    made_up_data,
)
from tests.made_up_run import add_figures, make_run
from tests.reports.test_report import Page
from tests.toy import MLP, inputs_of, make_config

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def data_of(run: Path) -> dict[str, Any]:
    text = (run / "report.html").read_text(encoding="utf-8")
    (found,) = DATA.findall(text)
    return json.loads(found)


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPD_OUT_DIR", str(tmp_path_factory.mktemp("out")))
        return start(little_config(), build)


@pytest.mark.slow
def test_a_run_ends_with_the_page_a_resumed_one_too_and_the_command_writes_it_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    data = data_of(run)
    assert data["positions"] == 3 * 4 * 32
    assert [site["name"] for site in data["sites"]] == list(load_run(run).model.sites)
    assert {row["c"] for row in data["rows"]} <= set(range(6))
    capsys.readouterr()
    report_command.report([str(run), "--batches", "2"])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert data_of(run)["positions"] == 2 * 4 * 32
    resume(LittleConfig, build, run)
    assert data_of(run) == data


def test_a_directory_that_is_no_run_and_a_senseless_number_are_mistakes(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
):
    before = (run / "report.html").read_bytes()
    for arguments, message in (
        ([str(tmp_path)], f"{tmp_path}: no config.yaml there"),
        ([str(run), "--batches", "0"], "--batches: 0; at least 1 is needed"),
        ([str(run), "--device", "abacus"], "device: 'abacus' cannot be used"),
    ):
        with pytest.raises(SystemExit) as stop:
            report_command.report(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert (run / "report.html").read_bytes() == before


def test_other_problems_keep_the_common_report_which_looks_at_no_data(tmp_path: Path):
    run = make_run(tmp_path, **{"metrics.jsonl": None})
    batches = iter(lambda: torch.randn(4, 4), None)
    problem = Problem(MLP(), train_batches=batches, eval_batches=batches)
    prepared = prepare(problem, make_config({"stochastic_recon": {"coeff": 1.0}}))
    with pytest.raises(UserError, match=f"--batches: the report of {run} .* looks at no data"):
        report_on(run, prepared, 2)
    assert not (run / "report.html").exists()
    assert report_on(run, prepared) == run / "report.html"
    assert not Page((run / "report.html").read_text(encoding="utf-8")).all("script")


def test_what_the_page_says_of_a_subcomponent_is_what_the_model_does():
    """Means, signs, contexts and companions, looked up in the importances of the same batches."""
    model = decomposed(
        little_model("llama"), {"model.embed_tokens": 5, "model.layers.1.mlp.down_proj": 4}
    )
    batches = [next(RandomBatches(seed)) for seed in range(3)]
    gathered = gather(model, batches, "lm_head")
    assert gathered is not None
    data = page_data(model, gathered, None)
    g, h = {}, {}
    for path, site in model.sites.items():
        inputs = [inputs_of(model, batch) for batch in batches]
        upper = [model.causal_importances(x).upper[path] for x in inputs]
        g[path] = torch.cat(upper).clamp(0, 1).detach()
        h[path] = torch.cat([site.subcomponents.acts(x[path]) for x in inputs]).detach()
    tokens = torch.cat(batches)
    active = {path: values > 0.1 for path, values in g.items()}
    names = [(data["sites"][row["site"]]["name"], row["c"]) for row in data["rows"]]
    alive = [
        (p, c) for p in model.sites for c in range(model.sites[p].C) if active[p][..., c].any()
    ]
    assert names == alive and len(alive) > 3
    for row, (path, c) in zip(data["rows"], names, strict=True):
        own, on = g[path][..., c], active[path][..., c]
        assert row["mean"] == pytest.approx(own.mean().item(), rel=1e-2)
        assert row["active"] == on.sum()
        assert row["highest"] == pytest.approx(own.max().item(), rel=1e-2)
        positive = (h[path][..., c][on] > 0).float().mean().item()
        assert row["flipped"] == (positive < 0.5)
        assert row["agree"] == pytest.approx(max(positive, 1 - positive), rel=1e-2)
        for middle, shades, *shown in row["contexts"]:
            words = [int(data["tokens"][token][1:]) for token in shown]
            found = [
                (b, p)
                for b in range(12)
                for p in range(32)
                if tokens[b, p : p + len(words)].tolist() == words
            ]
            ((b, p),) = found
            expected = (own[b, p : p + len(words)] * 255).round().to(torch.uint8).tolist()
            assert list(bytes.fromhex(shades)) == expected
            assert own[b, p + middle] > 0.1 and middle == min(16, p + middle)
        for other, jaccard, share in row["companions"]:
            other_path, d = names[other]
            both = (on & active[other_path][..., d]).sum().item()
            either = (on | active[other_path][..., d]).sum().item()
            assert jaccard == pytest.approx(both / either, rel=1e-2)
            assert share == pytest.approx(both / on.sum().item(), rel=1e-2)
            assert (other_path, d) != (path, c)


def importances_on(page: dict[str, Any]) -> list[float]:
    """Every importance that the page shows, or a mean or share of them."""
    found = []
    for row in page["rows"]:
        found += [row["mean"], row["highest"]]
        found += [share for _, share in row["shares"]]
        found += [mean for _, mean, _ in row["means"]]
        for _, shades, *_ in row["contexts"]:
            found += [level / 255 for level in bytes.fromhex(shades)]
    return found


def test_importances_above_1_and_below_0_are_shown_as_1_and_0():
    """The importance functions give out logits of any size; what leaks beyond 0 and 1 is for training."""
    model = decomposed(
        little_model("llama"), {"model.embed_tokens": 5, "model.layers.1.mlp.down_proj": 4}
    )
    with torch.no_grad():
        for site in model.sites.values():
            site.importance.weight.mul_(1e3)  # pyright: ignore
    batches = [next(RandomBatches(seed)) for seed in range(3)]
    ci = [model.causal_importances(model.target_forward(batch).site_inputs) for batch in batches]
    values = [g for own in ci for kind in (own.lower, own.upper) for g in kind.values()]
    assert max(g.max().item() for g in values) > 1.5
    assert min(g.min().item() for g in values) < -0.5
    gathered = gather(model, batches, "lm_head")
    assert gathered is not None
    shown = importances_on(page_data(model, gathered, None))
    assert len(shown) > 100 and max(shown) == 1.0 and min(shown) == 0.0
    assert min(shown) >= 0.0 and max(shown) <= 1.0
    statistics = gathered.statistics
    for tensor in (statistics.mean, statistics.highest, statistics.contexts.importances):
        assert tensor.min() >= 0.0 and tensor.max() <= 1.0


def test_sites_are_shown_only_where_they_are_applied_at_every_position():
    """Positions embedded once for all sequences count for each; a pooled vector does not."""
    model = decomposed(little_model("gpt2"), {"transformer.wpe": 4})
    batch = next(RandomBatches(0))
    gathered = gather(model, [batch], "lm_head")
    assert gathered is not None and gathered.left_out == []
    once = model.causal_importances(model.target_forward(batch).site_inputs).upper
    expected = 4 * (once["transformer.wpe"] > 0.1).flatten(0, -2).sum(dim=0)
    assert gathered.statistics.n_active.tolist() == expected.tolist()


def test_nothing_in_a_token_ends_the_data_or_becomes_part_of_the_page(tmp_path: Path):
    run = make_run(tmp_path, **{"metrics.jsonl": None})
    tokenizer = awkward_tokenizer()
    texts = [token_text(tokenizer, token) for token in range(6)]
    assert texts[:3] == list(AWKWARD)
    data = made_up_data(8, texts=[*texts, "\ud800"])
    data["sites"][0]["name"] = "</script><b>bold</b>"
    data["left_out"] = ["<i>left</i>"]
    write_subcomponents(run, data)
    assert data_of(run) == data
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("script") == [{"type": "application/json", "id": "data"}, {}]
    assert not page.all("b") and not page.all("i")
    assert all(image["src"].startswith("data:image/png") for image in page.all("img"))
    assert inline_json("<&>\u2028") == '"\\u003c&>\\u2028"'


def test_the_page_still_holds_the_report_of_a_run(tmp_path: Path):
    run = make_run(tmp_path, **{"metrics.jsonl": None})
    add_figures(run)
    write_subcomponents(run, made_up_data(8, texts=["a"]))
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    for words in ("Solved", "held-out", "Title of first", "How to reproduce it", "steps: 40000"):
        assert words in page.visible or words in page.text
    assert "32 subcomponents are alive" in page.visible.replace("8 of ", "")
    policy = page.all("meta")[2]["content"]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    outside = [value for _, attributes in page.elements for value in attributes.values()]
    assert not [value for value in outside if value.startswith(("http", "//"))]


@pytest.mark.slow
def test_two_thousand_subcomponents_fit_a_page_of_ten_megabytes(tmp_path: Path):
    run = make_run(tmp_path, **{"metrics.jsonl": None})
    texts = [f" word{i}" for i in range(4096)]
    path = write_subcomponents(run, made_up_data(2000, texts=texts))
    assert 2_000_000 < path.stat().st_size < 10_000_000


def test_tokens_as_text():
    words = {"\u2581the": 0, "ing": 1, "\u2581": 2, "?": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="?")), unk_token="?"
    )
    assert token_text(tokenizer, 1) == "ing"
    assert token_text(tokenizer, 9) == "#9"
    assert token_text(None, 3) == "#3"


def test_bytes_that_are_no_text_do_not_head_the_lists():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
    readable = readable_tokens(tokenizer, 300)
    texts = {token_text(tokenizer, token) for token in readable.nonzero().flatten().tolist()}
    assert texts == {"\t", "\n", *map(chr, range(32, 127))}
    assert readable_tokens(None, 3).all()
    model = decomposed(little_model("llama"), {"lm_head": 4})
    around = look_around(model, next(RandomBatches(0)), "lm_head")
    assert around is not None
    few = torch.arange(VOCAB) % 9 == 2
    found = token_directions(
        model, "lm_head", torch.arange(4), around, n=9, sign=torch.ones(4), readable=few
    )
    for extremes in found.values():
        assert set(extremes.highest.flatten().tolist()) == set(few.nonzero().flatten().tolist())
        assert torch.equal(extremes.highest, extremes.lowest.flip(1))


def test_a_finite_held_out_set_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))
    config = little_config(n_report_batches=50)
    problem = build(config, torch.device("cpu"))
    few = iter([next(RandomBatches(seed)) for seed in range(4)])
    prepared = prepare(replace(problem, eval_batches=few), config)
    run = make_run(tmp_path, **{"metrics.jsonl": None})
    report_on(run, prepared)
    assert data_of(run)["positions"] == 4 * 4 * 32
    few = iter([next(RandomBatches(seed)) for seed in range(4)])
    prepared = prepare(replace(build(config, torch.device("cpu")), eval_batches=few), config)
    with pytest.raises(UserError, match="--batches: 5 are wanted, but .* keeps 4"):
        report_on(run, prepared, 5)


def byte_level(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with few merges: most characters beyond ASCII are several tokens."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_characters_of_several_bytes_are_shown_whole():
    tokenizer = byte_level(
        [("Ġ", "â"), ("e", "Ì")]
    )  # one ends, the other begins within a character
    ids = tokenizer('a ”e\u0301é”"')["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids][1] == "Ġâ"
    texts = TokenTexts(tokenizer)
    groups = texts.whole(ids)
    assert [texts.texts[texts(*group)] for group in groups] == [
        *("a", " ”", "e\u0301", "é", "”", '"'),
    ]
    assert [token for group in groups for token in group] == ids
    assert texts(*groups[1]) == 1 and len(texts.texts) == 6, "each text once"


def test_a_part_of_a_character_is_given_as_bytes():
    tokenizer = byte_level([("Ġ", "â")])
    ids = tokenizer(" ”é")["input_ids"]
    texts = TokenTexts(tokenizer)
    cut = texts.whole([ids[1], ids[2], *ids[3:4]])
    assert cut == [(ids[1],), (ids[2],), (ids[3],)], "nothing whole begins there"
    assert token_text(tokenizer, ids[0]) == " <0xE2>" and token_text(tokenizer, ids[1]) == "<0x80>"
    assert TokenTexts(None).whole([3, 4]) == [(3,), (4,)]
    assert texts.whole([9999, ids[0]]) == [(9999,), (ids[0],)]


def test_a_context_shades_a_character_by_the_highest_of_its_tokens():
    tokenizer = byte_level([])
    model = decomposed(little_model("llama"), {"model.embed_tokens": 5})
    gathered = gather(model, [next(RandomBatches(0))], None)
    assert gathered is not None
    ids = torch.tensor(tokenizer("ab”c")["input_ids"])  # a b, three bytes, c
    statistics = gathered.statistics
    kept = statistics.contexts
    window = torch.full_like(kept.tokens[:1, :1], OUTSIDE)
    levels = torch.zeros_like(kept.importances[:1, :1])
    begin = statistics.left - 3  # the middle token is the second byte
    window[0, 0, begin : begin + 6] = ids
    levels[0, 0, begin : begin + 6] = torch.tensor([0.0, 0.2, 0.4, 1.0, 0.6, 0.0])
    scores, acts = torch.ones(1, 1), torch.zeros_like(levels)
    nowhere = torch.zeros(1, 1, dtype=torch.long)
    one = Contexts(scores, window, levels, acts, nowhere, nowhere)
    texts = TokenTexts(tokenizer)
    ((context,),) = context_lists(statistics._replace(contexts=one), torch.tensor([0]), texts)
    middle, shades, *shown = context
    assert [texts.texts[token] for token in shown] == ["a", "b", "”", "c"]
    assert list(bytes.fromhex(shades)) == [0, 51, 255, 0] and middle == 2
