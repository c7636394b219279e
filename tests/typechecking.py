"""The type checker under which the tests run the package.

It sees the functions that say something about shapes, in their first calls in each test: a training step
calls the same ones over and over, and to check them all would take more time than the steps. With
`SPD_TESTS_CHECK_ALL` in the environment, as in `make test-all`, it sees every call of every function.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, Self, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

CHECKED_CALLS = 2
"""of each function in each test"""

beartype_ = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484
_seen: Counter[int] = Counter()
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, but for functions that return `Self`, which it knows only inside a decorated class."""
    return function if Self in function.__annotations__.values() else beartype_(function)


def names_shapes(hint: Any) -> bool:
    """Whether a type hint holds one of jaxtyping's."""
    own = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return own or any(map(names_shapes, get_args(hint)))


def jaxtyped_at_first(*, typechecker: Any) -> Callable[[Any], Any]:
    """jaxtyping's decorator, for the first calls in each test."""

    def decorate(what: Any) -> Any:
        if not inspect.isfunction(what):
            return _jaxtyped(what, typechecker=typechecker)
        if not any(map(names_shapes, what.__annotations__.values())):
            return what
        key = id(what)

        @functools.cache  # what no test calls need not be made ready
        def checked() -> Callable[..., Any]:
            return _jaxtyped(what, typechecker=typechecker)

        @functools.wraps(what)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _seen[key] >= CHECKED_CALLS:
                return what(*args, **kwargs)
            _seen[key] += 1
            return checked()(*args, **kwargs)

        return call

    return decorate


def check_package(*, every_call: bool) -> None:
    """Before `spd` is imported: have its functions checked."""
    if not every_call:
        jaxtyping.jaxtyped = jaxtyped_at_first  # what the import hook decorates them with
    jaxtyping.install_import_hook("spd", f"{check.__module__}.{check.__name__}")


def next_test() -> None:
    """Every function is checked again."""
    _seen.clear()
