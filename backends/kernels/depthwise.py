"""Depthwise convolution: one filter per channel, vectors along the channels of a block.

A task computes some rows of one block of channels. As in `conv_direct`, pixels at the left and
right padding have code of their own without the products that fall into it; neighbouring pixels of
a tile share their loads, since the compiler sees the same address twice. A tile of two output rows
shares the input rows that both read, too:

    5×5, stride 1:  input row        0  1  2  3  4  5
                    kernel row for   0  1  2  3  4  –   the first output row
                                     –  0  1  2  3  4   the second one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

_MAX_TAPS = 32
"""Columns of a kernel that are unrolled."""
_MAX_HELD = 11
"""Columns of a kernel whose weights are meant to stay in registers."""
_TASK_STEPS = 1 << 13
_SHARED_ROWS = 3
"""Input rows that two output rows have to share to be computed together."""


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
        height: output rows of a tile, 1 or 2.
    """

    spec: ConvSpec
    block: int
    segments: tuple[Segment, ...]
    rows: int
    by_column: bool
    height: int = 1

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
    if spec.kernel[1] > _MAX_HELD:
        # Each weight is loaded for the pixels of a tile.
        pixels = max(1, min(8, isa.registers // width - 4))
    elif isa.load_operand:
        # Accumulators, one row of weights, and a spare for each pixel.
        pixels = max(1, min(8, (left - 2) // (width + 1)))
    else:
        # Accumulators, one row of weights, and inputs: at a stride few are shared between pixels,
        # and LLVM loads many at once.
        pixels = max(1, min(10, 2 * (left // width - 3) // (spec.stride[1] + 1)))
    height = _height(spec, isa)
    if height == 2 and spec.kernel[1] <= _MAX_HELD:
        # Accumulators of two rows, a row of inputs, and a weight for each row.
        pixels = max(1, min(8, (isa.registers // width - 2) // 3))
    segments = row_segments(spec, pixels, unrolled=True)
    steps = spec.kernel[0] * spec.kernel[1] * spec.out_size[1]
    rows = max(height, min(spec.out_size[0], _TASK_STEPS // steps) // height * height)
    return DepthwisePlan(spec, isa.block, segments, rows, not isa.load_operand, height)


def _height(spec: ConvSpec, isa: Isa) -> int:
    """How many output rows a tile has.

    Two, where a load costs as much as a multiply-add, for kernels whose output rows share at least
    three input rows: 3×3 ones gained nothing. On NEON a load brings two vectors, and wider tiles
    of one row share as much.
    """
    shift, apart = divmod(spec.stride[0], spec.dilation[0])
    shares = not apart and spec.kernel[0] - shift >= _SHARED_ROWS
    return 2 if isa.load_operand and shares and spec.out_size[0] > 1 else 1


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
    spec, height = depthwise.spec, depthwise.height
    blocks = -(-spec.groups // depthwise.block)
    bands = -(-spec.out_size[0] // depthwise.rows)
    n, cb, band = unflatten(task, [spec.batch, blocks, bands])
    first = band * depthwise.rows
    count: Expr = depthwise.rows
    if spec.out_size[0] % depthwise.rows:
        count = tirx.min(count, spec.out_size[0] - first)

    def tiles(oh: Expr, height: int) -> None:
        for segment in depthwise.segments:
            with T.serial(0, segment.last - segment.first) as i:
                column = segment.start + i * segment.pixels
                tile = _Tile(depthwise, segment, height, n, cb, oh, column, start, fold, access)
                tile.emit()

    with T.serial(0, count // height) as r:
        tiles(first + r * height, height)
    if spec.out_size[0] % height:
        with T.serial(0, count % height):
            tiles(spec.out_size[0] - 1, 1)


@dataclass(frozen=True)
class _Tile:
    """A tile of `height` output rows from `oh` on; see `emit_windows`."""

    depthwise: DepthwisePlan
    segment: Segment
    height: int
    n: Expr
    cb: Expr
    oh: Expr
    column: Expr
    start: Expr
    fold: Fold
    access: Accessors

    def emit(self) -> None:
        """Fold the windows, then store the results."""
        acc = self._alloc()
        self._each(lambda r, p, slot, lane: T.buffer_store(acc, self.start, [slot]))
        self._fold_windows(acc)
        if not self.access.heavy:
            self._each(lambda r, p, slot, lane: self._store(r, p, lane, acc[slot]))
            return
        sums = self._alloc()
        self._each(lambda r, p, slot, lane: T.buffer_store(sums, acc[slot], [slot]))
        with T.serial(0, self.height) as r, T.serial(0, self.segment.pixels) as p:
            self._each_lane(r, p, lambda r, p, slot, lane: self._store(r, p, lane, sums[slot]))

    def _alloc(self) -> Any:
        size = self.height * self.segment.pixels * self.depthwise.block
        return T.alloc_buffer((size,), "float32", scope="local")

    def _each(self, body: Callable[[Expr, Expr, Expr, Expr], None]) -> None:
        for r in range(self.height):
            for p in range(self.segment.pixels):
                self._each_lane(r, p, body)

    def _each_lane(self, r: Expr, p: Expr, body: Callable[[Expr, Expr, Expr, Expr], None]) -> None:
        """Emit `body(row of the tile, pixel, accumulator, lane)` for a vector of channels."""
        block = self.depthwise.block
        with T.vectorized(0, block) as lane:
            body(r, p, (r * self.segment.pixels + p) * block + lane, lane)

    def _store(self, r: Expr, p: Expr, lane: Expr, value: Expr) -> None:
        channel = self.cb * self.depthwise.block + lane
        self.access.store(self.n, channel, self.oh + r, self.column + p, value)

    def _fold_windows(self, acc: Any) -> None:
        """Fold the windows, without the rows that fall into the padding."""
        spec = self.depthwise.spec
        top = self.oh * spec.stride[0] - spec.padding[0]
        if self.height == 1:
            low, high = kernel_rows(spec, top)
            self._fold_rows(acc, top, low, high - low, (0,), 0)
            return
        # Both windows are one, higher by as many input rows as the second starts below the first.
        (kernel, columns), (rows, width) = spec.kernel, spec.out_size
        shift = spec.stride[0] // spec.dilation[0]
        both = replace(spec, kernel=(kernel + shift, columns), out_size=(rows - 1, width))
        low, high = kernel_rows(both, top)
        # Loops of their own also keep LLVM from holding all the weights and inputs in registers.
        for begin, end, outputs in (
            (0, shift, (0,)),
            (shift, kernel, (0, 1)),
            (kernel, kernel + shift, (1,)),
        ):
            first = tirx.max(low, begin)
            count = tirx.max(0, tirx.min(high, end) - first)
            self._fold_rows(acc, top, first, count, outputs, shift)

    def _fold_rows(
        self, acc: Any, top: Expr, first: Expr, count: Expr, outputs: Sequence[int], shift: int
    ) -> None:
        """Fold `count` input rows, from the first on, into some output rows of the tile.

        Input rows are counted from `top` in dilations; the windows are `shift` of them apart.
        """
        depthwise, spec = self.depthwise, self.depthwise.spec
        left = self.column * spec.stride[1] - spec.padding[1]
        taps = [
            (p * spec.stride[1] + kw * spec.dilation[1], p, kw)
            for kw in range(spec.kernel[1])
            for p in range(self.segment.pixels)
            if (p, kw) not in self.segment.skip
        ]
        with T.serial(0, count) as i:
            step = first + i
            ih = top + step * spec.dilation[0]
            for offset, p, kw in sorted(taps) if depthwise.by_column else taps:

                def add(r: Expr, p: Expr, slot: Expr, lane: Expr, kw: int = kw,
                        offset: int = offset) -> None:  # fmt: skip
                    channel = self.cb * depthwise.block + lane
                    x = self.access.x(self.n, channel, ih, left + offset)
                    folded = self.fold(acc[slot], x, self.cb, step - r * shift, kw, lane)
                    T.buffer_store(acc, folded, [slot])

                for r in outputs:
                    self._each_lane(r, p, add)
