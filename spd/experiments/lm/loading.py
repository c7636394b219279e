"""A target and its tokenizer from the hub, a directory, W&B or a training; and its copy in a run."""

import copy
import importlib
import logging
import pickle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from spd.config import UserError
from spd.experiments.lm.data.batches import HELD_OUT_FILE
from spd.experiments.lm.folder import check_folder
from spd.experiments.lm.hub import hub_commit, unreachable
from spd.experiments.lm.model import TokenModel, check_output
from spd.experiments.lm.train_lm import LM_TARGET, is_trained_here
from spd.experiments.targets import WANDB_PREFIX, resolve_target, target_directory
from spd.noise import derive_seed
from spd.run_files import forbidden, give_usual_mode, read_json, write_json
from spd.runs.wandb_run import download_run

logger = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"
Dtype = Literal["float32", "bfloat16"]


class Origin(NamedTuple):
    """Where a target comes from, as it is recorded beside its copy in a run."""

    reference: str
    """a name on the hub or a directory"""
    revision: str | None
    """the commit on the hub"""
    tokenizer: str | None
    """what the configuration names; None: that of the target"""
    directory: Path | None
    """where it lies on this machine; None: in the hub's cache"""


class LoadedTarget(NamedTuple):
    """A frozen model and what belongs to it."""

    model: TokenModel
    tokenizer: PreTrainedTokenizerBase | None
    origin: Origin
    unembed: str | None
    """path of the output embedding"""
    n_vocab: int
    """token ids are below it"""
    device: torch.device
    """where token ids are expected"""


class Wanted(NamedTuple):
    """What a configuration says about the target."""

    target: str
    revision: str | None
    model_class: str
    output: str | int
    dtype: Dtype
    tokenizer: str | None
    needs_tokenizer: bool
    null: bool = False
    """the model as it is initialised, before any training"""


def load_lm(
    wanted: Wanted,
    device: torch.device,
    *,
    folders: tuple[Path, ...],
    instead: str | Path | nn.Module | None = None,
    device_map: Any = None,
) -> LoadedTarget:
    """The target, frozen, in evaluation mode and of the dtype that is wanted, on the device.

    `instead`, a place or a module, is what the model is taken from: tokenizer and origin stay those of the
    target. With a `device_map` transformers puts it onto its devices.
    """
    model_class = None if isinstance(instead, nn.Module) else import_class(wanted.model_class)
    origin = find_target(wanted, device, folders)
    if isinstance(instead, nn.Module):
        inner: Any = instead.inner if isinstance(instead, TokenModel) else instead
    else:
        place = wanted if instead is None else wanted._replace(target=str(instead), revision=None)
        found = origin if instead is None else find_target(place, device, folders)
        inner = _load_model(model_class, found, wanted, device_map)
        if wanted.null and not _is_null(found):
            inner = initialised_anew(inner)
    if getattr(getattr(inner, "config", None), "use_cache", False):
        inner.config.use_cache = False  # keys and values kept for generation would only fill memory
    inner = inner.requires_grad_(False).eval()
    if device_map is None:
        inner = inner.to(device)
    else:
        device = next(inner.parameters()).device
    model = TokenModel(inner, wanted.output).eval()
    try:
        check_output(model, torch.zeros((1, 2), dtype=torch.long, device=device))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # T5, whisper and ViT each raise something else
        raise UserError(
            f"target: a {type(inner).__name__} does not read token ids alone: {_one_line(error)}; a model"
            " that needs another batch is decomposed by a program of yours, with a Problem"
            " (docs/language_models.md)"
        ) from None
    return LoadedTarget(
        model,
        _load_tokenizer(origin, wanted),
        origin,
        unembed_path(inner),
        _n_vocab(inner),
        device,
    )


