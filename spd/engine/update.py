"""What follows the gradients of a step: clipping, learning rates, AdamW."""

from typing import Any

import torch

from spd.engine.ensemble import Alone, Ensemble
from spd.schedule import schedule_factor
from spd.spd_config import SPDConfig


class Update:
    """AdamW without weight decay over the groups of parameters, each with its rate, schedule and clip."""

    def __init__(self, trained: Alone | Ensemble, config: SPDConfig) -> None:
        self.trained, self.config = trained, config
        groups = [
            {"params": parameters, "name": name} for name, parameters in trained.groups.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0, fused=True)

    def __call__(self, step: int) -> dict[str, float]:
        """Apply the gradients and drop them; the learning rates, under the names they are logged by."""
        config = self.config
        if config.grad_clip is not None:
            self.trained.clip_gradients_(self.trained.parameters, config.grad_clip)
        rates = {"lr": config.lr * schedule_factor(config.lr_schedule, step, config.steps)}
        for group in self.optimizer.param_groups:
            own = getattr(config, group["name"])
            if own.grad_clip is not None:
                self.trained.clip_gradients_(group["params"], own.grad_clip)
            group["lr"] = rates["lr"]
            if own.lr is not None or own.lr_schedule is not None:
                lr, schedule = own.lr or config.lr, own.lr_schedule or config.lr_schedule
                group["lr"] = lr * schedule_factor(schedule, step, config.steps)
                rates[f"lr/{group['name']}"] = group["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rates

    def states(self) -> list[dict[str, Any]]:
        """What the optimizer of each run would hold if it were alone."""
        return self.trained.optimizer_states(self.optimizer.state_dict())

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """The inverse of `states`."""
        self.optimizer.load_state_dict(self.trained.common_state(states))
