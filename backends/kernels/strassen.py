"""Strassen's matrix product: seven products of quarters instead of eight.

Of the variants with seven products this one has the fewest sums (Strassen, "Gaussian Elimination is
not Optimal", 1969; Winograd, "On Multiplication of 2 × 2 Matrices", 1971). The products, in the
order in which they are computed, and the quarters of the result:

    P1 = A11 · B11                      C11 = P1 + P2
    P2 = A12 · B21
    P6 = S2 · T2                        S1 = A21 + A22      T1 = B12 - B11
    P7 = (A11 - A21) · (T2 - B11)       S2 = S1 - A11       T2 = B22 - T1
    P5 = S1 · T1                        C22 = (P1 + P6 + P7) + P5
    P3 = (A12 - S2) · (T2 + T1)         C12 = (P1 + P6 + P5) + P3
    P4 = A22 · (B21 - T2)               C21 = (P1 + P6 + P7) + P4

Upper and lower rows are the two halves of an image's pixels or of a sequence, never of different
samples. A task sums the left factors of a block of pairs of rows in scratch. Then, for each
register tile of columns, it multiplies them by the right factors, of which four are kept as weights
and three are summed by the register tiles that use them first. Register tiles begin with what their
products are added to (Huang, Smith, Henry and van de Geijn, "Strassen's Algorithm Reloaded", 2016),
so that sums and stores wait behind multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import (
    barrier,
    f32,
    fence,
    loop,
    only_if,
    prefetch,
    scratch_parts,
    unflatten,
)
from graphopt.backends.kernels.conv_finish import finish, finish_pixels
from graphopt.backends.kernels.conv_spec import Accessors
from graphopt.backends.kernels.lanes import QUAD, multiply, multiply_by_lanes, vectors_of
from graphopt.backends.kernels.product import span
from graphopt.backends.kernels.strassen_plan import KEPT, StrassenPlan
from graphopt.backends.kernels.tiling import LINE, split
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr


@dataclass(frozen=True)
class _Step:
    """One of the products.

    Attributes:
        number: its place in the order, and that of its left factor.
        right: what its right factor is the sum of: factors that are kept, and their signs.
        start: the partial sum that it is added to, or None.
        keep: the partial sum that this makes, or None.
        quarter: row and column of the quarter of the result that is complete then, or None.
    """

    number: int
    right: tuple[tuple[int, int], ...]
    start: int | None = None
    keep: int | None = None
    quarter: tuple[int, int] | None = None


_B11, _B21, _T1, _T2 = range(KEPT)
_STEPS = (
    _Step(0, ((_B11, 1),), keep=0),
    _Step(1, ((_B21, 1),), start=0, quarter=(0, 0)),
    _Step(2, ((_T2, 1),), start=0, keep=0),
    _Step(3, ((_T2, 1), (_B11, -1)), start=0, keep=1),
    # The one that two partial sums want: the first one keeps it, the other one is complete.
    _Step(4, ((_T1, 1),), keep=0, quarter=(1, 1)),
    _Step(5, ((_T2, 1), (_T1, 1)), start=0, quarter=(0, 1)),
    _Step(6, ((_B21, 1), (_T2, -1)), start=1, quarter=(1, 0)),
)


def pack_weights(weight: npt.NDArray[Any], plan: StrassenPlan) -> npt.NDArray[np.float32]:
    """Pack the factors of `(oc, ic, 1, 1)` weights that are kept, in the order tasks read them.

    That is by group, part, register tile, factor, input channel, output channel.
    """
    matrix = weight.reshape(weight.shape[:2]).T.astype(np.float64)
    (b11, b12), (b21, b22) = (np.split(half, 2, axis=1) for half in np.split(matrix, 2))
    t1 = b12 - b11
    factors = np.stack([b11, b21, t1, b22 - t1])
    whole = np.zeros((KEPT, plan.half_depth, plan.groups * plan.group, plan.width), np.float32)
    first = 0
    for t in range(plan.channels.count):
        lanes = (plan.channels.size - (t >= plan.channels.large)) * plan.block
        whole[:, :, t, :lanes] = factors[:, :, first : first + lanes]
        first += lanes
    shape = (KEPT, plan.parts, plan.depth, plan.groups, plan.group, plan.width)
    return np.ascontiguousarray(whole.reshape(shape).transpose(3, 1, 4, 0, 2, 5)).ravel()


def emit(plan: StrassenPlan, task: Expr, weights: Any, scratch: Any, access: Accessors) -> None:
    """Emit one task; `weights` is the flat TIR buffer of the packed weights."""
    n, group, block = unflatten(task, [plan.spec.batch, plan.groups, plan.pairs.count])
    _Task(plan, n, group, block, weights, scratch, access).emit()


@dataclass(frozen=True)
class _Tile:
    """A register tile of channels in one part of the depth.

    Attributes:
        part: the part's number.
        channel_block: its first block of output channels, in the left half.
        origin: where its factors of weights begin.
        quarters: where its quarters of the result wait.
        vectors: its blocks.
    """

    part: Expr
    channel_block: Expr
    origin: Expr
    quarters: Expr
    vectors: int


@dataclass(frozen=True)
class _Rows:
    """A register tile of pairs: `count` of the block's from `first` on, one of `pieces`."""

    first: Expr
    count: int
    piece: Expr
    pieces: int


