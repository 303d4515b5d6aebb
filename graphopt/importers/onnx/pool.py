"""ONNX pooling and unpooling, and the sum of overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from graphopt.importers.onnx.shape import constant_pad, reshape_to
from graphopt.importers.onnx.values import (
    Context,
    OnnxNode,
    Refused,
    Value,
    dtype,
    integers,
    rank,
    shape,
)
from graphopt.importers.onnx.windows import Windows, read_windows
from graphopt.ops.order import order
from graphopt.windows import places_in_windows, window_axis

aten = torch.ops.aten
Pool = Callable[[Context, OnnxNode, Value, Windows], Value]


def spatial(pool: Pool) -> Callable[[Context, OnnxNode], Value]:
    """A handler for two or three spatial axes; one becomes a picture one row high."""

    def handler(ctx: Context, node: OnnxNode) -> Value:
        x = node.value(0)
        if rank(x) not in (3, 4, 5):
            raise Refused(f"its input has {rank(x)} dimensions, not 3 to 5")
        windows = read_windows(node, shape(x)[2:], node.get_ints("kernel_shape") or [])
        if rank(x) > 3:
            return pool(ctx, node, x, windows)
        batch, channels, length = shape(x)
        row = reshape_to(ctx, x, [batch, channels, 1, length])
        result = pool(ctx, node, row, _with_row(windows))
        return reshape_to(ctx, result, [batch, channels, *windows.output])

    return handler


def _with_row(windows: Windows) -> Windows:
    return Windows(
        (1, *windows.kernel),
        (1, *windows.strides),
        (1, *windows.dilations),
        ((0, 0), *windows.pads),
        (1, *windows.output),
    )


def max_pool(ctx: Context, node: OnnxNode, x: Value, windows: Windows) -> Value:
    """The largest element of each window; padding never wins."""
    if node.get_int("storage_order", 0):
        raise Refused("storage_order = 1")
    if not dtype(x).is_floating_point:
        raise Refused(f"its input is {dtype(x)}, not floating point")
    ceil = bool(node.get_int("ceil_mode", 0))
    padding = [head for head, _ in windows.pads]
    # ATen pads at most half the kernel, dilated or not.
    small = all(0 <= p <= k // 2 for p, k in zip(padding, windows.kernel, strict=True))
    if not windows.symmetric or not small:
        pads = windows.exact_pads(shape(x)[2:])
        x = constant_pad(ctx, x, [(0, 0), (0, 0), *pads], -math.inf)
        padding, ceil = [0] * len(padding), False
    kernel, strides, dilations = windows.kernel, windows.strides, windows.dilations
    result = ctx.op(
        aten.max_pool3d.default if rank(x) == 5 else aten.max_pool2d.default,
        x,
        list(kernel),
        list(strides),
        padding,
        list(dilations),
        ceil,
    )
    return _checked(result, windows)


def max_pool_with_places(ctx: Context, node: OnnxNode) -> tuple[Value, ...]:
    """`max_pool`, and if they are read the places of the first of the largest elements.

    Places count the elements of the whole input.
    """
    pooled = spatial(max_pool)(ctx, node)
    if not any(node.used[1:]):
        return (pooled,)
    x = node.value(0)
    batch, channels, *sizes = shape(x)
    windows = read_windows(node, sizes, node.get_ints("kernel_shape") or [])
    steps = zip(windows.strides, windows.pads, windows.dilations, strict=True)
    axes = [
        window_axis(size, count, kernel, (stride, pads[0], dilation))
        for size, count, kernel, (stride, pads, dilation) in zip(
            sizes, windows.output, windows.kernel, steps, strict=True
        )
    ]
    places = places_in_windows(axes, sizes)
    if int(places.min()) < 0 or int(places.max()) >= math.prod(sizes):
        raise Refused("a window has nothing but padding")
    count, width = places.shape
    images = [batch, channels]
    flat = reshape_to(ctx, x, [*images, math.prod(sizes)])
    read = ctx.op(aten.index_select.default, flat, 2, places.reshape(-1))
    best = ctx.op(order, reshape_to(ctx, read, [*images, count, width]), 1, 3, True)
    line = ctx.op(
        aten.add.Tensor, reshape_to(ctx, best, [*images, count]), torch.arange(count) * width
    )
    chosen = ctx.op(aten.index_select.default, places.reshape(-1), 0, reshape_to(ctx, line, [-1]))
    first = torch.arange(batch * channels).reshape(batch, channels, 1) * math.prod(sizes)
    result = ctx.op(aten.add.Tensor, reshape_to(ctx, chosen, [*images, count]), first)
    return pooled, reshape_to(ctx, result, [*images, *windows.output])


def max_unpool(ctx: Context, node: OnnxNode) -> Value:
    """Zeros, and each element at its place, which counts the elements of the whole result."""
    x, places = node.value(0), node.value(1)
    batch, channels, *sizes = shape(x)
    kernel = node.get_ints("kernel_shape") or []
    strides = node.get_ints("strides") or [1] * len(kernel)
    pads = node.get_ints("pads") or [0] * 2 * len(kernel)
    output = [batch, channels] + [
        (size - 1) * stride - head - tail + width
        for size, stride, width, head, tail in zip(
            sizes, strides, kernel, pads[: len(kernel)], pads[len(kernel) :], strict=True
        )
    ]
    if node.has(2):
        output = integers(node.value(2), "output's sizes")
    empty = torch.zeros(math.prod(output), dtype=dtype(x))
    flat = (reshape_to(ctx, places, [-1]), reshape_to(ctx, x, [-1]))
    return reshape_to(ctx, ctx.op(aten.scatter.src, empty, 0, *flat), output)


def average_pool(ctx: Context, node: OnnxNode, x: Value, windows: Windows) -> Value:
    """The mean of each window, over the padding too if `count_include_pad`."""
    if any(dilation != 1 for dilation in windows.dilations):
        raise Refused(f"dilations {list(windows.dilations)}")
    ceil, count_pad = bool(node.get_int("ceil_mode", 0)), bool(node.get_int("count_include_pad", 0))
    padding = [head for head, _ in windows.pads]
    kernel, strides = list(windows.kernel), list(windows.strides)
    small = all(0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True))
    average = aten.avg_pool3d.default if rank(x) == 5 else aten.avg_pool2d.default
    if windows.symmetric and small:
        result = ctx.op(average, x, kernel, strides, padding, ceil, count_pad)
        return _checked(result, windows)
    sizes = shape(x)[2:]
    pads = windows.exact_pads(sizes)
    padded = constant_pad(ctx, x, [(0, 0), (0, 0), *pads])
    mean = ctx.op(average, padded, kernel, strides, [0] * len(kernel), False, True)
    counted = [_counted(size, windows, axis, count_pad) for axis, size in enumerate(sizes)]
    share = math.prod(kernel) / torch.stack(torch.meshgrid(*counted, indexing="ij")).prod(0)
    if bool((share == 1).all()):
        return mean
    return ctx.op(aten.mul.Tensor, mean, share.to(dtype(x)))


def _counted(size: int, windows: Windows, axis: int, count_pad: bool) -> torch.Tensor:
    """How many positions of each window count along one axis."""
    head, tail = windows.pads[axis] if count_pad else (0, 0)
    starts = torch.arange(windows.output[axis]) * windows.strides[axis] - windows.pads[axis][0]
    ends = (starts + windows.kernel[axis]).clamp(max=size + tail)
    return (ends - starts.clamp(min=-head)).to(torch.float64)


def _checked(result: Value, windows: Windows) -> Value:
    if shape(result)[2:] != windows.output:
        raise Refused(f"ceil_mode: {shape(result)[2:]} windows instead of {windows.output}")
    return result


def global_average(ctx: Context, node: OnnxNode) -> Value:
    """The mean over all spatial axes."""
    return ctx.op(aten.mean.dim, node.value(0), _spatial_axes(node.value(0)), True)


def global_max(ctx: Context, node: OnnxNode) -> Value:
    """The maximum over all spatial axes."""
    return ctx.op(aten.amax.default, node.value(0), _spatial_axes(node.value(0)), True)


def _spatial_axes(x: Value) -> Sequence[int]:
    return list(range(2, rank(x)))


def col2im(ctx: Context, node: OnnxNode) -> Value:
    """Windows of a picture, one per column, added up at their places."""
    sizes = integers(node.value(1), "picture's sizes")
    kernel = integers(node.value(2), "window's sizes")
    if len(sizes) != 2 or len(kernel) != 2:
        raise Refused(f"its windows have {len(kernel)} axes, not 2")
    top, left, bottom, right = node.get_ints("pads") or [0] * 4
    strides = node.get_ints("strides") or [1, 1]
    dilations = node.get_ints("dilations") or [1, 1]
    whole = [sizes[0] + top + bottom, sizes[1] + left + right]
    result = ctx.op(aten.col2im.default, node.value(0), whole, kernel, dilations, [0, 0], strides)
    for axis, start, size in ((2, top, sizes[0]), (3, left, sizes[1])):
        result = ctx.op(aten.slice.Tensor, result, axis, start, start + size, 1)
    return result


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value | tuple[Value, ...]]] = {
    "AveragePool": spatial(average_pool),
    "Col2Im": col2im,
    "GlobalAveragePool": global_average,
    "GlobalMaxPool": global_max,
    "MaxPool": max_pool_with_places,
    "MaxUnpool": max_unpool,
}
