"""ONNX Resize, Upsample and GridSample.

Where ATen has the same operator it is used: `upsample_nearest2d` and `upsample_bilinear2d`. All
else is still exact, because sizes are static: nearest neighbours are picked by constant indices,
and an interpolation along an axis is a product with a small constant matrix of its weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from graphopt.importers.onnx.shape import permute_to
from graphopt.importers.onnx.values import (
    Context,
    OnnxNode,
    Refused,
    Value,
    axis_of,
    dtype,
    elements,
    integers,
    rank,
    shape,
)

aten = torch.ops.aten
Floats = npt.NDArray[np.float32]


def upsample(ctx: Context, node: OnnxNode) -> Value:
    """Resize before opset 10: asymmetric coordinates, rounded down."""
    x = node.value(0)
    given = node.attributes.get("scales")
    scales = _scales(node.value(1)) if given is None else [float(s) for s in given]
    output = [int(np.floor(size * s)) for size, s in zip(shape(x), scales, strict=True)]
    return _resize(ctx, node, x, output, scales, "asymmetric", "floor")


def resize(ctx: Context, node: OnnxNode) -> Value:
    """To sizes or by scales."""
    x = node.value(0)
    if ctx.opset < 11:
        scales = _scales(node.value(1))
        output = [int(np.floor(size * s)) for size, s in zip(shape(x), scales, strict=True)]
        return _resize(ctx, node, x, output, scales, "asymmetric", "floor")
    for name in ("antialias", "exclude_outside"):
        if node.get_int(name, 0):
            raise Refused(f"{name} = 1")
    policy = node.get_str("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        raise Refused(f"keep_aspect_ratio_policy = {policy!r}")
    axes = node.get_ints("axes")
    axes = list(range(rank(x))) if axes is None else [axis_of(a, rank(x)) for a in axes]
    scales = [1.0] * rank(x)
    output = list(shape(x))
    scale_value = node.optional(2)
    if scale_value is not None and elements(scale_value):
        for axis, scale in zip(axes, _scales(scale_value), strict=True):
            scales[axis] = scale
            output[axis] = int(np.floor(output[axis] * scale))
    else:
        for axis, size in zip(axes, integers(node.value(3), "sizes"), strict=True):
            scales[axis] = size / output[axis]
            output[axis] = size
    coordinates = node.get_str("coordinate_transformation_mode", "half_pixel")
    rounding = node.get_str("nearest_mode", "round_prefer_floor")
    return _resize(ctx, node, x, output, scales, coordinates, rounding)


def _scales(value: Value) -> list[float]:
    if not isinstance(value, torch.Tensor):
        raise Refused("its scales are computed from the model's inputs; they must be constant")
    return [float(s) for s in value.reshape(-1)]


def _resize(
    ctx: Context,
    node: OnnxNode,
    x: Value,
    output: list[int],
    scales: list[float],
    coordinates: str,
    rounding: str,
) -> Value:
    mode = node.get_str("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise Refused(f"mode = {mode!r}")
    sizes = shape(x)
    changed = [i for i in range(rank(x)) if output[i] != sizes[i] or scales[i] != 1.0]
    if not changed:
        return x
    sources = {
        axis: _sources(sizes[axis], output[axis], scales[axis], coordinates) for axis in changed
    }
    picture = rank(x) == 4 and all(axis >= 2 for axis in changed)
    if mode == "nearest":
        picked = {a: _nearest(sources[a], sizes[a], rounding) for a in changed}
        if picture and all(_is_aten_nearest(picked[a], sizes[a]) for a in changed):
            return ctx.op(aten.upsample_nearest2d.vec, x, output[2:], None)
        for axis, places in picked.items():
            x = ctx.op(aten.index_select.default, x, axis, torch.from_numpy(places))
        return x
    exact = all(output[a] == sizes[a] * scales[a] for a in changed) or not node.has(2)
    if mode == "linear" and picture:
        centred = coordinates == "half_pixel" or (
            coordinates == "pytorch_half_pixel" and min(output[2:]) > 1
        )
        if centred and exact:
            return ctx.op(aten.upsample_bilinear2d.vec, x, output[2:], False, None)
        if coordinates == "align_corners" and min(output[2:]) > 1:
            return ctx.op(aten.upsample_bilinear2d.vec, x, output[2:], True, None)
    cubic = node.get_float("cubic_coeff_a", -0.75)
    for axis in changed:
        weights = _weights(sources[axis], sizes[axis], mode, cubic)
        x = _along(ctx, x, axis, torch.from_numpy(weights).to(dtype(x)))
    return x


def _sources(size: int, output: int, scale: float, coordinates: str) -> Floats:
    """Where each output position lies in the input; float32, as ONNX Runtime computes it."""
    place = np.arange(output, dtype=np.float32)
    ratio = np.float32(scale)
    half = np.float32(0.5)
    if coordinates == "asymmetric":
        return place / ratio
    if coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and output > 1):
        return (place + half) / ratio - half
    if coordinates == "pytorch_half_pixel":
        return np.zeros(1, np.float32)
    if coordinates == "tf_half_pixel_for_nn":
        return (place + half) / ratio
    if coordinates == "align_corners":
        if output == 1:
            return np.zeros(1, np.float32)
        return place * np.float32(size - 1) / np.float32(output - 1)
    if coordinates == "half_pixel_symmetric":
        adjustment = np.float32(output) / (ratio * np.float32(size))
        offset = np.float32(size) / 2 * (1 - adjustment)
        return (offset + (place + half) / ratio - half).astype(np.float32)
    raise Refused(f"coordinate_transformation_mode = {coordinates!r}")


def _nearest(sources: Floats, size: int, rounding: str) -> npt.NDArray[np.int64]:
    half = np.float32(0.5)
    rules: dict[str, Callable[[Floats], Floats]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda s: np.ceil(s - half),
        "round_prefer_ceil": lambda s: np.floor(s + half),
    }
    if rounding not in rules:
        raise Refused(f"nearest_mode = {rounding!r}")
    return np.clip(rules[rounding](sources), 0, size - 1).astype(np.int64)


def _is_aten_nearest(places: npt.NDArray[np.int64], size: int) -> bool:
    """Whether ATen, which takes floor(i × size / output) in float32, picks the same elements."""
    ratio = np.float32(size) / np.float32(len(places))
    chosen = np.floor(np.arange(len(places), dtype=np.float32) * ratio)
    return bool((np.minimum(chosen, size - 1) == places).all())


def _weights(sources: Floats, size: int, mode: str, a: float) -> npt.NDArray[np.float64]:
    """The matrix (output, input) of an interpolation along one axis; the border is repeated."""
    matrix = np.zeros((len(sources), size))
    rows = np.arange(len(sources))
    clipped = np.clip(sources, 0, size - 1) if mode == "linear" else sources
    base = np.floor(clipped).astype(np.int64)
    t = (clipped - base).astype(np.float64)
    for offset, weight in _taps(t, mode, a):
        np.add.at(matrix, (rows, np.clip(base + offset, 0, size - 1)), weight)
    return matrix


def _taps(
    t: npt.NDArray[np.float64], mode: str, a: float
) -> list[tuple[int, npt.NDArray[np.float64]]]:
    """Neighbour offsets and their weights; cubic after Keys (1981), parameter `a`."""
    if mode == "linear":
        return [(0, 1 - t), (1, t)]
    near = [(0, t), (1, 1 - t)]
    far = [(-1, 1 + t), (2, 2 - t)]
    return [(o, (a + 2) * d**3 - (a + 3) * d**2 + 1) for o, d in near] + [
        (o, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a) for o, d in far
    ]


def _along(ctx: Context, x: Value, axis: int, weights: torch.Tensor) -> Value:
    """Apply a matrix (output, input) along one axis."""
    if axis == rank(x) - 1:
        return ctx.op(aten.linear.default, x, weights)
    if axis == rank(x) - 2:
        return ctx.op(aten.matmul.default, weights, x)
    order = [i for i in range(rank(x)) if i != axis] + [axis]
    back = [order.index(i) for i in range(rank(x))]
    return permute_to(ctx, ctx.op(aten.linear.default, permute_to(ctx, x, order), weights), back)


_MODES = {"bilinear": 0, "linear": 0, "nearest": 1, "bicubic": 2, "cubic": 2}
_PADDINGS = {"zeros": 0, "border": 1, "reflection": 2}


def grid_sample(ctx: Context, node: OnnxNode) -> Value:
    """An image read at the places of a grid."""
    x = node.value(0)
    if rank(x) != 4:
        raise Refused(f"its input has {rank(x)} dimensions, not 4")
    mode = _MODES[node.get_str("mode", "linear")]
    padding = _PADDINGS[node.get_str("padding_mode", "zeros")]
    align = bool(node.get_int("align_corners", 0))
    return ctx.op(aten.grid_sampler_2d.default, x, node.value(1), mode, padding, align)


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {
    "GridSample": grid_sample,
    "Resize": resize,
    "Upsample": upsample,
}
