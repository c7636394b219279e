"""How a step is executed, chosen in one place."""

from typing import Literal

from torch import Tensor

from spd.component_model import ComponentModel
from spd.engine.layers import layers_of
from spd.spd_config import Execution, Passes


def passes_of(setting: Passes, batch: Tensor) -> Literal["together", "one_by_one"]:
    """`auto` is `one_by_one` for token ids, whose passes are large, and `together` for anything else."""
    if setting == "auto":
        return "together" if batch.is_floating_point() else "one_by_one"
    return setting


def may_compile(execution: Execution, batch: Tensor, model: ComponentModel) -> bool:
    """Whether there is something to compile of a step on such batches, whole or layer by layer."""
    together = passes_of(execution.passes, batch) == "together"
    return not execution.activation_checkpointing and (together or bool(layers_of(model.target)))
