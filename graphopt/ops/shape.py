"""Operators that only move data: views, permutes, slices, pads, concatenation, gathers, resizing."""

from __future__ import annotations

from typing import Any

import torch
from tvm import tirx

from graphopt import graph as G
from graphopt.ops.math import dtype_of
from graphopt.ops.opdef import Call, Expr, Index, Kind, OpDef, Reader, broadcast_index

aten = torch.ops.aten


def _permute(call: Call, x: Reader, index: Index) -> Expr:
    source: list[Any] = [0] * len(index)
    for place, axis in zip(index, call["dims"], strict=True):
        source[axis] = place
    return x(tuple(source))


def _expand(call: Call, x: Reader, index: Index) -> Expr:
    return x(broadcast_index(index, call.shape_of("self")))


def _slice(call: Call, x: Reader, index: Index) -> Expr:
    dim, size = call["dim"] % len(index), call.shape_of("self")
    start = call["start"] or 0
    start = max(0, start + size[dim]) if start < 0 else min(start, size[dim])
    return x((*index[:dim], index[dim] * call["step"] + start, *index[dim + 1 :]))


def _select(call: Call, x: Reader, index: Index) -> Expr:
    size = call.shape_of("self")
    dim = call["dim"] % len(size)
    return x((*index[:dim], call["index"] % size[dim], *index[dim:]))


def _cat(call: Call, *rest: Any) -> Expr:
    *readers, index = rest
    dim = call["dim"] % len(index)
    extents = [G.shape(node)[dim] for node in call["tensors"] if G.shape(node) != (0,)]
    readers = [r for r, n in zip(readers, call["tensors"], strict=True) if G.shape(n) != (0,)]
    starts = [sum(extents[:i]) for i in range(len(extents))]
    place = index[dim]
    result = readers[-1]((*index[:dim], place - starts[-1], *index[dim + 1 :]))
    for reader, start, end in reversed(list(zip(readers[:-1], starts, starts[1:], strict=False))):
        piece = reader((*index[:dim], place - start, *index[dim + 1 :]))
        result = tirx.if_then_else(place < end, piece, result)
    return result


def _pad(call: Call, x: Reader, index: Index) -> Expr:
    pads, size = call["pad"], call.shape_of("self")
    place = list(index)
    inside: list[Expr] = []
    for i in range(len(pads) // 2):
        axis = len(size) - 1 - i
        before, after = pads[2 * i], pads[2 * i + 1]
        place[axis] = place[axis] - before
        if before > 0:
            inside.append(place[axis] >= 0)
        if after > 0:
            inside.append(place[axis] < size[axis])
    value = x(tuple(place))
    if not inside:
        return value
    return tirx.if_then_else(tirx.all(*inside), value, tirx.const(call["value"], dtype_of(value)))


def _wrap(place: Expr, extent: int) -> Expr:
    """A run-time index, negative ones counted from the end, kept inside the extent.

    PyTorch raises on an index outside; a library on a board must not read outside its memory.
    """
    place = tirx.Cast("int32", place)
    place = tirx.Select(place < 0, place + extent, place)
    return tirx.max(0, tirx.min(place, extent - 1))


def _index_select(call: Call, x: Reader, indices: Reader, index: Index) -> Expr:
    dim, size = call["dim"] % len(index), call.shape_of("self")
    place = _wrap(indices((index[dim],) if call.shape_of("index") else ()), size[dim])
    return x((*index[:dim], place, *index[dim + 1 :]))


def _gather(call: Call, x: Reader, indices: Reader, index: Index) -> Expr:
    dim, size = call["dim"] % len(index), call.shape_of("self")
    return x((*index[:dim], _wrap(indices(index), size[dim]), *index[dim + 1 :]))


def _embedding(call: Call, weight: Reader, indices: Reader, index: Index) -> Expr:
    return weight((_wrap(indices(index[:-1]), call.shape_of("weight")[0]), index[-1]))


def _scale(call: Call, axis: int) -> float:
    """Input step per output step of a resize, as PyTorch computes it."""
    size, out = call.shape_of("input"), call.shape
    factors = call.arguments.get("scale_factors")
    if factors is not None:
        return 1.0 / factors[axis - 2]
    return size[axis] / out[axis]


def _upsample_nearest(call: Call, x: Reader, index: Index) -> Expr:
    size = call.shape_of("input")
    place: list[Any] = list(index[:2])
    for axis in range(2, len(index)):
        ratio = call.shape[axis] / size[axis]
        if ratio == int(ratio) and _scale(call, axis) == 1 / ratio:
            place.append(index[axis] // int(ratio))
            continue
        moved = tirx.Cast("float32", index[axis]) * tirx.const(_scale(call, axis), "float32")
        place.append(tirx.min(tirx.Cast("int32", moved), size[axis] - 1))
    return x(tuple(place))


def _upsample_linear(call: Call, x: Reader, index: Index) -> Expr:
    size = call.shape_of("input")
    corners: list[tuple[tuple[Any, ...], Expr | None]] = [(tuple(index[:2]), None)]
    for axis in range(2, len(index)):
        out = call.shape[axis]
        place = tirx.Cast("float32", index[axis])
        if call["align_corners"]:
            step = (size[axis] - 1) / (out - 1) if out > 1 else 0.0
            source = place * tirx.const(step, "float32")
        else:
            step = _scale(call, axis)
            source = tirx.max(
                (place + tirx.const(0.5, "float32")) * tirx.const(step, "float32")
                - tirx.const(0.5, "float32"),
                tirx.const(0.0, "float32"),
            )
        low = tirx.min(tirx.Cast("int32", source), size[axis] - 1)
        high = tirx.min(low + 1, size[axis] - 1)
        part = source - tirx.Cast("float32", low)
        corners = [
            ((*at, where), share if weight is None else weight * share)
            for at, weight in corners
            for where, share in ((low, tirx.const(1.0, "float32") - part), (high, part))
        ]
    total: Expr = tirx.const(0.0, "float32")
    for at, weight in corners:
        total = total + x(at) * weight
    return total


SHAPE: tuple[OpDef, ...] = (
    OpDef("reshape", (aten.reshape.default, aten.view.default, aten._unsafe_view.default),
          Kind.VIEW),
    OpDef("clone", (aten.clone.default, aten.alias.default, aten.contiguous.default), Kind.VIEW),
    OpDef("permute", (aten.permute.default,), Kind.INJECTIVE, _permute),
    OpDef("expand", (aten.expand.default,), Kind.INJECTIVE, _expand),
    OpDef("slice", (aten.slice.Tensor,), Kind.INJECTIVE, _slice),
    OpDef("select", (aten.select.int,), Kind.INJECTIVE, _select),
    OpDef("cat", (aten.cat.default,), Kind.INJECTIVE, _cat, operands=("tensors",)),
    OpDef("pad", (aten.constant_pad_nd.default,), Kind.INJECTIVE, _pad),
    OpDef("index_select", (aten.index_select.default,), Kind.INJECTIVE, _index_select,
          operands=("self", "index")),
    OpDef("gather", (aten.gather.default,), Kind.INJECTIVE, _gather, operands=("self", "index")),
    OpDef("embedding", (aten.embedding.default,), Kind.INJECTIVE, _embedding,
          operands=("weight", "indices")),
    OpDef("upsample_nearest", (aten.upsample_nearest2d.vec, aten.upsample_nearest1d.vec),
          Kind.INJECTIVE, _upsample_nearest, operands=("input",)),
    OpDef("upsample_linear", (aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec),
          Kind.INJECTIVE, _upsample_linear, operands=("input",)),
)  # fmt: skip
