"""Which subcomponent causes which: direct effects on a prompt and over data (VPD paper, section 4).

The edge s → t is ∂a_t/∂a_s · a_s · g_s, with a = x V the inner activations and the gradient stopped at the
activation of every other subcomponent: what flows through the residual stream, norms, neurons and
attention, and not through another decomposed matrix. What V U leaves over of a matrix is a constant here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.problem import Batch, of_ids

INPUT = "input"
"""the source that stands for a toy's input or for the token embedding"""


@dataclass
class Traced:
    """One pass of the target in which the activation of every subcomponent is a leaf of its own."""

    output: Tensor
    acts: dict[str, Float[Tensor, "*rows C"]] = field(default_factory=dict)
    """of each site in the order in which they run, as it depends on the leaves before it"""
    leaves: dict[str, Float[Tensor, "*rows C"]] = field(default_factory=dict)
    """the same numbers, on which all that comes later depends"""
    embedded: Tensor | None = None
    """the token embedding or the input, a leaf too; None: that is a site itself"""
    read: Tensor | None = None
    """what the unembedding reads, if it is known"""

    def gradients(self, target: Float[Tensor, ""]) -> dict[str, Tensor]:
        """Of a number with respect to every leaf that it depends on; those of `INPUT` under that name."""
        leaves = dict(self.leaves)
        if self.embedded is not None:
            leaves[INPUT] = self.embedded
        found = torch.autograd.grad(target, list(leaves.values()), None, True, allow_unused=True)
        return {path: own for path, own in zip(leaves, found, strict=True) if own is not None}


