"""A decomposition alone, as a folder or on the Hugging Face hub: V, U and importance functions.

The target's weights stay where they are; what is kept of them is where they came from and a fingerprint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from spd.component_model import ComponentModel
from spd.config import BaseConfig, UserError, parse
from spd.importance import ImportanceConfig, LowerLeak
from spd.run_files import META_FILE, forbidden, read_json, write_safetensors
from spd.runs.console import resolve_device
from spd.runs.library import Result
from spd.runs.run import Run, load_run
from spd.runs.target import digest
from spd.runs.trust import Entry, check_values, entry_of_run, parts_of_entry

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
OWN_PACKAGE = "spd."


class TargetReference(BaseConfig):
    """How the run that made a decomposition came by its target."""

    model_config = ConfigDict(protected_namespaces=())

    module: str
    config_class: str
    build: str
    config: dict[str, Any]
    """the configuration of the run"""


class Layout(BaseConfig):
    """What it takes to lay saved parameters over a target."""

    sites: dict[str, int]
    """module path → C"""
    importance: ImportanceConfig
    lower_leak: LowerLeak
    tied_sites: tuple[tuple[str, str], ...]
    fingerprint: str
    """of the decomposed matrices of the target, in float32"""
    target: TargetReference | None = None


class Decomposition(ModelHubMixin, library_name="spd", tags=["stochastic-parameter-decomposition"]):
    """A `ComponentModel` that can be saved without its target.

    `save_pretrained(folder)` and `push_to_hub("user/name")` write it, `from_pretrained` reads either.
    """

    def __init__(self, model: ComponentModel, layout: Layout) -> None:
        self.model = model
        self.layout = layout

    @classmethod
    def of(cls, found: Run | Result | str | Path) -> Self:
        """Of what `decompose` returned, a loaded run, or the directory of one."""
        if isinstance(found, Result):
            config, problem = found.prepared.config, found.prepared.problem
            return cls.of_model(
                found.model,
                config.importance,
                lower_leak=config.lower_leak,
                tied_sites=problem.tied_sites,
            )
        return cls.of_run(found if isinstance(found, Run) else load_run(found))

    @classmethod
    def of_run(cls, run: Run) -> Self:
        """What a run has found, at the checkpoint that was loaded."""
        entry = entry_of_run(run.directory)
        reference = TargetReference(
            module=entry.module,
            config_class=entry.config,
            build=entry.build,
            config=run.config.model_dump(mode="json"),
        )
        return cls.of_model(
            run.model,
            run.config.importance,
            lower_leak=run.config.lower_leak,
            tied_sites=run.problem.tied_sites,
            target=reference,
        )

    @classmethod
    def of_model(
        cls,
        model: ComponentModel,
        importance: ImportanceConfig,
        *,
        lower_leak: LowerLeak = "both",
        tied_sites: tuple[tuple[str, str], ...] = (),
        target: TargetReference | None = None,
    ) -> Self:
        """A model that no run made: its target has to be given again when it is loaded."""
        layout = Layout(
            sites={path: site.C for path, site in model.sites.items()},
            importance=importance,
            lower_leak=lower_leak,
            tied_sites=tied_sites,
            fingerprint=digest(model, torch.float32),
            target=target,
        )
        return cls(model, layout)

    def _save_pretrained(self, save_directory: Path) -> None:
        text = self.layout.model_dump_json(indent=2)
        (save_directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        parameters = self.model.subcomponent_parameters()
        tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        write_safetensors(save_directory / WEIGHTS_FILE, tensors)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        target: nn.Module | None = None,
        device: str = "cpu",
        **download: Any,
    ) -> Self:
        """Over `target`, a module of the shape and weights of the original one, or one made as that was.

        The directory of a run will do, too: its newest checkpoint, over the run's own target.
        """
        folder = Path(model_id)
        if target is None and (folder / META_FILE).is_file():
            return cls.of_run(load_run(folder, device=device))
        if not folder.is_dir():
            names = [CONFIG_FILE, WEIGHTS_FILE]
            folder = Path(snapshot_download(model_id, allow_patterns=names, **download))
        layout, tensors = _read(folder)
        if target is None:
            target = _make_target(layout, folder, device)
        model = ComponentModel(
            target,
            layout.sites,
            layout.importance,
            tied_sites=layout.tied_sites,
            lower_leak=layout.lower_leak,
        )
        if digest(model, torch.float32) != layout.fingerprint:
            raise UserError(
                f"{model_id}: the matrices of this target are others than those that were decomposed"
            )
        try:
            model.load_subcomponents(tensors)
        except ValueError as error:
            raise UserError(
                f"{folder / WEIGHTS_FILE}: does not fit {CONFIG_FILE}: {error}"
            ) from None
        return cls(model, layout)


def _read(folder: Path) -> tuple[Layout, Mapping[str, torch.Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} there; a saved decomposition is expected")
    raw = read_json(folder / CONFIG_FILE)
    layout = parse(Layout, raw, str(folder / CONFIG_FILE))
    try:
        return layout, load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        weights = folder / WEIGHTS_FILE
        raise forbidden(weights, error) or UserError(f"{weights}: damaged: {error}") from None


def _make_target(layout: Layout, folder: Path, device: str) -> nn.Module:
    """As the run made it. Code that does not belong to this package is not run for a file's sake."""
    reference = layout.target
    if reference is None or not reference.module.startswith(OWN_PACKAGE):
        origin = "no run made it" if reference is None else f"{reference.module} made its target"
        raise UserError(f"{folder}: {origin}; give the target: from_pretrained(…, target=module)")
    place = f"{folder / CONFIG_FILE}: target"
    entry = Entry(reference.module, reference.config_class, reference.build)
    config_class, build = parts_of_entry(entry, place)
    config = parse(config_class, reference.config, place)
    check_values(config, place)
    return build(config, resolve_device(device)).target
