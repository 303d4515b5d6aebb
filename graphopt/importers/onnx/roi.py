"""ONNX RoiAlign: regions of images, each sampled to one size.

He et al., "Mask R-CNN", 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch

from graphopt.importers.onnx.elementwise import to_dtype
from graphopt.importers.onnx.shape import permute_to, reshape_to
from graphopt.importers.onnx.values import Context, OnnxNode, Refused, Value, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class _Samples:
    """Where samples lie along an axis [regions, …]: between two places, and how much of each."""

    low: Value
    high: Value
    of_low: Value
    of_high: Value


def roi_align(ctx: Context, node: OnnxNode) -> Value:
    """Bins of each region, of each the mean (or the maximum) of interpolated samples.

    The channels lie side by side while samples are read: rows [R, bins, samples, bins, samples, C].
    """
    x, regions, images = node.value(0), node.value(1), node.value(2)
    batch, channels, height, width = shape(x)
    rows, columns = node.get_int("output_height", 1), node.get_int("output_width", 1)
    ratio = node.get_int("sampling_ratio", 0)
    if ratio <= 0:
        raise Refused("sampling_ratio = 0: how many samples there are depends on the regions")
    mode = node.get_str("mode", "avg")
    if mode not in ("avg", "max"):
        raise Refused(f"mode = {mode!r}")
    default = "half_pixel" if ctx.opset >= 16 else "output_half_pixel"
    half = node.get_str("coordinate_transformation_mode", default) == "half_pixel"
    scaled = ctx.op(aten.mul.Tensor, regions, node.get_float("spatial_scale", 1.0))
    if half:
        scaled = ctx.op(aten.sub.Tensor, scaled, 0.5)
    count = shape(regions)[0]
    sides = [ctx.op(aten.select.int, scaled, 1, i) for i in range(4)]
    sides = [reshape_to(ctx, side, [count, 1, 1, 1, 1]) for side in sides]
    places = torch.arange(rows * ratio).reshape(rows, ratio, 1, 1)
    down = _samples(ctx, sides[1], sides[3], places, height, half)
    places = torch.arange(columns * ratio).reshape(1, 1, columns, ratio)
    across = _samples(ctx, sides[0], sides[2], places, width, half)

    lines = reshape_to(ctx, permute_to(ctx, x, (0, 2, 3, 1)), [batch * height * width, channels])
    first = ctx.op(aten.mul.Tensor, to_dtype(ctx, images, torch.int64), height)
    first = reshape_to(ctx, first, [count, 1, 1, 1, 1])

    def corner(row: Value, column: Value, of_row: Value, of_column: Value) -> Value:
        line = ctx.op(aten.mul.Tensor, ctx.op(aten.add.Tensor, first, row), width)
        read = ctx.op(aten.embedding.default, lines, ctx.op(aten.add.Tensor, line, column))
        share = ctx.op(aten.mul.Tensor, of_row, of_column)
        return ctx.op(aten.mul.Tensor, read, ctx.op(aten.unsqueeze.default, share, -1))

    corners = [
        corner(row, column, of_row, of_column)
        for row, of_row in ((down.low, down.of_low), (down.high, down.of_high))
        for column, of_column in ((across.low, across.of_low), (across.high, across.of_high))
    ]
    if mode == "avg":
        samples = reduce(lambda a, b: ctx.op(aten.add.Tensor, a, b), corners)
        bins = ctx.op(aten.mean.dim, samples, [2, 4])
    else:
        # As ONNX defines it: of the corners' shares, not of what they add up to.
        samples = reduce(lambda a, b: ctx.op(aten.maximum.default, a, b), corners)
        bins = ctx.op(aten.amax.default, samples, [2, 4])
    return permute_to(ctx, bins, (0, 3, 1, 2))


def _samples(
    ctx: Context,
    start: Value,
    end: Value,
    numbers: torch.Tensor,
    size: int,
    half: bool,
) -> _Samples:
    """Evenly in each bin; more than a pixel outside of the image they count as 0."""
    length = ctx.op(aten.sub.Tensor, end, start)
    if not half:
        length = ctx.op(aten.clamp.default, length, 1.0, None)
    at = (numbers.to(torch.float32) + 0.5) / numbers.numel()
    place = ctx.op(aten.add.Tensor, start, ctx.op(aten.mul.Tensor, length, at))
    inside = ctx.op(
        aten.logical_and.default,
        ctx.op(aten.ge.Scalar, place, -1.0),
        ctx.op(aten.le.Scalar, place, float(size)),
    )
    place = ctx.op(aten.clamp.default, place, 0.0, size - 1.0)
    low = ctx.op(aten.floor.default, place)
    part = ctx.op(aten.sub.Tensor, place, low)
    kept = to_dtype(ctx, inside, torch.float32)
    of_high = ctx.op(aten.mul.Tensor, part, kept)
    whole = to_dtype(ctx, low, torch.int64)
    high = ctx.op(aten.clamp.default, ctx.op(aten.add.Tensor, whole, 1), None, size - 1)
    return _Samples(whole, high, ctx.op(aten.sub.Tensor, kept, of_high), of_high)


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {"RoiAlign": roi_align}
