"""Runs whose target was not copied, and runs that are loaded over a target that is given."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from spd.config import UserError, parse
from spd.experiments.lm.lm_decomposition import LMConfig, build
from spd.experiments.lm.problem import LMProblem
from spd.runs.cli import main
from spd.runs.run import Run, load_run, resume, start
from spd.runs.trust import UntrustedError
from tests.lm_stand_ins import little_llama, make_tokenizer, save_model, stories
from tests.toy import tensors

pytestmark = pytest.mark.undrawn

IDS = torch.arange(12).reshape(2, 6)
UP = "model.layers.0.mlp.up_proj"


def test_a_model_of_transformers_is_placed_where_accelerate_is_installed(made: Path):
    whole = load_run(made / "run")
    if importlib.util.find_spec("accelerate") is None:
        with pytest.raises(UserError, match="device_map.*accelerate"):
            load_run(made / "run", device_map="cpu")
        return
    placed = load_run(made / "run", device_map="cpu")
    assert torch.equal(placed.model(IDS), whole.model(IDS))


class Placed(LlamaForCausalLM):
    """Puts itself onto a device without the package that transformers leaves that to."""

    asked: Any = None

    @classmethod
    def from_pretrained(cls, place: Any, *, device_map: Any = None, **options: Any) -> Any:
        Placed.asked = device_map
        return super().from_pretrained(place, **options)


@pytest.fixture(scope="module", name="made")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and a run of it that holds no copy, both as they were made."""
    folder = tmp_path_factory.mktemp("uncopied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPD_OUT_DIR", str(folder / "out"))
        patch.setenv("WANDB_MODE", "disabled")
        save_model(folder / "model", little_llama(), make_tokenizer(lowercase=False))
        (folder / "stories.txt").write_text("<end>".join(stories(20, seed=1)), encoding="utf-8")
        text = {"separator": "<end>", "eval_frac": 0.3, "context_length": 16}
        raw = {
            "experiment": "little",
            "target": str(folder / "model"),
            "copy_target_mb": 0,
            "data": {"source": str(folder / "stories.txt"), **text},
            "sites": {"*up_proj": 6},
            "losses": {"faithfulness": {"coeff": 1.0}, "stochastic_recon": {"coeff": 1.0}},
            **{"steps": 4, "lr": 1e-3, "batch_size": 3, "eval_batch_size": 2, "n_eval_batches": 2},
            **{"save_every": 2, "eval_every": 2, "n_report_batches": 3},
            "execution": {"compile": False},
        }
        start(parse(LMConfig, raw, "test"), build, directory=folder / "run")
        yield folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run, which may be changed."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def gone(made: Path) -> Iterator[Path]:
    """Where the model lies while its own place is empty."""
    elsewhere = made / "elsewhere"
    (made / "model").rename(elsewhere)
    yield elsewhere
    elsewhere.rename(made / "model")


def importances(run: Run) -> Tensor:
    return run.model.importances(IDS).lower[UP]


def test_a_target_that_stays_where_it_is_is_found_there(made: Path, run: Path):
    assert not list((run / "target").glob("model*.safetensors"))
    loaded = load_run(run)
    assert loaded.step == 4 and isinstance(loaded.problem, LMProblem)
    assert loaded.problem.tokenizer is not None
    expected = LlamaForCausalLM.from_pretrained(made / "model").eval()(IDS).logits
    assert torch.equal(loaded.model.target_forward(IDS).output, expected)

    shutil.rmtree(run / "checkpoints/00000004")
    resume(LMConfig, build, run)
    for name in ("metrics.jsonl", "checkpoints/00000004/model.safetensors"):
        assert (run / name).read_bytes() == (made / "run" / name).read_bytes()


def test_a_target_that_is_gone_is_named_and_another_place_is_taken(
    made: Path, run: Path, gone: Path
):
    said = rf"target {made / 'model'}: is no longer there.*load_run\(…, target=…\)"
    with pytest.raises(UserError, match=said):
        load_run(run)
    with pytest.raises(UserError, match=said):
        resume(LMConfig, build, run)
    loaded = load_run(run, target=gone)
    assert isinstance(loaded.problem, LMProblem) and loaded.problem.tokenizer is not None
    held_out = tensors(loaded.prepared.eval_batches)[0]
    again = load_run(run, target=str(gone))
    assert torch.equal(importances(loaded), importances(again))
    assert torch.equal(held_out, tensors(again.prepared.eval_batches)[0]), "that of the run"
    with pytest.raises(UserError, match="target '/no/such/place': no such directory"):
        load_run(run, target="/no/such/place")


