"""One of several processes: gradients of its rows of a joint batch, averaged; see test_distributed."""

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor

from spd.engine.distributed import (
    average_,
    is_leader,
    joined,
    mean_over_processes,
    own_share,
)
from spd.engine.sequential import Sequential
from spd.objective import Objective
from tests.little_lm import RandomBatches, little_model
from tests.toy import ALL_LOSSES, decompose, make_objective

LOSSES = {
    **ALL_LOSSES,
    "activity": {"coeff": 0.1, "penalty": {"type": "smooth_l0", "gamma": 0.3}},
    "frequency": {
        **{"coeff": 0.2, "penalty": {"type": "lp", "p": 0.9}},
        **{"reference_count": 50, "half_life": 3},
    },
}

SITES = {"model.layers.*.mlp.*_proj": 6, "model.embed_tokens": 5, "lm_head": 3}


def made() -> tuple[Objective, Tensor]:
    torch.manual_seed(0)
    objective = make_objective(decompose(little_model("llama"), SITES), LOSSES, "kl")
    return objective, next(RandomBatches(0))


def gradients(*, together: bool) -> dict[str, Tensor]:
    """Of this process's rows, averaged over all processes; beside them the logged values."""
    objective, batch = made()
    state = objective.initial_state()
    share, progress = own_share(), torch.tensor(0.5)
    if share.of > 1:
        objective.over_processes = mean_over_processes
    noise = objective.noise(batch, stream="train", seed=0, step=0, share=share)
    batch = batch[share.rows(len(batch))]
    if together:
        total, terms, state = objective(batch, progress, dict(noise), None, state)
        total.backward()
    else:
        terms, state = Sequential(objective)(batch, progress, noise, None, state)
    grads = {n: p.grad for n, p in objective.model.subcomponent_parameters().items()}
    found = {**terms, **state, **{name: grad for name, grad in grads.items() if grad is not None}}
    average_(found.values())
    return found


if __name__ == "__main__":
    with joined():
        for together in (False, True):
            found = gradients(together=together)
            if is_leader():
                save_file(found, f"{sys.argv[1]}/{together}.safetensors")
