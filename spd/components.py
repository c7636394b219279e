"""What can be decomposed, rank-one subcomponents of one matrix, and their published initialisation."""

import fnmatch
import sys
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spd.config import UserError, nearest


class SiteMask(NamedTuple):
    """How one site is replaced in one pass: by y = ((x V) ⊙ m) U + δ (x W − (x V) U) + bias.

    With m = 1 and δ = 1 that is the target's own output, up to rounding.
    """

    components: Float[Tensor, "*rows C"] | None = None
    """m, of the subcomponents; None: all on"""
    delta: Float[Tensor, "*rows"] | None = None
    """δ, of what the subcomponents leave over of W; None: that is no part of the pass"""
    routed: Bool[Tensor, "*rows"] | None = None
    """where the site is replaced; elsewhere it gives the original's output itself. None: everywhere"""


Mask = SiteMask | Tensor | Callable[[], SiteMask | Tensor]
"""What a pass says of a site. A tensor `[..., C]` stands for `SiteMask(components=tensor)`; a function
makes either, and makes it anew in the backward pass, so that less is stored."""


def as_site_mask(mask: SiteMask | Tensor | None) -> SiteMask:
    """None stands for a site whose subcomponents are all on."""
    return mask if isinstance(mask, SiteMask) else SiteMask(components=mask)


