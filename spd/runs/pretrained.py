"""A decomposition as a folder or on the Hugging Face hub: V, U, importance functions, and its run's target.

The target travels as weights, or as a name and a revision on the hub where its run has no copy of it. Of
one that no run keeps, a fingerprint travels, and the target has to be given again.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from spd.component_model import ComponentModel
from spd.config import BaseConfig, UserError, parse
from spd.importance import ImportanceConfig, LowerLeak
from spd.reports.evaluations import evaluation_of
from spd.reports.results import Evaluation, last_evaluation
from spd.run_files import META_FILE, TARGET, forbidden, read_json, write_safetensors
from spd.runs.card import CARD, Figure, card_of
from spd.runs.console import resolve_device
from spd.runs.export import export
from spd.runs.library import Result
from spd.runs.run import Run, load_run
from spd.runs.target import ROUNDING, digest, distance, sketches, with_target
from spd.runs.trust import Entry, check_values, entry_of_run, parts_of_entry

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
OWN_PACKAGE = "spd."
ORIGIN_FILE = "origin.json"
"""in the target of a run on a language model: where it comes from"""


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
    sketches: dict[str, list[float]] | None = None
    """site → a few numbers of its matrix, by which it is told how far another one is away"""
    target: TargetReference | None = None
    figures: tuple[Figure, ...] = ()
    """of the run's last evaluation, for the model card"""


class Decomposition(ModelHubMixin, library_name="spd", tags=["stochastic-parameter-decomposition"]):
    """A `ComponentModel` that can be saved without its run, with the target that the run keeps.

    `save_pretrained(folder)` and `push_to_hub("user/name")` write it, `from_pretrained` reads either.
    """

    def __init__(
        self, model: ComponentModel, layout: Layout, kept: Run | Path | None = None
    ) -> None:
        self.model = model
        self.layout = layout
        self.kept = kept
        """what is written of the target: that of a run, or what lies in a folder"""

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
        found = cls.of_model(
            run.model,
            run.config.importance,
            lower_leak=run.config.lower_leak,
            tied_sites=run.problem.tied_sites,
            target=reference,
        )
        evaluation = evaluation_of(last_evaluation(run.metrics), run.config.metrics)
        layout = found.layout.model_copy(update={"figures": _figures(evaluation)})
        return cls(run.model, layout, run)

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
            sketches=sketches(model),
            target=target,
        )
        return cls(model, layout)

    def _save_pretrained(self, save_directory: Path) -> None:
        text = self.layout.model_dump_json(indent=2)
        (save_directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        parameters = self.model.subcomponent_parameters()
        tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        write_safetensors(save_directory / WEIGHTS_FILE, tensors)
        _write_target(self.kept, save_directory / TARGET)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What it is, its figures, and how to load it."""
        card = card_of(
            self.model, self.layout.figures, made_of=self._origin(), travels=self.kept is not None
        )
        return ModelCard.from_template(
            card_data=self._hub_mixin_info.model_card_data, template_str=CARD, **card, **kwargs
        )

    def _origin(self) -> dict[str, Any]:
        reference = self.layout.target
        return {} if reference is None else reference.config

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        target: nn.Module | None = None,
        device: str = "cpu",
        **download: Any,
    ) -> Self:
        """Over the target that came with it, or `target`, a module with the weights of the original one.

        Where these differ by rounding, as if they were made on another machine, one line in the log says by
        how much. The directory of a run will do, too: its newest checkpoint, over the run's own target.
        """
        folder = Path(model_id)
        if target is None and (folder / META_FILE).is_file():
            return cls.of_run(load_run(folder, device=device))
        if not folder.is_dir():
            names = [CONFIG_FILE, WEIGHTS_FILE, f"{TARGET}/*"]
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
        _check_matrices(model, layout, model_id)
        try:
            model.load_subcomponents(tensors)
        except ValueError as error:
            raise UserError(
                f"{folder / WEIGHTS_FILE}: does not fit {CONFIG_FILE}: {error}"
            ) from None
        own = folder / TARGET
        return cls(model, layout, own if own.is_dir() else None)


def _figures(evaluation: Evaluation) -> tuple[Figure, ...]:
    return tuple(
        Figure(label=row.metric, value=evaluation.own(row), published=evaluation.published(row))
        for row in evaluation.rows
    )


def _write_target(found: Run | Path | None, folder: Path) -> None:
    """What a run keeps of its target, and the weights unless the hub has them; or a folder's files."""
    if found is None:
        return
    if folder.is_dir():  # of what was saved there before
        shutil.rmtree(folder)
    if isinstance(found, Path):
        shutil.copytree(found, folder, copy_function=shutil.copyfile)
        return
    own = found.directory / TARGET
    if not own.is_dir():
        return
    shutil.copytree(own, folder, copy_function=shutil.copyfile)
    has_weights = any(own.glob("*.safetensors")) and not (own / ORIGIN_FILE).is_file()
    has_weights = has_weights or any(own.glob("model*.safetensors"))
    if has_weights or _is_on_hub(own / ORIGIN_FILE):
        return
    whole = folder.with_name(f".{TARGET}.weights")
    export(found, whole)
    for path in whole.iterdir():
        path.replace(folder / path.name)
    whole.rmdir()


def _is_on_hub(origin: Path) -> bool:
    """Whether a target comes from there, so that its name and revision are enough."""
    record = read_json(origin) if origin.is_file() else {}
    reference = record.get("reference") if isinstance(record, dict) else None
    return isinstance(reference, str) and not Path(reference).is_absolute()


def _check_matrices(model: ComponentModel, layout: Layout, place: str) -> None:
    """`UserError` if a target is another one; a warning if it differs by rounding from what it was."""
    if digest(model, torch.float32) == layout.fingerprint:
        return
    off, known = None, layout.sketches
    if known is not None and known.keys() == model.sites.keys():
        off = distance(known, sketches(model))
    if off is None or not off <= ROUNDING:
        by = (
            ""
            if off is None
            else f" (by about {off:.2g} of their norm; up to {ROUNDING} is rounding)"
        )
        raise UserError(
            f"{place}: the matrices of this target are others than those that were decomposed{by}"
        )
    logger.warning(
        "%s: the matrices of this target differ by about %.1e of their norm from those that were"
        " decomposed, as by rounding on another machine; it is used as it is",
        *(place, off),
    )


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
    if (folder / TARGET).is_dir():
        config = with_target(config, folder / TARGET)
    return build(config, resolve_device(device)).target