def find_target(wanted: Wanted, device: torch.device, folders: tuple[Path, ...]) -> Origin:
    """Where the target is; a training YAML is trained on first use, a hub name gets its commit."""
    target, path = wanted.target, Path(wanted.target).expanduser()
    if target.startswith(WANDB_PREFIX):  # from here on it is a directory like any other
        path = download_run(target)
    on_disk = [place for place in (path, *(f / path for f in folders)) if place.exists()]
    if path.suffix in (".yaml", ".yml"):
        _no_revision(wanted)
        directory = resolve_target(
            target, LM_TARGET, device=device, folders=folders, null=wanted.null
        )
        return Origin(str(directory), None, wanted.tokenizer, directory)
    if on_disk and on_disk[0].is_dir():
        _no_revision(wanted)
        directory = target_directory(on_disk[0]).absolute()
        if wanted.null and is_trained_here(directory):
            directory = resolve_target(str(directory), LM_TARGET, device=device, null=True)
        logger.info("target: directory %s", directory)
        if (directory / ORIGIN_FILE).is_file():
            return Origin(**_origin(directory), directory=directory)
        return Origin(str(directory), None, wanted.tokenizer, directory)
    if on_disk or path.is_absolute() or target.startswith((".", "~")) or target.count("/") > 1:
        raise UserError(
            f"target {target!r}: no such directory; expected a name on the Hugging Face hub, a"
            " directory, a wandb:entity/project/name reference, or a training YAML"
        )
    commit = hub_commit(target, "model", wanted.revision, "target")
    logger.info("target: %s of the Hugging Face hub, commit %s", target, commit or "as cached")
    return Origin(target, commit or wanted.revision, wanted.tokenizer, None)


def initialised_anew(inner: nn.Module) -> nn.Module:
    """A model of the same class and sizes with the library's own initialisation, from one seed."""
    if not isinstance(inner, PreTrainedModel):
        raise UserError(
            f"null: a {type(inner).__name__} cannot be initialised anew, as models of transformers can"
        )
    parameter = next(inner.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("null target"))
        fresh: nn.Module = type(inner)(copy.deepcopy(inner.config))
    return nn.Module.to(fresh, parameter.device, parameter.dtype)


def _is_null(origin: Origin) -> bool:
    """Whether what was found is a model that was never trained: a training gave it as it begins."""
    return origin.directory is not None and is_trained_here(origin.directory)


def _origin(directory: Path) -> dict[str, Any]:
    """What `save_copy` recorded, or a `UserError` if it did not write this."""
    path = directory / ORIGIN_FILE
    record = read_json(path)
    names = {"reference", "revision", "tokenizer"}
    if not isinstance(record, dict) or record.keys() != names:
        raise UserError(
            f"{path}: not the origin of a target: {', '.join(sorted(names))} are needed"
        )
    for name, value in record.items():
        if not (isinstance(value, str) or (value is None and name != "reference")):
            raise UserError(f"{path}: {name}: a name is needed, got {value!r}")
        if value is not None and ".." in Path(value).parts:
            raise UserError(f"{path}: {name}: {value!r}: a place is named without '..'")
    return record


def import_class(path: str) -> Any:
    """The class at `package.module.Class`, which must have `from_pretrained`."""
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model_class: {path!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and callable(getattr(found, "from_pretrained", None))):
        raise UserError(f"model_class: {path!r} is no class with from_pretrained")
    own = found.__module__.partition(".")[0] == "transformers"
    if own and not issubclass(found, PreTrainedModel | _BaseAutoModelClass):
        # what else is loaded there, as AutoProcessor, would ask whether to run code that lies beside it
        raise UserError(f"model_class: {path!r} is no model of transformers")
    return found


def unembed_path(inner: nn.Module) -> str | None:
    """Path of the module that makes the logits, where the model tells which it is."""
    try:
        unembed = inner.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, module in inner.named_modules() if module is unembed), None)


def save_copy(
    model: TokenModel,
    tokenizer: PreTrainedTokenizerBase | None,
    origin: Origin,
    directory: Path,
    *,
    max_megabytes: float,
) -> None:
    """Write into `directory` what `load_lm` needs to load this target again.

    Larger weights, and those of a class that cannot save them, are not copied: then the record of
    where they come from must do.
    """
    directory.mkdir(parents=True)
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    save: Any = getattr(model.inner, "save_pretrained", None)
    if save is not None and n_bytes <= max_megabytes * 2**20:
        save(directory)  # sites are saved as what they stand for
        for weights in directory.glob("*.safetensors"):
            give_usual_mode(weights)
    else:
        logger.info(
            "target: %.0f MB are not copied into the run (copy_target_mb: %.0f); it will be loaded from"
            " %s",
            *(n_bytes / 2**20, max_megabytes, origin.reference),
        )
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    record = origin._asdict()
    del record["directory"]
    write_json(directory / ORIGIN_FILE, record)


