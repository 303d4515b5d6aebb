"""ONNX operators that move elements unchanged: reshape, transpose, join, repeat, pad."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from graphopt.importers.onnx.values import (
    Context,
    OnnxNode,
    Refused,
    Value,
    axis_of,
    dtype,
    elements,
    integers,
    number,
    rank,
    shape,
)

aten = torch.ops.aten


def reshape_to(ctx: Context, x: Value, sizes: Sequence[int]) -> Value:
    """`x` with another shape; itself when it has that shape."""
    return x if shape(x) == tuple(sizes) else ctx.op(aten.reshape.default, x, list(sizes))


def permute_to(ctx: Context, x: Value, order: Sequence[int]) -> Value:
    """`x` with its axes in another order; itself when they are in order."""
    if list(order) == list(range(rank(x))):
        return x
    return ctx.op(aten.permute.default, x, list(order))


def reshape(ctx: Context, node: OnnxNode) -> Value:
    """0 keeps a size (unless `allowzero`), -1 takes what is left."""
    x = node.value(0)
    wanted = integers(node.value(1), "sizes")
    if not node.get_int("allowzero", 0):
        wanted = [shape(x)[i] if size == 0 else size for i, size in enumerate(wanted)]
    if -1 in wanted:
        rest = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = elements(x) // rest if rest else 0
    if math.prod(wanted) != elements(x):
        raise Refused(f"a tensor of shape {shape(x)} cannot become {tuple(wanted)}")
    return reshape_to(ctx, x, wanted)


def flatten(ctx: Context, node: OnnxNode) -> Value:
    """To two dimensions, split before `axis`."""
    x, axis = node.value(0), node.get_int("axis", 1)
    axis = axis + rank(x) if axis < 0 else axis
    sizes = shape(x)
    return reshape_to(ctx, x, [math.prod(sizes[:axis]), math.prod(sizes[axis:])])


def axes_of(ctx: Context, node: OnnxNode, inputs_since: int, position: int = 1) -> list[int] | None:
    """Axes, an attribute before opset `inputs_since` and an input since; None when left out."""
    if ctx.opset < inputs_since:
        return node.get_ints("axes")
    value = node.optional(position)
    return None if value is None else integers(value, "axes")


def squeeze(ctx: Context, node: OnnxNode) -> Value:
    """Drop the given axes of size 1, or all of them."""
    x, axes = node.value(0), axes_of(ctx, node, 13)
    sizes = shape(x)
    if axes is None:
        return reshape_to(ctx, x, [size for size in sizes if size != 1])
    dropped = {axis_of(axis, rank(x)) for axis in axes}
    if any(sizes[axis] != 1 for axis in dropped):
        raise Refused(f"axes {axes} of shape {sizes} are not all of size 1")
    return reshape_to(ctx, x, [size for i, size in enumerate(sizes) if i not in dropped])


def unsqueeze(ctx: Context, node: OnnxNode) -> Value:
    """Add axes of size 1; positions count in the result."""
    x, axes = node.value(0), axes_of(ctx, node, 13)
    if axes is None:
        raise Refused("it has no axes")
    total = rank(x) + len(axes)
    added = {axis_of(axis, total) for axis in axes}
    sizes = iter(shape(x))
    return reshape_to(ctx, x, [1 if i in added else next(sizes) for i in range(total)])


def transpose(ctx: Context, node: OnnxNode) -> Value:
    """Axes in another order, reversed by default."""
    x = node.value(0)
    order = node.get_ints("perm") or list(range(rank(x)))[::-1]
    return permute_to(ctx, x, order)


def expand(ctx: Context, node: OnnxNode) -> Value:
    """Broadcast in both directions: a 1 in the wanted shape keeps the input's size."""
    x = node.value(0)
    wanted = tuple(integers(node.value(1), "sizes"))
    return expand_to(ctx, x, np.broadcast_shapes(shape(x), wanted))


def expand_to(ctx: Context, x: Value, sizes: Sequence[int]) -> Value:
    """`x` broadcast to a shape; itself when it has that shape."""
    return x if shape(x) == tuple(sizes) else ctx.op(aten.expand.default, x, list(sizes))


def concat(ctx: Context, node: OnnxNode) -> Value:
    """Join along an axis."""
    parts = [node.value(i) for i in range(len(node.operands))]
    axis = axis_of(node.get_int("axis", 0), rank(parts[0]))
    return parts[0] if len(parts) == 1 else ctx.op(aten.cat.default, parts, axis)


