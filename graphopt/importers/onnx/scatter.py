"""ONNX operators that write by position: ScatterND, ScatterElements."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import fx

from graphopt.importers.onnx.elementwise import to_dtype
from graphopt.importers.onnx.index import flat_places, wrapped
from graphopt.importers.onnx.shape import reshape_to
from graphopt.importers.onnx.values import Context, OnnxNode, Refused, Value, axis_of, rank, shape

aten = torch.ops.aten


def scatter_nd(ctx: Context, node: OnnxNode) -> Value:
    """A copy whose elements or slices at some places are replaced or folded into.

    A place is given by several indices.
    """
    data, indices, updates = (node.value(i) for i in range(3))
    fold = _fold(node)
    depth, sizes = shape(indices)[-1], shape(data)
    if not isinstance(data, fx.Node) and not isinstance(indices, fx.Node):
        if not isinstance(updates, fx.Node) and fold is None:
            result = data.clone()
            result[tuple(indices.unbind(-1))] = updates
            return result
    elif not 1 <= depth <= len(sizes):
        raise Refused(f"{depth} indices into {len(sizes)} dimensions")
    places = flat_places(ctx, indices, sizes[:depth])
    rest = sizes[depth:]
    lines = reshape_to(ctx, data, [prod(sizes[:depth]), *rest])
    many = prod(shape(indices)[:-1])
    line = reshape_to(ctx, places, [many])
    rows = reshape_to(ctx, updates, [many, *rest])
    if fold is None:
        changed = ctx.op(aten.index_copy.default, lines, 0, line, rows)
    elif fold == "sum":
        changed = ctx.op(aten.index_add.default, lines, 0, line, rows)
    else:
        column = reshape_to(ctx, line, [many, *[1] * len(rest)])
        each = ctx.op(aten.expand.default, column, [many, *rest])
        changed = ctx.op(aten.scatter_reduce.two, lines, 0, each, rows, fold)
    return reshape_to(ctx, changed, sizes)


def scatter_elements(ctx: Context, node: OnnxNode) -> Value:
    """A copy with single elements replaced or folded into, along one axis."""
    data, indices, updates = (node.value(i) for i in range(3))
    fold = _fold(node)
    axis = axis_of(node.get_int("axis", 0), rank(data))
    places = wrapped(ctx, to_dtype(ctx, indices, torch.int64), shape(data)[axis])
    if fold is None:
        return ctx.op(aten.scatter.src, data, axis, places, updates)
    return ctx.op(aten.scatter_reduce.two, data, axis, places, updates, fold)


_FOLDS = {"none": None, "add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _fold(node: OnnxNode) -> str | None:
    """PyTorch's name of the reduction, None where elements are replaced."""
    reduction = node.get_str("reduction", "none")
    if reduction not in _FOLDS:
        raise Refused(f"reduction is {reduction}")
    return _FOLDS[reduction]


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
}
