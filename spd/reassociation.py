"""A pass of the compiler that multiplies matrices in the cheapest order.

A residual stream is read by matrices alone, so it never has to exist: with `r = x W + a U`, the product
`r V` is `x (W V) + a (U V)`, which is far less work where the stream is wider than what it carries. The
same holds for gradients. Models are written as they are understood; the compiled step multiplies in
this order. Rounding aside, nothing changes. Knows nothing of subcomponents.
"""

from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

MAX_TERMS = 16
MAX_DEPTH = 4
TRAFFIC = 32
"""Multiplications that take about as long as writing one number."""


def multiply_cheaply(graph: Graph) -> None:
    """Rewrite a graph of aten operations in place; for inductor's option `joint_custom_pre_pass`."""
    _Products(graph).rewrite()


class _Plan(NamedTuple):
    """A product that may have to be computed, and what it costs."""

    cost: float
    shape: tuple[int, int]
    summands: tuple[tuple["_Operand", "_Operand"], ...]


_Operand = Node | _Plan


class _Products:
    """The products of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[tuple[Node, Node], Node] = {}
        self.transposes: dict[Node, Node] = {}
        self.place: Node | None = None

    def rewrite(self) -> None:
        """Replace every product that is cheaper in another order."""
        for node in list(self.graph.nodes):
            if _transposed(node) is not None:
                self.transposes.setdefault(node.args[0], node)
            if not _is_product(node):
                continue
            self.place = node
            left, right = node.args
            found = self.known.get((left, right))
            if found is None:
                plan = self._plan(left, right, MAX_DEPTH)
                if self._is_direct(plan, left, right):
                    self.known[left, right] = node
                    continue
                found = self._build(plan)
                self.known[left, right] = found
            node.replace_all_uses_with(found)
        self.graph.eliminate_dead_code()

    def _plan(self, left: _Operand, right: _Operand, depth: int) -> _Plan:
        """The cheapest way to `left @ right`: as it stands, or with one side taken apart."""
        (m, k), (_, n) = _shape(left), _shape(right)
        shape = (m, n)
        if isinstance(left, Node) and isinstance(right, Node) and (left, right) in self.known:
            return _Plan(0.0, shape, ((left, right),))
        direct = m * n * (k + TRAFFIC)
        best = _Plan(direct + _owed(left) + _owed(right), shape, ((left, right),))
        if depth == 0:
            return best
        for side, operand in enumerate((left, right)):
            terms = self._terms(operand) if isinstance(operand, Node) else []
            if not 1 <= len(terms) <= MAX_TERMS or all(b is None for _, b in terms):
                continue
            summands: list[tuple[_Operand, _Operand]] = []
            cost = 0.0
            for a, b in terms:
                if b is None:
                    pair = (a, right) if side == 0 else (left, a)
                elif side == 0:
                    pair = (a, self._plan(b, right, depth - 1))
                else:
                    pair = (self._plan(left, a, depth - 1), b)
                whole = self._plan(*pair, depth - 1)
                summands += whole.summands
                cost += whole.cost + sum(part.cost for part in pair if isinstance(part, _Plan))
            if cost < best.cost:
                best = _Plan(cost, shape, tuple(summands))
        return best

    def _terms(self, node: Node) -> list[tuple[Node, Node | None]]:
        """The summands that make up a matrix: products (a, b), or (a, None) for what is no product."""
        if _is_product(node):
            return [(node.args[0], node.args[1])]  # pyright: ignore[reportReturnType]
        if _is_sum(node):
            return [term for summand in node.args for term in self._terms(summand)]  # pyright: ignore
        inner = _transposed(node)
        if inner is not None:
            return [
                (self._transpose(a), None)
                if b is None
                else (self._transpose(b), self._transpose(a))
                for a, b in self._terms(inner)
            ]
        return [(node, None)]

    def _transpose(self, node: Node) -> Node:
        inner = _transposed(node)
        if inner is not None:
            return inner
        if node not in self.transposes:
            assert self.place is not None, "set by rewrite"
            with self.graph.inserting_before(self.place):
                self.transposes[node] = self._call(aten.permute.default, node, [1, 0])
        return self.transposes[node]

    def _is_direct(self, plan: _Plan, left: Any, right: Any) -> bool:
        return plan.summands == ((left, right),)

    def _build(self, plan: _Plan) -> Node:
        assert self.place is not None, "set by rewrite"
        total: Node | None = None
        for pair in plan.summands:
            left, right = (self._build(x) if isinstance(x, _Plan) else x for x in pair)
            if (left, right) not in self.known:
                with self.graph.inserting_before(self.place):
                    self.known[left, right] = self._call(aten.mm.default, left, right)
            product = self.known[left, right]
            if total is None:
                total = product
            else:
                with self.graph.inserting_before(self.place):
                    total = self._call(aten.add.Tensor, total, product)
        assert total is not None, "a product has a summand"
        return total

    def _call(self, function: Any, *args: Any) -> Node:
        node = self.graph.call_function(function, args)
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        node.meta["val"] = function(*values)
        return node


def _owed(operand: _Operand) -> float:
    """What computing an operand costs this product, where products are all that it is needed for."""
    if not isinstance(operand, Node):
        return 0.0
    n_readers = _readers(operand)
    if n_readers is None:
        return 0.0
    return _made_of(operand) / max(n_readers, 1)


def _readers(node: Node) -> int | None:
    """How many products read a matrix, also through sums; None if anything else does."""
    if not (_is_product(node) or _is_sum(node) or _transposed(node) is not None):
        return None
    total = 0
    for user in node.users:
        if _is_product(user):
            total += 1
            continue
        n_readers = _readers(user) if _is_sum(user) or _transposed(user) is not None else None
        if n_readers is None:
            return None
        total += n_readers
    return total


def _made_of(node: Node) -> float:
    """What the products cost that a matrix is the sum of."""
    inner = _transposed(node)
    if inner is not None:
        return _made_of(inner)
    if _is_sum(node):
        return sum(_made_of(arg) for arg in node.args if isinstance(arg, Node))
    if _is_product(node):
        left, right = node.args
        (m, k), (_, n) = _shape(left), _shape(right)  # pyright: ignore[reportArgumentType]
        return m * n * (k + TRAFFIC)
    return 0.0


def _shape(operand: _Operand) -> tuple[int, int]:
    return operand.shape if isinstance(operand, _Plan) else tuple(operand.meta["val"].shape)


def _is_matrix(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.is_floating_point()


def _is_product(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten.mm.default and _is_matrix(node)


def _is_sum(node: Any) -> bool:
    if not (isinstance(node, Node) and node.target is aten.add.Tensor and not node.kwargs):
        return False
    shapes = {_shape(arg) for arg in node.args if _is_matrix(arg)}  # pyright: ignore
    return all(_is_matrix(arg) for arg in node.args) and len(shapes) == 1


def _transposed(node: Any) -> Node | None:
    """What a matrix is the transpose of, if it is one."""
    if isinstance(node, Node) and _is_matrix(node):
        if node.target is aten.permute.default and list(node.args[1]) == [1, 0]:  # pyright: ignore
            return node.args[0]  # pyright: ignore[reportReturnType]
        if node.target is aten.t.default:
            return node.args[0]  # pyright: ignore[reportReturnType]
    return None
