"""Experts whose matrices are parts of a few parameters, taken apart so that each matrix can be a site.

In transformers, the experts of a layer (Mixtral, Qwen3-MoE, OLMoE, GPT-OSS, Llama 4 and others) are one
module with parameters of three axes. Here that module is replaced, for as long as it is decomposed, by one
that computes the same from a Linear for each matrix. An expert reads the tokens routed to it alone.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel, Site, in_half
from spd.components import ExpertMatrices, expert_matrices
from spd.config import UserError
from spd.masks import Routed, Running
from spd.problem import Batch


class Experts(nn.Module):
    """Computes what `original` does; expert e has its matrices at `e.gate_up_proj` and `e.down_proj`.

    They are views of the original's parameters. `state_dict` is the original's, so that the target is
    saved, and loaded into, as if they had never been taken apart.
    """

    def __init__(self, original: nn.Module, form: ExpertMatrices) -> None:
        super().__init__()
        self._original = (original,)  # a tuple hides it: its parameters are those of the experts
        self.form = form
        self.running = Running()
        for e in range(form.n_experts):
            matrices = {name: self._linear(e, name) for name in form.names}
            self.add_module(str(e), nn.ModuleDict(matrices))
        self._register_load_state_dict_pre_hook(_as_matrices, with_module=True)

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def _linear(self, e: int, name: str) -> nn.Linear:
        weight = self._part(e, name, "weight")
        d_out, d_in = weight.shape
        linear = nn.Linear(d_in, d_out, bias=self.form.biases, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.form.biases:
            linear.bias = nn.Parameter(self._part(e, name, "bias"), requires_grad=False)
        return linear

    def _part(self, e: int, name: str, kind: str) -> Tensor:
        """Expert e's part of a parameter of the original, as a Linear has it."""
        if kind == "bias":
            return self.original.get_parameter(f"{name}_bias").data[e]
        return self.as_linear(self.original.get_parameter(name).data)[e]

    def as_linear(self, stack: Tensor) -> Tensor:
        """`[experts, d_out, d_in]` of a parameter, and the other way round."""
        return stack.mT if self.form.transposed else stack

    def matrices(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Expert, name, and the Linear itself, also where a site stands in its place."""
        for e in range(self.form.n_experts):
            for name in self.form.names:
                module = self.get_submodule(f"{e}.{name}")
                yield e, name, module.original if isinstance(module, Site) else module

    def expert(self, e: int, rows: Tensor) -> Tensor:
        """What one of them makes of the rows that it is given."""
        first, second = (self.get_submodule(f"{e}.{name}") for name in self.form.names)
        original, h = self.original, first(rows)
        if self.form.presorted:
            gate, up = h.chunk(2, dim=-1)
            return second(up * original.act_fn(gate))  # pyright: ignore[reportCallIssue]
        gated = self.form.names[0] == "gate_up_proj"
        return second(original._apply_gate(h) if gated else original.act_fn(h))  # pyright: ignore

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Σ over the chosen experts of weight × expert(token); `routing`: which are chosen, and weights."""
        if self.form.presorted:
            return self._of_presorted(hidden_states)
        chosen, weights = (x.flatten(0, -2) for x in (*routing, *named.values()))
        x = hidden_states.flatten(0, -2)
        out = torch.zeros_like(x)
        for e in range(self.form.n_experts):
            tokens, rank = torch.where(chosen == e)
            with self.running.at(Routed(tokens, len(x))):
                own = self.expert(e, x[tokens]) * weights[tokens, rank, None]
            out = out.index_add(0, tokens, own.to(out.dtype))
        return out.reshape(hidden_states.shape)

    def _of_presorted(self, hidden_states: Tensor) -> Tensor:
        """Rows of zeros are those of tokens that are not routed to the expert; it makes zeros of them."""
        of_experts = hidden_states.unflatten(0, (self.form.n_experts, -1))
        outputs = []
        for e, x in enumerate(of_experts):
            routed = Routed(x.any(dim=-1).nonzero().flatten(), len(x))
            with self.running.at(routed):
                own = self.expert(e, x[routed.positions])
            outputs.append(routed.spread(own.to(x.dtype)))
        return torch.cat(outputs)

    def _apply(self, fn: Any, recurse: bool = True) -> "Experts":
        super()._apply(fn, recurse)
        self.put_together()
        return self

    @torch.no_grad()
    def put_together(self) -> nn.Module:
        """The original, its parameters what the matrices are now, which are views of it again."""
        for name in self.form.names:
            for kind in ("weight", *(["bias"] if self.form.biases else [])):
                own = [m.get_parameter(kind) for _, n, m in self.matrices() if n == name]
                parts = [self._part(e, name, kind) for e in range(self.form.n_experts)]
                if all(_is_view(a, b) for a, b in zip(own, parts, strict=True)):
                    continue
                stack = torch.stack([parameter.data for parameter in own])
                whole = self.as_linear(stack).contiguous() if kind == "weight" else stack
                suffix = "" if kind == "weight" else "_bias"
                self.original.get_parameter(name + suffix).data = whole
                for e, parameter in enumerate(own):
                    parameter.data = self._part(e, name, kind)
        return self.original

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The original's."""
        return self.put_together().state_dict(*args, **kwargs)


def _is_view(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.device == b.device and a.stride() == b.stride()


def _as_matrices(experts: Experts, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Make of the state of the original that of the matrices."""
    for name in experts.form.names:
        for kind, key in (("weight", f"{prefix}{name}"), ("bias", f"{prefix}{name}_bias")):
            if key in state:
                stack = state.pop(key)
                parts = experts.as_linear(stack) if kind == "weight" else stack
                for e, part in enumerate(parts):
                    state[f"{prefix}{e}.{name}.{kind}"] = part


def take_experts_apart_(target: nn.Module, patterns: Iterable[str]) -> None:
    """Replace the experts that a pattern names a matrix of; put others, taken apart before, together."""
    patterns = list(patterns)
    for path, module in list(target.named_modules()):
        apart = isinstance(module, Experts)
        original = module.put_together() if apart else module
        form = expert_matrices(original)
        if form is None or not path:
            continue
        wanted = any(fnmatch.filter(form.paths(path), pattern) for pattern in patterns)
        if wanted and not apart:
            target.set_submodule(path, Experts(original, form))
        elif apart and not wanted:
            module.running.over = True  # sites that an earlier model has left in it
            target.set_submodule(path, original)


def join_(model: ComponentModel) -> None:
    """Let the experts of a model's target tell its sites what they are called with."""
    for _, experts in experts_in(model.target):
        experts.running = model.running


def experts_in(module: nn.Module) -> list[tuple[str, Experts]]:
    """Path → those that are taken apart."""
    return [(path, part) for path, part in module.named_modules() if isinstance(part, Experts)]


@torch.no_grad()
def check_experts(model: ComponentModel, batch: Batch) -> None:
    """`UserError` unless experts that are taken apart give, on this batch, what they gave before."""
    tolerance = 2e-2 if in_half(model) else 1e-4
    off: dict[str, float] = {}
    handles = []
    for path, experts in experts_in(model.target):

        def compare(
            module: nn.Module, args: Any, kwargs: Any, output: Tensor, path: str = path
        ) -> None:
            assert isinstance(module, Experts)
            expected = module.original(*args, **kwargs).double()
            scale = expected.norm().clamp(min=1e-12)
            off[path] = ((output.double() - expected).norm() / scale).item()

        handles.append(experts.register_forward_hook(compare, with_kwargs=True))
    try:
        if handles:
            model.target_forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    for path, error in off.items():
        if not error <= tolerance:
            raise UserError(
                f"sites: the experts of {path!r}, taken apart into matrices, give something else than they"
                f" did before (off by {error:.1e} of it); leave them out"
            )


def stacked(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, those of experts' matrices as the parameters that they are parts of."""
    found = dict(weights)
    for path, experts in experts_in(module):
        for name in experts.form.names:
            own = {e: f"{path}.{e}.{name}.weight" for e in range(experts.form.n_experts)}
            new = {e: found.pop(key) for e, key in own.items() if key in found}
            if not new:
                continue
            parameter = experts.put_together().get_parameter(name)
            whole = experts.as_linear(parameter.detach().cpu().clone())
            for e, weight in new.items():
                whole[e] = weight
            found[f"{path}.{name}"] = experts.as_linear(whole).contiguous()
    return found