class _Task:
    """One task's indices and buffers."""

    def __init__(
        self, plan: StrassenPlan, n: Expr, group: Expr, block: Expr, weights: Any, scratch: Any,
        access: Accessors,
    ) -> None:  # fmt: skip
        self.plan, self.n, self.group, self.weights = plan, n, group, weights
        self.access = access
        first, self.count = span(plan.pairs, block)
        self.first = first if plan.pairs.count == 1 else share(first)
        parts = scratch_parts(plan.places, scratch)
        self.inputs, self.formed = parts["inputs"], parts["formed"]
        self.partial, self.quarters = parts["partial"], parts["quarters"]
        self.waits = access.heavy or access.row > 0

    def emit(self) -> None:
        plan, channels = self.plan, self.plan.channels
        with loop(plan.parts) as part:
            self._sum_inputs(part)
            tiles: Expr = plan.group
            if channels.count % plan.group:
                tiles = tirx.min(tiles, channels.count - self.group * plan.group)
            with loop(tiles) as t:
                number = self.group * plan.group + t
                panel = (self.group * plan.parts + part) * plan.group + t
                origin = share(panel * (KEPT * plan.panel))
                quarters = t * (4 * plan.sums) if plan.parts > 1 else 0

                def steps(
                    first: Expr, vectors: int,
                    part: Expr = part, origin: Expr = origin, quarters: Expr = quarters,
                ) -> None:  # fmt: skip
                    for step in _STEPS:
                        self._step(_Tile(part, first, origin, quarters, vectors), step)

                if channels.large == channels.count:
                    steps(number * channels.size, channels.size)
                else:
                    with T.If(number < channels.large):
                        with T.Then():
                            steps(number * channels.size, channels.size)
                        with T.Else():
                            behind = number * channels.size - (number - channels.large)
                            steps(behind, channels.size - 1)

    def _input(self, number: int, pair: Expr, channel: Expr, lane: Expr) -> Expr:
        """Where an element of a left factor is; `channel` and `lane` are of one block."""
        plan, size = self.plan, self.plan.block
        if plan.plain:
            return (number * plan.pairs.size + pair) * plan.row + channel + lane
        block = number * (plan.depth // size) + channel // size
        return (block * plan.pairs.size + pair) * size + channel % size + lane

    def _sum_inputs(self, part: Expr) -> None:
        """The left factors of the part, of all pairs of the block."""
        plan, size = self.plan, self.plan.block

        def pixel(pair: Expr, lower: int) -> Expr:
            at = self.first + pair + lower * plan.upper
            # What the missing pixel of a ragged pair gives is not stored.
            return tirx.min(at, plan.spec.out_size[1] - 1) if lower and plan.is_ragged else at

        def one(pair: Expr, block: Expr) -> None:
            quarters = T.alloc_buffer((4 * size,), "float32", scope="local")
            for number, (lower, behind) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                channel = behind * plan.half_depth + part * plan.depth + block * size
                with loop(size, "vectorized") as lane:
                    value = self.access.x(self.n, channel + lane, 0, pixel(pair, lower))
                    T.buffer_store(quarters, value, [number * size + lane])
            with loop(size, "vectorized") as lane:
                a11, a12, a21, a22 = (quarters[i * size + lane] for i in range(4))
                s1 = a21 + a22
                s2 = s1 - a11
                for number, value in enumerate((a11, a12, s2, a11 - a21, s1, a12 - s2, a22)):
                    place = self._input(number, pair, block * size, lane)
                    T.buffer_store(self.inputs, value, [place])

        # In the order in which they lie in memory.
        if plan.plain:
            with T.serial(0, self.count) as pair, loop(plan.depth // size) as block:
                one(pair, block)
        else:
            with loop(plan.depth // size) as block, T.serial(0, self.count) as pair:
                one(pair, block)

    def _step(self, tile: _Tile, step: _Step) -> None:
        """One product of all pairs of the block by one channel tile."""
        pairs = self.plan.pairs
        if pairs.large == pairs.count:
            self._rows(tile, step, pairs.size)
        else:
            with T.If(self.count == pairs.size):
                with T.Then():
                    self._rows(tile, step, pairs.size)
                with T.Else():
                    self._rows(tile, step, pairs.size - 1)
        if step.quarter is not None and self.waits:
            with self._in_last_part(tile):
                self._finish_later(tile, step.quarter)

    def _rows(self, tile: _Tile, step: _Step, total: int) -> None:
        pieces = split(total, self.plan.pixels)
        for pixels, start, before, count in pieces.kinds():
            # Overlapped with the first tile's products, sums of weights cost little: on their own
            # they took 5 % of 128×768 by 768×768.
            forms = int(len(step.right) > 1 and not before)
            if forms:
                self._product(tile, step, _Rows(start, pixels, 0, pieces.count), forms=True)
            if count > forms:
                with loop(count - forms) as i:
                    at = i + forms
                    rows = _Rows(start + at * pixels, pixels, before + at, pieces.count)
                    self._product(tile, step, rows)

    def _form(self, tile: _Tile, step: _Step, channel: Expr) -> None:
        """A row of a factor of weights that is not kept, from two that are."""
        plan = self.plan
        (a, _), (b, sign) = step.right
        for first, count in vectors_of(tile.vectors * plan.block, plan.wide):
            with T.vectorized(0, count) as lane:
                place = channel * plan.width + first + lane
                left = self.weights[tile.origin + a * plan.panel + place]
                right = self.weights[tile.origin + b * plan.panel + place]
                T.buffer_store(self.formed, left + right if sign > 0 else left - right, [place])

    def _product(self, tile: _Tile, step: _Step, rows: _Rows, forms: bool = False) -> None:
        """One register tile of one product, from what it is added to, to what that makes.

        `forms` says that it sums its factor of weights, too.
        """
        plan = self.plan
        width = tile.vectors * plan.block
        acc = T.alloc_buffer((rows.count * width,), "float32", scope="local")

        def each_slot(body: Callable[[Expr, Expr], None]) -> None:
            """`body(place in acc, place among a quarter's sums)` for each vector."""
            for p in range(rows.count):
                for start, count in vectors_of(width, plan.wide):
                    with T.vectorized(0, count) as lane:
                        at = (rows.first + p) * plan.width + start + lane
                        body(p * width + start + lane, at)

        def partial_sum(number: int, at: Expr) -> Expr:
            return self.partial[number * plan.sums + at]

        def begin(slot: Expr, at: Expr) -> None:
            value = f32(0.0) if step.start is None else partial_sum(step.start, at)
            T.buffer_store(acc, value, [slot])

        def keep(number: int, slot: Expr, at: Expr) -> None:
            T.buffer_store(self.partial, acc[slot], [number * plan.sums + at])

        def add_to_both(slot: Expr, at: Expr) -> None:
            T.buffer_store(self.partial, partial_sum(0, at) + acc[slot], [at])
            T.buffer_store(acc, partial_sum(1, at) + acc[slot], [slot])

        each_slot(begin)
        self._multiply(tile, step, acc, rows, forms)
        if step.keep is not None:
            if step.quarter is not None:
                each_slot(add_to_both)
            else:
                each_slot(partial(keep, step.keep))
        if step.quarter is not None:
            self._end(tile, step.quarter, acc, rows, each_slot)

    def _multiply(self, tile: _Tile, step: _Step, acc: Any, rows: _Rows, forms: bool) -> None:
        """The products; meanwhile their share of the next tile's weights is asked for."""
        plan = self.plan
        width, pixels = tile.vectors * plan.block, range(rows.count)
        if len(step.right) > 1:
            weights, origin = self.formed, tirx.const(0, "int32")
        else:
            weights, origin = self.weights, share(tile.origin + step.right[0][0] * plan.panel)
        turns = plan.depth // QUAD
        lines = KEPT * plan.panel // LINE // len(_STEPS)
        each = -(-lines // (rows.pieces * turns))
        asked = tile.origin + KEPT * plan.panel + (step.number * lines) * LINE

        def x(channel: Expr, p: int, lane: Expr) -> Expr:
            return self.inputs[self._input(step.number, rows.first + p, channel, lane)]

        with loop(turns) as turn:
            for line in range(each):
                prefetch(self.weights[asked + ((rows.piece * turns + turn) * each + line) * LINE])
            channel = turn * QUAD
            if forms:
                for c in range(QUAD):
                    self._form(tile, step, channel + c)
            row = origin + channel * plan.width
            if plan.by_lane:
                # As in `conv_direct`: LLVM would load two fours at once, and spill.
                barrier()
                multiply_by_lanes(acc, weights, row, plan.width, width, plan.wide, pixels,
                                  partial(x, channel))  # fmt: skip
            else:
                for c in range(QUAD):
                    multiply(acc, weights, row + c * plan.width, width, plan.wide, pixels,
                             partial(x, channel, lane=c), plan.in_place)  # fmt: skip

    def _place(self, tile: _Tile, quarter: tuple[int, int]) -> Expr:
        """Where a quarter of the result waits."""
        lower, behind = quarter
        return tile.quarters + (2 * lower + behind) * self.plan.sums

    def _end(
        self, tile: _Tile, quarter: tuple[int, int], acc: Any, rows: _Rows,
        each_slot: Callable[[Callable[[Expr, Expr], None]], None],
    ) -> None:  # fmt: skip
        """A register tile of a quarter of the result: added to that of the parts before, and kept
        for the next one or for a long epilogue, or stored."""
        origin = self._place(tile, quarter)

        def add(slot: Expr, at: Expr) -> None:
            T.buffer_store(acc, acc[slot] + self.quarters[origin + at], [slot])

        def keep(slot: Expr, at: Expr) -> None:
            T.buffer_store(self.quarters, acc[slot], [origin + at])

        if self.plan.parts > 1:
            with T.If(tile.part > 0), T.Then():
                each_slot(add)
        if self.waits:
            each_slot(keep)
        elif self.plan.parts == 1:
            self._finish(tile, quarter, acc, rows)
        else:
            with T.If(tile.part == self.plan.parts - 1):
                with T.Then():
                    self._finish(tile, quarter, acc, rows)
                with T.Else():
                    each_slot(keep)

    def _in_last_part(self, tile: _Tile) -> Any:
        last = self.plan.parts - 1
        return only_if(tile.part == last if last else None)

    def _outputs(self, tile: _Tile, quarter: tuple[int, int]) -> tuple[Expr, Expr]:
        """A quarter's first pixel and block of channels."""
        lower, behind = quarter
        blocks = self.plan.half_channels // self.plan.block
        return self.first + lower * self.plan.upper, tile.channel_block + behind * blocks

    def _finish(self, tile: _Tile, quarter: tuple[int, int], acc: Any, rows: _Rows) -> None:
        """A short epilogue and the stores of a register tile."""
        plan, width = self.plan, tile.vectors * self.plan.block
        start, channel_block = self._outputs(tile, quarter)
        start += rows.first

        def some(skipped: int, count: int) -> None:
            finish(plan.spec, plan.block, acc, lambda p: (skipped + p) * width, count,
                   tile.vectors, self.n, 0, lambda p: (0, start + skipped + p), channel_block,
                   self.access)  # fmt: skip

        if not (quarter[0] and plan.is_ragged):
            some(0, rows.count)
            return
        last = rows.count - 1
        some(0, last)
        with T.If(start + last < plan.spec.out_size[1]), T.Then():
            some(last, 1)

    def _finish_later(self, tile: _Tile, quarter: tuple[int, int]) -> None:
        """A long epilogue and the stores of all pairs of the block, as a loop of its own."""
        plan, origin = self.plan, self._place(tile, quarter)
        start, channel_block = self._outputs(tile, quarter)
        count = self.count
        if quarter[0] and plan.is_ragged:
            count = tirx.min(count, plan.spec.out_size[1] - start)
        fence(self.access.fence)
        finish_pixels(
            plan.spec, plan.block, self.quarters, lambda p: origin + p * plan.width, count,
            tile.vectors, self.n, 0, lambda p: (0, start + p), channel_block, self.access,
            plan.together,
        )  # fmt: skip
