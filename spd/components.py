"""What can be decomposed, rank-one subcomponents of one matrix, and their published initialisation."""

import fnmatch
import sys
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd.config import UserError, nearest


def input_output_weight(module: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """The weight of a decomposable module as `[d_in, d_out]`, whatever its own layout.

    Of an embedding with a `forward` of its own (Gemma's multiplies by a constant): what it gives out.
    """
    weight = module.weight
    assert isinstance(weight, Tensor), f"{type(module).__name__} has no weight"
    if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
        with torch.no_grad():
            return module(torch.arange(module.num_embeddings, device=weight.device))
    return weight.mT if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of a decomposable module is `[d_out, d_in]`."""
    return not isinstance(module, nn.Embedding) and not _is_conv1d(module)


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""of a weight that can be decomposed"""


def decomposable(module: nn.Module) -> bool:
    """Whether a module is a Linear, an Embedding or GPT-2's Conv1D, or acts as one.

    A subclass that computes something else (a quantised one, a router, positions counted from a mask) is
    not; one with a `forward` of its own is tried out, as is any module with a matrix for its `weight`.
    """
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward and module.weight.dtype in DTYPES
        return plain or _acts_as_linear(module)
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward or _acts_as_embedding(module)
    return _is_conv1d(module) or _acts_as_linear(module)


@torch.no_grad()
def _acts_as_linear(module: nn.Module) -> bool:
    """Whether module(x) − module(0) = x W for a weight Wᵀ, on two inputs drawn at random."""
    weight = module.weight if hasattr(module, "weight") else None
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES or any(module.children()):
        return False
    if isinstance(weight, nn.UninitializedParameter) or weight.is_meta or weight.ndim != 2:
        return False
    x = _drawn(weight, weight.shape[1])
    try:
        return _alike(module(x) - module(torch.zeros_like(x)), x @ weight.mT)
    except Exception:  # whatever it wants to be called with, it is no linear map
        return False


def _drawn(weight: Tensor, d_in: int) -> Tensor:
    """Two inputs, drawn at random."""
    return torch.randn(2, d_in, generator=torch.Generator().manual_seed(0)).to(weight)


def _alike(found: object, expected: Tensor) -> bool:
    """Equal but for rounding."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    scale = expected.float().abs().max().clamp(min=1e-12)
    off = (found.float() - expected.float()).abs().max() / scale
    return off.item() < 8 * torch.finfo(expected.dtype).eps ** 0.75


@torch.no_grad()
def _check_gives(path: str, module: nn.Module) -> None:
    """`UserError` unless a module gives what its matrix and its bias say, however it is called.

    A hook of all modules, a class whose `forward` or `__call__` was changed, or a shift besides the bias
    would be lost in masked passes.
    """
    W = input_output_weight(module)
    if isinstance(module, nn.Embedding):
        ids = torch.arange(min(module.num_embeddings, 16), device=W.device)
        found, expected, formula = module(ids), W[ids], "the rows of its weight"
    else:
        x, bias = _drawn(W, W.shape[0]), getattr(module, "bias", None)
        found, expected = module(x), x @ W if bias is None else x @ W + bias
        formula = "x W + b, with its weight and bias,"
    if not _alike(found, expected):
        raise UserError(
            f"sites: {path!r}, a {_full_name(module)}, gives something else than {formula} where it is"
            " called: a hook of all modules, or a changed class, would not act on its subcomponents;"
            " remove it before decomposing"
        )


@torch.no_grad()
def _acts_as_embedding(module: nn.Embedding) -> bool:
    """Whether it gives each id a row of its own, whatever stands beside it."""
    if module.weight.is_meta:
        return False
    ids = torch.arange(min(module.num_embeddings, 16), device=module.weight.device)
    try:
        rows, turned, batched = module(ids), module(ids.flip(0)), module(ids[None])
    except Exception:  # learned positions of OPT and BART are called with something else
        return False
    shape = (len(ids), module.embedding_dim)
    return (
        isinstance(rows, Tensor)
        and rows.shape == shape
        and torch.equal(turned.flip(0), rows)
        and torch.equal(batched[0], rows)
    )


def _is_conv1d(module: nn.Module) -> bool:
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


class ExpertMatrices(NamedTuple):
    """How a module of transformers keeps the matrices of all its experts: as parameters of three axes."""

    names: tuple[str, str]
    """of the matrices that an expert has, in the order in which they are applied"""
    n_experts: int
    transposed: bool
    """whether the parameters are `[experts, d_in, d_out]` rather than `[experts, d_out, d_in]`"""
    biases: bool
    """whether there are parameters of the same names with `_bias`, `[experts, d_out]`"""
    presorted: bool
    """whether it is called with the rows of all tokens, scaled, one expert after another (Llama 4)"""

    def paths(self, path: str) -> list[str]:
        """What these matrices are called, of the module at `path`."""
        return [f"{path}.{e}.{name}" for e in range(self.n_experts) for name in self.names]


def expert_matrices(module: nn.Module) -> ExpertMatrices | None:
    """None if the module holds no experts, or holds them in another way."""
    llama4 = sys.modules.get("transformers.models.llama4.modeling_llama4")
    presorted = llama4 is not None and isinstance(module, llama4.Llama4TextExperts)
    known = presorted or all(hasattr(module, name) for name in ("_apply_gate", "is_transposed"))
    if not known or getattr(module, "_is_expert_parallel", False):
        return None
    biases: bool = getattr(module, "has_bias", False)
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    wanted = {*names, *(f"{name}_bias" for name in names if biases)}
    parameters = dict(module.named_parameters())
    if parameters.keys() != wanted or any(module.buffers()):
        return None
    if not all(parameters[n].dim() == 3 and parameters[n].is_floating_point() for n in names):
        return None
    transposed = presorted or bool(module.is_transposed)
    return ExpertMatrices(names, len(parameters[names[0]]), transposed, biases, presorted)


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
    _check_gives(path, module)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _why_not(module: nn.Module) -> str:
    """What a module that cannot be decomposed is, by its full class path, and what to do."""
    name = f"a {_full_name(module)}"
    weight = getattr(module, "weight", None)
    if hasattr(module, "base_layer") and not isinstance(module, nn.Linear | nn.Embedding):
        return f"{name}, an adapter around a matrix (merge the adapter first: merge_and_unload() in peft)"
    if isinstance(weight, Tensor) and weight.dtype not in DTYPES:
        what = (
            "real numbers are needed"
            if weight.is_complex()
            else "load the model without quantisation"
        )
        return f"{name} with a weight of {weight.dtype} ({what})"
    if isinstance(module, nn.modules.conv._ConvNd):
        return (
            f"{name} (convolutions cannot be decomposed; write one as a Linear on unfolded patches)"
        )
    if isinstance(module, nn.Linear):
        return f"{name}, which computes something else than x W + b"
    if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
        return f"{name}, which computes something else than x W + b with a weight of [d_out, d_in]"
    if isinstance(module, nn.Embedding):
        return f"{name}, whose forward takes something else than the ids of its rows"
    return f"{name} (only Linear, Embedding and Conv1D can be decomposed)"


def check_weight(path: str, module: nn.Module) -> None:
    """`UserError` unless the matrix is there to be decomposed."""
    weight = module.weight
    if isinstance(weight, nn.UninitializedParameter):
        raise UserError(
            f"sites: {path!r} is a {type(module).__name__} that has not seen a batch yet, so that its size"
            " is unknown; call the target once before decomposing"
        )
    assert isinstance(weight, Tensor), "a module that can be decomposed has a weight"
    if weight.is_meta:
        raise UserError(
            f"sites: the weight of {path!r} is on the meta device: it is offloaded, or was never loaded;"
            " load the model whole onto one device"
        )
    if not weight.isfinite().all():
        raise UserError(f"sites: the weight of {path!r} has entries that are not finite")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        with (
            torch.no_grad()
        ):  # a row that is read is shortened in place: all of them, before V and U are made
            module(torch.arange(module.num_embeddings, device=weight.device))


def resolve_sites(target: nn.Module, patterns: Mapping[str, int]) -> dict[str, int]:
    """Module path → C for every pattern (`fnmatch`), in the order in which the target holds them.

    A pattern without a match, two patterns on one module, or a module that cannot be decomposed is a
    `UserError` that lists what there is.
    """
    modules = {path: module for path, module in target.named_modules() if path}
    usable = [path for path, module in modules.items() if decomposable(module)]
    usable += [
        f"{path}.*.{name}"
        for path, module in modules.items()
        if (experts := expert_matrices(module)) is not None
        for name in experts.names
    ]
    if decomposable(target):
        raise UserError(
            f"sites: the target is itself a {_full_name(target)}, which has no name in it; give"
            " nn.Sequential(target), in which it is '0'"
        )
    if not patterns:
        raise UserError(f"sites: at least one is needed; decomposable here: {', '.join(usable)}")
    matched: dict[str, str] = {}
    for pattern, C in patterns.items():
        if C < 1:
            raise UserError(f"sites: {pattern!r} has C = {C}; at least 1 subcomponent is needed")
        hits = [pattern] if pattern in modules else fnmatch.filter(modules, pattern)
        if not hits:
            raise UserError(
                f"sites: {pattern!r} matches no module{nearest(pattern, usable)}"
                f" (decomposable here: {', '.join(usable)})"
            )
        for path in hits:
            if path not in usable:
                raise UserError(
                    f"sites: {pattern!r} matches {path!r}, {_why_not(modules[path])}; decomposable here:"
                    f" {', '.join(usable) or 'nothing'}"
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
        self, h: Float[Tensor, "*rows C"], mask: Float[Tensor, "*#rows C"] | None
    ) -> Float[Tensor, "*rows d_out"]:
        """(h ⊙ m) U; without a mask every subcomponent is on."""
        return (h if mask is None else h * mask) @ self.U

    def forward(self, x: Tensor, mask: Float[Tensor, "*#rows C"] | None) -> Tensor:
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
        self, h: Float[Tensor, "*rows C"], mask: Float[Tensor, "*#rows C"] | None
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
