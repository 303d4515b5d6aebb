"""Register tiles of a matrix product, and panels: the right operand as such tiles read it.

A tile keeps some rows by some vectors of columns in registers, broadcasts the left operand's
elements and reads a panel front to back (Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.builder import f32, loop, only_if
from graphopt.backends.kernels.tiling import Split, fits, step_time
from graphopt.ops.opdef import Expr

_UNROLLED = 4
"""Steps of a turn: as many as NEON's vectors have lanes."""
_MOST_VECTORS = 8
_MOST_ROWS = 12

Left = Callable[[Expr, int, Expr], Expr]
"""`left(t, r, k)` is the element of row `r` of tile `t` at depth `k`."""

Right = Callable[[Expr, Expr, Expr], Expr]
"""`right(panel, k, column)` is the element at depth `k` of a panel's column."""

Store = Callable[[Expr, int, Expr, int, Callable[[Expr], Expr]], None]
"""`store(t, r, column, count, value)` stores the first `count` lanes of a vector of results."""


@dataclass(frozen=True)
class Panels:
    """A matrix of `depth` by `columns` in column panels of `vectors` vectors of `block` lanes.

    The last panel has room for as many columns as the others.
    """

    depth: int
    columns: int
    block: int
    vectors: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.block

    @property
    def size(self) -> int:
        """Floats in all."""
        return -(-self.columns // self.width) * self.panel_size

    @property
    def panel_size(self) -> int:
        """Floats of a panel."""
        return self.depth * self.width

    def place(self, k: Expr, column: Expr, lane: Expr = 0) -> Expr:
        """Where the element of row `k` and column `column + lane` is; both in one panel."""
        return self.inside(column // self.width, k, column % self.width + lane)

    def inside(self, panel: Expr, k: Expr, column: Expr) -> Expr:
        """Where the element of row `k` and a column of this panel is."""
        return (panel * self.depth + k) * self.width + column


def choose_rows(rows: int, products: Sequence[tuple[int, int]], isa: Isa) -> tuple[int, list[int]]:
    """Rows of the register tiles for a chain of products, and vectors of columns for each.

    All products have the same `rows`, cut into tiles of one size, the last one moved back to end
    with them. `products` has the blocks of columns and the depth of each.
    """
    best: tuple[float, int, list[int]] | None = None
    for size in range(1, min(rows, _MOST_ROWS) + 1):
        choices = [_vectors(size, blocks, isa) for blocks, _ in products]
        if any(choice is None for choice in choices):
            continue
        known = [choice for choice in choices if choice is not None]
        steps = sum(t * depth for (t, _), (_, depth) in zip(known, products, strict=True))
        time = -(-rows // size) * steps
        if best is None or time <= best[0]:
            best = time, size, [vectors for _, vectors in known]
    assert best is not None
    return best[1], best[2]


def _vectors(rows: int, blocks: int, isa: Isa) -> tuple[float, int] | None:
    """(cycles of one step over all columns, vectors of a tile) for tiles of so many rows."""
    times = []
    for vectors in range(1, min(blocks, _MOST_VECTORS) + 1):
        if fits(vectors, rows, isa):
            full, rest = divmod(blocks, vectors)
            time = full * step_time(vectors, rows, isa)
            time += step_time(rest, rows, isa) if rest else 0.0
            times.append((round(time, 6), vectors))
    return min(times, default=None)


def span(cut: Split, number: Expr) -> tuple[Expr, Expr]:
    """(first item, items) of the piece of this number."""
    if cut.large == cut.count:
        return number * cut.size, tirx.const(cut.size, "int32")
    first = number * cut.size - tirx.max(0, number - cut.large)
    return first, cut.size - (number >= cut.large).astype("int32")


def by_size(cut: Split, is_full: Expr, body: Callable[[int], None]) -> None:
    """Emit `body(size)` for each size that the pieces have; `is_full` says that this one's is the
    larger."""
    if cut.large == cut.count:
        body(cut.size)
        return
    with T.If(is_full):
        with T.Then():
            body(cut.size)
        with T.Else():
            body(cut.size - 1)


def tile_row(tile: Expr, size: int, rows: int) -> Expr:
    """First row of a tile of `size` rows; the last tile is moved back to end with the rows."""
    return tirx.min(tile * size, rows - size) if rows % size else tile * size


def emit_product(
    panels: Panels,
    right: Right,
    rows: int,
    tiles: Expr,
    left: Left,
    store: Store,
    *,
    padded: bool = True,
    before: Callable[[Expr, int], None] | None = None,
    by_lane: bool = False,
    columns: Expr | None = None,
    depth: Expr | None = None,
) -> None:
    """Emit the product of a left operand, `tiles` tiles of `rows` rows, and one in panels.

    A panel stays in the first-level cache while all tiles pass it.

    Args:
        panels: the shape of the right operand.
        right: its elements.
        rows: rows of a tile.
        tiles: how many tiles.
        left: the elements of the left operand.
        store: takes the results.
        padded: whether `right` may be asked for the columns that complete the last vector.
        before: `before(panel, columns)` is emitted where the tiles turn to another panel.
        by_lane: whether to multiply by lanes of vectors of the left operand.
        columns: panels that begin at this column or behind it are left out.
        depth: the left operand is 0 from here on.
    """
    full, rest = divmod(panels.columns, panels.width)
    tile = _Tile(panels, right, rows, left, store, padded, by_lane, depth)

    def one_panel(number: Expr, width: int) -> None:
        if before is not None:
            before(number, width)
        with loop(tiles) as t:
            tile.emit(number, width, t)

    if full:
        wanted = full if columns is None else tirx.min(full, _ceil_div(columns, panels.width))
        with loop(wanted) as number:
            one_panel(number, panels.width)
    if rest:
        with only_if(None if columns is None else columns > full * panels.width):
            one_panel(tirx.const(full, "int32"), rest)


def _ceil_div(a: Expr, b: int) -> Expr:
    return (a + (b - 1)) // b


@dataclass(frozen=True)
class _Tile:
    """What the register tiles of a product have in common: see `emit_product`."""

    panels: Panels
    right: Right
    rows: int
    left: Left
    store: Store
    padded: bool
    by_lane: bool
    depth: Expr | None

    def emit(self, number: Expr, columns: int, t: Expr) -> None:
        """Emit the tile of rows `t` by the first columns of a panel."""
        block = self.panels.block
        starts = range(0, columns, block)
        counts = [min(block, columns - start) for start in starts]
        lanes = [block if self.padded else count for count in counts]
        acc = T.alloc_buffer((self.rows * len(starts) * block,), "float32", scope="local")

        def each_vector(body: Callable[[int, int, int, int], None]) -> None:
            for r in range(self.rows):
                for v, start in enumerate(starts):
                    body(r, v, start, (r * len(starts) + v) * block)

        def clear(r: int, v: int, start: int, slot: int) -> None:
            with loop(lanes[v], "vectorized") as lane:
                T.buffer_store(acc, f32(0.0), [slot + lane])

        def step(k: Expr, x: list[Expr]) -> None:
            def multiply(r: int, v: int, start: int, slot: int) -> None:
                with loop(lanes[v], "vectorized") as lane:
                    value = acc[slot + lane] + x[r] * self.right(number, k, start + lane)
                    T.buffer_store(acc, value, [slot + lane])

            each_vector(multiply)

        each_vector(clear)
        self._steps(t, step)
        each_vector(
            lambda r, v, start, slot: self.store(
                t, r, number * self.panels.width + start, counts[v], lambda lane: acc[slot + lane]
            )
        )

    def _steps(self, t: Expr, step: Callable[[Expr, list[Expr]], None]) -> None:
        """All steps over the depth."""

        def one(k: Expr) -> None:
            step(k, [self.left(t, r, k) for r in range(self.rows)])

        # A single row waits for memory, which comes faster when it is asked for in one place at a
        # time.
        unrolled = _UNROLLED if self.rows > 1 else 1
        turns, more = divmod(self.panels.depth, unrolled)
        wanted = turns if self.depth is None else tirx.min(turns, _ceil_div(self.depth, unrolled))
        if turns:
            with loop(wanted) as turn:
                if self.by_lane and self.rows > 1:
                    self._by_lane(t, turn * unrolled, step)
                else:
                    for c in range(unrolled):
                        one(turn * unrolled + c)
        if more:
            with only_if(None if self.depth is None else self.depth > turns * unrolled):
                for c in range(more):
                    one(tirx.const(turns * unrolled + c, "int32"))

    def _by_lane(self, t: Expr, first: Expr, step: Callable[[Expr, list[Expr]], None]) -> None:
        """As many steps as a vector of the left operand has lanes: one load of it for all."""
        x = T.alloc_buffer((self.rows * _UNROLLED,), "float32", scope="local")
        for r in range(self.rows):
            with loop(_UNROLLED, "vectorized") as lane:
                T.buffer_store(x, self.left(t, r, first + lane), [r * _UNROLLED + lane])
        for c in range(_UNROLLED):
            step(first + c, [x[r * _UNROLLED + c] for r in range(self.rows)])


def transposed(lanes: int, element: Callable[[int, Expr], Expr]) -> Any:
    """`element(row, lane)` of a square, transposed in registers: a flat local buffer."""
    square = T.alloc_buffer((lanes * lanes,), "float32", scope="local")
    for row in range(lanes):
        with loop(lanes, "vectorized") as lane:
            T.buffer_store(square, element(row, lane), [row * lanes + lane])
    _transpose(square, lanes)
    return square


def _transpose(tile: Any, lanes: int) -> None:
    """Transpose a local buffer of `lanes` by `lanes` in registers.

    Swaps the off-diagonal quarters, then theirs (Eklundh, "A Fast Computer Method for Matrix
    Transposing", 1972): one shuffle for two results of each step, or two.
    """

    def row(number: int) -> Expr:
        return tirx.Ramp(number * lanes, 1, lanes)

    distance = lanes // 2
    while distance:
        for i in (i for i in range(lanes) if not i & distance):
            pair = [T.bind(tile[row(i)]), T.bind(tile[row(i + distance)])]
            low = [lane + (lanes - distance if lane & distance else 0) for lane in range(lanes)]
            high = [lane + (lanes if lane & distance else distance) for lane in range(lanes)]
            T.buffer_store(tile, tirx.Shuffle(pair, low), [row(i)])
            T.buffer_store(tile, tirx.Shuffle(pair, high), [row(i + distance)])
        distance //= 2
