"""Turning a fused group of graph nodes into TIR expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt import graph as G
from graphopt.backends.kernels.builder import View, flatten, unflatten
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Expr, Index, Kind, Reader, broadcast_index
from graphopt.ops.scalar import to_dtype


class Group:
    """The expressions of a group: what its nodes compute from the buffers it reads.

    Args:
        views: the nodes that are read from memory.
        scalars: constants of one element, which become immediates.
        flat: every buffer has one dimension and all are read at the same place.
    """

    def __init__(
        self,
        views: Mapping[fx.Node, View],
        scalars: Mapping[fx.Node, bool | int | float],
        *,
        flat: bool = False,
    ) -> None:
        """Nothing is computed before it is read."""
        self._flat = flat
        self._views = dict(views)
        self._scalars = dict(scalars)
        self._given: dict[fx.Node, Reader] = {}
        self._memo: dict[tuple[Any, ...], tuple[Any, Expr]] = {}
        self._depth = 0

    def with_views(self, change: Callable[[View], View]) -> Group:
        """The same group reading its buffers through changed views."""
        return Group({node: change(view) for node, view in self._views.items()}, self._scalars)

    def flattened(self) -> Group:
        """The same group over buffers of one dimension; only for elementwise nodes of one shape."""
        views = {node: view.flat() for node, view in self._views.items()}
        return Group(views, self._scalars, flat=True)

    def give(self, node: fx.Node, reader: Reader) -> None:
        """Let `node` be computed by the kernel itself, element by element."""
        self._given[node] = reader

    def reader(self, node: fx.Node) -> Reader:
        """A function that gives the node's element at a logical index."""
        return lambda index: self.read(node, index)

    def read(self, node: Any, index: Index) -> Expr:
        """The expression of one element of a node (or of a Python number)."""
        if not isinstance(node, fx.Node):
            return node
        if node in self._scalars:
            return to_dtype(self._scalars[node], G.value(node).dtype)
        if node in self._given:
            return self._given[node](index)
        if node in self._views:
            return self._views[node].load(index)
        if self._depth == 0:
            # What an element computed may name variables of the loop it was computed in.
            self._memo.clear()
        self._depth += 1
        try:
            return self._shared(node, index)
        finally:
            self._depth -= 1

    def _shared(self, node: fx.Node, index: Index) -> Expr:
        """The expression, computed once where an element uses it several times."""
        # Expressions are compared by identity: the same index object gives the same element.
        key = (node, *(place if isinstance(place, int) else id(place) for place in index))
        if key not in self._memo:
            self._memo[key] = (index, self._compute(node, index))
        return self._memo[key][1]

    def _compute(self, node: fx.Node, index: Index) -> Expr:
        call = Call(node)
        op = OPS[node.target]
        operands = call.operands(op.operands)
        if op.kind is Kind.VIEW:
            source = operands[0]
            flat = flatten(index, call.shape)
            return self.read(source, tuple(unflatten(flat, G.shape(source))))
        assert op.compute is not None
        if op.kind is Kind.INJECTIVE:
            return op.compute(call, *(self.reader(x) for x in operands), index)
        assert op.kind is Kind.ELEMENTWISE, f"{op.name} cannot be computed element by element"
        values = [self._operand(x, index) for x in operands]
        if op.promote:
            common = common_dtype(operands)
            values = [to_dtype(value, common) for value in values]
        return to_dtype(op.compute(call, *values), call.dtype)

    def _operand(self, operand: Any, index: Index) -> Expr:
        if not isinstance(operand, fx.Node):
            return operand
        if self._flat:
            return self.read(operand, index)
        return self.read(operand, broadcast_index(index, G.shape(operand)))


def common_dtype(operands: list[Any]) -> torch.dtype:
    """The dtype PyTorch's type promotion computes these operands in."""
    values = [G.value(x) if isinstance(x, fx.Node) else x for x in operands]
    dtype = values[0].dtype if isinstance(values[0], torch.Tensor) else None
    result: Any = values[0]
    for value in values[1:]:
        dtype = torch.result_type(result, value)
        result = torch.empty(result.shape if isinstance(result, torch.Tensor) else (), dtype=dtype,
                             device="meta")  # fmt: skip
        if isinstance(value, torch.Tensor) and value.dim() > result.dim():
            result = torch.empty(value.shape, dtype=dtype, device="meta")
    assert dtype is not None
    return dtype
