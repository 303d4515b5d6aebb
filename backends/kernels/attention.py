"""One task of scaled dot-product attention: a head, or some of its queries.

The task packs the head's keys (transposed) and values into panels once. Then bands of queries go
through scores, softmax and the sum over the values while their scores are in the cache (the
blocking of Dao et al., "FlashAttention", 2022, without its rescaling: a row of scores fits).

Keys are padded to whole vectors with scores of -inf. Scores are exponents of two, log₂ e being
folded into the queries' scale, and the weights are divided by their sum where the result is stored:
a row of it is shorter than one of the weights.
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
from graphopt.backends.kernels.builder import each, f32, loop
from graphopt.backends.kernels.product import (
    Panels,
    Right,
    choose_rows,
    emit_product,
    span,
    tile_row,
    transpose,
)
from graphopt.backends.kernels.tiling import LINE, Split, split
from graphopt.ops import math as M
from graphopt.ops.opdef import Expr

_BAND = 36
"""Queries that go through the phases together, at most."""
_FEWEST_TASKS = 6
_FEWEST_TILES = 4
"""Tiles of rows, at least, that one packing of the keys and values is for."""
_LOG2_E = log2(e)

_SHIFT = 12582912.0 + 127
"""1.5 · 2²³, which rounds to integers, and the bias of a float32's exponent."""
_EXP2 = (0.6931470036506653, 0.24022246897220612, 0.0555071122944355, 0.009671294130384922,
         0.0013269407209008932)  # fmt: skip
