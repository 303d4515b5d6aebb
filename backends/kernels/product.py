"""Products whose operands lie in scratch: the right one in panels, one register tile wide each.

A tile keeps some rows by some vectors of columns in registers, broadcasts the left operand's
elements and reads the panel front to back (Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.builder import f32, loop
from graphopt.backends.kernels.tiling import fits, step_time
from graphopt.ops.opdef import Expr

_UNROLLED = 4
_MOST_VECTORS = 8
_MOST_ROWS = 12

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
        return -(-self.columns // self.width) * self.depth * self.width

    def place(self, k: Expr, column: Expr, lane: Expr = 0) -> Expr:
        """Where the element of row `k` and column `column + lane` is; both in one panel."""
        panel, inside = column // self.width, column % self.width
        return (panel * self.depth + k) * self.width + inside + lane


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
    registers = max(1, isa.block // isa.lanes())
    times = []
    for vectors in range(1, min(blocks, _MOST_VECTORS) + 1):
        if fits(registers * vectors, rows, isa):
            full, rest = divmod(blocks, vectors)
            time = full * step_time(registers * vectors, rows, isa)
            time += step_time(registers * rest, rows, isa) if rest else 0.0
            times.append((round(time, 6), vectors))
    return min(times, default=None)


def emit_product(
    panels: Panels,
    right: Any,
    rows: int,
    tiles: Expr,
    left: Callable[[Expr, int, Expr], Expr],
    store: Store,
) -> None:
    """Emit the product of `left(t, r, k)`, row `r` of tile `t`, and the panels in `right`.

    A panel stays in the first-level cache while all tiles pass it.
    """
    full, rest = divmod(panels.columns, panels.width)

    def one_panel(number: Expr, columns: int) -> None:
        with loop(tiles) as t:
            _tile(panels, right, number, columns, t, rows, left, store)

    if full:
        with loop(full) as number:
            one_panel(number, panels.width)
    if rest:
        one_panel(tirx.const(full, "int32"), rest)


def _tile(
    panels: Panels, right: Any, number: Expr, columns: int, t: Expr, rows: int,
    left: Callable[[Expr, int, Expr], Expr], store: Store,
) -> None:  # fmt: skip
    block = panels.block
    vectors = -(-columns // block)
    acc = T.alloc_buffer((rows * vectors * block,), "float32", scope="local")
    for slot in range(rows * vectors):
        with loop(block, "vectorized") as lane:
            T.buffer_store(acc, f32(0.0), [slot * block + lane])

    def step(k: Expr) -> None:
        at = (number * panels.depth + k) * panels.width
        for r in range(rows):
            x = left(t, r, k)
            for v in range(vectors):
                with loop(block, "vectorized") as lane:
                    slot = (r * vectors + v) * block + lane
                    T.buffer_store(acc, acc[slot] + x * right[at + v * block + lane], [slot])

    turns, more = divmod(panels.depth, _UNROLLED)
    if turns:
        with loop(turns) as turn:
            for c in range(_UNROLLED):
                step(turn * _UNROLLED + c)
    for c in range(more):
        step(tirx.const(turns * _UNROLLED + c, "int32"))
    for r in range(rows):
        for v in range(vectors):
            slot = (r * vectors + v) * block
            column = number * panels.width + v * block
            store(t, r, column, min(block, columns - v * block), lambda i, at=slot: acc[at + i])


def transpose(tile: Any, lanes: int) -> None:
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
