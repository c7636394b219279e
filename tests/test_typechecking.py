"""Shape annotations of the package are executed in tests."""

from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from spd.components import LinearSubcomponents
from tests import typechecking
from tests.typechecking import CHECKED_CALLS, check, jaxtyped_at_first


def test_a_wrong_shape_in_the_package_is_an_error():
    part = LinearSubcomponents(4, 3, 2)
    assert part.acts(torch.zeros(5, 4)).shape == (5, 2)
    with pytest.raises(TypeError, match="Type-check"):
        part.acts(torch.zeros(5, 4, dtype=torch.long))


def test_the_first_calls_of_each_test_are_checked():
    def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m"]) -> Float[Tensor, "n"]:
        return a.sum(1)

    checked: Any = jaxtyped_at_first(typechecker=check)(product)
    good, wrong = (torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(2, 3), torch.zeros(4))
    for _ in range(CHECKED_CALLS - 1):
        checked(*good)
    with pytest.raises(TypeError):
        checked(*wrong)
    checked(*wrong)
    typechecking.next_test()
    with pytest.raises(TypeError):
        checked(*wrong)


def test_what_names_no_shape_is_left_alone():
    def plain(a: int) -> list[Tensor]:
        return []

    assert jaxtyped_at_first(typechecker=check)(plain) is plain
