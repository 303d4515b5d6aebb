"""ONNX operators that pick elements by position: Slice, Gather and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from graphopt.importers.onnx.elementwise import to_dtype
from graphopt.importers.onnx.shape import constant_pad, reshape_to
from graphopt.importers.onnx.values import (
    Context,
    OnnxNode,
    Refused,
    Value,
    axis_of,
    dtype,
    integers,
    number,
    rank,
    shape,
)
from graphopt.ops.order import order

aten = torch.ops.aten


def slice_(ctx: Context, node: OnnxNode) -> Value:
    """Python's slices, per axis; bounds are attributes before opset 10 and inputs since."""
    x = node.value(0)
    if ctx.opset < 10:
        starts, ends = node.get_ints("starts") or [], node.get_ints("ends") or []
        axes, steps = node.get_ints("axes"), None
    else:
        starts, ends = integers(node.value(1), "starts"), integers(node.value(2), "ends")
        axes = integers(node.value(3), "axes") if node.has(3) else None
        steps = integers(node.value(4), "steps") if node.has(4) else None
    axes = list(range(len(starts))) if axes is None else [axis_of(a, rank(x)) for a in axes]
    steps = steps or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = shape(x)[axis]
        begin, stop, step = slice(start, end, step).indices(size)
        if (begin, stop, step) == (0, size, 1):
            continue
        if step > 0:
            x = ctx.op(aten.slice.Tensor, x, axis, begin, max(begin, stop), step)
        else:
            places = torch.arange(begin, min(begin, stop), step)
            x = ctx.op(aten.index_select.default, x, axis, places)
    return x


def gather(ctx: Context, node: OnnxNode) -> Value:
    """Whole slices of the data, chosen along one axis; negative indices count from the end."""
    data, indices = node.value(0), node.value(1)
    axis = axis_of(node.get_int("axis", 0), rank(data))
    size = shape(data)[axis]
    wanted = [*shape(data)[:axis], *shape(indices), *shape(data)[axis + 1 :]]
    if isinstance(indices, torch.Tensor):
        flat = _from_front(indices, size)
        if _is_run(flat):
            begin = int(flat[0])
            run = ctx.op(aten.slice.Tensor, data, axis, begin, begin + flat.numel())
            return reshape_to(ctx, run, wanted)
        return reshape_to(ctx, ctx.op(aten.index_select.default, data, axis, flat), wanted)
    places = wrapped(ctx, indices, size)
    if axis == 0 and rank(data) == 2:
        return ctx.op(aten.embedding.default, data, places)
    line = reshape_to(ctx, places, [-1]) if rank(places) != 1 else places
    return reshape_to(ctx, ctx.op(aten.index_select.default, data, axis, line), wanted)


def gather_elements(ctx: Context, node: OnnxNode) -> Value:
    """Single elements along one axis."""
    data, indices = node.value(0), node.value(1)
    axis = axis_of(node.get_int("axis", 0), rank(data))
    places = wrapped(ctx, to_dtype(ctx, indices, torch.int64), shape(data)[axis])
    return ctx.op(aten.gather.default, data, axis, places)


def gather_nd(ctx: Context, node: OnnxNode) -> Value:
    """Elements or slices at places given by several indices each: one index into flat memory."""
    data, indices = node.value(0), node.value(1)
    batch = node.get_int("batch_dims", 0)
    sizes, many = shape(data), shape(indices)
    depth = many[-1]
    if not 1 <= depth <= len(sizes) - batch:
        raise Refused(f"{depth} indices into {len(sizes) - batch} dimensions")
    indexed = sizes[batch : batch + depth]
    flat = flat_places(ctx, indices, indexed)
    if batch:
        # The same place in each batch's own part of the memory.
        first = torch.arange(prod(sizes[:batch])) * prod(indexed)
        ones = [1] * (len(many) - 1 - batch)
        flat = _sum(ctx, flat, first.reshape(*sizes[:batch], *ones))
    rest = sizes[batch + depth :]
    lines = reshape_to(ctx, data, [prod(sizes[: batch + depth]), *rest])
    places = flat.reshape(-1) if isinstance(flat, torch.Tensor) else reshape_to(ctx, flat, [-1])
    picked = ctx.op(aten.index_select.default, lines, 0, places)
    return reshape_to(ctx, picked, [*many[:-1], *rest])


def flat_places(ctx: Context, indices: Value, indexed: Sequence[int]) -> Value:
    """The numbers, in flat memory of these dimensions, of places given by several indices each."""
    flat: Value | None = None
    for k, size in enumerate(indexed):
        scale = prod(indexed[k + 1 :])
        if isinstance(indices, torch.Tensor):
            one = indices[..., k]
            term: Value = _from_front(one, size).reshape(one.shape) * scale
        else:
            chosen = ctx.op(aten.select.int, indices, -1, k)
            place = wrapped(ctx, to_dtype(ctx, chosen, torch.int64), size)
            term = ctx.op(aten.mul.Tensor, place, scale) if scale != 1 else place
        flat = term if flat is None else _sum(ctx, flat, term)
    assert flat is not None
    return flat


