"""Strassen's product: what a plan chooses, and what it is estimated to cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.tiling import (
    LINE,
    Split,
    best_tiles,
    places_of,
    split,
    step_time,
    thread_counts,
    together,
    unevenness,
)

PRODUCTS = 7
KEPT = 4
"""Factors of weights that are kept; the other three are differences of two of them."""

_FEWEST_PIXELS = 32
_MOST_PAIRS = 128
"""Pairs of pixels in a task: the more, the fewer times factors of weights are formed."""
_PLANS = 3
"""Plans worth measuring beside each other."""
_INPUT = 28.0
_FORM = 3.0
_KEEP = 12.0
"""Cycles for as many floats as a core multiplies and adds per cycle: to sum left factors from a
quarter, to form factors of weights, and for the sums that wait for other products. A part of the
depth more costs half of the last again. Fitted to 20 layers of 64 to 3,072 channels, with AVX-512.
"""
_START = 30000
"""Cycles besides: the first factors come from memory unasked."""
_GAIN = 0.03
"""Share of the time that must be won, since rounding errors are larger than direct products'."""


@dataclass(frozen=True)
class StrassenPlan:
    """The choices for one product.

    Attributes:
        spec: the product, as a convolution of one row by 1×1 kernels.
        block: channels per block.
        wide: channels that products compute as one; see `Isa`.
        channels: the blocks of half the output channels, cut into register tiles.
        group: register tiles of channels in one task.
        pairs: pairs of pixels, half the pixels apart, cut into blocks for the tasks.
        pixels: pixels of a register tile, at most.
        parts: equal parts of half the input channels.
        by_lane: whether a multiply-add takes one lane of a vector as its scalar.
        in_place: whether there is `Isa.multiply_add`.
        together: blocks of channels whose long epilogue is computed in turn.
        plain: whether all channels of a pixel are neighbours in memory, not those of a block only.
    """

    spec: ConvSpec
    block: int
    wide: int
    channels: Split
    group: int
    pairs: Split
    pixels: int
    parts: int
    by_lane: bool
    in_place: bool
    together: int
    plain: bool

    @property
    def width(self) -> int:
        """Output channels of a register tile."""
        return self.channels.size * self.block

    @property
    def upper(self) -> int:
        """Pixels of the upper quarters; the lower ones have as many, or one less."""
        return self.pairs.total

    @property
    def is_ragged(self) -> bool:
        """Whether the last pair has one pixel only."""
        return self.spec.out_size[1] % 2 > 0

    @property
    def half_depth(self) -> int:
        """Input channels of a quarter; the second one may have a block less, and zeros instead."""
        return _half(self.spec.icg, self.block) * self.block

    @property
    def half_channels(self) -> int:
        """Output channels of a quarter; the second one may have a block less."""
        return _half(self.spec.ocg, self.block) * self.block

    @property
    def depth(self) -> int:
        """Input channels of a quarter in one part."""
        return self.half_depth // self.parts

    @property
    def row(self) -> int:
        """Floats from a pixel's left factor to the next one's, where they are not in blocks."""
        return _apart(self.depth)

    @property
    def factor(self) -> int:
        """Floats from a left factor to the next one, each of all pixels of a task."""
        return _apart(self.pairs.size * (self.row if self.plain else self.depth))

    @property
    def panel(self) -> int:
        """Floats of a factor of weights: a part of the depth by a register tile."""
        return self.depth * self.width

    @property
    def groups(self) -> int:
        """Groups of channels that are tasks of their own."""
        return -(-self.channels.count // self.group)

    @property
    def sums(self) -> int:
        """Floats of a quarter's sums, of one register tile of channels."""
        return self.pairs.size * self.width

    @property
    def places(self) -> dict[str, int]:
        """Where the parts of scratch begin, in floats.

        They are left factors, a factor of weights, sums of products that others are added to, and
        the quarters of the result that wait for the next part or a long epilogue.
        """
        return places_of({
            "inputs": PRODUCTS * self.factor,
            "formed": self.panel,
            "partial": 2 * self.sums,
            "quarters": 4 * self.sums * (self.group if self.parts > 1 else 1),
        })  # fmt: skip

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        return self.spec.batch * self.groups * self.pairs.count

    @property
    def operations(self) -> int:
        """Operations that the algorithm does: its products, and what it adds around them."""
        m, k, n = self.upper, self.half_depth, self.half_channels
        added = 4 * m * k * self.groups + 3 * k * n * self.pairs.count + 7 * m * n
        return self.spec.batch * (PRODUCTS * 2 * m * k * n + added)

    def describe(self) -> str:
        """For the report."""
        return f"strassen {self.width}×{self.pixels}"


def _half(channels: int, block: int) -> int:
    """Blocks of half the channels, or of the larger half."""
    return -(-channels // (2 * block))


def _apart(floats: int) -> int:
    """An odd number of cache lines, so that what lies as far apart does not meet in the cache."""
    return (-(-floats // LINE) | 1) * LINE


def supports(spec: ConvSpec, block: int) -> bool:
    """Products of one row of pixels by whole blocks of weights."""
    pointwise = spec.kernel == (1, 1) == spec.stride and spec.padding == (0, 0)
    one_row = pointwise and spec.groups == 1 and spec.in_size[0] == 1
    blocks = spec.icg % block == 0 == spec.ocg % block and min(spec.icg, spec.ocg) > block
    return one_row and blocks and spec.out_size[1] >= _FEWEST_PIXELS


def plans(
    spec: ConvSpec, isa: Isa, l2_bytes: int, cores: int, *, plain: bool
) -> list[StrassenPlan]:
    """The plans that cost least and leave threads an even share, the best first.

    Args:
        spec: the product.
        isa: the vector instruction set.
        l2_bytes: second-level cache of a core.
        cores: the most threads to share the work evenly among.
        plain: whether all channels of a pixel are neighbours in memory.
    """

    def weigh(plan: StrassenPlan) -> float:
        return cost(plan, isa) * unevenness(plan.tasks, cores)

    best: dict[str, StrassenPlan] = {}
    for plan in sorted(_candidates(spec, isa, l2_bytes, cores, plain), key=weigh):
        best.setdefault(plan.describe(), plan)
    return list(best.values())[:_PLANS]


def pays(plan: StrassenPlan, isa: Isa, instead: float) -> bool:
    """Whether the plan wins enough beside so many cycles of a direct product."""
    return cost(plan, isa) < (1 - _GAIN) * instead


def _candidates(
    spec: ConvSpec, isa: Isa, l2_bytes: int, cores: int, plain: bool
) -> Iterator[StrassenPlan]:
    block = isa.block
    upper, out_blocks = -(-spec.out_size[1] // 2), _half(spec.ocg, block)
    fewest = -(-upper // _MOST_PAIRS)
    counts = {-(-fewest * more // n) * n for more in (1, 2) for n in thread_counts(cores)}
    for cut in {split(upper, -(-upper // count)) for count in counts}:
        inputs = PRODUCTS * 4 * cut.size * block
        parts = _parts(_half(spec.icg, block), l2_bytes * 3 // 4 // inputs)
        for tile in best_tiles(out_blocks, cut.size, isa):
            channels = split(out_blocks, tile.vectors)
            sums = 4 * 4 * cut.size * channels.size * block
            most = channels.count if parts == 1 else max(1, l2_bytes // 4 // sums)
            fewest_groups = -(-channels.count // most)
            for groups in {min(channels.count, max(fewest_groups, n)) for n in (1, 2, 4, 8)}:
                group = -(-channels.count // groups)
                yield StrassenPlan(
                    spec, block, isa.wide, channels, group, cut, tile.pixels, parts,
                    isa.lane_operand, bool(isa.multiply_add), together(isa), plain,
                )  # fmt: skip


def _parts(blocks: int, most: int) -> int:
    """The fewest equal parts of at most so many blocks, or of one."""
    return next(n for n in range(1, blocks + 1) if blocks % n == 0 and blocks // n <= max(1, most))


def cost(plan: StrassenPlan, isa: Isa) -> float:
    """Estimated cycles of one core: the products, and all sums around them."""
    at_once = isa.lanes() * isa.multiply_adds
    steps = sum(
        rows * columns * step_time(vectors, pixels, isa)
        for vectors, _, _, rows in plan.channels.kinds()
        for size, _, _, blocks in plan.pairs.kinds()
        for pixels, columns in [
            (pixels, count * blocks) for pixels, _, _, count in split(size, plan.pixels).kinds()
        ]
    )
    m, k, n = plan.upper, plan.half_depth, plan.half_channels
    inputs = _INPUT * plan.groups * m * k
    weights = _FORM * (PRODUCTS - KEPT) * plan.pairs.count * k * n
    sums = _KEEP * (1 + (plan.parts - 1) / 2) * m * n
    beside = (inputs + weights + sums) / at_once
    return _START + plan.spec.batch * (PRODUCTS * k * steps + beside)
