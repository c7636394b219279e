"""The type checker under which the tests run the package: the first calls of a function in each test.

A training step calls the same functions over and over with the same shapes; to check them all would
take more time than the steps.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import jaxtyping
from beartype import BeartypeConf, beartype

CHECKED_CALLS = 5
"""of each function in each test"""

beartype_ = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484
_seen: Counter[int] = Counter()
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, but for functions that return `Self`, which it knows only inside a decorated class."""
    return function if Self in function.__annotations__.values() else beartype_(function)


def jaxtyped_at_first(*, typechecker: Any) -> Callable[[Any], Any]:
    """jaxtyping's decorator, for the first calls in each test."""

    def decorate(what: Any) -> Any:
        checked = _jaxtyped(what, typechecker=typechecker)
        if not inspect.isfunction(what):
            return checked
        key = id(checked)

        @functools.wraps(what)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _seen[key] >= CHECKED_CALLS:
                return what(*args, **kwargs)
            _seen[key] += 1
            return checked(*args, **kwargs)

        return call

    return decorate


def check_package() -> None:
    """Before `spd` is imported: have its functions checked."""
    jaxtyping.jaxtyped = jaxtyped_at_first  # what the import hook decorates them with
    jaxtyping.install_import_hook("spd", f"{check.__module__}.{check.__name__}")


def next_test() -> None:
    """Every function is checked again."""
    _seen.clear()
