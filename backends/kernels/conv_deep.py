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
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import barrier, f32, fence, loop, prefetch, unflatten
from graphopt.backends.kernels.conv_deep_plan import DeepPlan
from graphopt.backends.kernels.conv_finish import band_tiles, finish, finish_pixels
from graphopt.backends.kernels.conv_spec import Accessors
from graphopt.backends.kernels.lanes import QUAD, multiply, multiply_by_lanes, vectors_of
from graphopt.backends.kernels.product import by_size, span, transposed
from graphopt.backends.kernels.tiling import LINE, split
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr

_ASKING = 4
"""Tiles of pixels that ask for a share of the next panel each."""


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


@dataclass(frozen=True)
class _Tile:
    """A tile of output channels in one part of the depth.

    Attributes:
        part: the part's number.
        t: the tile's number in the task.
        channel_block: its first block of output channels.
        panel: number of its panel of weights.
        vectors: its blocks.
        pieces: tiles of pixels that share the asking for the next panel.
    """

    part: Expr
    t: Expr
    channel_block: Expr
    panel: Expr
    vectors: int
    pieces: int


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
                first, _ = span(deep.channels, tile)
                self._channel_tile(part, t, tile < deep.channels.large, first, panel)

    def _channel_tile(
        self, part: Expr, t: Expr, is_full: Expr, channel_block: Expr, panel: Expr
    ) -> None:
        """All pixels of the block by one channel tile: wide tiles first, then narrower ones."""
        blocks = self.deep.blocks

        def pixels(vectors: int) -> None:
            cut = partial(self._cut, part, t, channel_block, panel, vectors)
            by_size(blocks, self.count == blocks.size, cut)

        by_size(self.deep.channels, is_full, pixels)

    def _cut(
        self, part: Expr, t: Expr, channel_block: Expr, panel: Expr, vectors: int, total: int
    ) -> None:
        cut = split(total, self.deep.pixels)
        tile = _Tile(part, t, channel_block, panel, vectors, min(cut.count, _ASKING))
        waits = self.access.heavy or self.access.row > 0
        for kind in cut.kinds():
            pixels, start, before, count = kind
            if waits and self.deep.parts == 1:
                self._bands(tile, *kind)
                continue
            with loop(count) as i:
                self._register_tile(tile, start + i * pixels, pixels, before + i, waits)
        if waits and self.deep.parts > 1:
            with T.If(part == self.deep.parts - 1), T.Then():
                self._finish_later(tile, self.sums, self._kept(tile, 0), self.deep.width, 0, total)

    def _bands(self, tile: _Tile, pixels: int, start: int, before: int, count: int) -> None:
        """Some tiles of the one part, finished in bands; see `emit_bands` in `conv_direct`."""
        width = tile.vectors * self.deep.block
        tiles = min(count, band_tiles(pixels, width, self.access.row))
        sums = T.alloc_buffer((tiles * pixels * width,), "float32", scope="local")
        with loop(-(-count // tiles)) as band:
            first = band * tiles
            left = start + first * pixels
            within = share(tirx.min(tiles, count - first)) if count % tiles else tiles
            with T.serial(0, within) as i:
                acc = self._products(tile, left + i * pixels, pixels, before + first + i)
                self._keep(acc, tile, pixels, sums, i * pixels * width, width)
            self._finish_later(tile, sums, 0, width, left, within * pixels)

    def _finish_later(
        self, tile: _Tile, sums: Any, origin: Expr, stride: int, first: Expr, count: Expr
    ) -> None:
        """The epilogue of `count` pixels from `first` on, as a loop of its own.

        The first one's sums are in `sums` from `origin` on, the next one's `stride` floats on.
        """
        fence(self.access.fence)
        finish_pixels(
            self.deep.spec, self.deep.block, sums, lambda p: origin + p * stride, count,
            tile.vectors, self.n, 0, lambda p: self._place(first + p), tile.channel_block,
            self.access, self.deep.together,
        )  # fmt: skip

    def _kept(self, tile: _Tile, first: Expr) -> Expr:
        """Where the sums of a pixel are kept between parts."""
        return (tile.t * self.deep.blocks.size + first) * self.deep.width

    def _register_tile(
        self, tile: _Tile, first: Expr, pixels: int, piece: Expr, waits: bool
    ) -> None:
        """One tile, from the sums before this part to those after it, or to the outputs."""
        deep, block = self.deep, self.deep.block
        width = tile.vectors * block
        acc = self._products(tile, first, pixels, piece)

        def end() -> None:
            finish(deep.spec, block, acc, lambda p: p * width, pixels, tile.vectors, self.n, 0,
                   lambda p: self._place(first + p), tile.channel_block, self.access)  # fmt: skip

        def keep() -> None:
            self._keep(acc, tile, pixels, self.sums, self._kept(tile, first), deep.width)

        if deep.parts == 1:
            end()
        elif waits:
            keep()
        else:
            with T.If(tile.part == deep.parts - 1):
                with T.Then():
                    end()
                with T.Else():
                    keep()

    def _keep(
        self, acc: Any, tile: _Tile, pixels: int, sums: Any, origin: Expr, stride: int
    ) -> None:
        """Store a tile's sums from `origin` on, a pixel's `stride` floats behind the last one's."""
        width = tile.vectors * self.deep.block
        for p in range(pixels):
            for start, count in vectors_of(width, self.deep.wide):
                with T.vectorized(0, count) as lane:
                    value = acc[p * width + start + lane]
                    T.buffer_store(sums, value, [origin + p * stride + start + lane])

    def _products(self, tile: _Tile, first: Expr, pixels: int, piece: Expr) -> Any:
        """The part's products of one tile, added to the sums of the parts before, in registers."""
        width = tile.vectors * self.deep.block
        acc = T.alloc_buffer((pixels * width,), "float32", scope="local")

        def start(value: Callable[[Expr], Expr]) -> None:
            for p in range(pixels):
                for begin, count in vectors_of(width, self.deep.wide):
                    with T.vectorized(0, count) as lane:
                        place = self._kept(tile, first) + p * self.deep.width + begin + lane
                        T.buffer_store(acc, value(place), [p * width + begin + lane])

        if self.deep.parts == 1:
            start(lambda _: f32(0.0))
        else:
            with T.If(tile.part == 0):
                with T.Then():
                    start(lambda _: f32(0.0))
                with T.Else():
                    start(lambda place: self.sums[place])
        self._multiply(tile, acc, first, pixels, piece)
        return acc

    def _place(self, pixel: Expr) -> tuple[Expr, Expr]:
        """Row and column of a pixel of the task's block."""
        pixel = self.first + pixel
        columns = self.deep.spec.out_size[1]
        if self.deep.spec.out_size[0] == 1:
            return tirx.const(0, "int32"), pixel
        return pixel // columns, pixel % columns

    def _multiply(self, tile: _Tile, acc: Any, first: Expr, pixels: int, piece: Expr) -> None:
        deep, block, width = self.deep, self.deep.block, self.deep.width
        part, of_tile = tile.part, tile.vectors * block
        origin = tile.panel * (deep.part_depth * width)

        def x(p: int, number: Expr, ci: Expr) -> Expr:
            if deep.gathers:
                return self.gathered[number, first + p, ci]
            # A single tap: the number is that of the channel block.
            channel = (part * deep.part_blocks + number) * block + ci
            return self.access.x(self.n, channel, *self._place(first + p))

        def lane_of(number: Expr, first_lane: int, p: int, lane: Expr) -> Expr:
            return x(p, number, first_lane + lane)

        def ask_ahead(row: Expr) -> None:
            for line in range(0, max(1, QUAD * width // LINE), tile.pieces):
                ahead = deep.part_depth * width + (line + piece % tile.pieces) * LINE
                prefetch(self.weights[row + ahead])

        with loop(deep.part_depth // block) as number:
            row = origin + number * (block * width)
            if deep.by_lane and (deep.gathers or self.access.vector_in):
                for first_lane in range(0, block, QUAD):
                    if first_lane:
                        barrier()
                    ask_ahead(row + first_lane * width)
                    multiply_by_lanes(
                        acc, self.weights, row + first_lane * width, width, of_tile, deep.wide,
                        range(pixels), partial(lane_of, number, first_lane),
                    )  # fmt: skip
                return
            with loop(block // QUAD) as outer:
                row += outer * (QUAD * width)
                ask_ahead(row)
                for c in range(QUAD):
                    multiply(
                        acc, self.weights, row + c * width, of_tile, deep.wide, range(pixels),
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
