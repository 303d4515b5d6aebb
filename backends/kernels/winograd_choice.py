"""Which plans of Winograd convolution there are, and what they are estimated to cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.conv_direct_plan import SKIPPING
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.tiling import (
    MOST_PIXELS,
    Split,
    fits,
    split,
    step_time,
    thread_counts,
    unevenness,
)
from graphopt.backends.kernels.winograd_plan import WinogradPlan, taps
from graphopt.backends.kernels.winograd_transforms import operations, sizes

_FAR_BYTES = 6.0
_NEAR_BYTES = 20.0
"""Bytes per cycle one core reads from beyond its second-level cache, and from it."""
_NOT_HIDDEN = 0.25
"""Share of the shorter one that the products and their data's way do not overlap."""
_INTO = 1.3, 0.33
_BACK = 4.2, 0.8
"""Cycles of a transform for a vector of channels, by place and by operation: fitted, as are the
next two, to 250 kernels of 8 to 2,048 channels, whose times they give to 11 % on average."""
_GATHER = 0.5
"""Cycles of an element that is gathered."""
_START = 5600
"""Cycles of a kernel besides."""
_PLACE = 270
"""To begin with a place's weights, which come from memory."""
_SMALL = 4
"""Caches of the second level that weights may take for nothing."""
_BYTE = 1.8
"""Multiply-adds that a byte beyond is worth, on flash and in memory."""
_MOST_GROWTH = 5.0
"""How many times larger than direct convolution's those may be that no cache holds."""
_FOR_EXACTNESS = 0.05
"""Time given for direct convolution, whose rounding errors are smaller."""
_DIRECT_EFFICIENCY = 0.88
_CHANNELS_AT_ONCE = 32
"""Output channels multiplied before going back to the first place: inputs are read less often."""
_MOST_BLOCKS = 5
"""Blocks of output channels in a register tile."""
_MOST_TILES = 48
_MOST_OF_IMAGES = 64
"""Tiles in a task; of whole images more, since their last tiles save up to a quarter."""
_MOST_PLACES = {2: 5, 3: 6, 4: 8, 5: 8, 6: 8, 7: 8}
_MOST_PLACES_ALONE = {2: 8, 3: 8}
_MOST_ALONE = 10
"""Places of a tile's side by the kernel's longer side, and where the kernel is a row or a column,
of more taps too. Of F(6×6,3×3) the error would be four times that of F(4×4,3×3), for 0 to 14 % of
the time, of F(1×8,1×3) more than twice that, for 4 %; larger kernels take half the time or less
with eight places."""


def supports(spec: ConvSpec, block: int) -> bool:
    """Kernels small enough, larger than the stride; channels of a group are whole blocks.

    Of input channels also where there is a stride, which none has together with dilation.
    """
    strided = spec.stride != (1, 1)
    return (
        taps(spec) != (1, 1)
        and bool(_tiles(taps(spec)))
        and (spec.groups == 1 or spec.icg % block == spec.ocg % block == 0)
        and not (strided and (spec.icg % block or spec.dilation != (1, 1)))
    )