def _load_model(model_class: Any, origin: Origin, wanted: Wanted, device_map: Any = None) -> Any:
    place, revision = origin.reference, origin.revision
    if origin.directory is not None and _has_weights(origin.directory):
        place, revision = str(origin.directory), None
    elif Path(place).is_absolute() and not Path(place).is_dir():
        raise UserError(
            f"target {place}: is no longer there, and the run holds no copy of its weights"
            " (copy_target_mb); put it back there, or name its new place:"
            " spd-run --resume RUN_DIR --target DIR, load_run(…, target=…)"
        )
    if Path(place).is_dir():
        check_folder(Path(place))
    dtype: torch.dtype = getattr(torch, wanted.dtype)
    arguments: dict[str, Any] = {} if revision is None else {"revision": revision}
    reports = issubclass(model_class, PreTrainedModel | _BaseAutoModelClass)
    if reports:
        # without trust_remote_code it would ask at a terminal
        arguments |= {"dtype": dtype, "output_loading_info": True, "trust_remote_code": False}
        arguments |= {} if device_map is None else {"device_map": device_map}
    elif device_map is not None:
        raise UserError(
            f"device_map: {device_map!r}; {wanted.model_class} is no model of transformers; name a device"
        )
    try:
        loaded = model_class.from_pretrained(place, **arguments)
    except OSError as error:
        if Path(place).is_dir():
            for path in sorted(Path(place).iterdir()):
                if denied := forbidden(path, FileNotFoundError()):
                    raise denied from None
            raise UserError(f"target {place}: {_one_line(error)}") from None
        raise unreachable(place, "target", error) from None
    except (
        *(ValueError, TypeError, KeyError, RuntimeError, ImportError),
        *(pickle.UnpicklingError, EOFError),
    ) as error:
        raise UserError(
            f"target {place!r} as {wanted.model_class}: cannot be loaded: {_said(error)}"
        ) from None
    if reports:
        loaded, info = loaded
        missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if missing:
            raise UserError(
                f"target {place!r}: has no weights for {', '.join(missing[:5])}"
                f"{', …' if len(missing) > 5 else ''} of {wanted.model_class}; name its own model_class"
            )
    else:
        loaded = loaded.to(dtype)
    other = {p.dtype for p in loaded.parameters() if p.is_floating_point()} - {dtype}
    if other:
        raise UserError(f"target {place!r}: was loaded as {other}, not as {dtype}")
    return loaded


def _load_tokenizer(origin: Origin, wanted: Wanted) -> PreTrainedTokenizerBase | None:
    reference, revision = wanted.tokenizer or origin.reference, None
    directory = origin.directory
    if directory is not None and _has_tokenizer(directory, origin, wanted):
        reference = str(directory)
    elif not Path(reference).expanduser().is_dir():
        revision = (
            origin.revision
            if reference == origin.reference
            else hub_commit(reference, "model", None, "tokenizer")
        )
    arguments: dict[str, Any] = {} if revision is None else {"revision": revision}
    arguments["trust_remote_code"] = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference, **arguments)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            # the library makes this up where a model's own tokenizer is missing
            raise ValueError("it has no files there")
        return tokenizer
    except Exception as error:  # the library raises whatever its converters do
        if not wanted.needs_tokenizer and wanted.tokenizer is None:
            return None
        if isinstance(error, OSError) and not Path(reference).is_dir():
            raise unreachable(reference, "tokenizer", error) from None
        raise UserError(f"tokenizer {reference!r}: cannot be loaded: {_said(error)}") from None


def _said(error: Exception) -> str:
    """What is wrong; an advice to run code of a stranger's is not passed on."""
    if "trust_remote_code" in str(error):
        return "it needs code that lies beside it, which is not run"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds something else than tensors and plain values, or was cut short"
    return _one_line(error)


def _no_revision(wanted: Wanted) -> None:
    if wanted.revision is not None:
        raise UserError(f"revision: {wanted.target!r} is not on the hub, it has no revisions")


def _has_weights(directory: Path) -> bool:
    found = (*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin"))
    return any(path.name != HELD_OUT_FILE for path in found)


def _has_tokenizer(directory: Path, origin: Origin, wanted: Wanted) -> bool:
    """Whether the tokenizer that is wanted lies beside the target."""
    copied = (directory / ORIGIN_FILE).is_file() and wanted.tokenizer == origin.tokenizer
    return copied or wanted.tokenizer is None


def _n_vocab(inner: nn.Module) -> int:
    try:
        return inner.get_input_embeddings().num_embeddings  # pyright: ignore
    except (AttributeError, NotImplementedError):
        found = getattr(getattr(inner, "config", None), "vocab_size", None)
    if not isinstance(found, int):
        raise UserError("model_class: neither get_input_embeddings nor config.vocab_size is there")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
