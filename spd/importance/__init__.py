"""Causal importance functions, of single sites and of all together, and their sigmoids."""

from typing import Annotated

from pydantic import Field

from spd.importance.functions import (
    AffineImportance,
    AffineImportanceConfig,
    Importance,
    ImportanceSpec,
    InputImportance,
    MLPImportance,
    MLPImportanceConfig,
    SharedMLPImportance,
    SharedMLPImportanceConfig,
    VectorMLPImportance,
    VectorMLPImportanceConfig,
    rms_normalized,
)
from spd.importance.sigmoids import (
    CausalImportances,
    LowerLeak,
    Mapped,
    lower_leaky_hard_sigmoid,
    upper_leaky_hard_sigmoid,
)
from spd.importance.whole import (
    Chunk,
    GlobalMLPImportanceConfig,
    SiteSize,
    TransformerImportance,
    TransformerImportanceConfig,
    WholeImportance,
    WholeImportanceSpec,
    check_together,
)

ImportanceConfig = Annotated[
    MLPImportanceConfig
    | AffineImportanceConfig
    | SharedMLPImportanceConfig
    | VectorMLPImportanceConfig
    | GlobalMLPImportanceConfig
    | TransformerImportanceConfig,
    Field(discriminator="type"),
]

__all__ = [
    "AffineImportance",
    "AffineImportanceConfig",
    "CausalImportances",
    "Chunk",
    "GlobalMLPImportanceConfig",
    "Importance",
    "ImportanceConfig",
    "ImportanceSpec",
    "InputImportance",
    "LowerLeak",
    "MLPImportance",
    "MLPImportanceConfig",
    "Mapped",
    "SharedMLPImportance",
    "SharedMLPImportanceConfig",
    "SiteSize",
    "TransformerImportance",
    "TransformerImportanceConfig",
    "VectorMLPImportance",
    "VectorMLPImportanceConfig",
    "WholeImportance",
    "WholeImportanceSpec",
    "check_together",
    "lower_leaky_hard_sigmoid",
    "rms_normalized",
    "upper_leaky_hard_sigmoid",
]
