"""How well single subcomponents reproduce single columns: MMCS and ML2R (paper, section 3.1)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.losses import StepContext
from spd.metrics.spec import Metric, MetricSpec, Quantity
from spd.problem import Problem

INERT_FRACTION = 0.1


class ColumnMatch(NamedTuple):
    """How well single subcomponents reproduce single columns of a weight matrix (paper, section 3.1)."""

    mmcs: Float[Tensor, " features"]
    """for every input feature, the best cosine similarity"""
    ml2r: Float[Tensor, " features"]
    """norm of that subcomponent's column over the norm of the target's"""
    best: Tensor
    """which subcomponent, `[features]`; -1 where none is large enough"""


def column_match(
    weight: Float[Tensor, "d_in d_out"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    *,
    min_ratio: float = 0.0,
) -> ColumnMatch:
    """Per feature j the c with the best cosine between U_c V_jc and W[:, j].

    Only subcomponents with ‖U_c V_jc‖ ≥ `min_ratio` · ‖W[:, j]‖ compete; 0 is the paper's definition,
    in which an inert subcomponent can win by chance. Without any competitor, or with W[:, j] = 0,
    feature j counts 0.
    """
    norms = V.abs() * U.norm(dim=1)
    target_norms = weight.norm(dim=1, keepdim=True)
    directions = torch.nn.functional.normalize(U, dim=1)
    cosines = V.sign() * (torch.nn.functional.normalize(weight, dim=1) @ directions.mT)
    eligible = (norms >= min_ratio * target_norms) & (target_norms > 0)
    cosine, best = cosines.masked_fill(~eligible, -torch.inf).max(dim=1)
    ratio = (norms / target_norms).gather(1, best[:, None]).squeeze(1)
    any_eligible = eligible.any(dim=1)
    return ColumnMatch(
        torch.where(any_eligible, cosine, 0.0),
        torch.where(any_eligible, ratio, 0.0),
        torch.where(any_eligible, best, -1),
    )


class ColumnMatchMetric(MetricSpec):
    """MMCS and ML2R of one site, by the paper's definition and with inert subcomponents left out."""

    quantities = {
        "mmcs": Quantity(
            label="MMCS",
            meaning="how well the direction of each column of the target's matrix is met by a single"
            " subcomponent (cosine; 1 is perfect), mean over the input features ± their standard"
            " deviation (n − 1); subcomponents shorter than a tenth of the column do not compete",
            spread="mmcs_sd",
        ),
        "ml2r": Quantity(
            label="ML2R",
            meaning="the length of that subcomponent over the column's (1 is perfect)",
            spread="ml2r_sd",
        ),
        "mmcs_paper": Quantity(
            label="MMCS (paper's definition)",
            meaning="the same if subcomponents of any length compete",
            headline=False,
            spread="mmcs_paper_sd",
            published_as="mmcs",
        ),
        "ml2r_paper": Quantity(
            label="ML2R (paper's definition)",
            headline=False,
            spread="ml2r_paper_sd",
            published_as="ml2r",
        ),
    }

    type: Literal["column_match"] = "column_match"
    site: str

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        if self.site not in model.sites:
            raise UserError(
                f"metrics.column_match.site: {self.site!r} is no site"
                f" (sites: {', '.join(model.sites)})"
            )
        return _ColumnMatch(model, self.site)


class _ColumnMatch:
    def __init__(self, model: ComponentModel, path: str) -> None:
        self.model, self.path = model, path

    def update(self, ctx: StepContext) -> None:
        pass

    def compute(self) -> dict[str, float]:
        site = self.model.sites[self.path]
        parts = site.subcomponents
        values = {}
        for suffix, min_ratio in (("", INERT_FRACTION), ("_paper", 0.0)):
            match = column_match(site.target_weight, parts.V, parts.U, min_ratio=min_ratio)
            for name in ("mmcs", "ml2r"):
                per_feature = getattr(match, name)
                values[f"{name}{suffix}/{self.path}"] = per_feature.mean().item()
                spread = per_feature.std().item() if len(per_feature) > 1 else 0.0
                values[f"{name}{suffix}_sd/{self.path}"] = spread
        return values
