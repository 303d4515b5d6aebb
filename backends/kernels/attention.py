"""One task of scaled dot-product attention: a head, or some of its queries.

The task packs the head's keys (transposed) and values into panels once. Then bands of queries go
through scores, softmax and the sum over the values while their scores are in the cache (the
blocking of Dao et al., "FlashAttention", 2022, without its rescaling: a row of scores fits).

Keys are padded to whole vectors with scores of -inf. Scores are exponents of two, log₂ e and the
scale being folded into the packed keys, and the weights are divided by their sum where the result
is stored: a row of it is shorter than one of the weights. Of causal attention, what no query of a
band attends to is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import e, log2
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.builder import f32, loop, prefetch, scratch_parts
from graphopt.backends.kernels.product import (
    Panels,
    Right,
    choose_rows,
    emit_product,
    span,
    tile_row,
    transposed,
)
from graphopt.backends.kernels.tiling import LINE, Split, places_of, split
from graphopt.ops import math as M
from graphopt.ops.opdef import Expr

_BAND = 18
"""Queries that go through the phases together, at most: their scores stay in the first level."""
_FEWEST_TASKS = 6
_FEWEST_TILES = 4
"""Tiles of rows, at least, that one packing of the keys and values is for."""
_LOG2_E = log2(e)
_LOWEST = -3.4028234663852886e38
"""The lowest float32."""

_Join = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True)
class Operands:
    """What a task reads and writes; indices are those of the head.

    Attributes:
        query, key, value: elements by row and column.
        mask: gives `(score, query, key)` with the mask applied; None without one.
        store: stores an element of the result.
    """

    query: Callable[[Expr, Expr], Expr]
    key: Callable[[Expr, Expr], Expr]
    value: Callable[[Expr, Expr], Expr]
    mask: Callable[[Expr, Expr, Expr], Expr] | None
    store: Callable[[Expr, Expr, Expr], None]


@dataclass(frozen=True)
class AttentionPlan:
    """The choices for one attention.

    Attributes:
        queries, keys: rows of the head's operands.
        scale: factor of the scores.
        adds: whether the mask is added to the scores, which so have to be in natural units.
        causal: whether a query attends to no keys behind its own place.
        rows: rows of a register tile.
        key_panels, value_panels: the packed operands.
        parts: the tiles of a head, cut into tasks.
        band: tiles of a band.
        lanes: floats of a vector register.
        by_lane: whether multiply-adds take one lane of a vector.
    """

    queries: int
    keys: int
    scale: float
    adds: bool
    causal: bool
    rows: int
    key_panels: Panels
    value_panels: Panels
    parts: Split
    band: int
    lanes: int
    by_lane: bool

    @property
    def row(self) -> int:
        """Scores of a query, padding included."""
        block = self.key_panels.block
        return -(-self.keys // block) * block

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each part of scratch begins, in floats; `end` is where all ends."""
        band = self.band * self.rows
        return places_of({
            "keys": self.key_panels.size, "values": self.value_panels.size,
            "scores": band * self.row, "bases": band, "shares": band,
        })  # fmt: skip


