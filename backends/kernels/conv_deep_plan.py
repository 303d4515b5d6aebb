"""Deep convolution: what a plan chooses, and what it is estimated to cost."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.tiling import (
    MOST_PIXELS,
    Split,
    Tile,
    best_tiles,
    split,
    step_time,
    together,
)

_FEW_BYTES = 49152
"""Weights up to which direct convolution is as fast, where it would read them only once, too."""
_SUMS_BYTES = 32768
_MOST_PIXELS = 256
_FEWEST_PIXELS = 4
_FEWEST_TASKS = 16
"""For four threads to share evenly; one and two were 1 to 2 % faster than with eight, too."""
_FEWEST_SHARED = 16
"""Pixels of a block, at least, where blocks are cut for the number of tasks."""
_MOST_GATHERED = 64
"""Pixels of a block that is gathered: every group of channels would gather it again, while the
weights that are read for each block come fast enough. 3×3, stride 2, 256→512 on 28×28 from cold
caches: one block for four groups 91 GFLOP/s, four blocks 94; patches of 16×16, 3→384: 76 and 87."""
_FEWEST_GATHERS = 4
"""Tasks, where they gather."""
_GATHER_CYCLES = 3.0
"""To copy one vector of those that a core multiplies two of per cycle."""


@dataclass(frozen=True)
class DeepPlan:
    """The choices for one convolution.

    Attributes:
        spec: the convolution, in one group.
        block: channels per block.
        wide: channels that products compute as one; see `Isa`.
        channels: the blocks of output channels, cut into register tiles.
        group: register tiles of channels in one task.
        blocks: the pixels of an image, cut into blocks for the tasks.
        pixels: pixels of a register tile, at most.
        parts: equal parts of the input channels.
        by_lane: whether a multiply-add takes one lane of a vector as its scalar.
        in_place: whether there is `Isa.multiply_add`.
        together: blocks of channels whose long epilogue is computed in turn.
        row: floats of a vector, where neighbouring pixels of the input are neighbours in memory,
            which is turned into blocks of channels first; else 0.
    """

    spec: ConvSpec
    block: int
    wide: int
    channels: Split
    group: int
    blocks: Split
    pixels: int
    parts: int
    by_lane: bool
    in_place: bool
    together: int
    row: int = 0

    @property
    def width(self) -> int:
        """Output channels of a register tile."""
        return self.channels.size * self.block

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.spec.kernel[0] * self.spec.kernel[1]

    @property
    def part_blocks(self) -> int:
        """Blocks of input channels in one part."""
        return self.spec.icg // self.block // self.parts

    @property
    def part_depth(self) -> int:
        """Products per output in one part."""
        return self.part_blocks * self.block * self.taps

    @property
    def groups(self) -> int:
        """Groups of channels that are tasks of their own."""
        return -(-self.channels.count // self.group)

    @property
    def gathers(self) -> bool:
        """Whether the pixels' inputs are gathered in scratch first."""
        return self.row > 0 or _gathers(self.spec)

    @property
    def sums(self) -> int:
        """Floats of the sums kept between parts; none where there is one part."""
        return self.group * self.blocks.size * self.width if self.parts > 1 else 0

    @property
    def scratch(self) -> int:
        """Bytes of scratch per thread."""
        gathered = self.blocks.size * self.part_depth if self.gathers else 0
        return 4 * (self.sums + gathered)

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        return self.spec.batch * self.groups * self.blocks.count

    def describe(self) -> str:
        """For the report."""
        return f"conv_deep {self.width}×{self.pixels}"


def _gathers(spec: ConvSpec) -> bool:
    one_row = spec.in_size[0] == 1 and spec.in_size == spec.out_size
    return not (one_row and spec.kernel == (1, 1) and spec.padding == (0, 0))