def _sum(ctx: Context, a: Value, b: Value) -> Value:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a + b
    return ctx.op(aten.add.Tensor, a, b)


def wrapped(ctx: Context, indices: Value, size: int) -> Value:
    """Places of an axis of this size, negative ones counted from the end."""
    negative = ctx.op(aten.lt.Scalar, indices, 0)
    return ctx.op(aten.where.self, negative, ctx.op(aten.add.Tensor, indices, size), indices)


def _from_front(indices: torch.Tensor, size: int) -> torch.Tensor:
    flat = indices.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + size, flat)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= size):
        raise Refused(f"an index is outside the axis of size {size}")
    return flat


def _is_run(flat: torch.Tensor) -> bool:
    """Whether the indices are consecutive, so that a slice will do."""
    if flat.numel() == 0:
        return False
    return torch.equal(flat, torch.arange(flat.numel()) + flat[0])


def arg_extreme(largest: bool) -> Callable[[Context, OnnxNode], Value]:
    """Where the largest or smallest element is; the first one among equals."""

    def handler(ctx: Context, node: OnnxNode) -> Value:
        if node.get_int("select_last_index", 0):
            raise Refused("select_last_index = 1")
        x = node.value(0)
        axis = axis_of(node.get_int("axis", 0), rank(x))
        places = ctx.op(order, x, 1, axis, largest)
        if node.get_int("keepdims", 1):
            return places
        return reshape_to(ctx, places, [*shape(x)[:axis], *shape(x)[axis + 1 :]])

    return handler


def top_k(ctx: Context, node: OnnxNode) -> tuple[Value, ...]:
    """The largest or smallest elements along an axis, in order, and their places.

    K is an attribute before opset 10; equal elements are in the order of their places.
    """
    x = node.value(0)
    axis = axis_of(node.get_int("axis", -1), rank(x))
    k = node.get_int("k", 0) if ctx.opset < 10 else int(number(node.value(1), "K"))
    places = ctx.op(order, x, k, axis, bool(node.get_int("largest", 1)))
    return ctx.op(aten.gather.default, x, axis, places), places


def cumulative(target: Any, neutral: int) -> Callable[[Context, OnnxNode], Value]:
    """Running sums or products along a constant axis.

    In `reverse` they start at the end; if `exclusive`, they leave out the element at their place.
    """

    def handler(ctx: Context, node: OnnxNode) -> Value:
        x = node.value(0)
        axis = axis_of(int(number(node.value(1), "axis")), rank(x))
        backwards = node.get_int("reverse", 0)
        if backwards:
            x = ctx.op(aten.flip.default, x, [axis])
        if node.get_int("exclusive", 0):
            around = [(1, -1) if i == axis else (0, 0) for i in range(rank(x))]
            x = constant_pad(ctx, x, around, neutral)
        total = ctx.op(target, x, axis, dtype=dtype(x))
        return ctx.op(aten.flip.default, total, [axis]) if backwards else total

    return handler


def one_hot(ctx: Context, node: OnnxNode) -> Value:
    """One value at the place along a new axis, another elsewhere, and where it is outside."""
    indices = to_dtype(ctx, node.value(0), torch.int64)
    depth = int(number(node.value(1), "depth"))
    off, on = (ctx.op(aten.select.int, node.value(2), 0, i) for i in (0, 1))
    axis = axis_of(node.get_int("axis", -1), rank(indices) + 1)
    sizes = shape(indices)
    places = reshape_to(ctx, wrapped(ctx, indices, depth), [*sizes[:axis], 1, *sizes[axis:]])
    numbers = torch.arange(depth).reshape([-1, *[1] * (len(sizes) - axis)])
    return ctx.op(aten.where.self, ctx.op(aten.eq.Tensor, places, numbers), on, off)


def reverse_sequence(ctx: Context, node: OnnxNode) -> Value:
    """The first elements of each sequence, as many as its length says, in reverse order."""
    x = node.value(0)
    lengths = to_dtype(ctx, node.value(1), torch.int64)
    time = axis_of(node.get_int("time_axis", 0), rank(x))
    batch = axis_of(node.get_int("batch_axis", 1), rank(x))

    def along(axis: int) -> list[int]:
        return [-1 if i == axis else 1 for i in range(rank(x))]

    numbers = torch.arange(shape(x)[time]).reshape(along(time))
    ends = reshape_to(ctx, lengths, [shape(x)[batch] if n < 0 else n for n in along(batch)])
    turned = ctx.op(aten.sub.Tensor, ctx.op(aten.sub.Tensor, ends, 1), numbers)
    inside = ctx.op(aten.lt.Tensor, numbers, ends)
    places = ctx.op(aten.where.self, inside, turned, numbers)
    places = ctx.op(aten.expand.default, places, list(shape(x)))
    return ctx.op(aten.gather.default, x, time, places)


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value | tuple[Value, ...]]] = {
    "ArgMax": arg_extreme(True),
    "ArgMin": arg_extreme(False),
    "CumProd": cumulative(aten.cumprod.default, 1),
    "CumSum": cumulative(aten.cumsum.default, 0),
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "Slice": slice_,
    "TopK": top_k,
}
