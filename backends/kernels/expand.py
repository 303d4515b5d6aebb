"""A pointwise convolution and the depthwise one that alone reads it, in one kernel.

Inverted bottlenecks (MobileNetV2, Sandler et al., 2018) expand an image to several times its
channels, filter those one by one, and reduce them again. Where the expanded image is larger than
the caches, two kernels write it to memory and read it back. Here a task computes some rows of a few
blocks of channels into scratch memory, which stays in the cache, and filters them there:

    task      rows of the expanded image          rows of the result
    band 0    0 1 2 3 4 5 6                       0 1 2
    band 1              5 6 7 8 9 10 11           3 4 5          3×3, stride 2

Rows that two bands need are computed twice: the more rows a band has, the fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt import graph as G
from graphopt.backends.kernels import conv_direct, conv_direct_plan, depthwise
from graphopt.backends.kernels.base import (
    KernelSource,
    Request,
    collapse,
    collapsible,
    same_place,
)
from graphopt.backends.kernels.builder import BufferSpec, Part, View, fence, unflatten
from graphopt.backends.kernels.conv import (
    accessors,
    is_pointwise,
    lower_products,
    one_row,
    place_of,
    spec_of,
)
from graphopt.backends.kernels.conv_direct_plan import ConvPlan
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.depthwise import DepthwisePlan
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.tiling import best_tiles, unevenness
from graphopt.backends.target import Target
from graphopt.ops.opdef import Expr
from graphopt.program.layout import PLAIN, physical_size

_MEMORY = 0.1
"""Cycles that one core waits for a byte to or from memory."""
_LARGE = 0.5
"""The part of the last-level cache that an image has to be larger than, not to stay there."""
_HEAVY = 2.0
"""How much longer rows take whose epilogue is long; those that are computed twice, too."""


@dataclass(frozen=True)
class ExpandPlan:
    """The choices for one pair.

    Attributes:
        spec: the pointwise convolution of all rows.
        expand: the product of one band, as one row of pixels.
        filters: the depthwise convolution, whose tasks are the bands.
        rows: rows of the expanded image that a band needs.
        scratch: bytes of those, of a tile of channels.
        cycles: estimated cycles of one core for the products of all bands, and for waiting where
            threads have unequal shares.
    """

    spec: ConvSpec
    expand: ConvPlan
    filters: DepthwisePlan
    rows: int
    scratch: int
    cycles: float

    @property
    def bands(self) -> int:
        """Bands of an image."""
        return -(-self.filters.spec.out_size[0] // self.filters.rows)

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        return self.spec.batch * self.bands * self.expand.channels.count

    @property
    def own_flops(self) -> int:
        """Operations, those of rows computed twice among them."""
        bands = self.spec.batch * self.bands
        return bands * self.expand.spec.flops + self.filters.spec.flops

    def describe(self) -> str:
        """For the report."""
        widest = max(segment.pixels for segment in self.expand.segments)
        return f"expand {self.expand.channels.size * self.expand.block}×{widest}"


def plan(spec: ConvSpec, filters: ConvSpec, target: Target) -> ExpandPlan | None:
    """Choose the tile and the band of least cost; None where a row is too large for the cache.

    Args:
        spec: the pointwise convolution.
        filters: the depthwise one that reads it.
        target: what to build for.
    """
    base = depthwise.plan(filters, target.isa)
    if base is None:
        return None
    return min(_plans(spec, base, target), key=lambda each: each.cycles, default=None)


def _plans(spec: ConvSpec, base: DepthwisePlan, target: Target) -> Iterator[ExpandPlan]:
    isa, filters = target.isa, base.spec
    most = min(target.l2_bytes, target.last_bytes // (2 * target.cores))
    height, width = spec.in_size
    tiles = best_tiles(-(-spec.ocg // isa.block), height * width, isa)
    for tile, part in product(tiles, (1, 2)):
        row_bytes = tile.vectors * isa.block * width * 4
        rows = _band(filters, base.height, most // part // row_bytes)
        if not rows:
            continue
        needed = min(height, _rows_read(filters, rows))
        band = replace(one_row(spec), batch=1, in_size=(1, needed * width),
                       out_size=(1, needed * width))  # fmt: skip
        expand = conv_direct_plan.plan(band, isa, target.l2_bytes, tile)
        expand = replace(expand, tiles_per_task=expand.tiles)
        bands = spec.batch * -(-filters.out_size[0] // rows)
        cycles = bands * conv_direct_plan.cost(expand, isa)
        cycles *= unevenness(bands * expand.channels.count, target.cores)
        yield ExpandPlan(spec, expand, replace(base, rows=rows), needed, needed * row_bytes, cycles)


def _rows_read(filters: ConvSpec, rows: int) -> int:
    """Rows that so many rows of the result are made of."""
    return (rows - 1) * filters.stride[0] + (filters.kernel[0] - 1) * filters.dilation[0] + 1


def _band(filters: ConvSpec, height: int, most: int) -> int:
    """Rows of the result, a multiple of `height`, that need `most` rows at most; 0 if none do."""
    rows = (most - _rows_read(filters, 1)) // filters.stride[0] + 1
    rows = min(filters.out_size[0], rows) // height * height
    if rows <= 0:
        return 0
    even = -(-filters.out_size[0] // -(-filters.out_size[0] // rows))
    return -(-even // height) * height


def _specs(first: Request, second: Request) -> tuple[ConvSpec, ConvSpec] | None:
    """The pointwise and the depthwise convolution, if that is what these are, in blocks."""
    spec, filters = spec_of(first.call), spec_of(second.call)
    if spec is None or filters is None or len(first.call.shape) != 4:
        return None
    is_pair = is_pointwise(spec) and spec.groups == 1 and filters.icg == filters.ocg == 1
    is_image = spec.in_size[0] > 1 and spec.in_size[1] > 1
    layouts = {r.spec(node).layout for r in (first, second) for node in (r.call["input"], r.root)}
    weights = [r.constant(r.call["weight"]) for r in (first, second)]
    if not is_pair or not is_image or len(layouts) > 1 or PLAIN in layouts:
        return None
    if any(weight is None for weight in weights) or not collapsible(first, (2, 3)):
        return None
    return spec, filters


def pays(first: Request, second: Request) -> bool:
    """Whether `second`, which alone reads what `first` makes, should make that itself."""
    specs = _specs(first, second)
    if specs is None:
        return False
    spec, filters = specs
    target = first.target
    expanded = physical_size(G.shape(first.root), first.spec(first.root).layout, 4)
    if expanded // spec.batch <= _LARGE * target.last_bytes:
        return False
    found, apart = plan(spec, filters, target), lower_products(first)
    if found is None or apart is None:
        return False
    again = found.cycles - apart.candidates[0].cycles
    return again * (_HEAVY if first.heavy_epilogue else 1.0) < 2 * _MEMORY * expanded


def lower_expand(request: Request) -> KernelSource | None:
    """The pair of `request.before` and the request; None where there is nothing before it."""
    first = request.before
    specs = None if first is None else _specs(first, request)
    chosen = None if specs is None else plan(*specs, request.target)
    if first is None or chosen is None:
        return None
    weights = [r.constant(r.call["weight"]) for r in (first, request)]
    assert weights[0] is not None
    assert weights[1] is not None
    packed = (
        conv_direct.pack_weights(weights[0], chosen.expand),
        depthwise.pack_weights(weights[1], chosen.filters),
    )

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        _emit(chosen, (first, request), task, views, constants, out, group, scratch)

    reads = [
        *first.reads_without(first.call["weight"]),
        *(x for x in request.reads_without(request.call["weight"]) if x is not first.root),
    ]
    return KernelSource(
        chosen.describe(), chosen.tasks, sum(spec.flops for spec in specs or ()), emit,
        list(dict.fromkeys(reads)), packed, scratch=chosen.scratch,
        in_place=same_place(request, taken=first.reads), own_flops=chosen.own_flops,
    )  # fmt: skip


def _emit(
    chosen: ExpandPlan, pair: tuple[Request, Request], task: Expr, views: dict[fx.Node, View],
    constants: list[Any], out: View, group: Group, scratch: Any,
) -> None:  # fmt: skip
    """Emit one task: the band's rows of a tile of channels, and what is made of them."""
    first, second = pair
    spec, filters = chosen.spec, chosen.filters.spec
    channels, block = chosen.expand.channels, chosen.expand.block
    (height, width), rows = spec.in_size, chosen.rows
    n, band, tile = unflatten(task, [spec.batch, chosen.bands, channels.count])
    top = band * (chosen.filters.rows * filters.stride[0]) - filters.padding[0]
    top = tirx.max(0, tirx.min(top, height - rows))
    behind = tirx.max(0, tile - channels.large)
    begin = tile * channels.size - behind
    count = channels.size - tirx.Select(tile >= channels.large, 1, 0)
    layout, blocks = first.spec(first.root).layout, channels.size

    def part(image: tuple[int, int], row: Expr, pixel: Expr) -> Part:
        shape = (1, blocks * block, *image)
        memory = T.decl_buffer((1, blocks, *image, block), "float32", data=scratch)
        return Part(BufferSpec(shape, "float32", layout), memory, (n, begin, row, pixel, 0))

    index = place_of(4)
    pixels = top * width
    shape = first.call.shape
    access = accessors(
        first, group.with_views(lambda each: collapse(each, shape, (2, 3))),
        collapse(views[first.call["input"]], shape, (2, 3)),
        lambda _, c, h, w: index(n, c, h, pixels + w), part((1, rows * width), 0, pixels),
        lambda _, c, h, w: index(n, c, h, pixels + w), vector=True, padded=True, vector_in=True,
    )  # fmt: skip
    conv_direct.emit(chosen.expand, tile, constants[0], access)
    access = accessors(
        second, group, part((rows, width), top, 0), index, out, index, vector=True, padded=True
    )
    # Or LLVM would hold what the filters need in registers that the products need.
    fence(first.target.isa.fence)
    with T.serial(0, count) as i:
        each = (n * -(-filters.groups // block) + begin + i) * chosen.bands + band
        depthwise.emit(chosen.filters, each, constants[1], access)
