"""Products in the cheapest order: the same numbers from fewer multiplications."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from spd.reassociation import multiply_cheaply

MM = torch.ops.aten.mm.default


def rand(*shape: int) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))
    )


def traced(function: Callable[..., object], *args: Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def multiplications(module: GraphModule) -> int:
    total = 0
    for node in module.graph.nodes:
        if node.target is MM:
            (m, k), (_, n) = (arg.meta["val"].shape for arg in node.args)
            total += m * k * n
    return total


def before_and_after(function: Callable[..., object], *args: Tensor) -> tuple[int, int]:
    """Multiplications without and with the pass, after checking that the results are the same."""
    module = traced(function, *args)
    plain = multiplications(module)
    expected = module(*args)
    multiply_cheaply(module.graph)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*args), expected)
    return plain, multiplications(module)


def test_a_wide_stream_between_narrow_ends_never_exists():
    def read_twice(x: Tensor, E: Tensor, V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        stream = x @ E
        return stream @ V, stream @ U

    x, W_E, V, W_U = rand(200, 6), rand(6, 300), rand(300, 4), rand(300, 6)
    plain, cheap = before_and_after(read_twice, x, W_E, V, W_U)
    assert plain == 200 * 6 * 300 + 200 * 300 * (4 + 6)
    assert cheap == 6 * 300 * (4 + 6) + 200 * 6 * (4 + 6)


def residual_mlp(x: Tensor, E: Tensor, *blocks: Tensor) -> Tensor:
    """Two blocks, read through the transposed embedding."""
    stream = x @ E
    for W_in, W_out in zip(blocks[::2], blocks[1::2], strict=True):
        stream = stream + (stream @ W_in).relu() @ W_out
    return stream @ E.mT


def test_sums_are_taken_apart_and_gradients_too():
    blocks = [rand(300, 8), rand(8, 300), rand(300, 7), rand(7, 300)]

    def with_gradients(x: Tensor, *weights: Tensor) -> list[Tensor]:
        own = [w.detach().requires_grad_() for w in weights]
        total = residual_mlp(x, *own).square().sum()
        return [total.detach(), *torch.autograd.grad(total, own)]

    plain, cheap = before_and_after(with_gradients, rand(200, 6), rand(6, 300), *blocks)
    assert cheap < plain / 4


def test_equal_products_are_computed_once():
    x, W_E, V = rand(200, 6), rand(6, 300), rand(300, 4)
    plain, cheap = before_and_after(lambda x, E, V: (x @ E @ V).exp() + x @ E @ V, x, W_E, V)
    assert plain == 2 * (200 * 6 * 300 + 200 * 300 * 4)
    assert cheap == 6 * 300 * 4 + 200 * 6 * 4


@pytest.mark.parametrize(
    "function",
    [
        lambda x, A, B: (x @ A).relu() @ B,  # nothing may be moved past a nonlinearity
        lambda x, A, B: (x @ A, (x @ A)[0].exp()),
    ],
)
def test_what_is_read_otherwise_stays(function: Callable[..., object]):
    before_and_after(function, rand(50, 6), rand(6, 90), rand(90, 4))


def test_an_order_that_is_the_cheapest_already_stays():
    x, W, V = rand(4, 50), rand(50, 60), rand(60, 70)
    plain, cheap = before_and_after(lambda x, W, V: x @ W @ V, x, W, V)
    assert plain == cheap == 4 * 50 * 60 + 4 * 60 * 70
