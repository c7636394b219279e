"""A pass of the compiler that multiplies matrices in the cheapest order.

A residual stream is read by matrices alone, so it never has to exist: with `r = x W + a U`, the product
`r V` is `x (W V) + a (U V)`, which is far less work where the stream is wider than what it carries. The
same holds for gradients. Models are written as they are understood; the compiled step multiplies in
this order. Rounding aside, nothing changes. Knows nothing of subcomponents.

A step that is mapped over the members of an ensemble multiplies stacks of matrices
`[members, rows, columns]`, with each other or with a matrix that all members share.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten

MAX_TERMS = 16
MAX_DEPTH = 4
TRAFFIC = 32
"""Multiplications that take about as long as writing one number."""


def multiply_cheaply(graph: Graph, n_members: int = 1) -> None:
    """Rewrite a graph of aten operations in place; for inductor's option `joint_custom_pre_pass`.

    With several members, tensors of three axes of which the first has that length are stacks of matrices.
    """
    products = _Products(graph, n_members)
    if n_members > 1:
        products.name_shared_products()
    products.rewrite()
    products.spell_out_shared_products()


class _Plan(NamedTuple):
    """A product that may have to be computed, and what it costs."""

    cost: float
    shape: "_Shape"
    summands: tuple[tuple["_Operand", "_Operand"], ...]


_Operand = Node | _Plan
_Shape = tuple[int, int, int]
"""how many matrices (1 for one that is no stack), and their rows and columns"""


class _Products:
    """The products of one graph: of two matrices, of two stacks, or of a stack and a matrix.

    The last are `torch.matmul` while the graph is worked on, which the compiler would not take.
    """

    def __init__(self, graph: Graph, n_members: int) -> None:
        self.graph = graph
        self.n_members = n_members
        self.known: dict[tuple[Node, Node], Node] = {}
        self.transposes: dict[Node, Node] = {}
        self.place: Node | None = None

    def name_shared_products(self) -> None:
        """Undo how `torch.func.vmap` multiplies a stack by a matrix: all rows as those of one matrix.

        Views that change nothing, which it leaves around every product, go.
        """
        for node in list(self.graph.nodes):
            if not _is_view(node):
                continue
            inner = node.args[0]
            if _tensor(node).shape == _tensor(inner).shape:
                node.replace_all_uses_with(inner)
                self.graph.erase_node(node)
            elif self._is_shared_product(node):
                flat, matrix = inner.args
                self.place = node
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(self._call(torch.matmul, flat.args[0], matrix))
        self.graph.eliminate_dead_code()

    def _is_shared_product(self, node: Node) -> bool:
        """Whether a view gives the stack of products that one product of all rows was made of."""
        product: Any = node.args[0]
        if product.target is not aten.mm.default or not _is_view(product.args[0]):
            return False
        stack, result = _tensor(product.args[0].args[0]), _tensor(node)
        stacks = stack.dim() == result.dim() == 3 and len(stack) == self.n_members
        return stacks and stack.shape[:2] == result.shape[:2]

    def spell_out_shared_products(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is not torch.matmul:
                continue
            left, right = node.args
            with self.graph.inserting_before(node):
                if _tensor(left).dim() == 3 and _tensor(left).is_contiguous():
                    rows = self._call(aten.view.default, left, [-1, _shape(left)[2]])
                    product = self._call(aten.mm.default, rows, right)
                    result = self._call(aten.view.default, product, list(_tensor(node).shape))
                else:
                    stacks = (self._as_stack(operand) for operand in (left, right))
                    result = self._call(aten.bmm.default, *stacks)
            node.replace_all_uses_with(result)
        self.graph.eliminate_dead_code()

    def _as_stack(self, node: Node) -> Node:
        value = _tensor(node)
        if value.dim() == 3:
            return node
        return self._call(aten.expand.default, node, [self.n_members, *value.shape])

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
        (many, m, k), (many_too, _, n) = _shape(left), _shape(right)
        shape = (max(many, many_too), m, n)
        if isinstance(left, Node) and isinstance(right, Node) and (left, right) in self.known:
            return _Plan(0.0, shape, ((left, right),))
        direct = shape[0] * m * n * (k + TRAFFIC)
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
                order = [1, 0] if _tensor(node).dim() == 2 else [0, 2, 1]
                self.transposes[node] = self._call(aten.permute.default, node, order)
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
                    self.known[left, right] = self._multiply(left, right)
            product = self.known[left, right]
            if total is None:
                total = product
            else:
                with self.graph.inserting_before(self.place):
                    total = self._call(aten.add.Tensor, total, product)
        assert total is not None, "a product has a summand"
        return total

    def _multiply(self, left: Node, right: Node) -> Node:
        functions = {(2, 2): aten.mm.default, (3, 3): aten.bmm.default}
        kind = (_tensor(left).dim(), _tensor(right).dim())
        return self._call(functions.get(kind, torch.matmul), left, right)

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
        many, m, n = _shape(node)
        return many * m * n * (_shape(node.args[0])[2] + TRAFFIC)  # pyright: ignore[reportArgumentType]
    return 0.0


def _tensor(node: Any) -> Tensor:
    return node.meta["val"]


def _shape(operand: _Operand) -> _Shape:
    if isinstance(operand, _Plan):
        return operand.shape
    *many, m, n = _tensor(operand).shape
    return (many[0] if many else 1, m, n)


def _is_matrix(node: Any) -> bool:
    """A matrix, or a stack of them."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dim() in (2, 3) and value.is_floating_point()


def _is_view(node: Any) -> bool:
    views = (aten.view.default, aten.expand.default, aten._unsafe_view.default)
    return isinstance(node, Node) and node.target in views and isinstance(node.args[0], Node)


def _is_product(node: Any) -> bool:
    products = (aten.mm.default, aten.bmm.default, torch.matmul)
    return isinstance(node, Node) and node.target in products and _is_matrix(node)


def _is_sum(node: Any) -> bool:
    if not (isinstance(node, Node) and node.target is aten.add.Tensor and not node.kwargs):
        return False
    if not all(_is_matrix(arg) for arg in node.args):
        return False
    return len({_tensor(arg).shape for arg in node.args}) == 1


def _transposed(node: Any) -> Node | None:
    """What a matrix is the transpose of, if it is one."""
    if not isinstance(node, Node) or not _is_matrix(node):
        return None
    inner: Any = node.args[0] if node.args else None
    n_axes = _tensor(node).dim()
    *_, rows, columns = range(n_axes)
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return inner if list(order) == [*range(rows), columns, rows] else None
    if node.target is aten.transpose.int:
        return inner if {axis % n_axes for axis in node.args[1:]} == {rows, columns} else None  # pyright: ignore
    return inner if node.target is aten.t.default else None