def split(ctx: Context, node: OnnxNode) -> tuple[Value, ...]:
    """Slices along an axis: of given sizes, or equal ones, the last one smaller."""
    x = node.value(0)
    axis = axis_of(node.get_int("axis", 0), rank(x))
    total = shape(x)[axis]
    sizes = node.get_ints("split")
    given = node.optional(1)
    if given is not None:
        sizes = integers(given, "sizes")
    if sizes is None:
        each = -(-total // len(node.used))
        sizes = [min(each, total - i * each) for i in range(len(node.used))]
    if sum(sizes) != total or min(sizes) < 0:
        raise Refused(f"parts of {sizes} do not make up an axis of {total}")
    parts = []
    start = 0
    for size in sizes:
        parts.append(ctx.op(aten.slice.Tensor, x, axis, start, start + size))
        start += size
    return tuple(parts)


def tile(ctx: Context, node: OnnxNode) -> Value:
    """Repeat along every axis: a broadcast axis before each, then joined with it."""
    x, repeats = node.value(0), integers(node.value(1), "repeats")
    sizes = shape(x)
    apart = [size for axis in sizes for size in (1, axis)]
    repeated = [size for pair in zip(repeats, sizes, strict=True) for size in pair]
    joined = [count * size for count, size in zip(repeats, sizes, strict=True)]
    if tuple(joined) == sizes:
        return x
    wide = ctx.op(aten.expand.default, reshape_to(ctx, x, apart), repeated)
    return reshape_to(ctx, wide, joined)


def pad(ctx: Context, node: OnnxNode) -> Value:
    """With a constant, or with elements of the input (reflect, edge, wrap)."""
    x = node.value(0)
    mode = node.get_str("mode", "constant")
    if ctx.opset < 11:
        pads = node.get_ints("pads") or []
        fill: float | int | bool = node.get_float("value", 0.0)
    else:
        pads = integers(node.value(1), "pads")
        fill_value = node.optional(2)
        fill = 0 if fill_value is None else number(fill_value, "fill value")
    axes = axes_of(ctx, node, 18, 3) if ctx.opset >= 18 else None
    axes = list(range(rank(x))) if axes is None else [axis_of(a, rank(x)) for a in axes]
    before = dict(zip(axes, pads[: len(axes)], strict=True))
    after = dict(zip(axes, pads[len(axes) :], strict=True))
    amounts = [(before.get(i, 0), after.get(i, 0)) for i in range(rank(x))]
    if mode == "constant":
        return constant_pad(ctx, x, amounts, fill)
    for axis, (head, tail) in enumerate(amounts):
        if head or tail:
            x = _pad_from_inside(ctx, x, axis, head, tail, mode)
    return x


def constant_pad(
    ctx: Context, x: Value, amounts: Sequence[tuple[int, int]], fill: float | int | bool = 0
) -> Value:
    """`x` with (before, after) more elements per axis; negative amounts cut off."""
    if not any(head or tail for head, tail in amounts):
        return x
    flat = [amount for pair in reversed(amounts) for amount in pair]
    while flat[-2:] == [0, 0]:  # ATen lists the last axis first; leading axes can be left out
        flat = flat[:-2]
    return ctx.op(aten.constant_pad_nd.default, x, flat, fill)


def _pad_from_inside(ctx: Context, x: Value, axis: int, head: int, tail: int, mode: str) -> Value:
    size = shape(x)[axis]
    places = torch.arange(-head, size + tail)
    if mode == "edge":
        places = places.clamp(0, size - 1)
    elif mode == "wrap":
        places = places % size
    elif mode == "reflect":
        period = max(2 * (size - 1), 1)
        places = places % period
        places = torch.minimum(places, period - places) if size > 1 else places * 0
    else:
        raise Refused(f"its mode is {mode!r}")
    return ctx.op(aten.index_select.default, x, axis, places)


def depth_to_space(ctx: Context, node: OnnxNode) -> Value:
    """Blocks of channels become blocks of pixels; the block index is outer (DCR) or inner (CRD)."""
    x, block = node.value(0), node.get_int("blocksize", 1)
    batch, channels, height, width = shape(x)
    depth = channels // block**2
    if node.get_str("mode", "DCR") == "DCR":
        split_sizes, order = (batch, block, block, depth, height, width), (0, 3, 4, 1, 5, 2)
    else:
        split_sizes, order = (batch, depth, block, block, height, width), (0, 1, 4, 2, 5, 3)
    apart = permute_to(ctx, reshape_to(ctx, x, split_sizes), order)
    return reshape_to(ctx, apart, (batch, depth, height * block, width * block))


def space_to_depth(ctx: Context, node: OnnxNode) -> Value:
    """Blocks of pixels become channels; modes as for DepthToSpace."""
    x, block = node.value(0), node.get_int("blocksize", 1)
    batch, channels, height, width = shape(x)
    rows, columns = height // block, width // block
    apart = reshape_to(ctx, x, (batch, channels, rows, block, columns, block))
    blocks_outside = node.get_str("mode", "DCR") == "DCR"
    apart = permute_to(ctx, apart, (0, 3, 5, 1, 2, 4) if blocks_outside else (0, 1, 3, 5, 2, 4))
    return reshape_to(ctx, apart, (batch, channels * block**2, rows, columns))


def trilu(ctx: Context, node: OnnxNode) -> Value:
    """The upper or lower triangle; the rest is zero."""
    x = node.value(0)
    diagonal = 0 if not node.has(1) else int(number(node.value(1), "diagonal"))
    rows, columns = shape(x)[-2:]
    difference = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    keep = difference >= diagonal if node.get_int("upper", 1) else difference <= diagonal
    zero = torch.zeros((), dtype=dtype(x))
    return ctx.op(aten.where.self, keep, x, zero)


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value | tuple[Value, ...]]] = {
    "Concat": concat,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Flatten": flatten,
    "Pad": pad,
    "Reshape": reshape,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
