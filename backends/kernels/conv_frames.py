"""3-D convolutions as 2-D ones.

Where a kernel has one row and one column, frames are rows, and all pixels of a frame are columns;
where it has one frame, too, all pixels are one row. Of other kernels, output frames are images, and
the kernel's frames are more channels::

    out[n, o, d, h, w] = Σ over kd, c, kh, kw of x[n, c, d·stride + kd·dilation, …] · weight
                       = a 2-D convolution of image n·D + d with the channels (kd, c)

Depthwise ones take the rows of all the kernel's frames for one window instead. Nothing is copied;
only the places that are read differ. Where the kernel has rows or columns, the depth of the input
is padded already (`program/padding.py`), and so are the rows of depthwise ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.ops.opdef import Call, Expr, Index
from graphopt.program.padding import is_depthwise, is_over_time

Place = Callable[[Expr, Expr, Expr, Expr], Index]
"""`(n, channel, row, column)` of the spec → index of the tensor."""


@dataclass(frozen=True)
class Frames:
    """A 3-D convolution as a 2-D one.

    Attributes:
        spec: the 2-D convolution.
        inside: where it finds its inputs.
        index: where it stores its outputs.
        weight: its weights, from those of the 3-D one.
        joins: whether its channels are those of several frames.
    """

    spec: ConvSpec
    inside: Place
    index: Place
    weight: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    joins: bool = False


def frames_of(call: Call, block: int) -> Frames | None:
    """The convolution over frames; None where it is transposed or in groups, or its depth should be
    padded and is not."""
    if len(call.shape) != 5 or call["transposed"]:
        return None
    if is_over_time(call):
        return _over_time(call)
    if call["padding"][0]:
        return None
    batch, channels, *size = call.shape_of("input")
    _, out, depth, *out_size = call.shape
    kernel, stride, padding, dilation = (
        [int(v) for v in values]
        for values in (call.shape_of("weight")[2:], call["stride"], call["padding"],
                       call["dilation"])
    )  # fmt: skip
    if is_depthwise(call) and out == channels:
        return None if padding[1] else _depthwise(call)
    if int(call["groups"]) > 1:
        return None
    spec = ConvSpec(
        batch * depth, 1, kernel[0] * channels, out, (size[1], size[2]),
        (out_size[0], out_size[1]), (kernel[1], kernel[2]), (stride[1], stride[2]),
        (padding[1], padding[2]), (dilation[1], dilation[2]),
    )  # fmt: skip

    def inside(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
        if kernel[0] == 1:
            return (n // depth, c, n % depth * stride[0], h, w)
        if channels % block:
            frame, channel = c // channels, c % channels
        else:
            # In whole blocks, so that a vector of channels stays one.
            blocks = channels // block
            frame, channel = c // block // blocks, c // block % blocks * block + c % block
        return (n // depth, channel, n % depth * stride[0] + frame * dilation[0], h, w)

    def index(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
        return (n // depth, c, n % depth, h, w)

    def weight(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.moveaxis(values, 2, 1).reshape(out, -1, *kernel[1:])

    return Frames(spec, inside, index, weight, joins=kernel[0] > 1)


def _over_time(call: Call) -> Frames:
    """Frames as rows, or all pixels as one row."""
    batch, channels, *size = call.shape_of("input")
    _, out, depth, high, wide = call.shape
    taps, stride, padding, dilation = (
        int(values[0])
        for values in (call.shape_of("weight")[2:], call["stride"], call["padding"],
                       call["dilation"])
    )  # fmt: skip
    is_row = (taps, stride, padding) == (1, 1, 0)
    rows, out_rows = (1, 1) if is_row else (size[0], depth)
    columns = high * wide * (depth if is_row else 1)
    spec = ConvSpec(
        batch, 1, channels, out, (rows, columns), (out_rows, columns), (taps, 1), (stride, 1),
        (padding, 0), (dilation, 1),
    )  # fmt: skip

    def index(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
        frame = w // (high * wide) if is_row else h
        return (n, c, frame, w // wide % high, w % wide)

    return Frames(spec, index, index, lambda values: values.reshape(out, channels, taps, 1))


def side_by_side(
    batch: int, channels: int, width: int, out: Sequence[int], kernel: Sequence[int],
    stride: Sequence[int], padding: int, dilation: Sequence[int],
) -> tuple[ConvSpec, Callable[[Expr], tuple[Expr, Expr]], Place]:  # fmt: skip
    """Windows of frames as those of one tall image: the rows of all frames of a window follow one
    another.

    Args:
        batch: images.
        channels: each has windows of its own.
        width: columns of the input.
        out: frames, rows and columns of the output, as in what follows.
        kernel: size of a window.
        stride: from one window to the next.
        padding: columns; frames and rows begin at the first of each window.
        dilation: steps in a window.

    Returns:
        The windows; the frame and row of the input that a row of the tall image is; where to store.
    """
    rows = kernel[0] * kernel[1]
    spec = ConvSpec(
        batch, channels, 1, 1, (out[0] * out[1] * rows, width), (out[0] * out[1], out[2]),
        (rows, kernel[2]), (rows, stride[2]), (0, padding), (1, dilation[2]),
    )  # fmt: skip

    def place(h: Expr) -> tuple[Expr, Expr]:
        window, row = h // rows, h % rows
        frame = window // out[1] * stride[0] + row // kernel[1] * dilation[0]
        return frame, window % out[1] * stride[1] + row % kernel[1] * dilation[1]

    def index(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
        return (n, c, h // out[1], h % out[1], w)

    return spec, place, index


def _depthwise(call: Call) -> Frames:
    """Of a depthwise convolution whose frames and rows are padded already."""
    batch, channels, *size = call.shape_of("input")
    kernel = call.shape_of("weight")[2:]
    spec, place, index = side_by_side(
        batch, channels, size[2], call.shape[2:], kernel, call["stride"], call["padding"][2],
        call["dilation"],
    )  # fmt: skip

    def inside(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
        return (n, c, *place(h), w)

    def weight(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return values.reshape(channels, 1, kernel[0] * kernel[1], kernel[2])

    return Frames(spec, inside, index, weight)