def plans(
    spec: ConvSpec, isa: Isa, l2_bytes: int, cores: int = 4, *, plain: bool = False
) -> list[WinogradPlan]:
    """For each tile size the plan that costs least and leaves threads an even share, best first.

    Of a convolution in groups, they are plans of one group.

    Args:
        spec: the convolution.
        isa: the vector instruction set.
        l2_bytes: second-level cache of a core.
        cores: the most threads to share the work evenly among. Groups of output channels are tasks
            of their own then, each of which transforms the inputs again.
        plain: whether neighbouring channels of the input are no neighbours in memory.
    """
    cores, spec = -(-cores // spec.groups), replace(spec, groups=1)

    def weigh(conv: WinogradPlan) -> float:
        cycles = cost(conv, isa, l2_bytes) * unevenness(conv.tasks, cores)
        return cycles + _price(conv.weights, isa, l2_bytes)

    best: dict[tuple[int, int], WinogradPlan] = {}
    for conv in sorted(_candidates(spec, isa, l2_bytes, cores, plain), key=weigh):
        if conv.weights <= l2_bytes or conv.growth <= _MOST_GROWTH:
            best.setdefault(conv.m, conv)
    return list(best.values())


def _price(weights: int, isa: Isa, l2_bytes: int) -> float:
    """Cycles that so many bytes of weights are worth."""
    return _BYTE * max(0, weights - _SMALL * l2_bytes) / (isa.multiply_adds * isa.lanes())


def plan(spec: ConvSpec, isa: Isa, l2_bytes: int) -> WinogradPlan:
    """The best plan."""
    return plans(spec, isa, l2_bytes)[0]


def _candidates(
    spec: ConvSpec, isa: Isa, l2_bytes: int, cores: int, plain: bool
) -> Iterator[WinogradPlan]:
    block = isa.block
    blocks = -(-spec.ocg // block)
    vectors, pixels = _register_tile(blocks, isa)
    out_tiles = blocks // vectors
    most = max(1, _CHANNELS_AT_ONCE // (vectors * block))
    for m in _tiles(taps(spec)):
        rows, columns = (
            -(-size // (n * d)) for size, n, d in zip(spec.out_size, m, spec.dilation, strict=True)
        )
        cuts = _cuts(spec, m, rows * columns, pixels, cores)
        for groups in range(1, out_tiles + 1):
            per_group = out_tiles // groups
            if out_tiles % groups or (groups > 1 and per_group * vectors * block < 64):
                continue
            at_once = max(k for k in range(1, most + 1) if per_group % k == 0)
            for cut, images in sorted(cuts, key=lambda c: (c[0].size, c[1])):
                yield WinogradPlan(
                    spec, m, block, isa.wide, isa.narrow, (rows, columns), cut, images, vectors,
                    pixels, at_once, groups, isa.panel_bytes // 3, l2_bytes // 2,
                    isa.lane_operand, bool(isa.multiply_add), plain,
                )  # fmt: skip


def _cuts(
    spec: ConvSpec, m: tuple[int, int], of_phase: int, pixels: int, cores: int
) -> set[tuple[Split, int]]:
    """The ways to cut so many tiles a phase for the tasks, with the whole phases of each, or 0.

    By register tiles, or evenly among the cores.
    """
    phases = spec.batch * prod(spec.dilation)
    tiles = phases * of_phase
    tasks = {-(-tiles // size) for size in range(pixels, _MOST_TILES + 1, pixels)}
    tasks |= {-(-count // n) * n for count in tasks for n in thread_counts(cores)}
    cuts = {(split(tiles, -(-tiles // count)), 0) for count in tasks}
    alike = not any(size % d for size, d in zip(spec.out_size, spec.dilation, strict=True))
    of_all = zip(spec.out_size, m, spec.dilation, strict=True)
    if alike and any(size % (n * d) for size, n, d in of_all):
        cuts |= {
            (split(tiles, n * of_phase), n)
            for n in range(1, phases + 1)
            if phases % n == 0 and n * of_phase <= _MOST_OF_IMAGES
        }
    return cuts


def _tiles(kernel: tuple[int, int]) -> list[tuple[int, int]]:
    """The sizes of tiles: of as many places in rows as in columns, where the kernel has both."""
    high, wide = kernel
    longest = max(kernel)
    if 1 in kernel:
        most = _MOST_PLACES_ALONE.get(longest, _MOST_ALONE)
    else:
        most = _MOST_PLACES.get(longest, 0)
    return [
        (m, n)
        for m, n in product(sizes(high, most), sizes(wide, most))
        if m + high == n + wide or 1 in kernel
    ]  # fmt: skip


def _register_tile(blocks: int, isa: Isa) -> tuple[int, int]:
    """Vectors and pixels of the fastest register tile whose vectors divide the blocks."""
    best: tuple[float, int, int] | None = None
    for vectors in range(min(_MOST_BLOCKS, blocks), 0, -1):
        if blocks % vectors:
            continue
        for pixels in range(1, MOST_PIXELS + 1):
            if not fits(vectors, pixels, isa):
                break
            time = step_time(vectors, pixels, isa) / (vectors * pixels)
            if best is None or time < best[0]:
                best = (time, vectors, pixels)
    assert best is not None
    return best[1], best[2]


def cost(conv: WinogradPlan, isa: Isa, l2_bytes: int) -> float:
    """Estimated cycles of one core: products or their data's way, and both transforms."""
    spec = conv.spec
    steps = 0.0
    for each in conv.classes:
        pieces = split(conv.tiles_of(each), conv.pixels)
        for pixels, _, _, count in pieces.kinds():
            places = len(each.places) * len(each.residues)
            steps += places * count * step_time(conv.vectors, pixels, isa)
    products = conv.cut.count * spec.icg * conv.out_tiles * steps

    channels = conv.out_tiles * conv.width
    weights = conv.weights
    inputs = conv.transformed * conv.cut.size * conv.in_blocks * conv.block * 4
    passes = conv.out_tiles // conv.at_once
    traffic = weights * conv.cut.count / (_FAR_BYTES if weights > l2_bytes // 2 else _NEAR_BYTES)
    traffic += (
        inputs * passes * conv.cut.count / (_FAR_BYTES if conv.scratch > l2_bytes else _NEAR_BYTES)
    )
    places = prod(conv.side)
    tiles = conv.cut.count * conv.cut.size
    back_down, back_along = (conv.transforms(axis, m)[0] for axis, m in enumerate(conv.m))
    into = _INTO[0] * conv.transformed
    into += _INTO[1] * sum(operations(*conv.into(conv.m, each)) for each in conv.residues)
    back = _BACK[0] * places + _BACK[1] * operations(back_down, back_along)
    hidden = max(products, traffic) + _NOT_HIDDEN * min(products, traffic)
    if conv.gathers:
        into += _GATHER * conv.lanes * places
    into *= tiles * conv.in_blocks * (conv.block // conv.lanes) * conv.groups
    back *= tiles * channels / conv.lanes
    return hidden + into + back + _START + _PLACE * conv.places


def pays(
    conv: WinogradPlan, groups: int, instead: Sequence[ConvSpec], isa: Isa, l2_bytes: int
) -> bool:
    """Whether a plan, for so many groups, is better than direct convolution of all of these."""
    fewer = groups * cost(conv, isa, l2_bytes) * (1 + _FOR_EXACTNESS)
    direct = sum(direct_cost(spec, isa, l2_bytes) for spec in instead)
    weights = sum(spec.groups * spec.icg * spec.ocg * prod(spec.kernel) * 4 for spec in instead)
    fewer += _price(groups * conv.weights, isa, l2_bytes)
    return fewer < direct + _price(weights, isa, l2_bytes)


def direct_cost(spec: ConvSpec, isa: Isa, l2_bytes: int) -> float:
    """Estimated cycles of direct convolution; weights larger than the cache stream once a row."""
    block = isa.block
    channels = -(-spec.ocg // block) * block
    depth = spec.icg * spec.kernel[0] * spec.kernel[1]
    met = spec.met(0) * spec.met(1) / prod(spec.out_size + spec.kernel)
    pixels = spec.batch * prod(spec.out_size) * min(1.0, SKIPPING * met)
    products = pixels * depth * channels / (isa.multiply_adds * isa.lanes() * _DIRECT_EFFICIENCY)
    tile_bytes = depth * 2 * block * 4
    passes = 1 if tile_bytes <= l2_bytes // 2 else spec.out_size[0]
    traffic = depth * channels * 4 * passes / _FAR_BYTES
    return spec.groups * (max(products, traffic) + _NOT_HIDDEN * min(products, traffic))