def plan(
    heads: int, queries: int, keys: int, depth: int, width: int, scale: float, adds: bool,
    causal: bool, isa: Isa, l2_bytes: int,
) -> AttentionPlan:  # fmt: skip
    """Choose tiles, tasks and bands."""
    block = isa.block
    key_blocks = -(-keys // block)
    products = [(key_blocks, depth), (-(-width // block), keys)]
    rows, (of_keys, of_values) = choose_rows(queries, products, isa)
    tiles = -(-queries // rows)
    row = key_blocks * block
    parts = max(1, min(-(-_FEWEST_TASKS // max(1, heads)), tiles // _FEWEST_TILES))
    part = split(tiles, -(-tiles // parts))
    most = max(1, min(_BAND, l2_bytes // 2 // (4 * row)) // rows)
    return AttentionPlan(
        queries, keys, scale, adds, causal, rows,
        Panels(depth, keys, block, of_keys), Panels(keys, width, block, of_values),
        part, split(part.size, most).size, isa.lanes(), isa.lane_operand,
    )  # fmt: skip


def emit(chosen: AttentionPlan, part: Expr, operands: Operands, scratch: Any) -> None:
    """Emit the task that does this part of a head."""
    _Task(chosen, part, operands, scratch).emit()


class _Task:
    """One task's indices and buffers."""

    def __init__(self, chosen: AttentionPlan, part: Expr, operands: Operands, scratch: Any) -> None:
        self.plan, self.operands = chosen, operands
        self.first_tile, self.tiles = span(chosen.parts, part)
        self.buffers = scratch_parts(chosen.places, scratch)

    def emit(self) -> None:
        size = self.plan.band
        self._ask_queries(self.first_tile, size)
        self._pack_keys()
        self._pack_values()
        with loop(-(-self.plan.parts.size // size)) as band:
            tiles = tirx.min(size, self.tiles - band * size)
            self._band(self.first_tile + band * size, tiles)

    def _ask_queries(self, first_tile: Expr, tiles: Expr) -> None:
        """Ask for the queries of a band ahead: read in the product, they would be waited for."""
        with loop(tiles * self.plan.rows) as row:
            for d in range(0, self.plan.key_panels.depth, LINE):
                _ask(self.operands.query(self._query(first_tile) + row, tirx.const(d, "int32")))

    def _pack_keys(self) -> None:
        """Keys as columns: squares of them in registers, then what is left one by one."""
        chosen, lanes = self.plan, self.plan.lanes
        panels, packed, depth = chosen.key_panels, self.buffers["keys"], chosen.key_panels.depth
        squares, rest = divmod(chosen.keys, lanes)
        if squares:
            with loop(squares) as square:
                if depth >= lanes:
                    with loop(depth // lanes) as part:
                        self._pack_square(square * lanes, part * lanes)
                if depth % lanes:
                    with loop(depth % lanes) as d, loop(lanes, "vectorized") as lane:
                        k = depth // lanes * lanes + d
                        value = self._key(square * lanes + lane, k)
                        T.buffer_store(packed, value, [panels.place(k, square * lanes, lane)])
        if rest:
            with loop(rest) as j, loop(depth) as d:
                key = squares * lanes + j
                T.buffer_store(packed, self._key(key, d), [panels.place(d, key)])
        if chosen.row > chosen.keys:
            with loop(depth) as d, loop(chosen.row - chosen.keys) as j:
                T.buffer_store(packed, f32(0.0), [panels.place(d, chosen.keys + j)])

    def _pack_square(self, key: Expr, d: Expr) -> None:
        panels, lanes = self.plan.key_panels, self.plan.lanes
        for r in range(lanes):
            _ask(self.operands.key(key + lanes + r, d))
        tile = transposed(lanes, lambda r, lane: self._key(key + r, d + lane))
        for r in range(lanes):
            with loop(lanes, "vectorized") as lane:
                place = panels.place(d + r, key, lane)
                T.buffer_store(self.buffers["keys"], tile[r * lanes + lane], [place])

    def _key(self, key: Expr, d: Expr) -> Expr:
        """An element of the keys, times the scale."""
        scale = self.plan.scale * (1.0 if self.plan.adds else _LOG2_E)
        return self.operands.key(key, d) * f32(scale)

    def _pack_values(self) -> None:
        chosen, panels = self.plan, self.plan.value_panels
        full, rest = divmod(panels.columns, panels.block)

        with loop(chosen.keys) as j:

            def store(column: Expr, lane: Expr, value: Expr) -> None:
                T.buffer_store(self.buffers["values"], value, [panels.place(j, column, lane)])

            if full:
                with loop(full) as v, loop(panels.block, "vectorized") as lane:
                    first = v * panels.block
                    store(first, lane, self.operands.value(j, first + lane))
            if rest:
                last = tirx.const(full * panels.block, "int32")
                # The lanes of no column are multiplied, too: denormals there would cost time.
                with loop(panels.block, "vectorized") as lane:
                    store(last, lane, f32(0.0))
                with loop(rest) as lane:
                    store(last, lane, self.operands.value(j, last + lane))

    def _band(self, first_tile: Expr, tiles: Expr) -> None:
        """All phases for `tiles` tiles of rows."""
        chosen, buffers = self.plan, self.buffers
        rows, row = chosen.rows, chosen.row
        keys: Expr | None = None
        if chosen.causal:
            keys = tirx.min(chosen.keys, tirx.min((first_tile + tiles) * rows, chosen.queries))

        def score(t: Expr, r: int, first: Expr, count: int, value: Callable[[Expr], Expr]) -> None:
            query = self._query(first_tile + t) + r
            with loop(chosen.key_panels.block, "vectorized") as lane:
                masked = self._masked(value(lane), query, first + lane, lane, count)
                T.buffer_store(buffers["scores"], masked, [(t * rows + r) * row + first + lane])

        emit_product(
            chosen.key_panels, self._panels("keys", chosen.key_panels), rows, tiles,
            lambda t, r, d: self.operands.query(self._query(first_tile + t) + r, d), score,
            by_lane=chosen.by_lane, columns=keys,
        )  # fmt: skip
        block = chosen.key_panels.block
        vectors: Expr = row // block if keys is None else (keys + (block - 1)) // block
        self._ask_queries(first_tile + chosen.band, tiles)
        self._each_rows(tiles, lambda some: self._bases(some, vectors))
        self._each_rows(tiles, lambda some: self._weigh(some, vectors))

        def store(t: Expr, r: int, first: Expr, count: int, value: Callable[[Expr], Expr]) -> None:
            query = self._query(first_tile + t) + r
            with loop(count, "vectorized") as lane:
                mean = value(lane) * buffers["shares"][t * rows + r]
                self.operands.store(query, first + lane, mean)

        emit_product(
            chosen.value_panels, self._panels("values", chosen.value_panels), rows, tiles,
            lambda t, r, j: buffers["scores"][(t * rows + r) * row + j], store,
            by_lane=chosen.by_lane, depth=keys,
        )  # fmt: skip

    def _panels(self, name: str, panels: Panels) -> Right:
        return lambda panel, k, column: self.buffers[name][panels.inside(panel, k, column)]

    def _query(self, tile: Expr) -> Expr:
        return tile_row(tile, self.plan.rows, self.plan.queries)

    def _masked(self, score: Expr, query: Expr, key: Expr, lane: Expr, count: int) -> Expr:
        """A score with the mask, in a vector that has `count` keys."""
        padded = count < self.plan.key_panels.block
        if self.operands.mask is not None:
            # Padding reads the mask of the last key.
            known = M.share(tirx.min(key, self.plan.keys - 1)) if padded else key
            score = self.operands.mask(score, query, known)
        return tirx.Select(lane < count, score, f32(float("-inf"))) if padded else score

    def _each_rows(self, tiles: Expr, body: Callable[[list[Expr]], None]) -> None:
        """All rows of scores, two at a time.

        Each vector depends on the one before; two rows keep the arithmetic units busy.
        """
        rows = self.plan.rows
        with loop(tiles) as t:
            if rows > 1:
                with loop(rows // 2) as pair:
                    body([t * rows + pair * 2 + n for n in range(2)])
            if rows % 2:
                body([t * rows + rows - 1])

    def _fold(
        self, rows: list[Expr], vectors: Expr, start: float, join: _Join,
        element: Callable[[int, Expr], Expr],
    ) -> list[Expr]:  # fmt: skip
        """Fold the first vectors of each of the rows."""
        row, block = self.plan.row, self.plan.key_panels.block
        sums = [_filled(block, start) for _ in rows]
        with loop(vectors) as v:
            for n, acc in enumerate(sums):
                with loop(block, "vectorized") as lane:
                    value = element(n, rows[n] * row + v * block + lane)
                    T.buffer_store(acc, join(acc[lane], value), [lane])
        for acc in sums:
            _halve(acc, block, join)
        return [acc[0] for acc in sums]

    def _bases(self, rows: list[Expr], vectors: Expr) -> None:
        """What to subtract from the rows' scores: the largest of them, as a number.

        It may miss NaN, which the sum of the weights then finds.
        """
        scores = self.buffers["scores"]
        tops = self._fold(rows, vectors, float("-inf"), _larger, lambda _, place: scores[place])
        for row, top in zip(rows, tops, strict=True):
            T.buffer_store(self.buffers["bases"], _larger(top, f32(_LOWEST)), [row])

    def _weigh(self, rows: list[Expr], vectors: Expr) -> None:
        """Weights of the rows' scores, and what to multiply their sums of values with.

        A row with nothing to attend to gives zeros, as in PyTorch.
        """
        scores, adds = self.buffers["scores"], self.plan.adds
        bases = [_filled(1, 0.0) for _ in rows]
        for row, base in zip(rows, bases, strict=True):
            T.buffer_store(base, self.buffers["bases"][row], [0])

        def weigh(n: int, place: Expr) -> Expr:
            moved = scores[place] - bases[n][0]
            weight = M.share(M.exp2_nonpositive(moved * f32(_LOG2_E) if adds else moved))
            T.buffer_store(scores, weight, [place])
            return weight

        totals = self._fold(rows, vectors, 0.0, lambda a, b: a + b, weigh)
        for row, total in zip(rows, totals, strict=True):
            share = tirx.Select(M.equal(total, f32(0.0)), f32(0.0), f32(1.0) / total)
            T.buffer_store(self.buffers["shares"], share, [row])


def _ask(element: Expr) -> None:
    """Ask for an element ahead, or for what would be there behind the last one."""
    if not isinstance(element, tirx.FloatImm):
        prefetch(element)


def _larger(a: Expr, b: Expr) -> Expr:
    return tirx.Select(a > b, a, b)


def _filled(lanes: int, value: float) -> Any:
    acc = T.alloc_buffer((lanes,), "float32", scope="local")
    with loop(lanes, "vectorized") as lane:
        T.buffer_store(acc, f32(value), [lane])
    return acc


def _halve(acc: Any, lanes: int, join: _Join) -> None:
    """Fold a local buffer into its first element, by halves."""
    while lanes > 1:
        lanes //= 2
        with loop(lanes, "vectorized") as lane:
            T.buffer_store(acc, join(acc[lane], acc[lane + lanes]), [lane])
