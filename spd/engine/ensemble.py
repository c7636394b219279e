"""What the loop trains: one run alone, or runs of several seeds as one computation.

An ensemble holds the parameters of its members stacked on a leading axis and maps the step of one run
over it. Every member's own parameters become views of the stacks, so that whatever evaluates, draws or
saves a member finds it as it is. Knows no file and no loop.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from spd.config import UserError
from spd.kernels import WITH_OWN_GRADIENT
from spd.losses import Noise, State
from spd.objective import Objective
from spd.problem import Batch


class StepInputs(NamedTuple):
    """What a step is computed from: the arguments of `Objective.forward`."""

    batch: Batch
    progress: Tensor
    noise: Noise
    row_weights: Tensor | None = None
    state: State = {}
    slots: Tensor | None = None
    probes: Mapping[str, Tensor] | None = None


class Alone:
    """One run, as what the loop trains."""

    opaque = ()
    n_members = 1

    def __init__(self, objective: Objective) -> None:
        self.function = self.objective = objective
        self.climb = objective.climb
        own = objective.model.subcomponent_parameters()
        self.parameters, self.groups = list(own.values()), parameter_groups(own)

    def inputs(self, inputs: Sequence[StepInputs]) -> StepInputs:
        (own,) = inputs
        return own

    def clip_gradients_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        """Scale down the gradients of these parameters where their norm together is above `max_norm`."""
        nn.utils.clip_grad_norm_(parameters, max_norm)

    def gradient_norms(self) -> dict[str, Tensor]:
        """Of each group of parameters together, before any clipping, by the names they are logged by."""
        norms = {}
        for name, parameters in self.groups.items():
            grads = [p.grad for p in parameters if p.grad is not None]
            none = self.parameters[0].new_zeros(())
            norms[f"grad_norm/{name}"] = nn.utils.get_total_norm(grads) if grads else none
        return norms

    def stacked(self, states: Sequence[State]) -> State:
        """What all runs carry from step to step, as the step takes it."""
        (own,) = states
        return own

    def taken_apart(self, state: State) -> list[State]:
        """The inverse of `stacked`."""
        return [state]

    def optimizer_states(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """What each run's own optimizer would hold, from what the common one holds."""
        return [state]

    def common_state(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The inverse of `optimizer_states`."""
        (own,) = states
        return own


class Ensemble:
    """Runs that differ in their seed alone, as what the loop trains: the same methods.

    The gradient of the sum of all totals is each member's own gradient, and AdamW works element by
    element: no member feels another.
    """

    opaque = WITH_OWN_GRADIENT

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.n_members = len(objectives)
        self.objective = objectives[0]
        names = {parameter: name for name, parameter in self.objective.named_parameters()}
        own = [objective.model.subcomponent_parameters().values() for objective in objectives]
        self.stacks = {names[group[0]]: _stack_and_view_(group) for group in zip(*own, strict=True)}
        short = self.objective.model.subcomponent_parameters()
        self.parameters = list(self.stacks.values())
        self.groups = parameter_groups(dict(zip(short, self.stacks.values(), strict=True)))

    def function(
        self,
        batch: Batch,
        progress: Tensor,
        noise: Noise,
        row_weights: Tensor | None,
        state: State,
        slots: Tensor | None = None,
        probes: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Sum of the members' totals, what is worth logging, and the new state: `[members]` each.

        All arguments but `progress` have a leading axis of members.
        """

        def of_one(
            stacks: Mapping[str, Tensor], *inputs: Any
        ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            return functional_call(self.objective, stacks, inputs)  # pyright: ignore

        axes = (0, 0, None, 0, _axis(row_weights), 0, _axis(slots), _axis(probes))
        totals, terms, new_state = vmap(of_one, in_dims=axes)(
            self.stacks, batch, progress, noise, row_weights, state, slots, probes
        )
        return totals.sum(), terms, new_state

    def climb(
        self,
        state: State,
        slopes: Mapping[str, Tensor],
        progress: Tensor,
        slots: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `Objective.climb` does, for each member by itself."""
        axes = (0, 0, None, _axis(slots))
        return vmap(self.objective.climb, in_dims=axes)(state, slopes, progress, slots)

    def inputs(self, inputs: Sequence[StepInputs]) -> StepInputs:
        """Those of all members, stacked; shorter batches are filled up with rows of weight 0."""
        n_rows = max(len(own.batch) for own in inputs)
        if all(own.row_weights is None and len(own.batch) == n_rows for own in inputs):
            row_weights = None
        else:
            row_weights = torch.stack([_filled_weights(own, n_rows) for own in inputs])
        noise = {
            key: torch.stack([_filled_draw(own, key, n_rows) for own in inputs])
            for key in inputs[0].noise
        }
        batches = [own.batch for own in inputs if isinstance(own.batch, Tensor)]
        assert len(batches) == len(inputs), "runs side by side are given Tensors"
        batch = torch.stack([_filled(own, n_rows) for own in batches])
        state = self.stacked([own.state for own in inputs])
        return StepInputs(
            batch, inputs[0].progress, noise, row_weights, state, self._slots(inputs, n_rows)
        )

    def _slots(self, inputs: Sequence[StepInputs], n_rows: int) -> Tensor | None:
        """Those of all members; rows that fill up belong to none, which the number of slots stands for."""
        if all(own.slots is None for own in inputs):
            return None
        key = next(iter(self.objective.kept_by_example))
        found = []
        for own in inputs:
            n_own, n_slots = len(own.batch), len(own.state[key])
            slots = torch.arange(n_own, device=own.batch.device) if own.slots is None else own.slots
            found.append(F.pad(slots, (0, n_rows - n_own), value=n_slots))
        return torch.stack(found)

    def clip_gradients_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        """What `nn.utils.clip_grad_norm_` does, for each member by itself."""
        grads = [stack.grad for stack in parameters if stack.grad is not None]
        factors = (max_norm / (_norms(grads) + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factors.reshape(-1, *[1] * (grad.dim() - 1)))

    def gradient_norms(self) -> dict[str, Tensor]:
        norms = {}
        for name, stacks in self.groups.items():
            grads = [stack.grad for stack in stacks if stack.grad is not None]
            none = self.parameters[0].new_zeros(self.n_members)
            norms[f"grad_norm/{name}"] = _norms(grads) if grads else none
        return norms

    def stacked(self, states: Sequence[State]) -> State:
        return {key: torch.stack([state[key] for state in states]) for key in states[0]}

    def taken_apart(self, state: State) -> list[State]:
        return [
            {key: value[index].clone() for key, value in state.items()}
            for index in range(self.n_members)
        ]

    def optimizer_states(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        def of_member(index: int) -> dict[int, dict[str, Tensor]]:
            return _map_tensors(lambda value: value[index].clone(), state["state"])

        return [{**state, "state": of_member(index)} for index in range(self.n_members)]

    def common_state(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        inner = _map_tensors(
            lambda *values: torch.stack(values), *(state["state"] for state in states)
        )
        return {**states[0], "state": inner}


def _norms(grads: Sequence[Float[Tensor, "members ..."]]) -> Float[Tensor, " members"]:
    """Of each member's gradients together."""
    return torch.stack([grad.flatten(start_dim=1).norm(dim=1) for grad in grads]).norm(dim=0)


def train_together(objectives: Sequence[Objective]) -> Alone | Ensemble:
    """One run, or several of one kind as one computation."""
    return Alone(objectives[0]) if len(objectives) == 1 else Ensemble(objectives)


def parameter_groups(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """`components` (V and U) and `importances`, of parameters by their names in a `ComponentModel`."""
    groups: dict[str, list[nn.Parameter]] = {"components": [], "importances": []}
    for name, parameter in parameters.items():
        own = name.rpartition(".")[2] in ("V", "U") and ".subcomponents." in f".{name}"
        groups["components" if own else "importances"].append(parameter)
    return groups


def check_one_target(objectives: Sequence[Objective]) -> None:
    """`UserError` unless everything that is not trained is the same in all of them."""
    first, *others = (dict(_frozen(objective)) for objective in objectives)
    for other in others:
        for name, value in first.items():
            if not torch.equal(value, other[name]):
                raise UserError(
                    f"seeds: the target's {name} depends on the seed; side by side go runs that"
                    " decompose one target"
                )


def _frozen(objective: Objective) -> Iterator[tuple[str, Tensor]]:
    target = objective.model.target
    yield from ((name, p) for name, p in target.named_parameters() if not p.requires_grad)
    yield from target.named_buffers()


def _stack_and_view_(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """The parameters stacked; each of them becomes a view of its part."""
    stack = nn.Parameter(torch.stack([parameter.data for parameter in parameters]))
    for parameter, own in zip(parameters, stack.data, strict=True):
        parameter.data = own
    return stack


def _axis(argument: object) -> int | None:
    """Over which axis `vmap` goes."""
    return None if argument is None else 0


def _filled_draw(own: StepInputs, key: str, n_rows: int) -> Tensor:
    """A draw, filled up unless all rows share it."""
    draw = own.noise[key]
    return _filled(draw, n_rows) if len(draw) == len(own.batch) else draw


def _filled(rows: Float[Tensor, "n_own *rest"], n_rows: int) -> Float[Tensor, "{n_rows} *rest"]:
    if len(rows) == n_rows:
        return rows
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, n_rows - len(rows)))


def _filled_weights(own: StepInputs, n_rows: int) -> Float[Tensor, " {n_rows}"]:
    """With a mean of 1 again, over all rows."""
    n_own = len(own.batch)
    assert isinstance(own.batch, Tensor), "runs side by side are given Tensors"
    weights = own.batch.new_ones(n_own) if own.row_weights is None else own.row_weights
    return _filled(weights * (n_rows / n_own), n_rows)


def _map_tensors(
    function: Callable[..., Tensor], *states: Mapping[int, Mapping[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """`function` of what an optimizer holds for each parameter; its count of steps stays as it is."""
    return {
        index: {
            key: value if value.dim() == 0 else function(*(state[index][key] for state in states))
            for key, value in own.items()
        }
        for index, own in states[0].items()
    }
