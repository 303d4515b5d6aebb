"""Maps that read an operand across its rows, as a transposition does.

A vector of the output would gather its elements from as many rows, one by one. Instead squares of
the operand are loaded along its rows, transposed in registers, and stored with whatever else the
map computes; two side by side, so that both use whole cache lines. The last square of a row
overlaps the one before where the row is no multiple of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt import graph as G
from graphopt.backends.kernels.base import Request
from graphopt.backends.kernels.builder import View, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.product import transposed
from graphopt.ops import OPS
from graphopt.ops.math import share
from graphopt.ops.opdef import Call, Expr, Index, Kind
from graphopt.program.layout import PLAIN

_SQUARES = 2


@dataclass(frozen=True)
class Turned:
    """A permutation inside a map whose last axis is not the one its operand is contiguous along.

    Attributes:
        node: the permutation; it has the output's shape.
        axis: the output's axis along which neighbours are neighbours in the operand's memory.
        lanes: floats of a vector.
        is_blocked: whether neighbours of the operand are channels in blocks, of which there are
            whole vectors.
    """

    node: fx.Node
    axis: int
    lanes: int
    is_blocked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape."""
        return G.shape(self.node)

    @property
    def outer(self) -> tuple[int, ...]:
        """The output's extents with one place for the axes that a task runs along."""
        inner = (self.axis, len(self.shape) - 1)
        return tuple(1 if i in inner else extent for i, extent in enumerate(self.shape))

    @property
    def rows(self) -> int:
        """Places of `axis` in one task; the last task takes those that are left, too."""
        return self.lanes * min(_SQUARES, self.shape[self.axis] // self.lanes)

    @property
    def tiles(self) -> int:
        """Tasks for one place of the outer axes."""
        return self.shape[self.axis] // self.rows

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        return prod(self.outer) * self.tiles


def find_turned(request: Request) -> Turned | None:
    """The permutation to transpose in registers, if it alone moves the map's last axis."""
    out, lanes = request.spec(request.root), request.target.isa.narrow
    if len(out.shape) < 2:
        return None
    found: Turned | None = None
    for node in request.nodes:
        op = OPS[node.target]
        if op.heavy:
            return None
        if op.kind is Kind.ELEMENTWISE or op.name == "slice":
            continue
        if op.name != "permute" or found is not None or G.shape(node) != out.shape:
            return None
        source = Call(node)["self"]
        spec = request.spec(source)
        if source not in request.reads or spec.dtype != "float32":
            return None
        is_blocked = spec.layout != PLAIN
        contiguous = 1 if is_blocked else len(out.shape) - 1
        axis = [dim % len(out.shape) for dim in Call(node)["dims"]].index(contiguous)
        found = Turned(node, axis, lanes, is_blocked)
    if found is None or out.layout != PLAIN or found.axis == len(out.shape) - 1:
        return None
    # Squares of blocks of channels begin where blocks do.
    if found.is_blocked and out.shape[found.axis] % lanes:
        return None
    return found if min(out.shape[found.axis], out.shape[-1]) >= lanes else None


def emit_turned(turned: Turned, root: fx.Node, task: Expr, out: View, group: Group) -> None:
    """Emit one task of the map: some rows of the output, along all of its last axis."""
    lanes, axis, shape = turned.lanes, turned.axis, turned.shape
    call = Call(turned.node)
    source, dims = call["self"], [dim % len(shape) for dim in call["dims"]]
    *outer, tile = unflatten(task, [*turned.outer, turned.tiles])
    first = tile * turned.rows
    height, width = shape[axis], shape[-1]

    def index_of(row: Expr, column: Expr) -> Index:
        index = [*outer[:-1], column]
        index[axis] = row
        return tuple(index)

    def read(row: Expr, column: Expr) -> Expr:
        place: dict[int, Any] = dict(zip(dims, index_of(row, column), strict=True))
        return group.read(source, tuple(place[i] for i in range(len(shape))))

    def store(row: Expr, column: Expr, value: Expr) -> None:
        index = index_of(row, column)
        group.give(turned.node, lambda _: value)
        out.store(index, group.read(root, index))

    count: Expr = turned.rows
    if height % turned.rows:
        count = share(tirx.Select(tile == turned.tiles - 1, height - first, turned.rows))
    with T.serial(0, -(-width // lanes)) as j, T.serial(0, (count + lanes - 1) // lanes) as i:
        if turned.is_blocked:
            # A multiple of a vector that TVM can see to be one.
            row = share(tile * (turned.rows // lanes) + i) * lanes
        else:
            row = share(first + tirx.min(i * lanes, count - lanes))
        column = share(tirx.min(j * lanes, width - lanes))

        def element(r: int, lane: Expr, row: Expr = row, column: Expr = column) -> Expr:
            return read(row + lane, column + r)

        values = transposed(lanes, element)
        for r in range(lanes):
            with T.vectorized(0, lanes) as lane:
                store(row + r, column + lane, values[r * lanes + lane])
