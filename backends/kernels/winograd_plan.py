"""Winograd convolution: what a plan chooses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.tiling import LINE, Split
from graphopt.backends.kernels.winograd_transforms import Matrix, kept, operations, transforms

_LARGE_CUT = 24
"""Tiles from which on twice as many are better: sums wait in the products less often."""


@dataclass(frozen=True)
class Region:
    """Tiles of an image with as many outputs: (first, count) of rows and of columns."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    outputs: tuple[int, int]


@dataclass(frozen=True)
class PlaceClass:
    """Places, (row, column) in a tile, that the same tiles have: `rows × columns` of an image.

    `residues` are those whose part of the kernel has these places.
    """

    places: tuple[tuple[int, int], ...]
    rows: int
    columns: int
    residues: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class WinogradPlan:
    """The choices for one convolution.

    Attributes:
        spec: the convolution.
        m: rows and columns of outputs of a tile.
        block: channels per block.
        wide: channels that products compute as one; see `Isa`.
        lanes: channels transformed together.
        grid: rows and columns of tiles in one phase of an image. A dilated convolution is one of
            its own for every phase, which are the pixels that are a dilation apart.
        cut: the tiles of all images, cut into blocks for the tasks.
        images: whole phases in a task, whose last tiles are smaller where the image ends earlier;
            0 where tasks take any tiles, all of one size.
        vectors: channel blocks in one register tile.
        pixels: tiles in one register tile.
        at_once: register tiles of channels multiplied together.
        groups: groups of output channels that are tasks of their own.
        panel_bytes: weights multiplied with a few tiles before the next ones; twice as many with
            many tiles.
        near_bytes: larger weights come from beyond the second-level cache.
        by_lane: multiply-adds take one lane of a vector.
        in_place: there is `Isa.multiply_add`.
        gathers: whether neighbouring channels of the input are no neighbours in memory.
    """

    spec: ConvSpec
    m: tuple[int, int]
    block: int
    wide: int
    lanes: int
    grid: tuple[int, int]
    cut: Split
    images: int
    vectors: int
    pixels: int
    at_once: int
    groups: int
    panel_bytes: int
    near_bytes: int
    by_lane: bool
    in_place: bool
    gathers: bool

    @property
    def places(self) -> int:
        """Transformed places of a tile."""
        return sum(len(each.places) for each in self.classes)

    @cached_property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the largest part of the kernel; see `residues`."""
        return taps(self.spec)

    @property
    def side(self) -> tuple[int, int]:
        """Rows and columns of a tile's places."""
        (high, wide), (rows, columns) = self.m, self.taps
        return high + rows - 1, wide + columns - 1

    @cached_property
    def residues(self) -> list[tuple[int, int]]:
        """Rows and columns modulo the stride: each has its part of the input and of the kernel.

        What the parts give by convolutions of stride 1 adds up to that of the stride.
        """
        rows, columns = zip(self.spec.stride, self.spec.kernel, strict=True)
        return list(product(range(min(rows)), range(min(columns))))

    def is_short(self, axis: int, residue: int) -> bool:
        """Whether this part of the kernel has a tap less, and so no use for the last place."""
        return self.spec.kernel[axis] - residue <= (self.taps[axis] - 1) * self.spec.stride[axis]

    def having(self, place: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The residues that have a place, in the order in which their channels are multiplied."""
        is_last = [at == size - 1 for at, size in zip(place, self.side, strict=True)]
        return tuple(
            residue
            for residue in self.residues
            if not any(is_last[axis] and self.is_short(axis, residue[axis]) for axis in (0, 1))
        )

    @property
    def phases(self) -> int:
        """Phases of all images."""
        return self.spec.batch * prod(self.spec.dilation)

    def transforms(self, axis: int, outputs: int) -> tuple[Matrix, Matrix, Matrix]:
        """Those of rows (axis 0) or columns (1) of tiles with so many outputs there."""
        return transforms(self.m[axis], self.taps[axis], outputs)

    def into(self, outputs: tuple[int, int], residue: tuple[int, int]) -> tuple[Matrix, Matrix]:
        """The transforms of rows and columns of the inputs that a residue has of such a tile."""
        found = []
        for axis, extent in enumerate(outputs):
            matrix = self.transforms(axis, extent)[2]
            if self.is_short(axis, residue[axis]):
                # Without the place at infinity, the only one that the last input matters to.
                matrix = tuple(row[:-1] for row in matrix[:-1])
            found.append(matrix)
        return found[0], found[1]

    def kept(self, axis: int, outputs: int) -> tuple[int, ...]:
        """The places that tiles with so many outputs have."""
        return kept(self.m[axis], self.taps[axis], outputs)

    def last(self, axis: int) -> int:
        """Outputs of the last tile of rows (axis 0) or columns (1)."""
        m = self.m[axis]
        if not self.images:
            return m
        return self.spec.out_size[axis] // self.spec.dilation[axis] - (self.grid[axis] - 1) * m

    @property
    def regions(self) -> list[Region]:
        """The tiles of an image by their outputs."""
        cuts = []
        for axis, size in enumerate(self.grid):
            m = self.m[axis]
            whole = size - (self.last(axis) < m)
            pieces = ((0, whole, m), (whole, size - whole, self.last(axis)))
            cuts.append([piece for piece in pieces if piece[1]])
        return [
            Region((y, rows), (x, columns), (high, wide))
            for y, rows, high in cuts[0]
            for x, columns, wide in cuts[1]
        ]  # fmt: skip

    @cached_property
    def classes(self) -> list[PlaceClass]:
        """The places by the tiles that have them, in the order in which they are numbered."""
        found: dict[tuple[int, int, tuple[tuple[int, int], ...]], list[tuple[int, int]]] = {}
        rows, columns = (
            [size - (place not in self.kept(axis, self.last(axis))) for place in range(side)]
            for axis, (size, side) in enumerate(zip(self.grid, self.side, strict=True))
        )
        for i, j in product(*map(range, self.side)):
            key = rows[i], columns[j], self.having((i, j))
            found.setdefault(key, []).append((i, j))
        return [PlaceClass(tuple(places), *key) for key, places in found.items() if all(key)]

    @property
    def numbers(self) -> dict[tuple[int, int], int]:
        """The number of each place."""
        return {p: n for n, p in enumerate(q for each in self.classes for q in each.places)}

    def tiles_of(self, places: PlaceClass) -> int:
        """Tiles of a task that have these places."""
        return self.images * places.rows * places.columns if self.images else self.cut.size

    @property
    def multiply_adds(self) -> int:
        """Those of the products, without the transforms."""
        tiles = sum(
            len(each.places) * each.rows * each.columns * len(each.residues)
            for each in self.classes
        )
        return self.phases * tiles * self.spec.icg * self.spec.ocg

    @property
    def streams(self) -> bool:
        """Whether the weights come from beyond the second-level cache."""
        return self.weights > self.near_bytes

    @property
    def growth(self) -> float:
        """Weights in all, beside those of direct convolution."""
        return self.transformed / prod(self.spec.kernel)

    @property
    def transformed(self) -> int:
        """Places of all residues: transformed inputs of a tile's channel, weights of a pair."""
        return sum(len(each.places) * len(each.residues) for each in self.classes)

    @property
    def weights(self) -> int:
        """Bytes of the packed weights."""
        return self.transformed * self.spec.icg * self.out_tiles * self.width * 4

    @property
    def operations(self) -> int:
        """Operations in all, those of the transforms too; a multiply-add is two."""
        total = 2 * self.multiply_adds
        for region in self.regions:
            tiles = self.phases * region.rows[1] * region.columns[1]
            back_down, back_along = (
                self.transforms(axis, extent)[0] for axis, extent in enumerate(region.outputs)
            )
            into = sum(operations(*self.into(region.outputs, each)) for each in self.residues)
            total += tiles * self.spec.icg * self.groups * into
            total += tiles * self.spec.ocg * operations(back_down, back_along)
        return total

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

    def depth_parts(self, each: PlaceClass) -> int:
        """Equal parts the input channels are multiplied in: a panel of weights stays close."""
        full, rest = divmod(len(each.residues) * self.spec.icg, self.block)
        block_bytes = self.width * self.block * 4
        panel = self.panel_bytes * (2 if self.cut.size >= _LARGE_CUT else 1)
        if rest or full * block_bytes <= 2 * panel:
            return 1
        most = panel // block_bytes
        return next((n for n in range(1, full + 1) if full % n == 0 and full // n <= most), 1)

    @property
    def inputs_stride(self) -> int:
        """Transformed inputs, in floats, from one place to the next.

        A transform touches every place of a tile: strides that are multiples of 4 KB would put them
        all into one set of the cache.
        """
        return len(self.residues) * self.in_blocks * self.cut.size * self.block + LINE

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
        (high, wide), (rows, columns) = self.m, self.taps
        parts = "" if len(self.residues) == 1 else f"·{len(self.residues)}"
        return f"winograd F({high}×{wide},{rows}×{columns}){parts} {self.width}×{self.pixels}"


def taps(spec: ConvSpec) -> tuple[int, int]:
    """Rows and columns of the largest part that a stride leaves of a kernel."""
    down, along = (-(-k // s) for k, s in zip(spec.kernel, spec.stride, strict=True))
    return down, along
