"""Decompositions of language models from their commands to what a run leaves, and back in."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spd.config import UserError, load_config, parse
from spd.engine.prepare import evaluate, prepare
from spd.experiments.lm.lm_decomposition import LMConfig, build
from spd.experiments.lm.loading import import_class
from spd.experiments.lm.problem import LMProblem
from spd.runs.run import load_run, resume, start
from spd.runs.wandb_run import WandbRun, download_run
from spd.settings import PACKAGE_DIR
from tests.lm_stand_ins import (
    little_llama,
    make_tokenizer,
    save_data_set,
    save_model,
    simple_stories_llama,
    stories,
    tiny_stories_neo,
)
from tests.run_fixtures import Command, command_fixture, listing, log_lines, target_fixture
from tests.toy import tensors
from tests.wandb_stand_ins import FakeApi, FakeRun

__all__ = ["command_fixture", "target_fixture"]

pytestmark = pytest.mark.undrawn

LM = PACKAGE_DIR / "experiments" / "lm"
SCRIPT = LM / "lm_decomposition.py"
FEW = (
    *("steps=2", "n_eval_batches=1", "n_report_batches=1", "log_every=1", "figures={}"),
    "data.shuffle_buffer=8",  # there are few stories
)


@pytest.fixture
def simple_stories(tmp_path: Path) -> tuple[Path, Path]:
    """What stands for SimpleStories-1.25M and its data set: same shapes, columns and splits."""
    model = tmp_path / "hub" / "SimpleStories-1.25M"
    save_model(model, simple_stories_llama(), make_tokenizer())
    splits = {"train": stories(40, seed=1), "test": stories(30, seed=2)}
    data = save_data_set(tmp_path / "hub" / "SimpleStories", splits, column="story", n_shards=2)
    return model, data


@pytest.mark.slow
def test_the_command_and_the_data_flow_of_ss_emb(
    command: Command, simple_stories: tuple[Path, Path]
):
    """With a model and a data set laid out on disk as the hub lays them out, and nothing else changed."""
    model, data = simple_stories
    places = (f"target={model}", f"data.source={data}")
    done = command.run(SCRIPT, LM / "ss_emb_config.yaml", *places, *FEW)
    assert done.status == 0, done.err
    run_dir = command.only_run()
    assert done.out.endswith(f"report: {run_dir / 'report.html'}\n")
    assert [line["step"] for line in log_lines(run_dir)] == [0, 0, 1, 2]
    last = log_lines(run_dir)[-1]
    for key in ("ce/target", "ce/zero", "kl/masked", "l0/model.embed_tokens", "loss/faithfulness"):
        assert f"eval/{key}" in last

    # the held-out text is the test split: lower-cased, every story alone, ends joined, cut at 512
    tokenizer = make_tokenizer()
    ids: list[int] = []
    for story in stories(30, seed=2):
        ids += [*tokenizer(story.lower(), add_special_tokens=False)["input_ids"], 1]
    assert tokenizer.eos_token_id == 1 and tokenizer.unk_token_id not in ids
    expected = {tuple(ids[i : i + 512]) for i in range(0, len(ids) - 511, 512)}
    held_out = load_file(run_dir / "target" / "held_out.safetensors")["ids"]
    assert held_out.shape == (4, 512)
    assert {tuple(row) for row in held_out.tolist()} <= expected | _shard_cuts(tokenizer)

    # the run is all there is: model and data set are gone
    shutil.rmtree(model.parent)
    run = load_run(run_dir)
    assert run.step == 2 and torch.equal(tensors(run.prepared.eval_batches)[0], held_out[:4].long())
    assert run.problem.target(held_out[:1].long()).shape == (1, 512, 4096)


def _shard_cuts(tokenizer: Any) -> set[tuple[int, ...]]:
    """The same where the second file of the split is read before the first."""
    order = [*range(15, 30), *range(15)]
    texts = stories(30, seed=2)
    ids: list[int] = []
    for i in order:
        ids += [*tokenizer(texts[i].lower(), add_special_tokens=False)["input_ids"], 1]
    return {tuple(ids[i : i + 512]) for i in range(0, len(ids) - 511, 512)}


@pytest.mark.slow
def test_the_command_of_the_tiny_stories_example(command: Command, tmp_path: Path):
    model = save_model(tmp_path / "hub" / "TinyStories-1M", tiny_stories_neo())
    make_tokenizer(lowercase=False).save_pretrained(tmp_path / "hub" / "gpt-neo-125M")
    splits = {"train": stories(120, seed=1), "validation": stories(150, seed=2)}
    data = save_data_set(tmp_path / "hub" / "TinyStories", splits, column="text")
    places = (f"target={model}", f"tokenizer={tmp_path / 'hub' / 'gpt-neo-125M'}")
    args = (*places, f"data.source={data}", *FEW, "batch_size=1", "eval_batch_size=1")
    done = command.run(SCRIPT, LM / "ts_config.yaml", *args)
    assert done.status == 0, done.err
    shutil.rmtree(tmp_path / "hub")
    run = load_run(command.only_run())
    assert run.model.sites["transformer.h.3.mlp.c_fc"].C == 100
    assert run.prepared.eval_batches[0].shape == (1, 2048)


@pytest.mark.slow
def test_without_the_hub_one_message_names_the_experiment_that_needs_none(command: Command):
    done = command.run(SCRIPT, LM / "ss_emb_config.yaml")
    assert done.status == 3 and done.out == ""
    line = done.err.splitlines()[-1]
    assert line.startswith("error: target: 'SimpleStories/SimpleStories-1.25M'")
    assert "pydoc_emb" in line and not command.out.exists()


PUBLISHED = {  # the configuration of the paper
    "importance": {"type": "affine"},
    "lower_leak": "both",
    "recon": "kl",
    "steps": 50_000,
    "batch_size": 4,
    "lr": 1e-4,
    "lr_schedule": {"type": "constant", "warmup_frac": 0.01, "half_life": None},
}
PUBLISHED_LOSSES = {
    "faithfulness": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0, "n_samples": 1},
    "importance_minimality": {"coeff": 1e-6, "pnorm": 2.0},
}
OF_EACH: dict[str, dict[str, Any]] = {
    "ss_emb": {
        "target": "SimpleStories/SimpleStories-1.25M",
        "model_class": "transformers.LlamaForCausalLM",
        "tokenizer": None,
        "sites": {"model.embed_tokens": 100},
        "data": ("SimpleStories/SimpleStories", "story", "train", "test", 512, True),
    },
    "ts": {
        "target": "roneneldan/TinyStories-1M",
        "model_class": "transformers.AutoModelForCausalLM",
        "tokenizer": "EleutherAI/gpt-neo-125M",
        "sites": {"transformer.h.3.mlp.c_fc": 100},
        "data": ("roneneldan/TinyStories", "text", "train", "validation", 2048, False),
    },
}


@pytest.mark.parametrize("name", OF_EACH)
def test_the_settings_are_the_published_ones(name: str):
    whole = load_config(LMConfig, LM / f"{name}_config.yaml")
    config = whole.model_dump(mode="json")
    text = config["data"]
    keys = ("source", "column", "split", "eval_split", "context_length", "lowercase")
    config["data"] = tuple(text[key] for key in keys)
    expected = {**PUBLISHED, **OF_EACH[name]}
    assert {key: config[key] for key in expected} == expected
    for loss, spec in whole.losses.items():
        further = spec.model_dump(mode="json", exclude_defaults=True, exclude={"type"})
        assert PUBLISHED_LOSSES[loss].items() >= further.items()
        assert spec.model_dump(mode="json").items() >= PUBLISHED_LOSSES[loss].items()
    assert whole.losses.keys() == PUBLISHED_LOSSES.keys()
    import_class(config["model_class"])


# --- runs in this process, of a little model -------------------------------------------------------


@pytest.fixture(name="little")
def little_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LMConfig:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    model = save_model(tmp_path / "model", little_llama(), make_tokenizer(lowercase=False))
    path = tmp_path / "stories.txt"
    path.write_text("<end>".join(stories(20, seed=1)), encoding="utf-8")
    raw = {
        "experiment": "little",
        "target": str(model),
        "data": {
            **{"source": str(path), "separator": "<end>", "eval_frac": 0.3, "context_length": 16}
        },
        "sites": {"model.layers.*.mlp.*_proj": 6, "lm_head": 9, "model.embed_tokens": 4},
        "losses": {"stochastic_recon": {"coeff": 1.0}, "faithfulness": {"coeff": 1.0}},
        "metrics": {"cross_entropy": {}, "sparsity": {}},
        **{"steps": 4, "lr": 1e-3, "batch_size": 3, "eval_batch_size": 2, "n_eval_batches": 2},
        **{"log_every": 1, "eval_every": 2, "save_every": 2, "execution": {"compile": False}},
        "n_report_batches": 3,
    }
    return parse(LMConfig, raw, "test")


def changed(config: LMConfig, **changes: Any) -> LMConfig:
    return parse(LMConfig, {**config.model_dump(mode="json"), **changes}, "test")


def stream_of(config: LMConfig, folder: Path) -> LMConfig:
    splits = {"train": stories(20, seed=1), "test": stories(9, seed=2)}
    data = save_data_set(folder / "set", splits, column="text", n_shards=2)
    text = {"source": str(data), "eval_split": "test", "context_length": 16, "streaming": True}
    return changed(config, data={**text, "shuffle_buffer": 10})


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_ends_with_the_same_numbers(
    little: LMConfig, tmp_path: Path, streaming: bool
):
    config = stream_of(little, tmp_path) if streaming else little
    whole = start(config, build)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "00000004")
    (stopped / "metrics.jsonl").write_text("".join(_until(whole, 2)), encoding="utf-8")
    resume(LMConfig, build, stopped)
    for name in ("metrics.jsonl", "checkpoints/00000004/model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_target_larger_than_allowed_is_not_copied(
    little: LMConfig, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    copied, referred = (start(changed(little, copy_target_mb=mb), build) for mb in (1, 0))
    weights = [list((run / "target").glob("model*.safetensors")) for run in (copied, referred)]
    assert len(weights[0]) == 1 and not weights[1]
    assert caplog.text.count("are not copied into the run (copy_target_mb: 0)") == 1


def _until(run: Path, step: int) -> list[str]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["step"] < step]


def test_importances_of_a_string_in_four_lines(little: LMConfig, tmp_path: Path):
    directory = start(little, build)
    for name in ("model", "stories.txt", "out/data"):
        (tmp_path / name).rename(
            tmp_path / "gone" if name == "model" else tmp_path / f"{name}.gone"
        )

    run = load_run(directory)
    assert isinstance(run.problem, LMProblem) and run.problem.tokenizer is not None
    ids = run.problem.tokenizer("The little cat sat.", return_tensors="pt")["input_ids"]
    _, site_inputs = run.model.target_forward(ids)
    g = run.model.causal_importances(site_inputs).lower["model.layers.1.mlp.up_proj"]

    assert g.shape == (1, ids.shape[1], 6) and ids.shape[1] > 4
    assert len(list(run.problem.eval_batches)) == 1, "the report's third batch was kept as well"
    with pytest.raises(UserError, match="stories.txt' matches no file"):
        next(run.problem.train_batches)


@pytest.mark.slow
def test_a_run_on_wandb_is_loaded_and_its_target_decomposed_again(little: LMConfig, tmp_path: Path):
    whole = load_run(start(little, build))
    sent = FakeRun()
    WandbRun(sent).upload(whole.directory)
    reference = f"wandb:me/project/{whole.directory.name}"
    download_run(reference, FakeApi(sent.files, reference.removeprefix("wandb:")))
    for gone in (whole.directory, tmp_path / "model"):
        shutil.rmtree(gone)

    run = load_run(reference)
    assert run.step == 4 and run.metrics == whole.metrics
    assert isinstance(run.problem, LMProblem) and run.problem.tokenizer is not None
    ids = run.problem.tokenizer("The little cat sat.", return_tensors="pt")["input_ids"]
    g, expected = (
        r.model.causal_importances(r.model.target_forward(ids).site_inputs).lower
        for r in (run, whole)
    )
    assert g.keys() == expected.keys() and all(g[path].equal(expected[path]) for path in g)

    again = load_run(start(changed(little, target=reference, steps=1), build))
    assert again.problem.target(ids).equal(whole.problem.target(ids))


@pytest.mark.slow
def test_a_target_that_is_trained_brings_its_text(tmp_path: Path, little: LMConfig):
    text = little.model_dump(mode="json")["data"]
    training = {
        **{"data": text, "vocab_size": 270, "steps": 2, "batch_size": 4, "lr": 1e-3},
        "model": {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_model": 8, "d_mlp": 12},
    }
    (tmp_path / "target.yaml").write_text(yaml.safe_dump(training), encoding="utf-8")
    config = changed(little, target=str(tmp_path / "target.yaml"), data=None)
    run = load_run(start(config, build))
    files = listing(run.directory / "target")
    assert {"config.yaml", "training.json", "config.json", "tokenizer.json"} <= set(files)
    assert run.prepared.eval_batches[0].shape == (2, 16)
    kept = load_file(run.directory / "target" / "held_out.safetensors")["ids"]
    assert isinstance(run.problem, LMProblem) and run.problem.tokenizer is not None
    documents = "<end>".join(stories(20, seed=1))
    texts = [str(run.problem.tokenizer.decode(row)) for row in kept]
    assert all(part in documents for text in texts for part in text.split("<|end|>"))


def test_a_target_of_half_precision_needs_autocast(little: LMConfig):
    with pytest.raises(UserError, match="dtype bfloat16 needs autocast: bf16"):
        changed(little, dtype="bfloat16")
    prepared = prepare(
        build(
            changed(little, dtype="bfloat16", execution={"autocast": "bf16"}), torch.device("cpu")
        ),
        changed(little, dtype="bfloat16", execution={"autocast": "bf16"}),
    )
    assert all(math.isfinite(value) for value in evaluate(prepared).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "data: a value is required: .* was not trained here"),
        ({"n_eval_batches": 500}, "1000 held-out sequences are wanted, but"),
        ({"sites": {"model.layers.0.mlp": 3}}, "matches 'model.layers.0.mlp', a transformers"),
        ({"target": "./nothing"}, "no such directory"),
        ({"model_class": "transformers.Nothing"}, "model_class"),
    ],
)
def test_a_mistake_leaves_no_run(
    little: LMConfig, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message):
        start(changed(little, **changes), build)
    assert not (tmp_path / "out" / "little").exists()


def test_sequences_that_the_target_cannot_read_are_refused(little: LMConfig):
    text = {**little.model_dump(mode="json")["data"], "context_length": 65}
    with pytest.raises(UserError, match="65 is more than the 64 positions that the target knows"):
        start(changed(little, data=text), build)


def without(config: LMConfig, *tokens: str | int, **text: Any) -> LMConfig:
    raw = config.model_dump(mode="json")
    return parse(LMConfig, {**raw, "data": {**raw["data"], "exclude_tokens": tokens, **text}}, "x")


def test_excluded_tokens_are_found_by_name_or_id(little: LMConfig):
    ends = make_tokenizer(lowercase=False).eos_token_id
    problem = build(without(little, "[EOS]", 2), torch.device("cpu"))
    batch = next(problem.train_batches)
    assert problem.position_weights is not None and (batch == 2).any()
    assert torch.equal(problem.position_weights(batch) == 0, (batch == ends) | (batch == 2))
    assert build(little, torch.device("cpu")).position_weights is None


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["[EOZ]"], r"exclude_tokens: .* has no token '\[EOZ\]'; did you mean '\[EOS\]'"),
        ([200], "exclude_tokens: 200: the target knows 0 to 199"),
        ([-1], "exclude_tokens: -1"),
        (list(range(200)), "exclude_tokens: nothing is left"),
        ([True], "exclude_tokens.*number is needed, got True"),
    ],
)
def test_tokens_that_cannot_be_excluded(little: LMConfig, tokens: list[Any], said: str):
    with pytest.raises(UserError, match=said):
        build(without(little, *tokens), torch.device("cpu"))


def test_several_processes_count_every_token(little: LMConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="exclude_tokens: a run of several processes"):
        build(without(little, 5), torch.device("cpu"))


def test_what_a_sequence_begins_with_is_said_in_one_line(
    little: LMConfig, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="spd")
    build(little, torch.device("cpu"))
    said = [line for line in caplog.messages if "before a sequence" in line]
    assert said == ["data: no token is put before a sequence (bos: auto)"]


def test_tokens_of_another_tokenizer_are_refused(little: LMConfig, tmp_path: Path):
    small = save_model(tmp_path / "small", little_llama(vocab_size=20), make_tokenizer())
    with pytest.raises(UserError, match="the target knows 0 to 19; is this its tokenizer"):
        start(changed(little, target=str(small)), build)


# --- what needs no download ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pydoc_mlp", "pydoc_emb"])
def test_a_decomposition_that_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """From nothing: the target is trained, and few subcomponents at a time keep what it predicts."""
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    config = load_config(LMConfig, LM / f"{name}_config.yaml")
    directory = start(config, build, folder=LM)
    assert (directory / "report.html").is_file()
    last = {key.removeprefix("eval/"): value for key, value in log_lines(directory)[-1].items()}
    assert last["ce/target"] < last["ce/unigram"] - 1
    assert last["ce/zero"] > last["ce/target"] + 0.3
    assert last["recovered/masked"] > 0.9 and last["recovered/rounded"] > 0.9
    for key in [key for key in last if key.startswith("l0/")]:
        assert last[key] <= last[key.replace("l0/", "alive/")] / 3
