"""Products in the cheapest order: the same numbers from fewer multiplications."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from spd.engine.reassociation import multiply_cheaply

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
N_MEMBERS = 3


def rand(*shape: int) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))
    )


def traced(function: Callable[..., object], *args: Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def multiplications(module: GraphModule) -> int:
    total = 0
    for node in module.graph.nodes:
        if node.target in PRODUCTS:
            (*many, m, k), (*_, n) = (arg.meta["val"].shape for arg in node.args)
            total += math.prod(many) * m * k * n
    return total


def before_and_after(
    function: Callable[..., object], *args: Tensor, n_members: int = 1
) -> tuple[int, int]:
    """Multiplications without and with the pass, after checking that the results are the same."""
    module = traced(function, *args)
    plain = multiplications(module)
    expected = module(*args)
    multiply_cheaply(module.graph, n_members)
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


def with_gradients(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """Values and gradients of a function of what is given, what is shared, and weights."""

    def all_of_it(x: Tensor, shared: Tensor, *weights: Tensor) -> list[Tensor]:
        own = [w.detach().requires_grad_() for w in weights]
        out = function(x, shared, *own)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), own)]

    return all_of_it


def test_members_side_by_side_multiply_as_cheaply_as_each_alone():
    def stacked(*shape: int) -> Tensor:
        return torch.stack([rand(*shape) * (i + 1) for i in range(N_MEMBERS)])

    shapes = [(200, 6), (300, 8), (8, 300), (300, 7), (7, 300)]
    x, *blocks = (stacked(*shape) for shape in shapes)
    W_E = rand(6, 300)
    _, alone = before_and_after(with_gradients(residual_mlp), x[0], W_E, *(w[0] for w in blocks))
    mapped = with_gradients(torch.func.vmap(residual_mlp, in_dims=(0, None, *[0] * len(blocks))))
    plain, cheap = before_and_after(mapped, x, W_E, *blocks, n_members=N_MEMBERS)
    assert cheap <= N_MEMBERS * alone and cheap < plain / 4


def test_stacks_that_are_no_members_are_left_alone():
    x, W_E, V = rand(5, 40, 6), rand(6, 300), rand(300, 4)
    plain, same = before_and_after(lambda x, E, V: x @ E @ V, x, W_E, V)
    assert plain == same
    _, cheap = before_and_after(lambda x, E, V: x @ E @ V, x, W_E, V, n_members=5)
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
