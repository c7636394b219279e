"""Kinds of numbers in configurations, each with a limit far above any use.

Without one a slip of the keyboard is a run that would take longer than anybody waits. What a limit cannot
know, whether a size fits into memory, is `spd.config.memory`'s.
"""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

MAX_STEPS = 99_999_999
"""Checkpoints and figures are named by eight digits. At a thousand steps a second it is a day, and more
than a thousand times as many as the longest of the shipped experiments has."""
MAX_SEED = 2**63 - 1
"""the largest number that other readers of YAML and JSON, and torch, take as a whole one"""


def _whole(value: Any) -> Any:
    """Refuse `1.0`, which would be taken for another seed than `1` by whoever compares the text."""
    if isinstance(value, float) or (isinstance(value, str) and re.search(r"[^-+0-9\s]", value)):
        raise ValueError(
            f"a seed is a whole number, written without point or exponent: got {value!r}"
        )
    return value


Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MAX_SEED)]
Samples = Annotated[int, Field(ge=1, le=100)]
"""Passes of one term in every step; published runs take one to four, and the error of a mean over a
hundred is a tenth of that of one."""
EvalBatches = Annotated[int, Field(ge=1, le=10_000)]
"""All are kept, and looked at in every evaluation; the shipped experiments take up to 64."""
MAX_WIDTH, MAX_LAYERS = 10_000_000, 1000
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
"""of a layer of a model that is trained here"""
Members = Annotated[int, Field(ge=1, le=10_000)]
"""trained side by side"""
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