def trace(model: ComponentModel, batch: Batch, *, unembed: str | None = None) -> Traced:
    """Run the target with every activation a leaf; its output is what it always is.

    unembed: the module that makes logits, whose input is kept.
    """
    found = Traced(torch.zeros(()))
    handles = []

    def begin(path: str) -> Callable[..., Tensor]:
        site = model.sites[path]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if path in found.acts or model.running.routed is not None:
                raise UserError(
                    f"{path!r} reads some positions only, or is called twice; such a site has no edges here"
                )
            parts = site.subcomponents
            x = inputs[0]
            h = parts.acts(x if parts.reads_ids else x.to(parts.V.dtype))
            leaf = h.detach().requires_grad_()
            found.acts[path], found.leaves[path] = h, leaf
            constant = (output - parts.write(h, None).to(output.dtype)).detach()
            return parts.write(leaf, None).to(output.dtype) + constant

        return hook

    embedding = _embedding(model, batch)

    def keep_embedded(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found.embedded = output.detach().requires_grad_()
        return found.embedded

    def keep_read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.read = inputs[0]

    if embedding is not None:
        handles.append(embedding.register_forward_hook(keep_embedded))
    if unembed is not None:
        head = model.target.get_submodule(unembed)
        handles.append(head.register_forward_pre_hook(keep_read))
    handles += [site.register_forward_hook(begin(path)) for path, site in model.sites.items()]
    try:
        with torch.enable_grad(), _without_own_gradients(model):
            if isinstance(batch, Tensor) and not of_ids(batch):
                batch = found.embedded = batch.detach().requires_grad_()
            found.output = model(batch, {})
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _without_own_gradients(model: ComponentModel) -> Iterator[None]:
    """V, U and importance functions need no gradient in the meantime."""
    parameters = [p for p in model.subcomponent_parameters().values() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _embedding(model: ComponentModel, batch: Batch) -> nn.Module | None:
    """The module that embeds the token ids; None for other batches, and where it is a site itself."""
    if not isinstance(batch, Tensor) or not of_ids(batch):
        return None
    seen: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs and inputs[0].shape == batch.shape and torch.equal(inputs[0], batch):
            seen.append(module)

    kinds = [m for m in model.target.modules() if isinstance(m, nn.Embedding)]
    handles = [module.register_forward_hook(look) for module in kinds]
    try:
        model.target_forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    originals = [site.original for site in model.sites.values()]
    return next((module for module in seen if module not in originals), None)


def direct_effects(
    traced: Traced, target: Float[Tensor, ""], g: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """∂target/∂a_s · a_s · g_s of every subcomponent at every row or position, by site.

    Under `INPUT` those of the inputs, or of the token embedding, summed over its width `[*rows]`.
    """
    found = {}
    for path, slope in traced.gradients(target).items():
        if path == INPUT:
            assert traced.embedded is not None, "it has a gradient"
            effect = slope * traced.embedded
            tokens = effect.dim() > 2
            found[path] = (effect.sum(dim=-1) if tokens else effect).detach()
        else:
            found[path] = (slope * traced.leaves[path] * g[path].clamp(0, 1)).detach()
    return found


# --- over data -------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A subcomponent."""

    site: str
    c: int


@dataclass
class Sums:
    """What edges over data are made of."""

    effects: dict[Node, dict[str, Float[Tensor, " C"]]] = field(default_factory=dict)
    """target → source site → A = Σ attr over all rows; under `INPUT` by feature or token"""
    absolute: dict[Node, dict[str, Float[Tensor, " C"]]] = field(default_factory=dict)
    """the same of |a_t|"""
    importance: dict[str, Float[Tensor, " C"]] = field(default_factory=dict)
    """Σ g_s; under `INPUT` how often each token stood there, or in how many rows a feature was not 0"""
    squares: dict[str, Float[Tensor, " C"]] = field(default_factory=dict)
    """Σ a²"""
    n_rows: int = 0

    def rms(self, node: Node) -> float:
        """RMS of the activation of a target over all rows."""
        return (self.squares[node.site][node.c] / max(self.n_rows, 1)).sqrt().item()

    def normalised(self, target: Node, source: str, *, absolute: bool = False) -> Tensor:
        """Â = A / (Σ g_s · RMS(a_t)), of every source in a site; 0 where the source is never on."""
        A = (self.absolute if absolute else self.effects)[target][source]
        below = self.importance[source] * self.rms(target)
        return torch.where(below > 1e-12, A / below.clamp(min=1e-12), 0.0)


def over_data(
    model: ComponentModel,
    batches: Sequence[Batch],
    targets: Sequence[Node],
    *,
    absolute: bool = True,
    n_tokens: int | None = None,
) -> Sums:
    """The direct effects on each target, summed over the data: one backward pass for each and each batch.

    With `absolute` another of |a_t| (sign(a_t) times the first). n_tokens: how many ids there are, where
    batches are token ids.
    """
    sums = Sums()
    for batch in batches:
        traced = trace(model, batch)
        g = model.importances(batch).lower
        sums.n_rows += _count(sums, traced, g, batch, n_tokens)
        for target in targets:
            a = traced.acts[target.site][..., target.c]
            kinds = [(sums.effects, a)]
            if absolute:
                kinds.append((sums.absolute, a * a.detach().sign()))
            for into, own in kinds:
                own_sums = into.setdefault(target, {})
                if not own.requires_grad:  # of a first site whose input is a site's neither
                    continue
                for path, effect in direct_effects(traced, own.sum(), g).items():
                    total = _summed(path, effect, batch, n_tokens)
                    own_sums[path] = own_sums[path] + total if path in own_sums else total
    return sums


def _count(
    sums: Sums, traced: Traced, g: Mapping[str, Tensor], batch: Batch, n_tokens: int | None
) -> int:
    n_rows = 0
    for path, own in g.items():
        clipped = own.clamp(0, 1).flatten(end_dim=-2).sum(dim=0)
        squares = traced.acts[path].detach().square().flatten(end_dim=-2).sum(dim=0)
        n_rows = own.flatten(end_dim=-2).shape[0]
        for into, new in ((sums.importance, clipped), (sums.squares, squares)):
            into[path] = into[path] + new if path in into else new
    if traced.embedded is not None and isinstance(batch, Tensor):
        counts = (
            (batch != 0).flatten(end_dim=-2).sum(dim=0).float()
            if n_tokens is None
            else torch.bincount(batch.flatten(), minlength=n_tokens).float()
        )
        before = sums.importance.get(INPUT)
        sums.importance[INPUT] = counts if before is None else before + counts
    return n_rows


def _summed(path: str, effect: Tensor, batch: Batch, n_tokens: int | None) -> Tensor:
    if path == INPUT and n_tokens is not None:
        assert isinstance(batch, Tensor), "token ids"
        zeros = effect.new_zeros(n_tokens)
        return zeros.index_add(0, batch.flatten(), effect.flatten())
    return effect.flatten(end_dim=-2).sum(dim=0)


def to_unembedding(
    model: ComponentModel, batches: Sequence[Batch], unembed: str
) -> dict[str, Float[Tensor, "C d_model"]]:
    """Σ over the data of the direct effect of each subcomponent on what the unembedding reads.

    In the space of the residual stream, so that the effect on any token's logit is a product with its
    column of the unembedding: d_model backward passes for each batch. Under `INPUT` that of the token
    embedding as a whole, `[1, d_model]`.
    """
    sums: dict[str, Tensor] = {}
    for batch in batches:
        traced = trace(model, batch, unembed=unembed)
        g = model.importances(batch).lower
        assert traced.read is not None, "the unembedding is called"
        width = traced.read.shape[-1]
        for i in range(width):
            for path, effect in direct_effects(traced, traced.read[..., i].sum(), g).items():
                total = effect.sum() if path == INPUT else effect.flatten(end_dim=-2).sum(dim=0)
                own = sums.setdefault(path, effect.new_zeros(*total.shape or (1,), width))
                own[:, i] += total
    return sums