def input_output_weight(module: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """The weight of a decomposable module as `[d_in, d_out]`, whatever its own layout.

    Of an embedding with a `forward` of its own (Gemma's multiplies by a constant): what it gives out.
    """
    weight = module.weight
    assert isinstance(weight, Tensor), f"{type(module).__name__} has no weight"
    if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
        with torch.no_grad():
            return module(torch.arange(module.num_embeddings, device=weight.device))
    return weight.mT if isinstance(module, nn.Linear) else weight


def decomposable(module: nn.Module) -> bool:
    """Whether a module is a Linear, an Embedding or GPT-2's Conv1D.

    A subclass of Linear that computes something else (a quantised one, a router) is not.
    """
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return isinstance(module, nn.Embedding) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


def check_nothing_is_attached(path: str, module: nn.Module) -> None:
    """`UserError` if something is attached to a module that its subcomponents would do without."""
    attached = [
        f"the {kind} {getattr(hook, '__qualname__', type(hook).__name__)}"
        for name, kind in HOOKS.items()
        for hook in getattr(module, name).values()
    ]
    if "forward" in vars(module):
        attached.append("a forward of its own")
    if attached:
        raise UserError(
            f"sites: {path!r} has {', '.join(attached)}, which would not act on its subcomponents; remove"
            " it before decomposing (hooks added afterwards act in every pass)"
        )


def resolve_sites(target: nn.Module, patterns: Mapping[str, int]) -> dict[str, int]:
    """Module path → C for every pattern (`fnmatch`), in the order in which the target holds them.

    A pattern without a match, two patterns on one module, or a module that cannot be decomposed is a
    `UserError` that lists what there is.
    """
    modules = {path: module for path, module in target.named_modules() if path}
    usable = [path for path, module in modules.items() if decomposable(module)]
    if not patterns:
        raise UserError(f"sites: at least one is needed; decomposable here: {', '.join(usable)}")
    matched: dict[str, str] = {}
    for pattern, C in patterns.items():
        if C < 1:
            raise UserError(f"sites: {pattern!r} has C = {C}; at least 1 subcomponent is needed")
        hits = [path for path in modules if fnmatch.fnmatchcase(path, pattern)]
        if not hits:
            raise UserError(
                f"sites: {pattern!r} matches no module{nearest(pattern, usable)}"
                f" (decomposable here: {', '.join(usable)})"
            )
        for path in hits:
            if path not in usable:
                raise UserError(
                    f"sites: {pattern!r} matches {path!r}, a {type(modules[path]).__name__}; only"
                    f" Linear, Embedding and Conv1D can be decomposed: {', '.join(usable)}"
                )
            if path in matched:
                raise UserError(
                    f"sites: {path!r} is matched by both {matched[path]!r} and {pattern!r};"
                    " every module may be matched once"
                )
            matched[path] = pattern
    return {path: patterns[matched[path]] for path in modules if path in matched}


class LinearSubcomponents(nn.Module):
    """W ≈ Σ_c U_c V_cᵀ for a matrix from `[..., d_in]` to `[..., d_out]` (paper, section 2). No bias.

    This class, and each that extends it, is a kind of site: it declares what the axes of an input mean.
    """

    V: Float[Tensor, "d_in C"]
    U: Float[Tensor, "C d_out"]
    reads_ids: ClassVar[bool] = False
    """whether an input holds ids, one for each row, rather than vectors along its last axis"""

    def __init__(self, d_in: int, d_out: int, C: int) -> None:
        super().__init__()
        self.V = nn.Parameter(torch.empty(d_in, C))
        self.U = nn.Parameter(torch.empty(C, d_out))

    def acts(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows C"]:
        """Inner activations h_c(x) = x · V_c."""
        return x @ self.V

    def write(
        self, h: Float[Tensor, "*rows C"], mask: Float[Tensor, "*rows C"] | None
    ) -> Float[Tensor, "*rows d_out"]:
        """(h ⊙ m) U; without a mask every subcomponent is on."""
        return (h if mask is None else h * mask) @ self.U

    def forward(self, x: Tensor, mask: Float[Tensor, "*rows C"] | None) -> Tensor:
        return self.write(self.acts(x), mask)

    @classmethod
    def rows(cls, x: Tensor) -> torch.Size:
        """The shape of what a site has for each of its inputs, such as an importance, without C."""
        return x.shape if cls.reads_ids else x.shape[:-1]


class EmbeddingSubcomponents(LinearSubcomponents):
    """The same for an embedding: `V` is `[vocab, C]` and the input holds token or position ids."""

    reads_ids = True

    def acts(self, x: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows C"]:
        return nn.functional.embedding(x, self.V)

    def write(
        self, h: Float[Tensor, "*rows C"], mask: Float[Tensor, "*rows C"] | None
    ) -> Float[Tensor, "*rows d_out"]:
        return super().write(h, mask).to(self.U.dtype)  # autocast leaves it in its own type


class TiedSubcomponents(LinearSubcomponents):
    """Subcomponents of a matrix that is the transpose of another site's: V = U₁ᵀ, U = V₁ᵀ.

    Holds no parameter of its own: both sites read one `V` and one `U`, whose gradients add up. (The
    published runs alias two parameters onto one storage instead, so that Adam steps it twice.)
    """

    def __init__(self, source: LinearSubcomponents) -> None:
        nn.Module.__init__(self)
        self._source = (source,)  # in a tuple, so that the parameters are registered once

    @property
    def V(self) -> Float[Tensor, "d_in C"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._source[0].U.mT

    @property
    def U(self) -> Float[Tensor, "C d_out"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._source[0].V.mT


def subcomponents_of(module: nn.Module, C: int) -> LinearSubcomponents:
    """Of the kind that a decomposable module needs, not initialised."""
    d_in, d_out = input_output_weight(module).shape
    kind = EmbeddingSubcomponents if isinstance(module, nn.Embedding) else LinearSubcomponents
    return kind(d_in, d_out, C)


@torch.no_grad()
def init_subcomponents_(
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    weight: Float[Tensor, "d_in d_out"],
    *,
    generator: torch.Generator,
) -> None:
    """Published initialisation: random unit `V_c` and `U_c`, then `U_c` scaled by u_c · W v_c.

    `weight` maps inputs to outputs from the left, as in `x @ weight`.
    """
    for matrix, dim in ((V, 0), (U, 1)):
        drawn = torch.randn(matrix.shape, generator=generator, dtype=torch.float32)
        matrix.copy_(drawn / drawn.norm(dim=dim, keepdim=True))
    overlap = ((weight.mT @ V) * U.mT).sum(dim=0)  # two products: the three-operand einsum is huge
    U.mul_(overlap[:, None])
