"""Short runs against an adversary whose sources are kept; as a script, in two processes."""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from spd.engine.distributed import is_leader, joined
from spd.optimize import Silent, run_steps
from spd.spd_config import SPDConfig
from tests.carried_state import prepared, result_of
from tests.toy import make_config

PERSISTENT: dict[str, Any] = {"type": "persistent", "scope": "bc", "lr_ramp": 0.5}
MERGED: dict[str, Any] = {**PERSISTENT, "type": "merged", "betas": [0.01, 0.99]}


def config(source: dict[str, Any] = MERGED, **changes: Any) -> SPDConfig:
    settings = {"steps": 6, "log_every": 1, "eval_every": 3, "save_every": 3, "lr": 1e-2}
    losses = {
        "faithfulness": {"coeff": 1.0},
        "masked_recon": {"coeff": 0.5, "source": source},
        "importance_minimality": {"coeff": 1e-3, "pnorm": 1.0},
    }
    return make_config(losses, **{**settings, "n_eval_batches": 1, **changes})


if __name__ == "__main__":
    folder, scope, passes, until = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    with joined():
        run = prepared(config({**MERGED, "scope": scope}, passes=passes))
        stops = iter([0] * until + [15] * 9)
        try:
            run_steps(
                run,
                Silent(),
                checkpoints=folder / "checkpoints",
                resume=True,
                stop_requested=(lambda: next(stops)) if until < 6 else lambda: False,
            )
        except Exception as stopped:
            assert until < 6, stopped
        if is_leader() and until == 6:
            save_file(result_of(run, folder / "checkpoints"), folder / "result.safetensors")
        raise SystemExit(0)  # the other waits for the leader
