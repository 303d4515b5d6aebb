"""Convolution and matrix product whose weights come from beyond the second-level cache.

Direct convolution would wait for them, and read those that do not fit the cache once for every row
of pixels. Here the pixels of an image are one row, and a task computes a group of output channels
for a block of them, part by part of the depth: it multiplies all pixels of the block by a panel of
weights (one part of the depth, one tile of output channels) while that is in the first-level cache,
keeps the sums in scratch until the next part, and asks for the next panel ahead. So every weight
comes from memory once, in order (Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication", 2008, with the roles of the operands that few pixels and many weights ask for).

What is no matrix product as it is, because the kernel has several taps, strides or pads, becomes
one part by part: the task first gathers what each of its pixels reads into scratch (im2col;
Chellapilla et al., "High Performance Convolutional Neural Networks for Document Processing", 2006).
So it does with a plain input, of which few pixels would take a cache line of every channel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import barrier, f32, fence, loop, prefetch, unflatten
from graphopt.backends.kernels.conv_deep_plan import DeepPlan
from graphopt.backends.kernels.conv_finish import finish, finish_pixels
from graphopt.backends.kernels.conv_spec import Accessors
from graphopt.backends.kernels.lanes import QUAD, multiply, multiply_by_lanes
from graphopt.backends.kernels.product import span, transposed
from graphopt.backends.kernels.tiling import LINE, split
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr


def pack_weights(weight: npt.NDArray[Any], deep: DeepPlan) -> npt.NDArray[np.float32]:
    """Pack `(oc, ic, KH, KW)` weights in the order in which tasks read them.

    That is by group, part, channel tile, kernel column, block of input channels, kernel row, input
    channel in its block, output channel in its tile. Missing output channels are zero.
    """
    spec, block, parts = deep.spec, deep.block, deep.parts
    tiles = deep.groups * deep.group
    whole = np.zeros((tiles * deep.width, *weight.shape[1:]), np.float32)
    first = source = 0
    for t in range(deep.channels.count):
        lanes = (deep.channels.size - (t >= deep.channels.large)) * block
        rows = weight[source : source + lanes]
        whole[first : first + len(rows)] = rows
        source += lanes
        first += deep.width
    shape = (deep.groups, deep.group, deep.width, parts, deep.part_blocks, block, *spec.kernel)
    # group, tile, width, part, in block, channel, row, column
    return np.ascontiguousarray(whole.reshape(shape).transpose(0, 3, 1, 7, 4, 6, 5, 2)).ravel()


def emit(deep: DeepPlan, task: Expr, weights: Any, scratch: Any, access: Accessors) -> None:
    """Emit one task; `weights` is the flat TIR buffer of the packed weights."""
    n, group, part_of_image = unflatten(task, [deep.spec.batch, deep.groups, deep.blocks.count])
    _Task(deep, n, group, part_of_image, weights, scratch, access).emit()


class _Task:
    """One task's indices and buffers."""

    def __init__(
        self, deep: DeepPlan, n: Expr, group: Expr, block: Expr, weights: Any, scratch: Any,
        access: Accessors,
    ) -> None:  # fmt: skip
        self.deep, self.n, self.group, self.weights = deep, n, group, weights
        self.access = access
        first, self.count = span(deep.blocks, block)
        # Shared, or LLVM computes all addresses in the inner loop: 57 GFLOP/s instead of 98.
        self.first = first if deep.blocks.count == 1 else share(first)
        if deep.parts > 1:
            self.sums = T.decl_buffer((deep.sums,), "float32", data=scratch)
        if deep.gathers:
            shape = (deep.part_depth // deep.block, deep.blocks.size, deep.block)
            self.gathered = T.decl_buffer(shape, "float32", data=scratch, elem_offset=deep.sums)

    def emit(self) -> None:
        deep = self.deep
        with loop(deep.parts) as part:
            if deep.row:
                self._turn(part)
            elif deep.gathers:
                self._gather(part)
            tiles: Expr = deep.group
            if deep.channels.count % deep.group:
                tiles = tirx.min(tiles, deep.channels.count - self.group * deep.group)
            with loop(tiles) as t:
                tile = self.group * deep.group + t
                panel = (self.group * deep.parts + part) * deep.group + t
                self._channel_tile(part, t, tile, panel)

    def _channel_tile(self, part: Expr, t: Expr, tile: Expr, panel: Expr) -> None:
        """All pixels of the block by one channel tile: wide tiles first, then narrower ones."""
        channels = self.deep.channels
        if channels.large == channels.count:
            self._pixel_tiles(part, t, tile * channels.size, panel, channels.size)
            return
        with T.If(tile < channels.large):
            with T.Then():
                self._pixel_tiles(part, t, tile * channels.size, panel, channels.size)
            with T.Else():
                behind = tile * channels.size - (tile - channels.large)
                self._pixel_tiles(part, t, behind, panel, channels.size - 1)

    def _pixel_tiles(
        self, part: Expr, t: Expr, channel_block: Expr, panel: Expr, vectors: int
    ) -> None:
        blocks = self.deep.blocks
        if blocks.large == blocks.count:
            self._cut(part, t, channel_block, panel, vectors, blocks.size)
            return
        with T.If(self.count == blocks.size):
            with T.Then():
                self._cut(part, t, channel_block, panel, vectors, blocks.size)
            with T.Else():
                self._cut(part, t, channel_block, panel, vectors, blocks.size - 1)

    def _cut(
        self, part: Expr, t: Expr, channel_block: Expr, panel: Expr, vectors: int, total: int
    ) -> None:
        for pixels, start, before, count in split(total, self.deep.pixels).kinds():
            with loop(count) as i:
                self._register_tile(part, t, channel_block, panel, vectors,
                                    start + i * pixels, pixels, before + i)  # fmt: skip
        if self._finishes_later:
            with T.If(part == self.deep.parts - 1), T.Then():
                fence(self.access.fence)
                finish_pixels(
                    self.deep.spec, self.deep.block, self.sums,
                    lambda p: (t * self.deep.blocks.size + p) * self.deep.width, total, vectors,
                    self.n, 0, self._place, channel_block, self.access, self.deep.together,
                )  # fmt: skip

    @property
    def _finishes_later(self) -> bool:
        """Whether the epilogue is a loop of its own; see `emit_bands` in `conv_direct`."""
        return (self.access.heavy or self.access.row > 0) and self.deep.parts > 1

    def _register_tile(
        self, part: Expr, t: Expr, channel_block: Expr, panel: Expr, vectors: int, first: Expr,
        pixels: int, piece: Expr,
    ) -> None:  # fmt: skip
        deep, block = self.deep, self.deep.block
        slots = pixels * vectors
        acc = T.alloc_buffer((slots * block,), "float32", scope="local")
        kept = (t * deep.blocks.size + first) * deep.width

        def each_slot(body: Any) -> None:
            for p in range(pixels):
                for v in range(vectors):
                    with T.vectorized(0, block) as lane:
                        place = kept + (p * deep.channels.size + v) * block + lane
                        body((p * vectors + v) * block + lane, place)

        def clear() -> None:
            each_slot(lambda slot, place: T.buffer_store(acc, f32(0.0), [slot]))

        if deep.parts == 1:
            clear()
        else:
            with T.If(part == 0):
                with T.Then():
                    clear()
                with T.Else():
                    each_slot(lambda slot, place: T.buffer_store(acc, self.sums[place], [slot]))
        self._multiply(part, acc, panel, vectors, first, pixels, piece)

        def end() -> None:
            finish(deep.spec, block, acc, pixels, vectors, self.n, 0,
                   lambda p: self._place(first + p), channel_block, self.access,
                   deep.together)  # fmt: skip

        def keep() -> None:
            each_slot(lambda slot, place: T.buffer_store(self.sums, acc[slot], [place]))

        if deep.parts == 1:
            end()
        elif self._finishes_later:
            keep()
        else:
            with T.If(part == deep.parts - 1):
                with T.Then():
                    end()
                with T.Else():
                    keep()

    def _place(self, pixel: Expr) -> tuple[Expr, Expr]:
        """Row and column of a pixel of the task's block."""
        pixel = self.first + pixel
        columns = self.deep.spec.out_size[1]
        if self.deep.spec.out_size[0] == 1:
            return tirx.const(0, "int32"), pixel
        return pixel // columns, pixel % columns

    def _multiply(
        self, part: Expr, acc: Any, panel: Expr, vectors: int, first: Expr, pixels: int,
        piece: Expr,
    ) -> None:  # fmt: skip
        deep, block, width = self.deep, self.deep.block, self.deep.width
        origin = panel * (deep.part_depth * width)

        def x(p: int, number: Expr, ci: Expr) -> Expr:
            if deep.gathers:
                return self.gathered[number, first + p, ci]
            # A single tap: the number is that of the channel block.
            channel = (part * deep.part_blocks + number) * block + ci
            return self.access.x(self.n, channel, *self._place(first + p))

        def lane_of(number: Expr, first_lane: int, p: int, lane: Expr) -> Expr:
            return x(p, number, first_lane + lane)

        def ask_ahead(row: Expr) -> None:
            # A quarter of the next panel's lines each: four pieces ask for all of it.
            for line in range(0, max(1, QUAD * width // LINE), 4):
                ahead = deep.part_depth * width + (line + piece % 4) * LINE
                prefetch(self.weights[row + ahead])

        with loop(deep.part_depth // block) as number:
            row = origin + number * (block * width)
            if deep.by_lane and (deep.gathers or self.access.vector_in):
                for first_lane in range(0, block, QUAD):
                    if first_lane:
                        barrier()
                    ask_ahead(row + first_lane * width)
                    multiply_by_lanes(
                        acc, self.weights, row + first_lane * width, width, block, range(pixels),
                        vectors, partial(lane_of, number, first_lane),
                    )  # fmt: skip
                return
            with loop(block // QUAD) as outer:
                row += outer * (QUAD * width)
                ask_ahead(row)
                for c in range(QUAD):
                    multiply(
                        acc, self.weights, row + c * width, block, range(pixels), vectors,
                        partial(x, number=number, ci=outer * QUAD + c), deep.in_place,
                    )  # fmt: skip

    def _gather(self, part: Expr) -> None:
        """Copy what each pixel reads of the part's channels, with zeros for the padding."""
        deep, spec = self.deep, self.deep.spec
        kernel_h, kernel_w = spec.kernel
        with T.serial(0, self.count) as pixel:
            row, column = self._place(pixel)
            with loop(kernel_w) as kw, loop(kernel_h) as kh:
                ih = row * spec.stride[0] - spec.padding[0] + kh * spec.dilation[0]
                iw = column * spec.stride[1] - spec.padding[1] + kw * spec.dilation[1]

                def put(value: Callable[[Expr, Expr], Expr], kw: Expr = kw, kh: Expr = kh) -> None:
                    with loop(deep.part_blocks) as cb, T.vectorized(0, deep.block) as lane:
                        number = (kw * deep.part_blocks + cb) * kernel_h + kh
                        T.buffer_store(self.gathered, value(cb, lane), [number, pixel, lane])

                def read(cb: Expr, lane: Expr, ih: Expr = ih, iw: Expr = iw) -> Expr:
                    channel = (part * deep.part_blocks + cb) * deep.block + lane
                    return self.access.x(self.n, channel, ih, iw)

                inside = tirx.all(ih >= 0, ih < spec.in_size[0], iw >= 0, iw < spec.in_size[1])
                with T.If(inside):
                    with T.Then():
                        put(read)
                    with T.Else():
                        put(lambda cb, lane: f32(0.0))

    def _turn(self, part: Expr) -> None:
        """Copy the part's channels of a plain input, in blocks."""
        deep, lanes = self.deep, self.deep.row

        def x(number: Expr, half: Expr, c: Expr, pixel: Expr) -> Expr:
            channel = (part * deep.part_blocks + number) * deep.block + half * lanes + c
            return self.access.x(self.n, channel, *self._place(pixel))

        with T.serial(0, deep.part_blocks) as number, loop(deep.block // lanes) as half:
            with T.serial(0, self.count // lanes) as i:
                columns = partial(x, number, half)
                square = transposed(lanes, lambda c, lane: columns(c, i * lanes + lane))
                for p in range(lanes):
                    with T.vectorized(0, lanes) as lane:
                        place = [number, i * lanes + p, half * lanes + lane]
                        T.buffer_store(self.gathered, square[p * lanes + lane], place)
            with T.serial(0, self.count % lanes) as i, T.vectorized(0, lanes) as lane:
                p = self.count - self.count % lanes + i
                place = [number, p, half * lanes + lane]
                T.buffer_store(self.gathered, x(number, half, lane, p), place)
