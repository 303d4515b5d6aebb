"""Direct convolution and matrix product: one register tile of outputs, all inputs folded in turn.

A task computes, for one tile of output channels and one group of pixel tiles of one output row,

    acc[p, v] = Σ over input channel, kernel row, kernel column of
                broadcast(x[channel, row, column of pixel p]) × w[channel, row, column, v]

with `acc` in registers, then the epilogue, then the stores. Weights are packed so that the inner
loop reads them in order. A 1×1 convolution is a row of H·W pixels; a linear layer is a row of M.
Pixels that touch the left or right padding get code of their own in which the products with the
padding are left out, so the inner loop has no test; rows of padding shorten the loop over kernel
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import barrier, f32, fence, loop, prefetch, unflatten
from graphopt.backends.kernels.conv_direct_plan import (
    ConvPlan,
    Segment,
    tests_columns,
    unrolled_columns,
)
from graphopt.backends.kernels.conv_finish import band_tiles, finish, finish_pixels
from graphopt.backends.kernels.conv_spec import Accessors, kernel_rows
from graphopt.backends.kernels.lanes import (
    QUAD,
    Tap,
    multiply,
    multiply_by_lanes,
    multiply_row,
    vectors_of,
)
from graphopt.backends.kernels.tiling import LINE
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr


def pack_weights(weight: npt.NDArray[Any], conv: ConvPlan) -> npt.NDArray[np.float32]:
    """Pack `(groups·ocg, icg, KH, KW)` weights in the order the inner loop reads them.

    Per group and tile of output channels: kernel column, input channels in blocks, kernel row,
    channel in the block, output channel in the tile. Missing output channels are zero. With
    `by_row`: input channel, kernel row, kernel column, output channel.
    """
    spec, block = conv.spec, conv.block
    kh, kw = spec.kernel
    blocks = -(-spec.ocg // block)
    grouped = np.zeros((spec.groups, blocks * block, spec.icg, kh, kw), np.float32)
    grouped[:, : spec.ocg] = weight.reshape(spec.groups, spec.ocg, spec.icg, kh, kw)
    pieces: list[npt.NDArray[np.float32]] = []
    for group in range(spec.groups):
        first = 0
        for t in range(conv.channels.count):
            vectors = conv.channels.size - (t >= conv.channels.large)
            rows = grouped[group, first * block : (first + vectors) * block]
            first += vectors
            if conv.by_row:
                pieces.append(rows.transpose(1, 2, 3, 0).ravel())
                continue
            for column in range(kw):
                for c in range(0, spec.icg, block):
                    part = rows[:, c : c + block, :, column]
                    pieces.append(part.transpose(2, 1, 0).ravel())
    return np.concatenate(pieces)


def emit(conv: ConvPlan, task: Expr, weights: Any, access: Accessors) -> None:
    """Emit one task; `weights` is the flat TIR buffer of the packed weights."""
    spec = conv.spec
    if conv.channels_outer:
        extents = [spec.batch, spec.groups, conv.channels.count, spec.out_size[0], conv.row_tasks]
        n, g, t, oh, row = unflatten(task, extents)
    else:
        extents = [spec.batch, spec.groups, spec.out_size[0], conv.row_tasks, conv.channels.count]
        n, g, oh, row, t = unflatten(task, extents)
    first = row * conv.tiles_per_task
    count: Expr = conv.tiles_per_task
    if conv.tiles % conv.tiles_per_task:
        count = tirx.min(count, conv.tiles - first)
    large = conv.channels.large
    sizes = [(conv.channels.size, 0)]
    if large < conv.channels.count:
        sizes.append((conv.channels.size - 1, large))
    for position, (vectors, base) in enumerate(sizes):
        tile_block = t * vectors + (base if position else 0)
        if position:
            # Tiles after the large ones start where those end.
            tile_block = large * conv.channels.size + (t - large) * vectors

        def body(vectors: int = vectors, tile_block: Expr = tile_block) -> None:
            row = _Row(conv, n, g, oh, vectors, tile_block, weights, access)
            in_bands = access.heavy or access.row
            row.emit_bands(first, count) if in_bands else row.emit_tiles(first, count)

        if len(sizes) == 1:
            body()
        else:
            with T.If((t < large) if position == 0 else (t >= large)), T.Then():
                body()


@dataclass(frozen=True)
class _Row:
    """Tiles of one output row and one tile of output channels, `vectors` blocks from a block on."""

    conv: ConvPlan
    n: Expr
    g: Expr
    oh: Expr
    vectors: int
    tile_block: Expr
    weights: Any
    access: Accessors

    def emit_tiles(self, first: Expr, count: Expr) -> None:
        """Some tiles, each finished while it is in registers."""

        def end(acc: Any, pixels: int, column: Expr) -> None:
            width = self.vectors * self.conv.block
            finish(self.conv.spec, self.conv.block, acc, lambda p: p * width, pixels, self.vectors,
                   self.n, self.g, lambda p: (self.oh, column + p), self.tile_block,
                   self.access)  # fmt: skip

        with T.serial(0, count) as i:
            self._segments(self.conv.segments, first + i, end)

    def emit_bands(self, first: Expr, count: Expr) -> None:
        """Some tiles, finished in bands.

        The sums of a band wait in the first-level cache for a loop over all its pixels: a long
        epilogue takes many times its throughput to begin and to end, and LLVM spills accumulators
        of the products where it may hold them in registers next to the epilogue's values.
        """
        block, width = self.conv.block, self.vectors * self.conv.block
        widest = max(segment.pixels for segment in self.conv.segments)
        tiles = band_tiles(widest, width, self.access.row)
        sums = T.alloc_buffer((tiles * widest * width,), "float32", scope="local")
        with T.serial(0, (count + tiles - 1) // tiles) as band:
            start = first + band * tiles
            end = tirx.min(start + tiles, first + count)
            left = self.conv.column_of(start)

            def keep(acc: Any, pixels: int, column: Expr, left: Expr = left) -> None:
                for p in range(pixels):
                    for begin, count in vectors_of(width, self.conv.wide):
                        with T.vectorized(0, count) as lane:
                            place = (column - left + p) * width + begin + lane
                            T.buffer_store(sums, acc[p * width + begin + lane], [place])

            with T.serial(0, end - start) as i:
                self._segments(self.conv.segments, start + i, keep)

            fence(self.access.fence)

            def place(p: Expr, left: Expr = left) -> tuple[Expr, Expr]:
                return self.oh, left + p

            # Shared: not computed again for each of the loops over the pixels.
            pixels = share(self.conv.column_of(end) - left)
            finish_pixels(self.conv.spec, block, sums, lambda p: p * width, pixels, self.vectors,
                          self.n, self.g, place, self.tile_block, self.access,
                          self.conv.together)  # fmt: skip

    def _segments(
        self, segments: Sequence[Segment], tile: Expr, end: Callable[[Any, int, Expr], None]
    ) -> None:
        """Branch to the code of the segment that holds the tile."""
        segment, rest = segments[0], segments[1:]
        if not rest:
            self._tile(segment, segment.column_of(tile), end)
            return
        with T.If(tile < segment.last):
            with T.Then():
                self._tile(segment, segment.column_of(tile), end)
            with T.Else():
                self._segments(rest, tile, end)

    def _tile(self, segment: Segment, column: Expr, end: Callable[[Any, int, Expr], None]) -> None:
        conv, access, vectors, weights = self.conv, self.access, self.vectors, self.weights
        n, g, oh, spec, block = self.n, self.g, self.oh, conv.spec, conv.block
        pixels, width = segment.pixels, vectors * block
        kernel_h, kernel_w = spec.kernel
        depth = spec.icg * kernel_h * kernel_w
        blocks = -(-spec.ocg // block)
        origin = (g * blocks + self.tile_block) * block * depth
        acc = T.alloc_buffer((pixels * width,), "float32", scope="local")
        for p in range(pixels):
            for start, count in vectors_of(width, conv.wide):
                with T.vectorized(0, count) as lane:
                    T.buffer_store(acc, f32(0.0), [p * width + start + lane])

        row = oh * spec.stride[0] - spec.padding[0]
        low, high = kernel_rows(spec, row)
        left = column * spec.stride[1] - spec.padding[1]

        is_tested = tests_columns(spec)
        is_tight = pixels >= conv.tight and not (conv.in_place and width == conv.wide)

        def step(c: Expr, ih: Expr, base: Expr, kw: Expr, skipped: frozenset[int]) -> None:
            def x(p: int) -> Expr:
                iw = left + p * spec.stride[1] + kw * spec.dilation[1]
                if not is_tested:
                    return access.x(n, g * spec.icg + c, ih, iw)
                # Shared, or TVM drops the clamp where `inside` implies it; the load runs anyway.
                near = share(tirx.max(0, tirx.min(iw, spec.in_size[1] - 1)))
                inside = tirx.all(iw >= 0, iw < spec.in_size[1])
                return tirx.Select(inside, access.x(n, g * spec.icg + c, ih, near), f32(0.0))

            multiply(acc, weights, base, width, conv.wide, _inside(pixels, skipped), x,
                     conv.in_place)  # fmt: skip

        by_lane = (conv.by_lane and access.vector_in and not is_tested
                   and (spec.groups == 1 or spec.icg % block == 0))  # fmt: skip

        def four(c: Expr, ih: Expr, base: Expr, kw: Expr, skipped: frozenset[int]) -> None:
            def x(p: int, lane: Expr) -> Expr:
                iw = left + p * spec.stride[1] + kw * spec.dilation[1]
                return access.x(n, g * spec.icg + c + lane, ih, iw)

            multiply_by_lanes(
                acc, weights, base, width, width, conv.wide, _inside(pixels, skipped), x
            )

        def channel_block(first: Expr, channels: int, kw: Expr, skipped: frozenset[int]) -> None:
            start = origin + (kw * spec.icg + first) * (kernel_h * width)
            with loop(high - low) as i:
                kh = low + i
                ih = row + kh * spec.dilation[0]
                rows = start + kh * (channels * width)
                if access.ahead:
                    for p in range(pixels, 2 * pixels, max(1, LINE // block)):
                        prefetch(access.x(n, g * spec.icg + first, ih, left + p * spec.stride[1]))
                if by_lane and channels % QUAD == 0:
                    for c in range(0, channels, QUAD):
                        if c:
                            # LLVM would load both fours of each pixel at once, and spill.
                            barrier()
                        four(first + c, ih, rows + c * width, kw, skipped)
                    return
                inner = 4 if channels % 4 == 0 else channels
                with loop(channels // inner) as outer:
                    has_rows = spec.kernel != (1, 1) and isinstance(high - low, int)
                    if is_tight and has_rows and channels > inner:
                        # LLVM moves no loads across. Without padding, it would have those of two
                        # fours at once, and spill: 53 GFLOP/s instead of 100.
                        prefetch(weights[rows + (outer + 2) * inner * width], level=1)
                    for ci in range(inner):
                        c = outer * inner + ci
                        step(first + c, ih, rows + c * width, kw, skipped)

        def kernel_column(kw: Expr, skipped: frozenset[int]) -> None:
            full, rest = divmod(spec.icg, block)
            if full:
                with loop(full) as cb:
                    channel_block(cb * block, block, kw, skipped)
            if rest:
                channel_block(tirx.const(full * block, "int32"), rest, kw, skipped)

        # Neighbouring kernel columns read the same pixels. They are kept in loops of their own, or
        # LLVM would hold the shared pixels in registers and spill accumulators instead.
        if conv.by_row:
            _multiply_rows(
                conv, segment, acc, weights, origin, vectors, low, high,
                lambda c, kh, column: access.x(
                    n, g * spec.icg + c, row + kh * spec.dilation[0], left + column
                ),
            )  # fmt: skip
        elif segment.skip:
            for kw in range(kernel_w):
                skipped = frozenset(p for p, column_ in segment.skip if column_ == kw)
                if len(skipped) < pixels:
                    kernel_column(tirx.const(kw, "int32"), skipped)
        else:
            with loop(kernel_w) as kw:
                kernel_column(kw, frozenset())
        end(acc, pixels, column)


def _inside(pixels: int, skipped: frozenset[int]) -> list[int]:
    return [p for p in range(pixels) if p not in skipped]


def _multiply_rows(
    conv: ConvPlan, segment: Segment, acc: Any, weights: Any, origin: Expr, vectors: int,
    low: Expr, high: Expr, x: Callable[[Expr, Expr, Expr], Expr],
) -> None:  # fmt: skip
    """All products of a tile, for `by_row`; `x` takes channel, kernel row and tile's column."""
    spec, width = conv.spec, vectors * conv.block
    kernel_h, kernel_w = spec.kernel
    unrolled = unrolled_columns(spec)
    taps = [
        Tap(kw, p, p * spec.stride[1] + kw * spec.dilation[1])
        for kw in range(unrolled)
        for p in range(segment.pixels)
        if (p, kw) not in segment.skip
    ]
    if not taps:
        return

    def row(c: Expr, kh: Expr, first: Expr) -> None:
        base = origin + ((c * kernel_h + kh) * kernel_w + first) * width
        multiply_row(acc, weights, base, width, conv.wide, taps,
                     lambda offset: x(c, kh, first * spec.dilation[1] + offset))  # fmt: skip

    # A single column is little for a turn of the loop.
    together = QUAD if spec.kernel == (1, 1) and spec.icg % QUAD == 0 else 1
    with (
        loop(spec.icg // together) as outer,
        loop(high - low) as i,
        loop(kernel_w // unrolled) as part,
    ):
        for c in range(together):
            row(outer * together + c, low + i, part * unrolled)
