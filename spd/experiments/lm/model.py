"""A Hugging Face model as a module from token ids to one Tensor, under its own module names."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd.config import UserError


class TokenModel(nn.Module):
    """One output of a model that returns several; every path is that of the model itself.

    It holds the very tables of submodules, parameters and buffers that `inner` holds, so that what is
    replaced, moved or frozen through the one is so in the other. `output` is an attribute of what
    `inner` returns, or an index into it.
    """

    def __init__(self, inner: nn.Module, output: str | int) -> None:
        super().__init__()
        self._modules = inner._modules
        self._parameters = inner._parameters
        self._buffers = inner._buffers
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set
        self._inner = (inner,)  # a tuple hides it: it is no submodule
        self.output = output

    @property
    def inner(self) -> nn.Module:
        return self._inner[0]

    def train(self, mode: bool = True) -> "TokenModel":
        self.inner.train(mode)
        return super().train(mode)

    def forward(self, *batch: Tensor, **named: Tensor) -> Float[Tensor, "batch *rest"]:
        """Of token ids, or of whatever else `inner` takes, by its names."""
        returned = self.inner(*batch, **named)
        if isinstance(self.output, int):
            return returned[self.output]
        return getattr(returned, self.output)


@torch.no_grad()
def check_output(model: TokenModel, batch: Int[Tensor, "batch position"]) -> None:
    """Raise `UserError` unless the chosen output is `[batch, position, features]` for this batch."""
    returned: Any = model.inner(batch)
    if isinstance(model.output, int):
        try:
            found = returned[model.output]
        except (IndexError, KeyError, TypeError):
            raise UserError(
                f"output: the model returns no item {model.output}; it returns {_describe(returned)}"
            ) from None
    else:
        found = getattr(returned, model.output, None)
    if not (isinstance(found, Tensor) and found.shape[:2] == batch.shape and found.ndim == 3):
        raise UserError(
            f"output: {model.output!r} is {_describe(found)}; floats of shape (batch, position,"
            f" features) are needed; the model returns {_describe(returned)}"
        )


def _describe(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return f"a Tensor of shape {tuple(returned.shape)}"
    if isinstance(returned, dict):  # transformers returns a kind of dict
        return "named outputs " + ", ".join(map(str, returned))
    if isinstance(returned, tuple | list):
        return f"a {type(returned).__name__} of {len(returned)}"
    return "None" if returned is None else f"a {type(returned).__name__}"
