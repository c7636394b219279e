"""The graph of one prompt: subcomponents at positions as nodes, direct effects as edges."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd.analysis.edges import INPUT, Traced, direct_effects, trace
from spd.component_model import ComponentModel
from spd.config import UserError
from spd.problem import Batch, Problem, of_ids

N_NODES, N_EDGES = 150, 1500


class Wanted(NamedTuple):
    """An output whose causes are looked for."""

    position: int
    """0 for a toy, whose row has one"""
    output: int
    """a token, or an output"""


class GraphNode(NamedTuple):
    """A node, by what it is and how much it matters here."""

    kind: str
    """input, component or output"""
    site: str
    """where it stands; `input` and `output` for the two others"""
    position: int
    item: int
    """a subcomponent, a feature, or a token"""
    g: float
    """its importance"""
    activation: float
    """‖U_c‖ V_c·x; the value of an input, or of an output (a logit less the mean of all)"""


class Graph(NamedTuple):
    """Nodes, and edges (source, target, attr, share of all that goes into the target)."""

    nodes: list[GraphNode]
    edges: list[tuple[int, int, float, float]]
    n_left_out: int
    """subcomponents with g > 0 that are no nodes, since others matter more"""


def graph_of(
    model: ComponentModel,
    problem: Problem,
    batch: Batch,
    outputs: Sequence[Wanted],
    *,
    g: Mapping[str, Float[Tensor, "*rows C"]] | None = None,
    n_nodes: int = N_NODES,
    n_edges: int = N_EDGES,
) -> Graph:
    """The subcomponents with g > 0 on one example, and what they cause of each other and of outputs.

    Other importances than the model's may be given, as of a behaviour (`spd.analysis.behaviour`). An edge's
    share is attr over Σ|attr| of all that goes into its target, kept or not: attr itself scales with the
    target's V, so that edges into different targets compare by their shares alone.
    """
    if len(batch) != 1:
        raise UserError(f"a graph is of one example; {len(batch)} are given")
    importance = model.importances(batch).lower if g is None else g
    traced = trace(model, batch)
    flat = {path: own.clamp(0, 1).flatten(end_dim=-2) for path, own in importance.items()}
    nodes, n_left_out = _components(model, traced, flat, n_nodes)
    targets = [traced.acts[n.site].flatten(end_dim=-2)[n.position, n.item] for n in nodes]
    values = traced.output.flatten(end_dim=-2)
    for wanted in outputs:
        own = values[wanted.position, wanted.output]
        own = own - values[wanted.position].mean() if problem.recon == "kl" else own
        targets.append(own)
        place = ("output", wanted.position, wanted.output)
        nodes.append(GraphNode("output", *place, 1.0, own.item()))
    inputs = _inputs(traced, batch)
    index = {(n.site, n.position, n.item): i for i, n in enumerate([*nodes, *inputs])}
    edges = []
    for i, target in enumerate(targets):
        if target.requires_grad:
            effects = direct_effects(traced, target, importance)
            edges += _into(i, effects, index, of_tokens=of_ids(batch))
    edges.sort(key=lambda edge: -abs(edge[3]))
    edges = edges[:n_edges]
    return _connected(Graph([*nodes, *inputs], edges, n_left_out))


def _components(
    model: ComponentModel, traced: Traced, g: Mapping[str, Tensor], n_nodes: int
) -> tuple[list[GraphNode], int]:
    """Those with the largest g ‖U‖ |a|, in the order in which the sites run."""
    found = []
    for path, acts in traced.acts.items():
        norms = model.sites[path].subcomponents.U.detach().norm(dim=1)
        sizes = acts.detach().flatten(end_dim=-2) * norms
        for position, c in (g[path] > 0).nonzero().tolist():
            own = g[path][position, c].item(), sizes[position, c].item()
            found.append(GraphNode("component", path, position, c, *own))
    kept = sorted(found, key=lambda node: -node.g * abs(node.activation))[:n_nodes]
    order = {path: i for i, path in enumerate(traced.acts)}
    kept.sort(key=lambda node: (order[node.site], node.position, node.item))
    return kept, len(found) - len(kept)


def _inputs(traced: Traced, batch: Batch) -> list[GraphNode]:
    """A toy's features that are not 0, or the tokens; none where the embedding is a site."""
    if traced.embedded is None or not isinstance(batch, Tensor):
        return []
    if not of_ids(batch):
        features = batch.flatten(end_dim=-2)[0]
        on = features.nonzero().flatten().tolist()
        return [GraphNode("input", INPUT, 0, j, 1.0, features[j].item()) for j in on]
    ids = batch.flatten().tolist()
    norms = traced.embedded.detach().flatten(end_dim=-2).norm(dim=-1).tolist()
    places = enumerate(zip(ids, norms, strict=True))
    return [GraphNode("input", INPUT, t, token, 1.0, norm) for t, (token, norm) in places]


def _into(
    target: int,
    effects: Mapping[str, Tensor],
    index: Mapping[tuple[str, int, int], int],
    *,
    of_tokens: bool,
) -> list[tuple[int, int, float, float]]:
    """The edges into one target from all nodes; an input is a token at a position, or a feature."""
    whole = sum(float(effect.abs().sum()) for effect in effects.values())
    if whole <= 0:
        return []
    found = []
    for (site, position, place), source in index.items():
        if site not in effects:
            continue
        if site == INPUT:
            value = effects[site].flatten()[position if of_tokens else place]
        else:
            value = effects[site].flatten(end_dim=-2)[position, place]
        if value != 0:
            found.append((source, target, value.item(), value.item() / whole))
    return found


def _connected(graph: Graph) -> Graph:
    """Without the inputs and subcomponents that no edge is left of, unless all are without."""
    touched = {end for edge in graph.edges for end in edge[:2]}
    kept = [i for i, n in enumerate(graph.nodes) if i in touched or n.kind == "output"]
    new = {old: i for i, old in enumerate(kept)}
    edges = [(new[s], new[t], value, share) for s, t, value, share in graph.edges]
    return Graph([graph.nodes[i] for i in kept], edges, graph.n_left_out)


def as_data(
    graph: Graph, sites: Sequence[str], tokens: Sequence[str], names: Mapping[int, str]
) -> dict[str, Any]:
    """For the page: rows of the picture from below, columns, nodes and edges."""
    rows = [INPUT, *sites, "output"]
    nodes = [
        {
            "kind": node.kind,
            "row": rows.index(node.site),
            "column": node.position,
            "index": node.item,
            "g": round(node.g, 4),
            "a": float(f"{node.activation:.4g}"),
            "text": names.get(node.item, str(node.item)) if node.kind != "component" else "",
        }
        for node in graph.nodes
    ]
    edges = [[s, t, float(f"{v:.4g}"), float(f"{share:.4g}")] for s, t, v, share in graph.edges]
    return {
        "rows": rows,
        "columns": list(tokens),
        "nodes": nodes,
        "edges": edges,
        "left_out": graph.n_left_out,
    }


def running_order(model: ComponentModel, batch: Batch) -> list[str]:
    """The sites in the order in which the target calls them."""
    with torch.no_grad():
        return list(trace(model, batch).acts)