def plans(
    spec: ConvSpec, isa: Isa, l2_bytes: int, *, plain: bool = False, most: int = MOST_PIXELS
) -> tuple[DeepPlan, ...]:
    """The plans with the best register tiles, the best first.

    There are none where the weights are few or the shape is not this kernel's. `plain` says that
    neighbouring columns of the input are neighbours in memory, and not channels; register tiles
    have at most `most` pixels.
    """
    block = isa.block
    out_blocks = -(-spec.ocg // block)
    taps = spec.kernel[0] * spec.kernel[1]
    total = spec.out_size[0] * spec.out_size[1]
    if spec.groups > 1 or spec.icg % block or total < _FEWEST_PIXELS:
        return ()
    if plain and _gathers(spec):
        return ()
    if spec.icg * taps * out_blocks * block * 4 <= _few(spec, total, l2_bytes, plain):
        return ()
    gathers = plain or _gathers(spec)
    blocks = _gathered(total) if gathers else split(total, min(total, _MOST_PIXELS))
    tiles = best_tiles(out_blocks, blocks.size, isa, most)
    row = isa.narrow if plain else 0
    return tuple(_with_tile(spec, blocks, tile, isa, row) for tile in tiles)


def _few(spec: ConvSpec, pixels: int, l2_bytes: int, plain: bool) -> int:
    """Bytes of weights up to which direct convolution is as fast."""
    if not _gathers(spec) and pixels <= _MOST_PIXELS:
        # A block holds all pixels. Direct convolution reads the weights only once, too, but waits
        # for them: those that would fit the second level have left it since the model's last run.
        return _FEW_BYTES
    gathers_little = spec.kernel == (1, 1) and (plain or _gathers(spec))
    return l2_bytes // 2 if gathers_little else l2_bytes * 3 // 2


def plan(spec: ConvSpec, isa: Isa, l2_bytes: int) -> DeepPlan | None:
    """The best plan, or None."""
    return next(iter(plans(spec, isa, l2_bytes)), None)


def _with_tile(spec: ConvSpec, blocks: Split, tile: Tile, isa: Isa, row: int) -> DeepPlan:
    block = isa.block
    gathers = row > 0 or _gathers(spec)
    taps = spec.kernel[0] * spec.kernel[1]
    channels = split(-(-spec.ocg // block), tile.vectors)
    width = channels.size * block
    in_blocks = spec.icg // block
    most = max(1, isa.panel_bytes // (width * block * taps * 4))
    parts = _parts(in_blocks, most)
    if in_blocks // parts <= most // 2:
        # Rather a larger panel than the sums' way to scratch and back for little depth.
        parts = _parts(in_blocks, 2 * most)
    if not gathers:
        blocks = _shared(blocks, spec.batch * channels.count)
    group = max(1, _SUMS_BYTES // (blocks.size * width * 4)) if parts > 1 else 1
    shares = max(1, _FEWEST_TASKS // (spec.batch * blocks.count))
    group = min(group, max(1, channels.count // shares))
    if gathers:
        groups = -(-_FEWEST_GATHERS // (spec.batch * blocks.count))
        group = -(-channels.count // groups)
    return DeepPlan(spec, block, isa.wide, channels, group, blocks, tile.pixels, parts,
                    isa.lane_operand, bool(isa.multiply_add), together(isa), row)  # fmt: skip


def _gathered(pixels: int) -> Split:
    """The pixels in blocks to gather: one, two, or a multiple of what four threads share."""
    count = -(-pixels // _MOST_GATHERED)
    if count > 2:
        count = -(-count // _FEWEST_GATHERS) * _FEWEST_GATHERS
    return split(pixels, -(-pixels // count))


def _shared(blocks: Split, tiles: int) -> Split:
    """The pixels in more blocks, where so many tiles of channels are too few tasks."""
    cuts = min(-(-_FEWEST_TASKS // tiles), blocks.total // _FEWEST_SHARED)
    return split(blocks.total, -(-blocks.total // cuts)) if cuts > blocks.count else blocks


def _parts(in_blocks: int, most: int) -> int:
    """The fewest equal parts of at most so many blocks."""
    return next(n for n in range(1, in_blocks + 1) if in_blocks % n == 0 and in_blocks // n <= most)


def cost(deep: DeepPlan, isa: Isa) -> float:
    """Estimated cycles of one core: the products, and gathering once for every group."""
    spec = deep.spec
    cut = split(deep.blocks.size, deep.pixels)
    steps = sum(
        rows * columns * step_time(vectors, pixels, isa)
        for vectors, _, _, rows in deep.channels.kinds()
        for pixels, _, _, columns in cut.kinds()
    )
    depth = spec.icg * deep.taps
    images = spec.batch * deep.blocks.count
    gathering, speed = 0.0, isa.lanes() * isa.multiply_adds / 2
    if deep.gathers:
        gathering = deep.groups * deep.blocks.size * depth / speed * _GATHER_CYCLES
    return images * (depth * steps + gathering)
