"""The method's step in plain eager PyTorch: what a careful researcher writes first.

Every term is the published formula, one after another. Nothing is computed that no term needs, and
nothing is rearranged, merged, fused or compiled. Written independently of the package's step, of which it
shares the target's modules and the names of the parameters; a test compares the two.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd.experiments.resid_mlp.model import MLPBlock, ResidMLP
from spd.experiments.tms.model import TMSModel
from spd.losses import Losses
from spd.schedule import peak_of

Linear = Callable[[str, Tensor], Tensor]
"""what the matrix of that path makes of its input"""


class Parts(NamedTuple):
    """What one matrix is decomposed into."""

    V: Tensor
    U: Tensor
    mlp_in: Tensor
    in_bias: Tensor
    mlp_out: Tensor
    out_bias: Tensor


class Naive:
    """The step on one target, with the parameters of a `ComponentModel` by its names."""

    def __init__(
        self,
        target: nn.Module,
        parameters: Mapping[str, Tensor],
        losses: Losses,
        tied_sites: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.target, self.parameters = target, parameters
        self.source_of = {tied: source for source, tied in tied_sites}
        names = [name for name, _ in target.named_modules()]
        self.paths = [name for name in names if f"{name}.importance.mlp_in" in parameters]
        self.coeffs = {name: peak_of(spec.coeff) for name, spec in losses.items()}
        self.pnorm: float = losses["importance_minimality"].pnorm  # pyright: ignore

    def parts(self, path: str) -> Parts:
        """A tied matrix is the transpose of its source, and so are its subcomponents."""
        source = self.source_of.get(path, path)
        V, U = (self.parameters[f"{source}.subcomponents.{name}"] for name in "VU")
        if source != path:
            V, U = U.mT, V.mT
        functions = (self.parameters[f"{path}.importance.{name}"] for name in Parts._fields[2:])
        return Parts(V, U, *functions)

    def total(self, batch: Tensor, noise: Iterator[Tensor]) -> Tensor:
        """Σ coefficient × term; `noise` yields U(0, 1) of all matrices together, then of each alone."""
        inputs: dict[str, Tensor] = {}

        def original(path: str, x: Tensor) -> Tensor:
            inputs[path] = x
            return self.linear(path, x)

        with torch.no_grad():
            expected = forward(self.target, batch, original)
        logits = {path: importance(inputs[path], self.parts(path)) for path in self.paths}
        lower = {path: torch.where(x <= 0, 0.01 * x, x.clamp(max=1)) for path, x in logits.items()}

        faithfulness = self.faithfulness()
        masks = {path: g + (1 - g) * next(noise) for path, g in lower.items()}
        recon = self.error(batch, masks, expected)
        layerwise = []
        for path, g in lower.items():
            layerwise.append(self.error(batch, {path: g + (1 - g) * next(noise)}, expected))
        minimality = []
        for x in logits.values():
            upper = torch.where(x > 1, 1 + 0.01 * (x - 1), x.relu())
            minimality.append((upper**self.pnorm).sum(dim=-1).mean())
        return (
            self.coeffs["faithfulness"] * faithfulness
            + self.coeffs["stochastic_recon"] * recon
            + self.coeffs["stochastic_recon_layerwise"] * torch.stack(layerwise).mean()
            + self.coeffs["importance_minimality"] * torch.stack(minimality).sum()
        )

    def faithfulness(self) -> Tensor:
        errors, n_entries = [], 0
        for path in self.paths:
            parts = self.parts(path)
            weight = self.target.get_submodule(path).get_parameter("weight")
            errors.append((weight - (parts.V @ parts.U).mT).square().sum())
            n_entries += weight.numel()
        return torch.stack(errors).sum() / n_entries

    def error(self, batch: Tensor, masks: Mapping[str, Tensor], expected: Tensor) -> Tensor:
        """Mean squared error where the matrices of `masks` are masked."""

        def masked(path: str, x: Tensor) -> Tensor:
            if path not in masks:
                return self.linear(path, x)
            parts, bias = self.parts(path), self.target.get_submodule(path).bias
            out = ((x @ parts.V) * masks[path]) @ parts.U
            return out + bias if isinstance(bias, Tensor) else out

        return F.mse_loss(forward(self.target, batch, masked), expected)

    def linear(self, path: str, x: Tensor) -> Tensor:
        return self.target.get_submodule(path)(x)


def importance(x: Tensor, parts: Parts) -> Tensor:
    """One GELU network per subcomponent, on its inner activation."""
    z = (x @ parts.V)[..., None] * parts.mlp_in + parts.in_bias
    return (F.gelu(z) * parts.mlp_out).sum(dim=-1) + parts.out_bias


def forward(target: nn.Module, x: Tensor, linear: Linear) -> Tensor:
    """The target, with `linear` in place of its matrices."""
    if isinstance(target, TMSModel):
        hidden = linear("linear1", x)
        for i in range(len(target.hidden_layers)):
            hidden = linear(f"hidden_layers.{i}", hidden)
        return torch.relu(linear("linear2", hidden))
    assert isinstance(target, ResidMLP), f"a {type(target).__name__} is no toy model"
    residual = x @ target.W_E
    for i, block in enumerate(target.layers):
        assert isinstance(block, MLPBlock), f"a {type(block).__name__} among the layers"
        neurons = block.act(linear(f"layers.{i}.mlp_in", residual))
        residual = residual + linear(f"layers.{i}.mlp_out", neurons)
    return residual @ target.W_U
