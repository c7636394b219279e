"""What a step cannot do without, at the speed that this machine reaches on nothing else.

python -m benchmarks.floor [EXPERIMENT …]

Counted after rows without input are merged and matrices are multiplied in the cheapest order, timed one by
one on shapes of the step, best of several rounds, beside the best block of steps:

- products: every matrix product of the compiled step, forward and backward;
- gelu: Φ and φ for every element of (rows, C, hidden), once forward and once backward;
- draws: the uniform numbers of masks and data;
- tensors: reading and writing what has the shape (rows, C), see `TENSORS_PER_SITE` and `…_PER_MASK`;
- optimizer: reading p, g, m, v and writing p, m, v of AdamW.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.blocks import machine, measure
from benchmarks.cases import Case, load
from benchmarks.step_time import DEFAULT
from spd.engine.compilation import inductor_options
from spd.engine.prepare import Prepared, prepare
from spd.importance import MLPImportance
from spd.kernels import normal_cdf_and_gelu_slope

Product = tuple[int, int, int]
"""m, k, n of [m, k] @ [k, n]"""

TENSORS_PER_SITE = 6
"""h read by either pass of the importance function; slope and importance, written and read"""
TENSORS_PER_MASK = 5
"""the draws written and read in either direction; masked h written, its gradient read"""
ADAMW_TENSORS = 7
FLOAT_BYTES = 4


class Work(NamedTuple):
    """What one step has to do."""

    products: Counter[Product]
    elements: int
    """of (rows, C, hidden)"""
    draws: int
    tensor_bytes: int
    optimizer_bytes: int


class Peaks(NamedTuple):
    """The machine's best, in seconds."""

    per_element: float
    """Φ and φ, nothing of which is read or written"""
    per_draw: float
    per_byte: float
    """of a copy of what no cache holds, counted twice"""


def work_of(prepared: Prepared) -> Work:
    batch = next(prepared.problem.train_batches)
    rows = prepared.zero_rows.merge(batch)
    objective = prepared.objective
    noise = objective.draw_noise(rows.batch, stream="train", seed=0, step=0)
    n_masks = Counter(key.partition(".")[2].partition(".")[2] for key in noise)
    products: Counter[Product] = Counter()

    def collect(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                left, right = (arg.meta["val"] for arg in node.args[-2:])
                products[*left.shape, right.shape[1]] += 1

    options = {**inductor_options(), "post_grad_custom_post_pass": collect}
    step = torch.compile(objective, fullgraph=True, dynamic=False, options=options)
    step(rows.batch, torch.tensor(0.0), noise, rows.weights)[0].backward()

    n_rows, elements, tensors = len(rows.batch), 0, 0
    for path, site in objective.model.sites.items():
        assert isinstance(site.importance, MLPImportance), "the toy experiments have no others"
        elements += n_rows * site.importance.mlp_in.numel()
        tensors += n_rows * site.C * (TENSORS_PER_SITE + TENSORS_PER_MASK * n_masks[path])
    n_parameters = sum(p.numel() for p in objective.model.subcomponent_parameters().values())
    return Work(
        products,
        elements,
        sum(uniform.numel() for uniform in noise.values()) + 2 * batch.numel(),
        tensors * FLOAT_BYTES,
        n_parameters * ADAMW_TENSORS * FLOAT_BYTES,
    )


def seconds_of(function: Callable[[], object], *, rounds: int = 7) -> float:
    """The best of several rounds, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def peaks() -> Peaks:
    h, w = torch.randn(4096, 1), torch.randn(256)

    @torch.compile(dynamic=False, options=inductor_options())
    def gelu() -> torch.Tensor:
        cdf, slope = normal_cdf_and_gelu_slope(h * w)
        return (cdf + slope).sum(dim=-1)

    uniform = torch.empty(1_000_000)
    source = torch.zeros(16_000_000)
    copied = torch.empty_like(source)
    return Peaks(
        per_element=seconds_of(gelu) / (h.numel() * w.numel()),
        per_draw=seconds_of(lambda: uniform.uniform_()) / uniform.numel(),
        per_byte=seconds_of(lambda: copied.copy_(source)) / (2 * FLOAT_BYTES * source.numel()),
    )


def seconds_of_products(products: Counter[Product]) -> float:
    total = 0.0
    for (m, k, n), count in products.items():
        left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        total += count * seconds_of(lambda a=left, b=right, out=out: torch.mm(a, b, out=out))
    return total


def floor(work: Work, peak: Peaks) -> dict[str, float]:
    """Seconds of every part."""
    return {
        "products": seconds_of_products(work.products),
        "gelu": 2 * work.elements * peak.per_element,
        "draws": work.draws * peak.per_draw,
        "tensors": work.tensor_bytes * peak.per_byte,
        "optimizer": work.optimizer_bytes * peak.per_byte,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiments", nargs="*", default=DEFAULT, metavar="EXPERIMENT")
    args = parser.parse_args()
    peak = peaks()
    print(machine())
    print(
        f"\nPeaks: {peak.per_element * 1e9:.2f} ns per Φ and φ, {peak.per_draw * 1e9:.2f} ns per draw,"
        f" {1e-9 / peak.per_byte:.1f} GB/s copied.\n"
    )
    for index, name in enumerate(args.experiments):
        with tempfile.TemporaryDirectory() as folder:
            config, problem = load(Case(name), Path(folder) / "target", "metrics={}", "figures={}")
        work = work_of(prepare(problem, config))
        parts = floor(work, peak)
        found = measure(Case(name), ["compiled"], n_blocks=5, block_seconds=1.0)["compiled"]
        own = 1 / max(found.steps_per_second)
        if index == 0:
            names = " | ".join(f"{part}, ms" for part in parts)
            print(f"| experiment | GFLOP | elements | {names} | floor, ms | measured, ms | times |")
            print("|---" * (len(parts) + 6) + "|")
        flops = sum(2 * m * k * n * count for (m, k, n), count in work.products.items())
        cells = [f"{1e3 * seconds:.2f}" for seconds in [*parts.values(), sum(parts.values()), own]]
        print(
            f"| `{name}` | {flops / 1e9:.2f} | {work.elements / 1e6:.1f} M | {' | '.join(cells)}"
            f" | {own / sum(parts.values()):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
