"""The type checker under which the tests run the package."""

from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype

beartype_ = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, but for functions that return `Self`, which it knows only inside a decorated class."""
    return function if Self in function.__annotations__.values() else beartype_(function)
