"""ONNX convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from graphopt.importers.onnx.shape import constant_pad
from graphopt.importers.onnx.values import Context, OnnxNode, Refused, Value, rank, shape
from graphopt.importers.onnx.windows import read_windows

aten = torch.ops.aten


def conv(ctx: Context, node: OnnxNode) -> Value:
    """1-, 2- or 3-dimensional, grouped, dilated; uneven padding is padded apart."""
    x, weight, bias = node.value(0), node.value(1), node.optional(2)
    _check_rank(x)
    windows = read_windows(node, shape(x)[2:], shape(weight)[2:])
    padding = [head for head, _ in windows.pads]
    if not windows.symmetric or min(padding) < 0:
        x = constant_pad(ctx, x, [(0, 0), (0, 0), *windows.pads])
        padding = [0] * len(padding)
    return ctx.op(
        aten.convolution.default,
        x,
        weight,
        bias,
        list(windows.strides),
        padding,
        list(windows.dilations),
        False,
        [0] * len(padding),
        node.get_int("group", 1),
    )


def conv_transpose(ctx: Context, node: OnnxNode) -> Value:
    """The gradient of a convolution; uneven padding is cut off the full result."""
    x, weight, bias = node.value(0), node.value(1), node.optional(2)
    _check_rank(x)
    sizes, kernel = shape(x)[2:], shape(weight)[2:]
    dimensions = len(sizes)
    strides = node.get_ints("strides") or [1] * dimensions
    dilations = node.get_ints("dilations") or [1] * dimensions
    extra = node.get_ints("output_padding") or [0] * dimensions
    full = [
        stride * (size - 1) + added + (k - 1) * dilation + 1
        for size, k, stride, dilation, added in zip(
            sizes, kernel, strides, dilations, extra, strict=True
        )
    ]
    pads = _transposed_pads(node, full, sizes, strides)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise Refused(f"output_padding {extra} is not smaller than its strides or dilations")
    even = all(head == tail >= 0 for head, tail in pads)
    result = ctx.op(
        aten.convolution.default,
        x,
        weight,
        bias,
        strides,
        [head for head, _ in pads] if even else [0] * dimensions,
        dilations,
        True,
        extra,
        node.get_int("group", 1),
    )
    if even:
        return result
    for axis, (head, tail) in enumerate(pads):
        if min(head, tail) < 0:
            raise Refused(f"its pads {pads} are negative")
        if head or tail:
            stop = full[axis] - tail
            result = ctx.op(aten.slice.Tensor, result, axis + 2, head, stop)
    return result


def _transposed_pads(
    node: OnnxNode, full: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """What to cut off the full result, from `pads`, `output_shape` or `auto_pad`."""
    dimensions = len(full)
    mode = node.get_str("auto_pad", "NOTSET")
    wanted = node.get_ints("output_shape")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if wanted is None:
        flat = node.get_ints("pads") or [0] * (2 * dimensions)
        flat = [0] * len(flat) if mode == "VALID" else flat
        return [(flat[i], flat[i + dimensions]) for i in range(dimensions)]
    pads = []
    for have, want in zip(full, wanted[-dimensions:], strict=True):
        if want > have:
            raise Refused(f"output_shape {wanted} is larger than the full result {list(full)}")
        small, large = (have - want) // 2, have - want - (have - want) // 2
        pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return pads


def _check_rank(x: Value) -> None:
    if not 3 <= rank(x) <= 5:
        raise Refused(f"its input has {rank(x)} dimensions, not 3, 4 or 5")


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
}
