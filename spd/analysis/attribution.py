"""python -m spd.analysis.attribution RUN_DIR [--prompt TEXT] [--prune]: what causes what, on one example.

Nodes are the subcomponents that are important there, the inputs, and the outputs asked for; edges are
direct effects, with the gradient stopped at every other subcomponent. With --prune the importances are
those of one behaviour, trained against an adversary, whose result stands beside the graph. --data N gives
the strongest edges over N held-out batches instead (VPD paper, Bushnaq et al. 2026).
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from spd.analysis.behaviour import Behaviour, Judgement, Pruning, prune
from spd.analysis.edges import INPUT, Node, over_data, to_unembedding
from spd.analysis.editing import HasTokens, output_named
from spd.analysis.edits import ever_on
from spd.analysis.graph import N_NODES, Wanted, as_data, graph_of, running_order
from spd.components import input_output_weight
from spd.config import UserError
from spd.problem import of_ids
from spd.reports.graph import write_graph
from spd.run_files import write_json
from spd.runs.cli import add_ways_in
from spd.runs.console import console_log, user_errors
from spd.runs.run import Run, load_run

ANALYSIS = "analysis/attribution"
N_POSITIONS = 32
"""of a held-out text, where no prompt is given"""


@runtime_checkable
class EncodesText(Protocol):
    """A problem that knows how a text becomes token ids as in its data."""

    def encode(self, text: str) -> list[int]: ...


@runtime_checkable
class ReadsTokens(Protocol):
    """A problem that knows what its tokens are as text, parts of characters too."""

    @property
    def token_text(self) -> Callable[[int], str]: ...


class Prompt(NamedTuple):
    """An example and what is asked about it."""

    batch: Tensor
    """of one example"""
    position: int
    outputs: list[int]
    columns: list[str]
    """the texts of its tokens; one empty one for a toy"""
    names: dict[int, str]
    """texts of inputs and outputs by index"""


def prompt_of(
    run: Run,
    *,
    text: str | None = None,
    row: int = 0,
    position: int | None = None,
    outputs: Sequence[str] = (),
) -> Prompt:
    """A text, or a held-out row; by default the last position and what is predicted there."""
    model, problem = run.model, run.problem
    batches = [batch for batch in run.prepared.eval_batches if isinstance(batch, Tensor)]
    if not batches:
        raise UserError(
            f"{run.directory}: its batches have names; only batches of one Tensor are traced"
        )
    tokenizer = problem.tokenizer if isinstance(problem, HasTokens) else None
    if text is not None:
        if tokenizer is None:
            raise UserError(
                "--prompt: this run's target reads no text that a tokenizer is known of"
            )
        encode = problem.encode if isinstance(problem, EncodesText) else tokenizer.encode
        batch = torch.tensor([encode(text)], dtype=torch.long, device=batches[0].device)
        if batch.shape[1] == 0:
            raise UserError(f"--prompt: {text!r} has no token")
    else:
        rows = torch.cat(batches)
        if not 0 <= row < len(rows):
            raise UserError(f"--row {row}: there are the held-out rows 0 to {len(rows) - 1}")
        batch = rows[row : row + 1]
        batch = batch[:, :N_POSITIONS] if of_ids(batch) else batch
    with torch.no_grad():
        output = model(batch, {}).flatten(end_dim=-2)
    n, d = output.shape
    at = n - 1 if position is None else position
    if not 0 <= at < n:
        raise UserError(f"--position {at}: the example has the positions 0 to {n - 1}")
    wanted = [output_named(run, name) for name in outputs] or [int(output[at].argmax())]
    for index in wanted:
        if not 0 <= index < d:
            raise UserError(f"--output {index}: the target has the outputs 0 to {d - 1}")
    ids = {*wanted, *(batch.flatten().tolist() if of_ids(batch) else [])}
    text_of: Callable[[int], str] = str
    if tokenizer is not None:
        known = isinstance(problem, ReadsTokens)
        text_of = problem.token_text if known else partial(_decoded, tokenizer)
    names = {i: text_of(i) for i in ids}
    of_tokens = of_ids(batch)
    columns = [names[i] for i in batch.flatten().tolist()] if of_tokens else [""]
    return Prompt(batch, at, wanted, columns, names)


def _decoded(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


class Found(NamedTuple):
    """A graph as the page has it, and the behaviour that it was pruned for."""

    data: dict[str, Any]
    behaviour: Behaviour | None


def attribution(
    run: Run, prompt: Prompt, *, pruning: Pruning | None = None, n_nodes: int = N_NODES
) -> Found:
    """The graph of one example; with `pruning`, of the first output asked for, and that alone."""
    model, problem, behaviour = run.model, run.problem, None
    if pruning is not None:
        asked = {"position": prompt.position, "wanted": prompt.outputs[0]}
        behaviour = prune(model, problem, prompt.batch, **asked, how=pruning)
    graph = graph_of(
        *(model, problem, prompt.batch),
        [Wanted(prompt.position, index) for index in prompt.outputs],
        g=None if behaviour is None else behaviour.importances,
        n_nodes=n_nodes,
    )
    order = running_order(model, prompt.batch)
    data = as_data(graph, order, prompt.columns, prompt.names)
    return Found(data, behaviour)


def sentences(found: Found, prompt: Prompt) -> list[str]:
    """What stands above the picture, and is printed."""
    data, behaviour = found.data, found.behaviour
    outputs = ", ".join(repr(prompt.names[index]) for index in prompt.outputs)
    n = sum(node["kind"] == "component" for node in data["nodes"])
    told = [
        f"What causes {outputs} at position {prompt.position}: {n} subcomponents,"
        f" {len(data['edges'])} direct effects. {data['left_out']} subcomponents that are on, but matter"
        " less, are left out."
    ]
    if behaviour is None:
        told.append("With the importances of the run; --prune finds those of this behaviour alone.")
        return told
    for words, own in (("Of the run", behaviour.before), ("Of this behaviour", behaviour.after)):
        told.append(f"{words}: {_judged(own)}")
    return told


def _judged(own: Judgement) -> str:
    return (
        f"{own.n_nodes} nodes; the target gives {own.target:.3f}, the importances as masks"
        f" {own.masked:.3f}, random masks {own.stochastic:.3f}, adversarial masks {own.adversarial:.3f}"
        f" ({own.n_steps} steps)."
    )


def over_held_out(
    run: Run, n_batches: int, *, n_targets: int = 50, n_edges: int = 20
) -> dict[str, Any]:
    """The strongest normalised edges into the subcomponents that are on most, over held-out batches."""
    model, problem = run.model, run.problem
    batches = [b for b in run.prepared.eval_batches if isinstance(b, Tensor)][:n_batches]
    if not batches:
        raise UserError(f"{run.directory}: no batch of one Tensor to look at")
    of_tokens = of_ids(batches[0])
    unembed = problem.unembed if isinstance(problem, HasTokens) else None
    alive = ever_on(model, batches)
    found = over_data(
        *(model, batches, _most_on(run, batches, n_targets, alive)),
        n_tokens=_n_tokens(run, batches) if of_tokens else None,
    )
    edges = []
    for target, by_site in found.effects.items():
        for source in by_site:
            signed = found.normalised(target, source)
            absolute = found.normalised(target, source, absolute=True)
            strongest = absolute.abs().topk(min(n_edges, len(absolute))).indices.tolist()
            edges += [
                [[source, c], list(target), signed[c].item(), absolute[c].item()]
                for c in strongest
                if absolute[c] != 0
            ]
    edges.sort(key=lambda edge: -abs(edge[3]))
    record: dict[str, Any] = {"checkpoint": run.step, "n_batches": len(batches), "edges": edges}
    if unembed is not None:
        record["towards_tokens"] = _towards_tokens(run, batches, unembed, alive)
    return record


def _most_on(run: Run, batches: Sequence[Tensor], n: int, alive: dict[str, Tensor]) -> list[Node]:
    means: dict[Node, float] = {}
    for path, g in run.model.importances(batches[0]).lower.items():
        mean = g.clamp(0, 1).flatten(end_dim=-2).mean(dim=0)
        means |= {Node(path, c): mean[c].item() for c in alive[path].nonzero().flatten().tolist()}
    return sorted(means, key=lambda node: -means[node])[:n]


def _n_tokens(run: Run, batches: Sequence[Tensor]) -> int:
    largest = max(int(batch.max()) for batch in batches)
    with torch.no_grad():
        return max(largest + 1, run.model(batches[0][:1], {}).shape[-1])


def _towards_tokens(
    run: Run, batches: Sequence[Tensor], unembed: str, alive: dict[str, Tensor]
) -> list[Any]:
    """Of each subcomponent that is ever on, the three tokens whose logits it raises most."""
    head = run.model.target.get_submodule(unembed)
    original = getattr(head, "original", head)
    columns = input_output_weight(original).detach().float()
    columns = columns - columns.mean(dim=1, keepdim=True)
    found = []
    for path, sums in to_unembedding(run.model, batches[:1], unembed).items():
        if path == INPUT:
            continue
        for c in alive[path].nonzero().flatten().tolist():
            best = (sums[c] @ columns).topk(3)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found.append([path, c, [list(pair) for pair in pairs]])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Draw which subcomponents cause which on one example, or list the strongest edges over data."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--prompt", metavar="TEXT", help="of a language model")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="held-out example (0)")
    parser.add_argument("--position", type=int, metavar="T", help="of the outputs (the last)")
    parser.add_argument("--output", nargs="+", default=[], metavar="TOKEN", help="asked for")
    parser.add_argument("--nodes", type=int, default=N_NODES, metavar="N", help="at most")
    parser.add_argument("--prune", type=int, metavar="STEPS", help="for one behaviour, as 2000")
    parser.add_argument("--minimality", type=float, default=0.1, help="of --prune (0.1)")
    parser.add_argument("--data", type=int, metavar="N", help="edges over N batches instead")
    parser.add_argument("--name", default="graph", help="of the files in the run (graph)")
    add_ways_in(parser)
    args = parser.parse_args(argv)
    for name in ("nodes", "prune", "data"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1 is needed")
    if not args.name.replace("-", "").replace("_", "").isalnum():
        parser.error(f"--name {args.name!r}: letters, digits, '_' and '-' are allowed")
    with console_log(), user_errors():
        run = load_run(args.run_dir, trust=args.trust, verify=not args.unverified)
        folder = args.run_dir / ANALYSIS
        folder.mkdir(parents=True, exist_ok=True)
        if args.data is not None:
            record = over_held_out(run, args.data)
            write_json(folder / "data.json", record)
            for source, target, signed, absolute in record["edges"][:20]:
                print(
                    f"{source[0]}:{source[1]} -> {target[0]}:{target[1]}  {signed:+.3f}  {absolute:.3f}"
                )
            print(f"Â and |Â|, the strongest of {len(record['edges'])}; in {folder / 'data.json'}")
            return
        asked = {"text": args.prompt, "row": args.row, "position": args.position}
        prompt = prompt_of(run, **asked, outputs=args.output)
        pruning = None if args.prune is None else Pruning(args.prune, minimality=args.minimality)
        found = attribution(run, prompt, pruning=pruning, n_nodes=args.nodes)
        told = sentences(found, prompt)
        judged = found.behaviour and {
            name: getattr(found.behaviour, name)._asdict() for name in ("before", "after")
        }
        write_json(folder / f"{args.name}.json", {**found.data, "behaviour": judged})
        title = f"Causes in {run.config.experiment}"
        page = write_graph(folder / f"{args.name}.html", found.data, title=title, sentences=told)
    print(*told, sep="\n")
    print(f"graph: {page}")


if __name__ == "__main__":
    main()
