"""A target, or what its decomposition makes of it, in the ordinary form: nothing of this package in it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel, Site
from spd.components import is_transposed
from spd.config import UserError, nearest
from spd.engine.experts import stacked
from spd.run_files import TARGET, give_usual_mode, new_directory, write_safetensors
from spd.runs.run import Run

What = Literal["target", "sum", "edited"]
WEIGHTS_FILE = "model.safetensors"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@runtime_checkable
class HasModel(Protocol):
    """A `Run`, what `decompose` returns, or a `Decomposition`."""

    @property
    def model(self) -> ComponentModel: ...


def export(
    source: HasModel | ComponentModel,
    folder: str | Path,
    what: What | str = "target",
    *,
    edits: Mapping[str, Tensor | float] | None = None,
) -> Path:
    """Write a model into a new folder, which is returned.

    A Hugging Face target becomes a folder for `from_pretrained`, with the tokenizer that its run keeps;
    any other one a `model.safetensors` for `load_state_dict`, with the files that its run keeps beside it.

    what: "target" is the target, bit for bit. "sum" has V U in place of every decomposed W. "edited" has
    W + V diag(m − 1) U: each subcomponent c of a site counts m_c times (0: it is taken out), and whatever
    the subcomponents leave over of W stays. `edits` gives m: site → number or `[C]`; or `[C, d_out]`, what
    the subcomponents write in place of U.
    """
    if what not in get_args(What):
        raise UserError(
            f"what: {what!r} is unknown{nearest(str(what), get_args(What))} (allowed:"
            f" {', '.join(get_args(What))})"
        )
    if not isinstance(source, ComponentModel) and not hasattr(source, "model"):
        raise UserError(
            f"source: {type(source).__name__}; what decompose or load_run gave, or its model, is needed"
        )
    model = source if isinstance(source, ComponentModel) else source.model
    model.check_current()
    if (what == "edited") != bool(edits):
        raise UserError(
            f"edits: {'needed for' if what == 'edited' else 'no part of'} what={what!r}"
        )
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not empty; a new folder is needed")
    weights = _weights(model, what, edits or {})
    inner = _pretrained(model)
    with new_directory(folder) as partial:
        if inner is None:
            write_safetensors(partial / WEIGHTS_FILE, _state(model.target, weights))
        else:
            _save_pretrained(inner, weights, partial)
            for path in partial.glob("*.safetensors"):
                give_usual_mode(path)
        if isinstance(source, Run):
            _copy_others(source.directory / TARGET, partial)
    return folder


def _state(target: nn.Module, weights: Mapping[nn.Module, Tensor]) -> dict[str, Tensor]:
    """What `load_state_dict` takes; `UserError` where one parameter would have two values."""
    new, old = _named(target, weights), target.state_dict()
    owner = {value.data_ptr(): name for name, value in old.items() if name in new}
    for name, value in old.items():
        shared = owner.get(value.data_ptr()) if value.numel() else None
        own = new.get(name)
        if shared is not None and not _equal(value if own is None else own, new[shared]):
            raise UserError(
                f"{shared} and {name} are one parameter, which would have two values; untie them in a copy"
                " of the target, or decompose both with tied_sites"
            )
    return {name: _alone(value) for name, value in old.items()} | new


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.cpu(), other.cpu())


def _weights(
    model: ComponentModel, what: str, edits: Mapping[str, Tensor | float]
) -> dict[nn.Module, Tensor]:
    """Site → what stands in the place of its weight, in the layout and type of that."""
    unknown = [path for path in edits if path not in model.sites]
    if unknown:
        raise UserError(
            f"edits: {unknown[0]!r} is no site{nearest(unknown[0], model.sites)} (sites:"
            f" {', '.join(model.sites)})"
        )
    weights: dict[nn.Module, Tensor] = {}
    for path, site in model.sites.items():
        if what == "sum" or path in edits:
            weights[site] = _weight(path, site, edits.get(path))
    return weights


@torch.no_grad()
def _weight(path: str, site: Site, m: Tensor | float | None) -> Tensor:
    V, U = site.subcomponents.V, site.subcomponents.U
    own, given_out = site.weight, site.target_weight
    if m is None:
        matrix = V @ U
    else:
        factors = torch.as_tensor(m, dtype=V.dtype, device=V.device)
        if factors.shape not in ((), (site.C,), U.shape):
            raise UserError(
                f"edits: that of {path!r} has the shape {tuple(factors.shape)}; a number or ({site.C},),"
                f" one for each subcomponent, is needed, or {tuple(U.shape)}, what they write instead"
            )
        difference = factors - U if factors.ndim == 2 else (factors[..., None] - 1) * U
        matrix = given_out.to(V.dtype) + V @ difference
    if is_transposed(site.original):
        return matrix.mT.to(own.dtype).contiguous()
    if given_out is not own:  # an embedding that gives out a multiple of its rows
        factor = (given_out.float() * own.float()).sum() / own.float().square().sum()
        if not torch.allclose(own.float() * factor, given_out.float(), rtol=1e-2, atol=1e-6):
            raise UserError(
                f"sites: {path!r} gives out no multiple of its rows: it cannot be exported"
            )
        matrix = matrix / factor
    return matrix.to(own.dtype).contiguous()


def _pretrained(model: ComponentModel) -> Any | None:
    """The Hugging Face model that holds all sites, if the target is one, or a module around one."""
    candidates = [getattr(model.target, "inner", None), *model.target.modules()]
    sites = set(model.sites.values())
    for module in candidates:
        known = isinstance(module, nn.Module) and hasattr(module, "save_pretrained")
        if known and sites <= set(module.modules()):
            return module
    return None


def _named(module: nn.Module, weights: Mapping[nn.Module, Tensor]) -> dict[str, Tensor]:
    """The same under every name that a site has in a module."""
    named = {
        f"{path}.weight": weights[part].cpu()
        for path, part in module.named_modules(remove_duplicate=False)
        if part in weights
    }
    return stacked(module, named)


def _save_pretrained(inner: Any, weights: Mapping[nn.Module, Tensor], folder: Path) -> None:
    """In its own form; a matrix at both ends of a language model becomes two where they differ now."""
    state = inner.state_dict()
    new = _named(inner, weights)
    apart = _differ(state, state | new)
    parts = [inner.config, getattr(inner.config, "text_config", None)]
    tied = [config for config in parts if apart and getattr(config, "tie_word_embeddings", False)]
    for config in tied:
        config.tie_word_embeddings = False
    try:
        if apart:
            new = {name: _alone(value) for name, value in (state | new).items()}
        inner.save_pretrained(folder, state_dict=state | new)
    finally:
        for config in tied:
            config.tie_word_embeddings = True


def _differ(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether names that stood for one tensor stand for several."""
    first: dict[int, str] = {}
    names = ((first.setdefault(value.data_ptr(), name), name) for name, value in before.items())
    return any(not torch.equal(after[one], after[other]) for one, other in names)


def _alone(tensor: Tensor) -> Tensor:
    """A copy that shares its memory with nothing."""
    return tensor.detach().cpu().contiguous().clone()


def _copy_others(target: Path, folder: Path) -> None:
    """What a run keeps of its target beside the weights: tokenizer, configuration."""
    for path in sorted(target.iterdir()) if target.is_dir() else ():
        kept = path.is_file() and not path.name.endswith((*WEIGHTS, ".index.json"))
        if kept and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