def test_a_run_goes_on_with_a_target_that_was_moved(
    made: Path, run: Path, gone: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(run / "checkpoints/00000004")
    with pytest.raises(SystemExit) as ended:
        main(["--resume", str(run), "--target", str(gone)])
    assert ended.value.code == 0, capsys.readouterr()
    for name in ("metrics.jsonl", "checkpoints/00000004/model.safetensors"):
        assert (run / name).read_bytes() == (made / "run" / name).read_bytes()


def test_a_run_does_not_go_on_with_another_target(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = little_llama()
    with torch.no_grad():
        model.get_submodule(UP).weight[3, 4] += 0.01  # pyright: ignore
    other = save_model(tmp_path / "other", model)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["--resume", str(run), "--target", str(other)])
    assert ended.value.code == 2
    assert "its matrices are others than those that were decomposed" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_module_may_be_given(made: Path, run: Path, gone: Path):
    module = LlamaForCausalLM.from_pretrained(gone)
    loaded = load_run(run, target=module)
    assert loaded.model.get_submodule("target").inner is module  # pyright: ignore
    assert torch.equal(importances(loaded), importances(load_run(run, target=gone)))
    with pytest.raises(UserError, match="LlamaForCausalLM that is given is decomposed already"):
        load_run(run, target=module)


def test_another_target_is_refused(made: Path, run: Path, tmp_path: Path):
    other = little_llama()
    with torch.no_grad():
        other.get_submodule(UP).weight[3, 4] += 0.01  # pyright: ignore
    place = save_model(tmp_path / "other", other)
    said = "its matrices are others than those that were decomposed"
    with pytest.raises(UserError, match=f"target '{place}': {said}"):
        load_run(run, target=place)
    with pytest.raises(UserError, match=f"target a LlamaForCausalLM: {said}"):
        load_run(run, target=other)
    narrow = little_llama(intermediate_size=20)
    with pytest.raises(UserError, match=said):
        load_run(run, target=narrow)

    meta = json.loads((run / "meta.json").read_text())
    del meta["matrices"]  # as of runs that were made before there was a digest
    (run / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert load_run(run, target=place).step == 4
    with pytest.raises(UserError, match=r"not fit the given target: .* shape \(6, 24\), expected"):
        load_run(run, target=little_llama(intermediate_size=20))
    with pytest.raises(UserError, match="target: a Linear does not read token ids"):
        load_run(run, target=torch.nn.Linear(2, 2))


def test_the_target_must_not_have_changed_since(made: Path, run: Path, gone: Path):
    changed = little_llama()
    with torch.no_grad():
        changed.get_submodule(UP).weight.mul_(2)  # pyright: ignore
    save_model(made / "model", changed)
    try:
        for again in (lambda: load_run(run), lambda: resume(LMConfig, build, run)):
            with pytest.raises(UserError, match=f"target '{made / 'model'}': its matrices are"):
                again()
    finally:
        shutil.rmtree(made / "model")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_type_of_the_target(run: Path, dtype: Any):
    loaded = load_run(run, dtype=dtype)
    site = loaded.model.sites[UP]
    assert site.original.weight.dtype == torch.bfloat16  # pyright: ignore
    assert site.subcomponents.V.dtype == torch.float32
    assert loaded.config.dtype == "float32", "that of the run"
    whole = load_run(run)
    output, expected = (r.model(IDS) for r in (loaded, whole))
    assert output.dtype == torch.float32 and torch.allclose(output, expected, atol=0.05)
    assert torch.allclose(importances(loaded), importances(whole), atol=0.05)
    with pytest.raises(UserError, match="load_run: dtype: .*'float16'"):
        load_run(run, dtype="float16")


def test_a_device_map_is_handed_to_transformers(run: Path):
    text = (run / "config.yaml").read_text(encoding="utf-8")
    own = text.replace("transformers.AutoModelForCausalLM", f"{__name__}.Placed")
    assert own != text
    (run / "config.yaml").write_text(own, encoding="utf-8")
    with pytest.raises(UserError, match="model_class is '.*Placed', and was 'transformers"):
        load_run(run)
    loaded = load_run(run, device_map={"": "cpu"}, verify=False)
    assert Placed.asked == {"": "cpu"} and loaded.problem.device == torch.device("cpu")
    with pytest.raises(UserError, match="device: 'cpu' and device_map: 'auto'; one of them"):
        load_run(run, device="cpu", device_map="auto", verify=False)
    module = little_llama()
    with pytest.raises(UserError, match="device_map: auto; a target that is given as a module"):
        load_run(run, target=module, device_map="auto", verify=False)
    with pytest.raises(UserError, match="dtype: bfloat16; a target that is given as a module"):
        load_run(run, target=module, dtype="bfloat16", verify=False)


def test_a_class_that_only_the_run_names_is_not_imported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neither when it is loaded, nor when it goes on; what the user names himself is his own."""
    mark, name = tmp_path / "it-was-run", "a_class_from_elsewhere"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    code += "from transformers import AutoModelForCausalLM as Theirs\n"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    meta = json.loads((run / "meta.json").read_text())
    text = (run / "config.yaml").read_text(encoding="utf-8")
    own = meta["config"]["model_class"]
    (run / "config.yaml").write_text(text.replace(own, f"{name}.Theirs"), encoding="utf-8")
    meta["config"]["model_class"] = f"{name}.Theirs"
    (run / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UntrustedError, match=rf"model_class: '{name}' is no code of the installed"):
        load_run(run)
    with pytest.raises(UntrustedError, match="--trust"):
        resume(LMConfig, build, run)
    assert not mark.exists()
    resume(LMConfig, build, run, named=[f"{name}.Theirs"])
    assert mark.exists() and load_run(run, trust=True).step == 4


def test_code_beside_a_target_is_not_run(run: Path, made: Path, tmp_path: Path):
    """`auto_map` names it; nothing asks whether to run it, and no message advises to."""
    place = Path(shutil.copytree(made / "model", tmp_path / "model"))
    config = json.loads((place / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.C", "AutoModel": "theirs.M"},
    }
    (place / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "it-was-run"
    (place / "theirs.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(UserError) as caught:
        load_run(run, target=place)
    assert "trust_remote_code" not in str(caught.value) and not mark.exists()
