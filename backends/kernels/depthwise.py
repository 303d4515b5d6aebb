"""Depthwise convolution: one filter per channel, vectors along the channels of a block.

A task computes some rows of one block of channels. As in `conv_direct`, pixels at the left and
right padding have code of their own without the products that fall into it; neighbouring pixels of
a tile share their loads, since the compiler sees the same address twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.builder import f32, unflatten
from graphopt.backends.kernels.conv_direct_plan import Segment, row_segments
from graphopt.backends.kernels.conv_spec import Accessors, ConvSpec, kernel_rows
from graphopt.ops.opdef import Expr

_MAX_TAPS = 11
_TASK_STEPS = 1 << 13


Fold = Callable[[Expr, Expr, Expr, Expr, int, Expr], Expr]
"""`(folded so far, input, channel block, kernel row, kernel column, lane)` → folded."""


@dataclass(frozen=True)
class DepthwisePlan:
    """The choices for one depthwise convolution; `spec` has `groups` channels.

    Attributes:
        spec: the convolution.
        block: channels per block.
        segments: the tiles of a row.
        rows: output rows of a task.
        by_column: whether a tile's inputs are used one after the other by all taps, with a row of
            weights in registers, and not tap after tap.
    """

    spec: ConvSpec
    block: int
    segments: tuple[Segment, ...]
    rows: int
    by_column: bool

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        blocks = -(-self.spec.groups // self.block)
        return self.spec.batch * blocks * -(-self.spec.out_size[0] // self.rows)

    def describe(self) -> str:
        """For the report."""
        widest = max(segment.pixels for segment in self.segments)
        return f"depthwise {self.block}×{widest}"


def plan(spec: ConvSpec, isa: Isa) -> DepthwisePlan | None:
    """Choose the tile; None where the kernel is too wide to unroll."""
    if spec.kernel[1] > _MAX_TAPS:
        return None
    width = max(1, isa.block * 4 // isa.vector_bytes)
    left = isa.registers - width * spec.kernel[1]
    if isa.load_operand:
        # Accumulators, one row of weights, and a spare for each pixel.
        pixels = max(1, min(8, (left - 2) // (width + 1)))
    else:
        # Accumulators, one row of weights, and inputs: at a stride few are shared between pixels,
        # and LLVM loads many at once.
        pixels = max(1, min(10, 2 * (left // width - 3) // (spec.stride[1] + 1)))
    segments = row_segments(spec, pixels)
    steps = spec.kernel[0] * spec.kernel[1] * spec.out_size[1]
    rows = max(1, min(spec.out_size[0], _TASK_STEPS // steps))
    return DepthwisePlan(spec, isa.block, segments, rows, not isa.load_operand)


def pack_weights(weight: npt.NDArray[Any], depthwise: DepthwisePlan) -> npt.NDArray[np.float32]:
    """Pack `(C, 1, KH, KW)` to `(⌈C/block⌉, KH, KW, block)`, missing channels zero."""
    block, (kh, kw) = depthwise.block, depthwise.spec.kernel
    channels = weight.shape[0]
    blocks = -(-channels // block)
    padded = np.zeros((blocks * block, kh, kw), np.float32)
    padded[:channels] = weight[:, 0].reshape(channels, kh, kw)
    return np.ascontiguousarray(padded.reshape(blocks, block, kh, kw).transpose(0, 2, 3, 1)).ravel()


def emit(depthwise: DepthwisePlan, task: Expr, weights: Any, access: Accessors) -> None:
    """Emit one task; `weights` is the flat TIR buffer of the packed weights."""
    block, (kernel_h, kernel_w) = depthwise.block, depthwise.spec.kernel

    def add(acc: Expr, x: Expr, cb: Expr, kh: Expr, kw: int, lane: Expr) -> Expr:
        return acc + x * weights[((cb * kernel_h + kh) * kernel_w + kw) * block + lane]

    emit_windows(depthwise, task, f32(0.0), add, access)


def emit_windows(
    depthwise: DepthwisePlan, task: Expr, start: Expr, fold: Fold, access: Accessors
) -> None:
    """Emit one task that folds each window, from `start` on, into one element."""
    spec, block = depthwise.spec, depthwise.block
    blocks = -(-spec.groups // block)
    bands = -(-spec.out_size[0] // depthwise.rows)
    n, cb, band = unflatten(task, [spec.batch, blocks, bands])
    first = band * depthwise.rows
    count: Expr = depthwise.rows
    if spec.out_size[0] % depthwise.rows:
        count = tirx.min(count, spec.out_size[0] - first)
    with T.serial(0, count) as r:
        for segment in depthwise.segments:
            with T.serial(0, segment.last - segment.first) as i:
                column = segment.start + i * segment.pixels
                _tile(depthwise, segment, n, cb, first + r, column, start, fold, access)


def _tile(
    depthwise: DepthwisePlan, segment: Segment, n: Expr, cb: Expr, oh: Expr, column: Expr,
    start: Expr, fold: Fold, access: Accessors,
) -> None:  # fmt: skip
    spec, block = depthwise.spec, depthwise.block
    acc = T.alloc_buffer((segment.pixels * block,), "float32", scope="local")
    for p in range(segment.pixels):
        with T.vectorized(0, block) as lane:
            T.buffer_store(acc, start, [p * block + lane])
    row = oh * spec.stride[0] - spec.padding[0]
    low, high = kernel_rows(spec, row)
    left = column * spec.stride[1] - spec.padding[1]
    taps = [
        (p * spec.stride[1] + kw * spec.dilation[1], p, kw)
        for kw in range(spec.kernel[1])
        for p in range(segment.pixels)
        if (p, kw) not in segment.skip
    ]
    with T.serial(0, high - low) as step:
        kh = low + step
        ih = row + kh * spec.dilation[0]
        for offset, p, kw in sorted(taps) if depthwise.by_column else taps:
            with T.vectorized(0, block) as lane:
                x = access.x(n, cb * block + lane, ih, left + offset)
                slot = p * block + lane
                T.buffer_store(acc, fold(acc[slot], x, cb, kh, kw, lane), [slot])
    if not access.heavy:
        for p in range(segment.pixels):
            with T.vectorized(0, block) as lane:
                access.store(n, cb * block + lane, oh, column + p, acc[p * block + lane])
        return
    source = T.alloc_buffer((segment.pixels * block,), "float32", scope="local")
    for p in range(segment.pixels):
        with T.vectorized(0, block) as lane:
            T.buffer_store(source, acc[p * block + lane], [p * block + lane])
    with T.serial(0, segment.pixels) as p, T.vectorized(0, block) as lane:
        access.store(n, cb * block + lane, oh, column + p, source[p * block + lane])