"""2^r = 1 + r·P(r) for |r| ≤ ½, a minimax fit, relative error 1.5e-7."""

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
        rows: rows of a register tile.
        key_panels, value_panels: the packed operands.
        parts: the tiles of a head, cut into tasks.
        band: tiles of a band.
        lanes: floats of a vector register.
    """

    queries: int
    keys: int
    scale: float
    adds: bool
    rows: int
    key_panels: Panels
    value_panels: Panels
    parts: Split
    band: int
    lanes: int

    @property
    def row(self) -> int:
        """Scores of a query, padding included."""
        block = self.key_panels.block
        return -(-self.keys // block) * block

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each part of scratch begins, in floats; `end` is where all ends."""
        band = self.band * self.rows
        sizes = {
            "keys": self.key_panels.size,
            "values": self.value_panels.size,
            "queries": band * self.key_panels.depth,
            "scores": band * self.row,
            "shares": band,
            "end": 0,
        }
        places, end = {}, 0
        for name, size in sizes.items():
            places[name] = end
            end += -(-size // LINE) * LINE
        return places


def plan(
    heads: int, queries: int, keys: int, depth: int, width: int, scale: float, adds: bool,
    isa: Isa, l2_bytes: int,
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
        queries, keys, scale, adds, rows,
        Panels(depth, keys, block, of_keys), Panels(keys, width, block, of_values),
        part, split(part.size, most).size, isa.lanes(),
    )  # fmt: skip


def emit(chosen: AttentionPlan, part: Expr, operands: Operands, scratch: Any) -> None:
    """Emit the task that does this part of a head."""
    _Task(chosen, part, operands, scratch).emit()


class _Task:
    """One task's indices and buffers."""

    def __init__(self, chosen: AttentionPlan, part: Expr, operands: Operands, scratch: Any) -> None:
        self.plan, self.operands = chosen, operands
        self.first_tile, self.tiles = span(chosen.parts, part)
        ends = list(chosen.places.values())[1:]
        self.buffers = {
            name: T.decl_buffer((end - start,), "float32", data=scratch, elem_offset=start)
            for (name, start), end in zip(chosen.places.items(), ends, strict=False)
        }

    def emit(self) -> None:
        self._pack_keys()
        self._pack_values()
        size = self.plan.band
        with loop(-(-self.plan.parts.size // size)) as band:
            tiles = tirx.min(size, self.tiles - band * size)
            self._band(self.first_tile + band * size, tiles)

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
                        value = self.operands.key(square * lanes + lane, k)
                        T.buffer_store(packed, value, [panels.place(k, square * lanes, lane)])
        if rest:
            with loop(rest) as j, loop(depth) as d:
                key = squares * lanes + j
                T.buffer_store(packed, self.operands.key(key, d), [panels.place(d, key)])
        if chosen.row > chosen.keys:
            with loop(depth) as d, loop(chosen.row - chosen.keys) as j:
                T.buffer_store(packed, f32(0.0), [panels.place(d, chosen.keys + j)])

    def _pack_square(self, key: Expr, d: Expr) -> None:
        panels, lanes = self.plan.key_panels, self.plan.lanes
        tile = T.alloc_buffer((lanes * lanes,), "float32", scope="local")
        for r in range(lanes):
            with loop(lanes, "vectorized") as lane:
                T.buffer_store(tile, self.operands.key(key + r, d + lane), [r * lanes + lane])
        transpose(tile, lanes)
        for r in range(lanes):
            with loop(lanes, "vectorized") as lane:
                place = panels.place(d + r, key, lane)
                T.buffer_store(self.buffers["keys"], tile[r * lanes + lane], [place])

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
        rows, depth, row = chosen.rows, chosen.key_panels.depth, chosen.row
        self._pack_queries(first_tile, tiles)

        def score(t: Expr, r: int, first: Expr, count: int, value: Callable[[Expr], Expr]) -> None:
            query = self._query(first_tile + t) + r
            with loop(chosen.key_panels.block, "vectorized") as lane:
                masked = self._masked(value(lane), query, first + lane, lane, count)
                T.buffer_store(buffers["scores"], masked, [(t * rows + r) * row + first + lane])

        emit_product(
            chosen.key_panels, self._panels("keys", chosen.key_panels), rows, tiles,
            lambda t, r, d: buffers["queries"][(t * rows + r) * depth + d], score,
        )  # fmt: skip
        with loop(tiles) as t:
            if rows > 1:
                with loop(rows // 2) as pair:
                    self._softmax(t * rows + pair * 2, 2)
            if rows % 2:
                self._softmax(t * rows + rows - 1, 1)

        def store(t: Expr, r: int, first: Expr, count: int, value: Callable[[Expr], Expr]) -> None:
            query = self._query(first_tile + t) + r
            with loop(count, "vectorized") as lane:
                mean = value(lane) * buffers["shares"][t * rows + r]
                self.operands.store(query, first + lane, mean)

        emit_product(
            chosen.value_panels, self._panels("values", chosen.value_panels), rows, tiles,
            lambda t, r, j: buffers["scores"][(t * rows + r) * row + j], store,
        )  # fmt: skip

    def _panels(self, name: str, panels: Panels) -> Right:
        return lambda panel, k, column: self.buffers[name][panels.inside(panel, k, column)]

    def _query(self, tile: Expr) -> Expr:
        return tile_row(tile, self.plan.rows, self.plan.queries)

    def _pack_queries(self, first_tile: Expr, tiles: Expr) -> None:
        """Copy the band's queries, times the scale."""
        chosen, depth = self.plan, self.plan.key_panels.depth
        scale = f32(chosen.scale * (1.0 if chosen.adds else _LOG2_E))
        with loop(tiles) as t, loop(chosen.rows) as r:
            query = self._query(first_tile + t) + r

            def put(d: Expr, t: Expr = t, r: Expr = r, query: Expr = query) -> None:
                place = (t * chosen.rows + r) * depth + d
                value = self.operands.query(query, d) * scale
                T.buffer_store(self.buffers["queries"], value, [place])

            each(depth, chosen.lanes, put)

    def _masked(self, score: Expr, query: Expr, key: Expr, lane: Expr, count: int) -> Expr:
        """A score with the mask, in a vector that has `count` keys."""
        padded = count < self.plan.key_panels.block
        if self.operands.mask is not None:
            # Padding reads the mask of the last key.
            known = M.share(tirx.min(key, self.plan.keys - 1)) if padded else key
            score = self.operands.mask(score, query, known)
        return tirx.Select(lane < count, score, f32(float("-inf"))) if padded else score

    def _softmax(self, first: Expr, count: int) -> None:
        """Weights of neighbouring rows, and what to multiply their sums of values with.

        Each vector depends on the one before; several rows keep the arithmetic units busy. A row
        with nothing to attend to gives zeros, as in PyTorch. The maximum may miss NaN, which the
        sum of the weights then finds.
        """
        chosen, scores = self.plan, self.buffers["scores"]
        block = chosen.key_panels.block
        rows = [first + n for n in range(count)]

        def fold(start: float, join: _Join, element: Callable[[int, Expr], Expr]) -> list[Any]:
            sums = [_filled(block, start) for _ in rows]
            with loop(chosen.row // block) as v:
                for n, acc in enumerate(sums):
                    with loop(block, "vectorized") as lane:
                        value = element(n, rows[n] * chosen.row + v * block + lane)
                        T.buffer_store(acc, join(acc[lane], value), [lane])
            for acc in sums:
                _halve(acc, block, join)
            return sums

        tops = fold(float("-inf"), _larger, lambda n, place: scores[place])
        nothing = [top[0] == f32(float("-inf")) for top in tops]
        bases = [_filled(1, 0.0) for _ in rows]
        for n, base in enumerate(bases):
            T.buffer_store(base, tirx.Select(nothing[n], f32(0.0), tops[n][0]), [0])

        def weigh(n: int, place: Expr) -> Expr:
            moved = scores[place] - bases[n][0]
            weight = M.share(_exp2(moved * f32(_LOG2_E) if chosen.adds else moved))
            T.buffer_store(scores, weight, [place])
            return weight

        totals = fold(0.0, lambda a, b: a + b, weigh)
        for n, total in enumerate(totals):
            share = tirx.Select(nothing[n], f32(0.0), f32(1.0) / total[0])
            T.buffer_store(self.buffers["shares"], share, [rows[n]])


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


def _exp2(x: Expr) -> Expr:
    """2 to the x for x ≤ 0, max 2 ulp; results below 2^-126.5 become 0."""
    x = M.at_least(x, -127.0)
    shifted = M.share(x + f32(_SHIFT))
    r = M.share(x - M.share(shifted - f32(_SHIFT)))
    value = M.share(r * M.horner(r, _EXP2) + f32(1.0))
    # The exponent's bits of 2⁻¹²⁷ are those of 0.
    return value * M.from_bits(M.bits(shifted) << 23)
