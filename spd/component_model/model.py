"""The target with sites in it, and the passes through it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from spd.component_model.building import (
    check_size,
    check_ties,
    make_subcomponents,
    sizes_of,
    width_of_input,
)
from spd.component_model.places import begin_anew, paths_of_modules, places_of
from spd.component_model.site import Site
from spd.components import (
    check_nothing_is_attached,
    check_weight,
    input_output_weight,
    resolve_sites,
)
from spd.config import UserError, nearest
from spd.importance import (
    CausalImportances,
    ImportanceConfig,
    LowerLeak,
    WholeImportance,
    WholeImportanceSpec,
    check_together,
)
from spd.masks import (
    GivenMask,
    GivenMasks,
    Mask,
    Pass,
    RoutedInput,
    Running,
    SiteInput,
    SiteMask,
)
from spd.noise import derive_seed
from spd.problem import Batch, as_batch, run_target

HALVES = (torch.float16, torch.bfloat16)
"""in which a target may compute, but no loss is"""


WITH_FAST_PATH = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""without gradients they read the weights of their modules, and call none of them, unless that is switched
off (`torch.backends.mha`)"""


class TargetOutput(NamedTuple):
    """What the unchanged target computes on a batch."""

    output: Tensor
    """the target's output"""
    site_inputs: dict[str, SiteInput]
    """what it feeds to each site: `[..., d_in]`, token ids for an embedding, or rows of some positions"""


