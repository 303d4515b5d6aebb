"""Direct convolution: what a plan chooses, and what it is estimated to cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from tvm import tirx

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.lanes import QUAD
from graphopt.backends.kernels.tiling import (
    LINE,
    MOST_PIXELS,
    Split,
    Tile,
    best_tiles,
    choose_tile,
    fits,
    split,
    step_time,
    together,
)
from graphopt.ops.opdef import Expr

MAX_UNROLLED_KERNEL = 11
_TARGET_STEPS = 1 << 15
"""Register-tile steps worth one task; keeps the task loop's cost below a percent."""
_PANEL_BYTES = 24576
"""Weights of a tile that stay in the first-level cache from one tile of pixels to the next."""
_FIRST_LEVEL_BYTES = 32768
_SECOND_LEVEL_BYTES = 12.8
"""Bytes of weights per cycle from the second-level cache, as measured: tiles of 16×4 and 16×3 in
turn lost a third, 16×5 a tenth."""
_FAR = 0.4
"""Cycles that a step waits for weights of the second level all the same."""
_FAR_LINES = 2.0
"""Cycles that a step waits where weights and lines of a plain input evict each other: 232 to 232
channels on 7×7 ran at 72 GFLOP/s instead of 96."""
SKIPPING = 1.3
"""How much longer than their steps tiles take of which some taps meet padding: the weights come
from as far for fewer products. Measured 1.2 to 1.5 where half of all taps do."""


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
        wide: channels that products compute as one; see `Isa`.
        channels: the blocks of output channels, cut into tiles.
        segments: the tiles of a row.
        tiles: how many those are.
        tiles_per_task: tiles of a row that make a task.
        channels_outer: whether tiles of channels change after rows.
        by_lane: whether multiply-adds take one lane of a vector.
        in_place: whether there is `Isa.multiply_add`.
        together: blocks of channels whose long epilogue is computed in turn.
        tight: pixels from which a register tile leaves no register.
        by_row: whether the kernel's columns are innermost, as neighbouring columns of the input are
            loaded at once.
    """

    spec: ConvSpec
    block: int
    wide: int
    channels: Split
    segments: tuple[Segment, ...]
    tiles: int
    tiles_per_task: int
    channels_outer: bool
    by_lane: bool
    in_place: bool
    together: int
    tight: int = 0
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


def tests_columns(spec: ConvSpec) -> bool:
    """Whether the inner loop tests for left and right padding."""
    return spec.kernel[1] > MAX_UNROLLED_KERNEL and _pads_columns(spec)


def row_segments(spec: ConvSpec, pixels: int, *, unrolled: bool = False) -> tuple[Segment, ...]:
    """Cut a row into tiles of at most `pixels`, those at the padding apart.

    `unrolled` says that the columns of even a very wide kernel are; else they are tested at run
    time.
    """
    cut = split(spec.out_size[1], pixels)
    padded = _pads_columns(spec) and (unrolled or not tests_columns(spec))
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


def plans(
    spec: ConvSpec, isa: Isa, l2_bytes: int, *, plain: bool = False, most: int = MOST_PIXELS
) -> tuple[ConvPlan, ...]:
    """The plans with the best tiles of at most `most` pixels, the best first; see `plan`."""
    tiles = best_tiles(-(-spec.ocg // isa.block), spec.out_size[1], isa, most)
    return tuple(plan(spec, isa, l2_bytes, tile, plain=plain) for tile in tiles)


def plan(
    spec: ConvSpec, isa: Isa, l2_bytes: int, tile: Tile | None = None, *, plain: bool = False
) -> ConvPlan:
    """Choose the tile, if none is given, the order and the size of tasks.

    `plain` says that neighbouring columns of the input are neighbours in memory.
    """
    block = isa.block
    blocks = -(-spec.ocg // block)
    tile = tile or choose_tile(blocks, spec.out_size[1], isa)
    channels = split(blocks, tile.vectors)
    segments = row_segments(spec, tile.pixels)
    tiles = segments[-1].last
    depth = spec.icg * spec.kernel[0] * spec.kernel[1]
    per_tile = depth * tile.vectors * tile.pixels
    tiles_per_task = max(1, min(tiles, _TARGET_STEPS // per_tile)) if per_tile else tiles
    if 4 < tiles_per_task < tiles:
        # Whole vectors of pixels, which rows of a plain output are stored in.
        tiles_per_task -= tiles_per_task % (8 if tiles_per_task >= 8 else 4)
    channels_outer = _is_read_less(
        depth * blocks * block, spec.out_size[0] * -(-tiles // tiles_per_task),
        spec.icg * spec.in_size[0] * spec.in_size[1], channels.count, l2_bytes,
    )  # fmt: skip
    if channels_outer:
        tiles_per_task = min(tiles, max(tiles_per_task, 4))
    tight = next(p for p in count(1) if not fits(tile.vectors, p + 1, isa))
    by_row = plain and isa.lane_operand and unrolled_columns(spec) > 0
    return ConvPlan(spec, block, isa.wide, channels, segments, tiles, tiles_per_task,
                    channels_outer, isa.lane_operand, bool(isa.multiply_add), together(isa), tight,
                    by_row)  # fmt: skip


def unrolled_columns(spec: ConvSpec) -> int:
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


def cost(conv: ConvPlan, isa: Isa, *, plain: bool = False) -> float:
    """Estimated cycles of one core: multiply-adds, or the operands' way from the second level.

    Of a `plain` input a tile takes a few pixels of the cache lines of every channel.
    """
    spec = conv.spec
    tiles = sum(
        count * _tile_cost(conv, vectors, isa, plain)
        for vectors, _, _, count in conv.channels.kinds()
    )
    return spec.batch * spec.groups * spec.icg * tiles


def _tile_cost(conv: ConvPlan, vectors: int, isa: Isa, plain: bool) -> float:
    """Cycles for all pixels of one image and so many blocks of channels, per input channel."""
    spec = conv.spec
    depth = spec.icg * spec.kernel[0] * spec.kernel[1]
    width = vectors * conv.block
    far = depth * width * 4 > _PANEL_BYTES
    whole = used = 0.0
    for segment in conv.segments:
        floats = LINE + (segment.pixels - 1) * spec.stride[1] + spec.kernel[1] - 1
        lines = spec.icg * spec.kernel[0] * floats
        far_lines = plain and 4 * (depth * width + lines) > _FIRST_LEVEL_BYTES

        def column(pixels: int, far_lines: bool = far_lines) -> float:
            if pixels == 0:
                return 0.0
            step = step_time(vectors, pixels, isa)
            if far:
                step = max(step, width * 4 / _SECOND_LEVEL_BYTES) + _FAR
            return step + (_FAR_LINES if far_lines else 0.0)

        tiles = segment.last - segment.first
        whole += tiles * spec.kernel[1] * column(segment.pixels)
        for kw in range(spec.kernel[1]):
            skipped = sum(each == kw for _, each in segment.skip)
            used += tiles * column(segment.pixels - skipped)
    return min(spec.out_size[0] * spec.kernel[0] * whole, SKIPPING * spec.met(0) * used)
