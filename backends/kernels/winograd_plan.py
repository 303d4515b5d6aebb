"""Winograd convolution: the transforms, what a plan chooses, and what it is estimated to cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.conv_direct import ConvSpec
from graphopt.backends.kernels.tiling import LINE, Split, fits, split, step_time

KERNEL = 3
_POINTS = {
    2: (0, 1, -1),
    4: (0, Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}
_FAR_BYTES = 6.0
_NEAR_BYTES = 20.0
"""Bytes per cycle one core reads from beyond its second-level cache, and from it."""
_DIRECT_EFFICIENCY = 0.88
_CHANNELS_AT_ONCE = 32
"""Output channels multiplied before going back to the first place: inputs are read less often."""
_MOST_TILES = 48
PANEL_BYTES = 8192
"""Weights multiplied with all tiles before the next ones: they share the first-level cache with
their inputs."""

Matrix = tuple[tuple[Fraction, ...], ...]


@cache
def transforms(m: int) -> tuple[Matrix, Matrix, Matrix]:
    """The matrices Aᵀ (m × a), G (a × 3) and Bᵀ (a × a) with a = m + 2, as exact fractions.

    Evaluation at the finite points and at infinity, and the interpolation back; the transposition
    principle turns the product of polynomials into the correlation that a convolution layer is.
    """
    points = [Fraction(p) for p in _POINTS[m]]
    size = m + KERNEL - 1
    scales = [_product(p - q for q in points if q != p) for p in points]

    def powers(count: int) -> list[list[Fraction]]:
        finite = [[p**k for k in range(count)] for p in points]
        return [*finite, [Fraction(int(k == count - 1)) for k in range(count)]]

    a_t = tuple(zip(*powers(m), strict=True))
    g = [
        tuple(value / scale for value in row)
        for row, scale in zip(powers(KERNEL), [*scales, Fraction(1)], strict=True)
    ]
    rows: list[tuple[Fraction, ...]] = []
    for i in range(size - 1):
        others = _polynomial([q for k, q in enumerate(points) if k != i])
        rows.append((*others, *[Fraction(0)] * (size - len(others))))
    rows.append(tuple(_polynomial(points)))
    return a_t, tuple(g), tuple(rows)


def _product(values: Any) -> Fraction:
    result = Fraction(1)
    for value in values:
        result *= value
    return result


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, constant first, of the monic polynomial with these roots."""
    result = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *result]
        scaled = [*(-root * c for c in result), Fraction(0)]
        result = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return result


