"""Every knob of a decomposition that does not depend on what is decomposed."""

from itertools import pairwise
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from spd.config import BaseConfig
from spd.config.limits import EvalBatches, Members, Seed, Steps
from spd.importance import ImportanceConfig, LowerLeak, MLPImportanceConfig
from spd.losses import Losses
from spd.metrics import Metrics
from spd.schedule import ScheduleConfig

Passes = Literal["auto", "together", "one_by_one"]


class GroupConfig(BaseConfig):
    """What is special about one group of parameters; null: as all parameters have it."""

    lr: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    lr_schedule: ScheduleConfig | None = None
    grad_clip: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """largest norm of the gradient of this group"""


class WarmupConfig(BaseConfig):
    """A phase before the first step: AdamW on V and U alone against the faithfulness term."""

    steps: Steps
    lr: float = Field(gt=0.0, allow_inf_nan=False)


class Execution(BaseConfig):
    """How a step is executed: changes no number beyond rounding; `tf32` and `autocast` round more."""

    compile: Literal["auto"] | bool = "auto"
    cuda_graphs: bool = True
    """on a GPU, launch a compiled step whose passes go together as a whole, with no gaps between kernels"""
    tf32: bool = False
    """on a GPU, multiply the matrices of a training step on its tensor cores, rounded (`tf32_matmuls`)"""
    passes: Passes = "auto"
    """whether the masked forward passes of a step go back in one graph or `one_by_one`, with the same
    gradients: the first compiles as a whole, the second layer by layer, and needs the memory of one pass"""
    autocast: Literal["bf16"] | None = None
    """run the target and its replaced sites in mixed precision; importances and losses stay float32"""
    starts_together: Literal["auto"] | bool = "auto"
    """whether several `starts` are trained as one computation, or one after another in the memory of one"""
    activation_checkpointing: bool = False
    """recompute the layers of a Hugging Face target in the backward pass; nothing is compiled then"""


class SPDConfig(BaseConfig):
    """Everything about a decomposition that does not depend on what is decomposed."""

    open_group: ClassVar = "execution"

    sites: dict[str, int]
    """module pattern (`fnmatch`) → number of subcomponents C"""
    losses: Losses
    importance: ImportanceConfig = MLPImportanceConfig()
    lower_leak: LowerLeak = "both"
    steps: Steps
    lr: float = Field(gt=0.0, allow_inf_nan=False)
    lr_schedule: ScheduleConfig = ScheduleConfig()
    seed: Seed = 0
    starts: Members = 1
    """how often it is begun, from other seeds of V, U, importance functions and masks; the best start, by
    its loss on data that serve this choice alone, is the run"""
    halve_at: tuple[float, ...] = (0.15, 0.3, 0.5)
    """fractions of the run after which the worse half of the starts is dropped; if several are left after
    the last, the best at the end is chosen"""
    n_choice_batches: int = Field(default=16, ge=1)
    """by how many batches, neither trained on nor in the verdict, the starts are compared"""
    execution: Execution = Execution()
    grad_clip: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """largest norm of the gradient of all parameters together"""
    components: GroupConfig = GroupConfig()
    """V and U"""
    importances: GroupConfig = GroupConfig()
    """the causal importance functions"""
    faithfulness_warmup: WarmupConfig | None = None
    metrics: Metrics = {}
    n_eval_batches: EvalBatches = 4
    log_every: int = Field(default=100, ge=1)
    eval_every: int = Field(default=1000, ge=1)
    save_every: int = Field(default=5000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _one_way_to_clip(self) -> Self:
        own = [name for name in ("components", "importances") if getattr(self, name).grad_clip]
        if self.grad_clip is not None and own:
            raise ValueError(
                f"grad_clip clips all parameters together, {own[0]}.grad_clip a group: one of them"
                " must be null"
            )
        return self

    @field_validator("halve_at")
    @classmethod
    def _fractions_in_order(cls, halve_at: tuple[float, ...]) -> tuple[float, ...]:
        ends = (0.0, *halve_at, 1.0)
        if not all(earlier < later for earlier, later in pairwise(ends)):
            raise ValueError(
                f"{list(halve_at)}: fractions between 0 and 1, each above the one before it, are allowed"
            )
        return halve_at

    @field_validator("losses")
    @classmethod
    def _some_loss(cls, losses: Losses) -> Losses:
        if not any(spec.is_on for spec in losses.values()):
            raise ValueError("at least one needs a coefficient above 0")
        return losses
