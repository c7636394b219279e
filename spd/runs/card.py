"""The model card of a decomposition: what it is, its figures, how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any

from spd.component_model import ComponentModel
from spd.config import BaseConfig

CARD = """---
{{ card_data }}
---

# {{ title }}

A stochastic parameter decomposition ([arXiv 2506.20790](https://arxiv.org/abs/2506.20790)): each of the
matrices below is a sum of C rank-one subcomponents V_c U_c, and an importance function says for every input
which of them it needs. {{ target }}

| matrix | d_in | d_out | C |
|---|---|---|---|
{{ sites }}

## Figures

{{ figures }}

## How to load it

```python
from spd.runs.pretrained import Decomposition

model = Decomposition.from_pretrained("{{ place }}"{{ given }}).model
g = model.importances(batch).lower  # matrix → how much each subcomponent is needed, [..., C]
output = model(batch, g)  # every matrix replaced by its masked subcomponents; model(batch, {}): the target
```

`model.sites["{{ first }}"].subcomponents` has V `[d_in, C]` and U `[C, d_out]`; `batch` is what the
target takes.
"""


class Figure(BaseConfig):
    """One figure of merit, as text."""

    label: str
    value: str
    published: str = "–"


def card_of(
    model: ComponentModel,
    figures: Sequence[Figure],
    *,
    made_of: Mapping[str, Any],
    travels: bool,
) -> dict[str, str]:
    """What the template needs; `made_of` is the configuration of the run, if there was one.

    travels: whether the target comes with it.
    """
    rows = []
    for path, site in model.sites.items():
        d_in, d_out = site.target_weight.shape
        rows.append(f"| `{path}` | {d_in} | {d_out} | {site.C} |")
    run = f"{made_of.get('experiment')}, seed {made_of.get('seed')}, {made_of.get('steps')} steps"
    where = (
        "The target, which stays frozen, comes with it."
        if travels
        else "The target does not come with it: a module with the decomposed weights is needed to load it."
    )
    return {
        "title": f"Decomposition: {run}" if made_of else "Decomposition",
        "target": where,
        "sites": "\n".join(rows),
        "figures": _table(figures),
        "place": "user/name",
        "given": "" if travels else ", target=module",
        "first": next(iter(model.sites)),
    }


def _table(figures: Sequence[Figure]) -> str:
    if not figures:
        return "None were recorded."
    lines = [f"| {own.label} | {own.value} | {own.published} |" for own in figures]
    head = "| on held-out data | here | published |\n|---|---|---|\n"
    return head + "\n".join(lines)