class ComponentModel(nn.Module):
    """The target with a `Site` in place of every decomposed module. Changes `target` in place.

    Trainable are only `V`, `U` and the importance functions: `subcomponent_parameters()`. With
    `autocast` the target and its replaced sites run in that type where torch deems it safe; outputs and
    importances are float32 nevertheless.
    """

    def __init__(
        self,
        target: nn.Module,
        sites: Mapping[str, int],
        importance: ImportanceConfig,
        *,
        tied_sites: Sequence[tuple[str, str]] = (),
        lower_leak: LowerLeak = "both",
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        begin_anew(target)
        C_of = resolve_sites(target, sites)
        for path in C_of:
            check_weight(path, target.get_submodule(path))
        check_size(target, C_of, importance)
        target.requires_grad_(False).eval()
        if any(isinstance(module, WITH_FAST_PATH) for module in target.modules()):
            torch.backends.mha.set_fastpath_enabled(False)
        self.target = target
        self.lower_leak: LowerLeak = lower_leak
        self.running = Running()
        self.overwritten: frozenset[str] = frozenset()
        """sites whose input the target changes in place later on, as far as a pass has shown it"""
        source_of = check_ties(target, C_of, tied_sites)
        places, paths_of = places_of(target, C_of), paths_of_modules(target)
        self.sites: dict[str, Site] = {}
        for path in sorted(C_of, key=lambda path: path in source_of):  # sources before their ties
            original = target.get_submodule(path)
            check_nothing_is_attached(path, original)
            generator = torch.Generator().manual_seed(derive_seed("init", seed, path))
            tie = self.sites[source_of[path]] if path in source_of else None
            subcomponents = make_subcomponents(original, C_of[path], tie, generator)
            weight = input_output_weight(original)
            function = None
            if not isinstance(importance, WholeImportanceSpec):
                d_in = width_of_input(original)
                function = importance.build(C_of[path], d_in, generator=generator)
                function = function.to(weight.device)
            site = Site(original, subcomponents, function, places[path], self.running)
            for name in paths_of[original]:  # one module may have several
                target.set_submodule(name, site)
            self.sites[path] = site
        self.sites = {path: self.sites[path] for path in C_of}
        self.importance: WholeImportance | None = None
        """the function of all sites together, where the sites have none of their own"""
        if isinstance(importance, WholeImportanceSpec):
            generator = torch.Generator().manual_seed(derive_seed("init", seed, "all sites"))
            function = importance.build(sizes_of(self.sites), generator=generator)
            self.importance = function.to(next(iter(self.sites.values())).subcomponents.V.device)

    def train(self, mode: bool = True) -> Self:
        """The target stays in evaluation mode whatever is asked for: its output is never random."""
        super().train(mode)
        self.target.eval()
        return self

    def subcomponent_parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter of everything that is trained, each once."""
        shared = {} if self.importance is None else dict(self.importance.named_parameters())
        whole = {f"importance.{name}": parameter for name, parameter in shared.items()}
        return {**self._parameters_of_sites(), **whole}

    def _parameters_of_sites(self) -> dict[str, nn.Parameter]:
        return {
            f"{path}.{name}": parameter
            for path, site in self.sites.items()
            for part, module in (
                ("subcomponents", site.subcomponents),
                ("importance", site.importance),
            )
            if module is not None
            for name, parameter in module.named_parameters(prefix=part)
        }

    def load_subcomponents(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved parameters in; names and shapes must be exactly those of this model."""
        own = self.subcomponent_parameters()
        if own.keys() != tensors.keys():
            raise ValueError(f"parameters differ: {sorted(own.keys() ^ tensors.keys())}")
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != tensors[name].shape:
                    raise ValueError(
                        f"{name}: shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensors[name])

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The target's entries are under `target.`, those of sites, which are trained, under `sites.`."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._parameters_of_sites().items():
            destination[f"{prefix}sites.{name}"] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, parameter in self._parameters_of_sites().items():
            key = f"{prefix}sites.{name}"
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != parameter.shape:
                shapes = tuple(state_dict.pop(key).shape), tuple(parameter.shape)
                error_msgs.append(f"size mismatch for {key}: {shapes[0]}, expected {shapes[1]}")
            else:
                parameter.data.copy_(state_dict.pop(key))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def importances(self, batch: Batch | Mapping[str, Tensor]) -> CausalImportances:
        """g_c(x) of every site on a batch, without gradients."""
        return self.causal_importances(self.target_forward(batch).site_inputs)

    def target_forward(self, batch: Batch | Mapping[str, Tensor]) -> TargetOutput:
        """Run the unchanged target, without gradient, and keep what it feeds to each site."""
        return self.target_output(batch, lambda: Pass({}, keep_inputs=True))

    def target_output(
        self, batch: Batch | Mapping[str, Tensor], begin: Callable[[], Pass]
    ) -> TargetOutput:
        """The same in a pass that the caller makes, and that keeps the inputs of sites.

        The first time that an input turns out to be overwritten later on, there is a second pass.
        """
        target_pass = begin()
        with torch.no_grad():
            output = self.run(batch, target_pass)
        kept = target_pass.inputs
        assert kept is not None, "such a pass keeps what the sites read"
        self._check_calls(kept)
        overwritten = target_pass.overwritten()
        if overwritten:
            self.overwritten |= overwritten
            return self.target_output(batch, begin)
        return TargetOutput(output, {path: target_pass.input_of(path) for path in self.sites})

    def _check_calls(self, kept: Mapping[str, Sequence[Tensor]]) -> None:
        """`UserError` unless every site has read something once."""
        wrong = {path: n for path in self.sites if (n := len(kept.get(path, ()))) != 1}
        if not wrong:
            return
        (path, n_calls), *others = wrong.items()
        names = " = ".join(map(repr, paths_of_modules(self.target)[self.sites[path]]))
        unseen = " (its weight is read, or not used at all)" if n_calls == 0 else ""
        also = f"; so it is with {', '.join(other for other, _ in others)}" if others else ""
        raise UserError(
            f"sites: the target calls {names} {n_calls} times in one pass{unseen}; a site must be called"
            f" once, so name patterns that leave it out{also}"
        )

    def forward(
        self, batch: Batch | Mapping[str, Tensor], masks: Mapping[str, Mask | None] | None = None
    ) -> Tensor:
        """Run with the sites named in `masks` replaced by their subcomponents; `None`: all on.

        `masks` itself `None` replaces every site, all subcomponents on.
        """
        return self.run(batch, Pass(self.known_masks(masks)))

    @contextmanager
    def masked(self, masks: Mapping[str, GivenMask] | GivenMask = None) -> Iterator[nn.Module]:
        """Whatever runs the target in the meantime (its own `generate`, hooks, other tools) runs it masked.

        `masks` names sites and gives each a mask; a site not named runs as in the target. One mask alone
        is that of every site. A mask is a number, a Tensor that broadcasts to `[..., C]` (`[C]` is one for
        all inputs), a `SiteMask`, a function of the site's input that returns one of these, None (all on),
        or `"importances"`: g_c of the input that the site has *in this masked run*, which is what
        generation can have, a token at a time; for those of the target's own run see `importances`.
        Gives the target. `UserError` if a name is no site or a mask does not fit.
        """
        given = masks if isinstance(masks, Mapping) else dict.fromkeys(self.sites, masks)
        unknown = [path for path in given if path not in self.sites]
        if unknown:
            raise UserError(
                f"masks: {unknown[0]!r} is no site{nearest(unknown[0], self.sites)} (sites:"
                f" {', '.join(self.sites)})"
            )
        self.check_current()
        this = GivenMasks(given, self.sites, self._lower_importances)
        this.copied = self.overwritten
        kind = next(self.target.parameters()).device.type
        precision = nullcontext() if self.autocast is None else torch.autocast(kind, self.autocast)
        with self.running.within(this), precision:
            yield self.target

    def _lower_importances(self, path: str, x: SiteInput) -> Tensor:
        if self.importance is not None:
            raise UserError(
                f"masks: {path!r} has 'importances', those of its own input; here one function makes them"
                " from the inputs of all sites, so give masks made by model.importances(batch)"
            )
        logits = {path: self.sites[path].importance_logits(x)}
        return CausalImportances.of_logits(logits, self.lower_leak).lower[path]

    def known_masks(self, masks: Mapping[str, Mask | None] | None) -> dict[str, Mask]:
        """Those of the sites that a pass replaces: what the argument of `forward` means."""
        chosen = dict.fromkeys(self.sites) if masks is None else masks
        unknown = [path for path in chosen if path not in self.sites]
        assert not unknown, f"masks for {unknown}, which are no sites"
        return {path: SiteMask() if mask is None else mask for path, mask in chosen.items()}

    def run(self, batch: Batch | Mapping[str, Tensor], this: Pass) -> Tensor:
        """Run the target as the pass says."""
        this.copied = self.overwritten
        self.check_current()
        before, self.running.current = self.running.current, this
        try:
            return self._run_target(as_batch(batch))
        finally:
            self.running.current = before

    def check_current(self) -> None:
        """`UserError` if the target was decomposed again since; it is in evaluation mode afterwards."""
        awake = not torch.compiler.is_compiling() and any(m.training for m in self.target.modules())
        if awake:  # one of them was told so by itself
            self.target.eval()
        if self.running.over:
            raise UserError(
                "this model's target has been decomposed again since, so that its subcomponents are no part"
                " of it any more; to keep both, decompose copies of the target (copy.deepcopy)"
            )

    def _run_target(self, batch: Batch) -> Tensor:
        if self.autocast is None:
            output = run_target(self.target, batch)
            half = isinstance(output, Tensor) and output.dtype in HALVES
            return output.float() if half else output
        with torch.autocast(batch.device.type, self.autocast):
            return run_target(self.target, batch).float()

    def causal_importances(self, site_inputs: Mapping[str, SiteInput]) -> CausalImportances:
        """g_c(x) of every site from what the *target* feeds to it.

        Gradients reach V through h_c, if the importance functions read h_c.
        """
        return CausalImportances.of_logits(self.importance_logits(site_inputs), self.lower_leak)

    def importance_logits(self, site_inputs: Mapping[str, SiteInput]) -> dict[str, Tensor]:
        """What the hard sigmoids are applied to, for every site."""
        if self.importance is not None:
            logits = self.importance(self._vectors(site_inputs))
            return {
                path: z.to(self.sites[path].subcomponents.V.device) for path, z in logits.items()
            }
        return {
            path: site.importance_logits(site_inputs[path]) for path, site in self.sites.items()
        }

    def backward_importances(
        self, site_inputs: Mapping[str, SiteInput], gradients: Mapping[str, Tensor]
    ) -> None:
        """Add to the parameters of the importance functions what arrived at their logits, by site.

        Functions of single sites are computed once more one after another.
        """
        if self.importance is not None:
            logits = self.importance_logits(site_inputs)
            torch.autograd.backward([logits[path] for path in gradients], [*gradients.values()])
            return
        for path, gradient in gradients.items():
            self.sites[path].importance_logits(site_inputs[path]).backward(gradient)

    def check_importance(self, batch: Batch) -> None:
        """`UserError` where the inputs of sites cannot be joined as a function of all of them needs it."""
        if self.importance is None:
            return
        inputs = self.target_forward(batch).site_inputs
        shapes = {path: x.shape[:-1] for path, x in self._vectors(inputs).items()}
        check_together("a function of all sites", shapes, len(batch))

    def _vectors(self, site_inputs: Mapping[str, SiteInput]) -> dict[str, Tensor]:
        """What all sites read, as vectors."""
        vectors, device = {}, next(iter(self.sites.values())).subcomponents.V.device
        for path, site in self.sites.items():
            x = site_inputs[path]
            if isinstance(x, RoutedInput):
                raise UserError(
                    f"importance: a function of all sites joins what they read at a position, and {path!r}"
                    " reads some positions only, those routed to it; leave it out, or choose functions of"
                    " single sites (mlp, shared_mlp, vector_mlp)"
                )
            vectors[path] = site.vectors(x).to(device)
        return vectors


def in_half(model: ComponentModel) -> bool:
    """Whether the target computes, in part at least, in half precision."""
    halves = any(parameter.dtype in HALVES for parameter in model.target.parameters())
    return halves or model.autocast is not None
