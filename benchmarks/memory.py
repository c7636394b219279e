"""Peak memory and speed of a step on a language model, by what is decomposed and how passes are run.

python -m benchmarks.memory [--steps 5] [--passes one_by_one one_by_one,compiled together]

A Llama of the size of SimpleStories-1.25M (4 layers; with 8, room for 24 matrices), 4 × 512 tokens,
C = 100, affine importance functions, both stochastic losses; of the embedding, as in `ss_emb`, the
layerwise one. Every case runs in a process of its own; the peak is that of the process, with everything
it has imported.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from benchmarks.blocks import peak_resident_megabytes
from spd.config import parse
from spd.engine.compilation import CompiledStep
from spd.engine.prepare import prepare
from spd.engine.sequential import CompiledPasses
from spd.experiments.lm.model import TokenModel
from spd.problem import Problem
from spd.spd_config import SPDConfig

BATCH, POSITIONS, VOCAB, C = 4, 512, 4096, 100
LOSSES = {
    "faithfulness": {"coeff": 1.0},
    "importance_minimality": {"coeff": 1e-6, "pnorm": 2.0},
    "stochastic_recon": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0},
}
EMBEDDING_LOSSES = {name: spec for name, spec in LOSSES.items() if name != "stochastic_recon"}
PATTERNS = {
    "embedding": "model.embed_tokens",
    "1": "model.layers.0.mlp.down_proj",
    "4": "model.layers.[0-3].mlp.down_proj",
    "12": "model.layers.[0-3].mlp.*_proj",
    "24": "model.layers.*.mlp.*_proj",
}
SIZES = [(4, "embedding"), (4, "1"), (4, "4"), (4, "12")]
SIZES += [(8, "1"), (8, "4"), (8, "12"), (8, "24")]
"""layers, and what is decomposed: the embedding, or how many matrices"""
CASE = ("LAYERS", "SITES", "PASSES")
# the last takes minutes for the embedding, and was never waited for with more
PASSES = ("one_by_one", "one_by_one,compiled", "together", "together,compiled")


class Measured(NamedTuple):
    """One case."""

    megabytes: float
    """largest resident set of the process, in 10⁶ bytes"""
    tokens_per_second: float
    """of the median step after the first"""
    first_seconds: float
    """of the first step, which is where compiling happens"""


def measure(n_layers: int, sites: str, variant: str, steps: int) -> Measured:
    """Train for `steps` steps in this process."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=341,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            use_cache=False,
        )
    )
    passes, _, compiled = variant.partition(",")
    losses = EMBEDDING_LOSSES if sites == "embedding" else LOSSES
    raw: dict[str, Any] = {"sites": {PATTERNS[sites]: C}, "losses": losses}
    raw |= {"importance": {"type": "affine"}, "n_eval_batches": 1, "steps": steps, "lr": 1e-4}
    raw["execution"] = {"compile": bool(compiled), "passes": passes}
    config = parse(SPDConfig, raw, "benchmark")
    problem = Problem(TokenModel(llama, "logits"), _tokens(), _tokens(), recon="kl")
    objective = prepare(problem, config).objective
    parameters = list(objective.model.subcomponent_parameters().values())
    assert len(objective.model.sites) == (1 if sites == "embedding" else int(sites))
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    together = passes == "together"
    kind = CompiledStep if together else CompiledPasses
    step_fn = kind(objective, config.execution.compile, steps)
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        batch = next(problem.train_batches)
        noise = objective.noise(batch, stream="train", seed=0, step=step)
        progress = torch.tensor(step / steps)
        if together:
            step_fn(batch, progress, dict(noise), None)[0].backward()
        else:
            step_fn(batch, progress, noise, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    tokens_per_second = BATCH * POSITIONS / statistics.median(seconds[1:])
    return Measured(peak_resident_megabytes(), tokens_per_second, seconds[0])


def _tokens() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, VOCAB, (BATCH, POSITIONS), generator=generator)


def measured_apart(n_layers: int, sites: str, variant: str, steps: int) -> Measured:
    """The same in a process of its own."""
    case = ["--case", str(n_layers), sites, variant, "--steps", str(steps)]
    command = [sys.executable, "-m", "benchmarks.memory", *case]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(*map(float, done.stdout.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="of each case, the first not timed")
    parser.add_argument("--passes", nargs="+", default=PASSES[:-1], choices=PASSES)
    parser.add_argument("--case", nargs=3, metavar=CASE, help="one, unformatted")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2 are needed")
    if args.case:
        n_layers, sites, variant = args.case
        print(*measure(int(n_layers), sites, variant, args.steps))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    columns = ("layers", "sites", "passes", "peak memory", "tokens/s", "first step")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for n_layers, sites in SIZES:
        for variant in args.passes:
            peak, speed, first = measured_apart(n_layers, sites, variant, args.steps)
            cells = (str(n_layers), sites, variant.replace(",", ", "))
            measured = (f"{peak:.0f} MB", f"{speed:,.0f}", f"{first:.0f} s")
            print(f"| {' | '.join(cells + measured)} |", flush=True)


if __name__ == "__main__":
    main()
