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

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.builder import barrier, f32, loop, prefetch, unflatten
from graphopt.backends.kernels.lanes import QUAD, Tap, multiply_by_lanes, multiply_row
from graphopt.backends.kernels.tiling import (
    LINE,
    Split,
    Tile,
    best_tiles,
    choose_tile,
    split,
    step_time,
)
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr

MAX_UNROLLED_KERNEL = 11
_TARGET_STEPS = 1 << 15
"""Register-tile steps worth one task; keeps the task loop's cost below a percent."""


_PANEL_BYTES = 24576
"""Weights of a tile that stay in the first-level cache from one tile of pixels to the next."""
_BAND_BYTES = 2048
"""Sums that wait for a long epilogue; they lie on the stack."""
_SECOND_LEVEL_BYTES = 12.8
"""Bytes of weights per cycle from the second-level cache, as measured: tiles of 16×4 and 16×3 in
turn lost a third, 16×5 a tenth."""
_FAR = 0.4
"""Cycles that a step waits for weights of the second level all the same."""


@dataclass(frozen=True)
class ConvSpec:
    """A convolution over rows and columns; `groups` of `icg` input to `ocg` output channels."""

    batch: int
    groups: int
    icg: int
    ocg: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-add, padding included."""
        outputs = self.batch * self.groups * self.ocg * self.out_size[0] * self.out_size[1]
        return 2 * outputs * self.icg * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Accessors:
    """How the kernel reaches its operands.

    Attributes:
        x: `(n, channel, row, column)` → the input element.
        store: `(n, channel, row, column, accumulated value)` emits the epilogue and the store of
            one element; the channel may hold a vectorized variable.
        vector: whether neighbouring channels are neighbours in memory.
        padded: whether channels behind the last one of a block may be stored too.
        heavy: whether the epilogue is too long to repeat for every accumulator.
        ahead: whether to ask for the next pixels' inputs, which come from far.
        vector_in: whether neighbouring channels of the input are neighbours in memory.
    """

    x: Callable[[Expr, Expr, Expr, Expr], Expr]
    store: Callable[[Expr, Expr, Expr, Expr, Expr], None]
    vector: bool
    padded: bool
    heavy: bool
    ahead: bool = False
    vector_in: bool = False


@dataclass(frozen=True)
class Segment:
    """Tiles `first ≤ i < last` of a row, all `pixels` wide, the first at column `start`.

    `skip` holds the (pixel, kernel column) pairs that fall into the padding.
    """

    first: int
    last: int
    start: int
    pixels: int
    skip: frozenset[tuple[int, int]]

    def column_of(self, tile: Expr) -> Expr:
        """The first column of a tile."""
        return self.start + (tile - self.first) * self.pixels


@dataclass(frozen=True)
class ConvPlan:
    """All the choices made for one convolution.

    Attributes:
        spec: the convolution.
        block: channels per block.
        channels: the blocks of output channels, cut into tiles.
        segments: the tiles of a row.
        tiles: how many those are.
        tiles_per_task: tiles of a row that make a task.
        channels_outer: whether tiles of channels change after rows.
        by_lane: whether multiply-adds take one lane of a vector.
        by_row: whether the kernel's columns are innermost, as neighbouring columns of the input are
            loaded at once.
    """

    spec: ConvSpec
    block: int
    channels: Split
    segments: tuple[Segment, ...]
    tiles: int
    tiles_per_task: int
    channels_outer: bool
    by_lane: bool
    by_row: bool = False

    @property
    def row_tasks(self) -> int:
        """Tasks along one output row."""
        return -(-self.tiles // self.tiles_per_task)

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        spec = self.spec
        return spec.batch * spec.groups * self.channels.count * spec.out_size[0] * self.row_tasks

    def column_of(self, tile: Expr) -> Expr:
        """The first column of a tile; behind the last one, the end of the row."""
        column = self.segments[-1].column_of(tile)
        for segment in self.segments[-2::-1]:
            column = tirx.Select(tile < segment.last, segment.column_of(tile), column)
        return column

    def describe(self) -> str:
        """For the report."""
        widest = max(segment.pixels for segment in self.segments)
        return f"conv_direct {self.channels.size * self.block}×{widest}"


def _pads_columns(spec: ConvSpec) -> bool:
    """Whether some kernel column of some pixel falls into the padding."""
    reach = (spec.out_size[1] - 1) * spec.stride[1] + (spec.kernel[1] - 1) * spec.dilation[1]
    return spec.padding[1] > 0 or reach - spec.padding[1] >= spec.in_size[1]


def _tests_columns(spec: ConvSpec) -> bool:
    """Whether the inner loop tests for left and right padding."""
    return spec.kernel[1] > MAX_UNROLLED_KERNEL and _pads_columns(spec)


def row_segments(spec: ConvSpec, pixels: int) -> tuple[Segment, ...]:
    """Cut a row into tiles of at most `pixels`, those at the padding apart."""
    cut = split(spec.out_size[1], pixels)
    # A very wide kernel is tested at run time instead: its columns are not unrolled.
    padded = _pads_columns(spec) and not _tests_columns(spec)
    segments: list[Segment] = []
    start = 0
    for i in range(cut.count):
        width = cut.size if i < cut.large else cut.size - 1
        skip = frozenset(
            (p, kw)
            for p in range(width)
            for kw in range(spec.kernel[1] if padded else 0)
            if not 0
            <= (start + p) * spec.stride[1] - spec.padding[1] + kw * spec.dilation[1]
            < spec.in_size[1]
        )
        last = segments[-1] if segments else None
        if last and last.pixels == width and last.skip == skip:
            segments[-1] = Segment(last.first, i + 1, last.start, width, skip)
        else:
            segments.append(Segment(i, i + 1, start, width, skip))
        start += width
    return tuple(segments)


def plans(spec: ConvSpec, isa: Isa, l2_bytes: int, *, plain: bool = False) -> tuple[ConvPlan, ...]:
    """The plans with the best register tiles, the best first; see `plan`."""
    tiles = best_tiles(-(-spec.ocg // isa.block), spec.out_size[1], isa, isa.block)
    return tuple(plan(spec, isa, l2_bytes, tile, plain=plain) for tile in tiles)


def plan(
    spec: ConvSpec, isa: Isa, l2_bytes: int, tile: Tile | None = None, *, plain: bool = False
) -> ConvPlan:
    """Choose the tile, if none is given, the order and the size of tasks.

    `plain` says that neighbouring columns of the input are neighbours in memory.
    """
    block = isa.block
    blocks = -(-spec.ocg // block)
    tile = tile or choose_tile(blocks, spec.out_size[1], isa, block)
    channels = split(blocks, tile.vectors)
    segments = row_segments(spec, tile.pixels)
    tiles = segments[-1].last
    depth = spec.icg * spec.kernel[0] * spec.kernel[1]
    per_tile = depth * tile.vectors * tile.pixels
    tiles_per_task = max(1, min(tiles, _TARGET_STEPS // per_tile)) if per_tile else tiles
    channels_outer = _is_read_less(
        depth * blocks * block, spec.out_size[0] * -(-tiles // tiles_per_task),
        spec.icg * spec.in_size[0] * spec.in_size[1], channels.count, l2_bytes,
    )  # fmt: skip
    if channels_outer:
        tiles_per_task = min(tiles, max(tiles_per_task, 4))
    by_row = plain and isa.lane_operand and _unrolled_columns(spec) > 0
    return ConvPlan(spec, block, channels, segments, tiles, tiles_per_task, channels_outer,
                    isa.lane_operand, by_row)  # fmt: skip


def _unrolled_columns(spec: ConvSpec) -> int:
    """Kernel columns to unroll where columns are innermost; 0 if it cannot be done."""
    if spec.kernel[1] <= MAX_UNROLLED_KERNEL:
        return spec.kernel[1]
    return QUAD if spec.kernel[1] % QUAD == 0 and not _pads_columns(spec) else 0


def _is_read_less(
    weights: int, pixel_tasks: int, inputs: int, channel_tiles: int, l2_bytes: int
) -> bool:
    """Whether to go by tiles of channels: inputs again and again for each, weights once.

    `weights` and `inputs` are the floats of an image; what fits the second-level cache is free.
    """
    half = l2_bytes // 8
    return weights > half and (inputs <= half or inputs * channel_tiles < weights * pixel_tasks)


def cost(conv: ConvPlan, isa: Isa) -> float:
    """Estimated cycles of one core: multiply-adds, or the weights' way from the second level."""
    spec = conv.spec
    depth = spec.icg * spec.kernel[0] * spec.kernel[1]
    width = conv.channels.size * conv.block
    registers = width // isa.lanes()
    far = depth * width * 4 > _PANEL_BYTES
    row = 0.0
    for segment in conv.segments:
        step = step_time(registers, segment.pixels, isa)
        if far:
            step = max(step, width * 4 / _SECOND_LEVEL_BYTES) + _FAR
        row += (segment.last - segment.first) * step
    rows = spec.batch * spec.groups * spec.out_size[0]
    return rows * conv.channels.count * depth * row


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
            row.emit_bands(first, count) if access.heavy else row.emit_tiles(first, count)

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
            finish(self.conv.spec, self.conv.block, acc, pixels, self.vectors, self.n, self.g,
                   lambda p: (self.oh, column + p), self.tile_block, self.access)  # fmt: skip

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
        tiles = max(1, _BAND_BYTES // (widest * width * 4))
        sums = T.alloc_buffer((tiles * widest * width,), "float32", scope="local")
        with T.serial(0, (count + tiles - 1) // tiles) as band:
            start = first + band * tiles
            end = tirx.min(start + tiles, first + count)
            left = self.conv.column_of(start)

            def keep(acc: Any, pixels: int, column: Expr, left: Expr = left) -> None:
                for slot in range(pixels * self.vectors):
                    with T.vectorized(0, block) as lane:
                        place = (column - left) * width + slot * block + lane
                        T.buffer_store(sums, acc[slot * block + lane], [place])

            with T.serial(0, end - start) as i:
                self._segments(self.conv.segments, start + i, keep)
            with T.serial(0, self.conv.column_of(end) - left) as p:
                finish_pixel(self.conv.spec, block, sums, p * width, self.vectors, self.n, self.g,
                       (self.oh, left + p), self.tile_block, self.access)  # fmt: skip

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
        acc = T.alloc_buffer((pixels * vectors * block,), "float32", scope="local")
        for slot in range(pixels * vectors):
            with T.vectorized(0, block) as lane:
                T.buffer_store(acc, f32(0.0), [slot * block + lane])

        row = oh * spec.stride[0] - spec.padding[0]
        low, high = kernel_rows(spec, row)
        left = column * spec.stride[1] - spec.padding[1]

        tests_columns = _tests_columns(spec)

        def step(c: Expr, ih: Expr, base: Expr, kw: Expr, skipped: frozenset[int]) -> None:
            for p in range(pixels):
                if p in skipped:
                    continue
                iw = left + p * spec.stride[1] + kw * spec.dilation[1]
                if tests_columns:
                    # Shared, or TVM drops the clamp where `inside` implies it; the load runs
                    # anyway.
                    near = share(tirx.max(0, tirx.min(iw, spec.in_size[1] - 1)))
                    inside = tirx.all(iw >= 0, iw < spec.in_size[1])
                    x = tirx.Select(inside, access.x(n, g * spec.icg + c, ih, near), f32(0.0))
                else:
                    x = access.x(n, g * spec.icg + c, ih, iw)
                for v in range(vectors):
                    with T.vectorized(0, block) as lane:
                        slot = (p * vectors + v) * block + lane
                        w = weights[base + v * block + lane]
                        T.buffer_store(acc, acc[slot] + x * w, [slot])

        by_lane = (conv.by_lane and access.vector_in and not tests_columns
                   and (spec.groups == 1 or spec.icg % block == 0))  # fmt: skip

        def four(c: Expr, ih: Expr, base: Expr, kw: Expr, skipped: frozenset[int]) -> None:
            def x(p: int, lane: Expr) -> Expr:
                iw = left + p * spec.stride[1] + kw * spec.dilation[1]
                return access.x(n, g * spec.icg + c + lane, ih, iw)

            inside = [p for p in range(pixels) if p not in skipped]
            multiply_by_lanes(acc, weights, base, width, block, inside, vectors, x)

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


def _multiply_rows(
    conv: ConvPlan, segment: Segment, acc: Any, weights: Any, origin: Expr, vectors: int,
    low: Expr, high: Expr, x: Callable[[Expr, Expr, Expr], Expr],
) -> None:  # fmt: skip
    """All products of a tile, for `by_row`; `x` takes channel, kernel row and tile's column."""
    spec, width = conv.spec, vectors * conv.block
    kernel_h, kernel_w = spec.kernel
    unrolled = _unrolled_columns(spec)
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
        multiply_row(acc, weights, base, width, conv.block, taps, vectors,
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


def kernel_rows(spec: ConvSpec, row: Expr) -> tuple[Expr, Expr]:
    """The kernel rows that meet the input: `low ≤ kh < high`."""
    kernel, dilation, size = spec.kernel[0], spec.dilation[0], spec.in_size[0]
    last = (spec.out_size[0] - 1) * spec.stride[0] - spec.padding[0] + (kernel - 1) * dilation
    low: Expr = 0
    high: Expr = kernel
    if spec.padding[0] > 0:
        low = tirx.min(tirx.max(0, -row + dilation - 1) // dilation, kernel)
    if last >= size:
        high = tirx.max(low, tirx.min(kernel, (size - row + dilation - 1) // dilation))
    return low, high


def finish(
    spec: ConvSpec, block: int, acc: Any, pixels: int, vectors: int, n: Expr, g: Expr,
    place: Callable[[Expr], tuple[Expr, Expr]], tile_block: Expr, access: Accessors,
) -> None:  # fmt: skip
    """Epilogue and stores of one register tile; `place` gives the row and column of a pixel."""

    def pixel(sums: Any, p: Expr) -> None:
        at = p * vectors * block
        finish_pixel(spec, block, sums, at, vectors, n, g, place(p), tile_block, access)

    if not access.heavy:
        for p in range(pixels):
            pixel(acc, p)
        return
    # Copied so that the loop may index it at run time: `acc` has to stay in registers.
    sums = T.alloc_buffer((pixels * vectors * block,), "float32", scope="local")
    for slot in range(pixels * vectors):
        with T.vectorized(0, block) as lane:
            T.buffer_store(sums, acc[slot * block + lane], [slot * block + lane])
    with T.serial(0, pixels) as p:
        pixel(sums, p)


def finish_pixel(
    spec: ConvSpec, block: int, sums: Any, at: Expr, vectors: int, n: Expr, g: Expr,
    place: tuple[Expr, Expr], tile_block: Expr, access: Accessors,
) -> None:  # fmt: skip
    """Epilogue and stores of one pixel, whose sums are in a buffer from `at` on."""
    ragged = spec.ocg % block
    kind = "vectorized" if access.vector else "unroll"
    for v in range(vectors):
        channel = (tile_block + v) * block
        slot = at + v * block

        def lanes(count: int, kind: str, channel: Expr = channel, slot: Expr = slot) -> None:
            with loop(count, kind) as lane:
                access.store(n, g * spec.ocg + channel + lane, *place, sums[slot + lane])

        if not ragged or access.padded:
            lanes(block, kind)
            continue
        with T.If(channel + block <= spec.ocg):
            with T.Then():
                lanes(block, kind)
            with T.Else():
                lanes(ragged, "unroll")