@dataclass(frozen=True)
class WinogradPlan:
    """The choices for one convolution.

    Attributes:
        spec: the convolution.
        m: outputs per tile side.
        block: channels per block.
        grid: rows and columns of tiles in one image.
        cut: the tiles of all images, cut into blocks for the tasks.
        vectors: channel blocks in one register tile.
        pixels: tiles in one register tile.
        at_once: register tiles of channels multiplied together.
        groups: groups of output channels that are tasks of their own.
        streams: the weights come from beyond the second-level cache.
        by_lane: multiply-adds take one lane of a vector.
    """

    spec: ConvSpec
    m: int
    block: int
    grid: tuple[int, int]
    cut: Split
    vectors: int
    pixels: int
    at_once: int
    groups: int
    streams: bool
    by_lane: bool

    @property
    def places(self) -> int:
        """Transformed places of a tile."""
        return (self.m + KERNEL - 1) ** 2

    @property
    def in_blocks(self) -> int:
        """Blocks of input channels."""
        return -(-self.spec.icg // self.block)

    @property
    def width(self) -> int:
        """Output channels of a register tile."""
        return self.vectors * self.block

    @property
    def out_tiles(self) -> int:
        """Register tiles of output channels."""
        return -(-self.spec.ocg // self.width)

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        return self.cut.count * self.groups

    @property
    def depth_parts(self) -> int:
        """Equal parts the input channels are multiplied in: a panel of weights stays in L1."""
        full = self.spec.icg // self.block
        most = PANEL_BYTES // (self.width * self.block * 4)
        return next((n for n in range(1, full + 1) if full % n == 0 and full // n <= most), 1)

    @property
    def inputs_stride(self) -> int:
        """Transformed inputs, in floats, from one place to the next.

        A transform touches every place of a tile: strides that are multiples of 4 KB would put them
        all into one set of the cache.
        """
        return self.in_blocks * self.cut.size * self.block + LINE

    @property
    def products_stride(self) -> int:
        """Products of a register tile of channels, in floats, from one place to the next."""
        return self.cut.size * self.width + LINE

    @property
    def scratch(self) -> int:
        """Bytes of scratch: the transformed inputs and the products of `at_once` tiles."""
        return self.places * (self.inputs_stride + self.at_once * self.products_stride) * 4

    def describe(self) -> str:
        """For the report."""
        return f"winograd F({self.m}×{self.m},3×3) {self.width}×{self.pixels}"


def supports(spec: ConvSpec) -> bool:
    """3×3, stride 1, not dilated, in one group."""
    return (
        spec.kernel == (KERNEL, KERNEL)
        and spec.stride == (1, 1)
        and spec.dilation == (1, 1)
        and spec.groups == 1
    )


def plans(spec: ConvSpec, isa: Isa, l2_bytes: int, cores: int = 4) -> list[WinogradPlan]:
    """For each tile size the plan with the least estimated time that leaves threads an even share;
    the best first.

    Args:
        spec: the convolution.
        isa: the vector instruction set.
        l2_bytes: second-level cache of a core.
        cores: the most threads to share the work evenly among. Groups of output channels are tasks
            of their own then, each of which transforms the inputs again.
    """

    def weigh(conv: WinogradPlan) -> float:
        shares = [-(-conv.tasks // n) * n / conv.tasks for n in (1, 2, 4) if n <= max(1, cores)]
        return cost(conv, isa, l2_bytes) * sum(shares) / len(shares)

    best: dict[int, WinogradPlan] = {}
    for conv in sorted(_candidates(spec, isa, l2_bytes), key=weigh):
        best.setdefault(conv.m, conv)
    return list(best.values())


def plan(spec: ConvSpec, isa: Isa, l2_bytes: int) -> WinogradPlan:
    """The best plan."""
    return plans(spec, isa, l2_bytes)[0]


def _candidates(spec: ConvSpec, isa: Isa, l2_bytes: int) -> Iterator[WinogradPlan]:
    block = isa.block
    blocks = -(-spec.ocg // block)
    vectors, pixels = _register_tile(blocks, isa)
    out_tiles = blocks // vectors
    most = max(1, _CHANNELS_AT_ONCE // (vectors * block))
    for m in _POINTS:
        grid = (-(-spec.out_size[0] // m), -(-spec.out_size[1] // m))
        tiles = spec.batch * grid[0] * grid[1]
        streams = (m + KERNEL - 1) ** 2 * spec.icg * blocks * block * 4 > l2_bytes // 2
        cuts = {split(tiles, min(tiles, size)) for size in range(pixels, _MOST_TILES + 1, pixels)}
        for groups in range(1, out_tiles + 1):
            per_group = out_tiles // groups
            if out_tiles % groups or (groups > 1 and per_group * vectors * block < 64):
                continue
            at_once = max(k for k in range(1, most + 1) if per_group % k == 0)
            for cut in sorted(cuts, key=lambda c: c.size):
                yield WinogradPlan(
                    spec, m, block, grid, cut, vectors, pixels, at_once, groups, streams,
                    isa.lane_operand,
                )  # fmt: skip


def _register_tile(blocks: int, isa: Isa) -> tuple[int, int]:
    """Vectors and pixels of the fastest register tile whose vectors divide the blocks."""
    width = max(1, isa.block * 4 // isa.vector_bytes)
    best: tuple[float, int, int] | None = None
    for vectors in range(min(4, blocks), 0, -1):
        if blocks % vectors:
            continue
        for pixels in range(1, 17):
            if not fits(width * vectors, pixels, isa):
                break
            time = step_time(width * vectors, pixels, isa) / (vectors * pixels)
            if best is None or time < best[0]:
                best = (time, vectors, pixels)
    assert best is not None
    return best[1], best[2]


def cost(conv: WinogradPlan, isa: Isa, l2_bytes: int) -> float:
    """Estimated cycles of one core: products or their data's way, and both transforms."""
    spec = conv.spec
    lanes = isa.lanes()
    width = max(1, conv.block // lanes)
    pieces = split(conv.cut.size, conv.pixels)
    steps = pieces.large * step_time(width * conv.vectors, pieces.size, isa)
    if pieces.count > pieces.large:
        small = step_time(width * conv.vectors, pieces.size - 1, isa)
        steps += (pieces.count - pieces.large) * small
    products = conv.cut.count * conv.places * spec.icg * conv.out_tiles * steps

    channels = conv.out_tiles * conv.width
    weights = conv.places * spec.icg * channels * 4
    inputs = conv.places * conv.cut.size * conv.in_blocks * conv.block * 4
    passes = conv.out_tiles // conv.at_once
    traffic = weights * conv.cut.count / (_FAR_BYTES if weights > l2_bytes // 2 else _NEAR_BYTES)
    traffic += (
        inputs * passes * conv.cut.count / (_FAR_BYTES if conv.scratch > l2_bytes else _NEAR_BYTES)
    )
    side = conv.m + KERNEL - 1
    tiles = conv.cut.count * conv.cut.size
    # Loads, stores and a few additions per element and pass, about two a cycle.
    into = tiles * conv.in_blocks * width * side * side * 3.0 * conv.groups
    back = tiles * channels / lanes * side * side * 2.5
    return max(products, traffic) + into + back


def direct_cost(spec: ConvSpec, isa: Isa, l2_bytes: int) -> float:
    """Estimated cycles of direct convolution; weights larger than the cache stream once a row."""
    block = isa.block
    channels = -(-spec.ocg // block) * block
    depth = spec.icg * spec.kernel[0] * spec.kernel[1]
    pixels = spec.batch * spec.out_size[0] * spec.out_size[1]
    products = pixels * depth * channels / (2 * isa.lanes() * _DIRECT_EFFICIENCY)
    tile_bytes = depth * 2 * block * 4
    passes = 1 if tile_bytes <= l2_bytes // 2 else spec.out_size[0]
    return max(products, depth * channels * 4 * passes / _FAR_BYTES)
