"""A step whose passes go one after another, with the target's layers compiled."""

from collections.abc import Callable
from typing import Any, Literal

from spd.compilation import CompiledStep
from spd.objective import Objective


class CompiledPasses(CompiledStep):
    """`Objective.backward_one_by_one`, each layer and the divergence compiled by themselves, or not.

    One graph of all passes takes long to compile and holds them all in memory. A graph of a layer serves
    every layer and pass in which the same of its sites are replaced. Arguments, `auto` and falling back
    are as in `CompiledStep`.
    """

    def __init__(self, objective: Objective, setting: Literal["auto"] | bool, n_steps: int) -> None:
        super().__init__(objective.backward_one_by_one, setting, n_steps)
        self.objective = objective

    @property
    def worthwhile_seconds(self) -> float:
        """A step takes four fifths of what it took, so it is longer before compiling pays."""
        return 8 * super().worthwhile_seconds

    def forward(self, *args: Any) -> Any:
        return self.objective(*args)

    def make_compiled(self) -> Callable[..., Any]:
        self.objective.compile_passes(True)
        return self.eager

    def go_back(self) -> None:
        self.objective.compile_passes(False)
        for parameter in self.objective.model.subcomponent_parameters().values():
            parameter.grad = None  # of a step that did not come to its end
