"""Strassen's matrix product: seven products of quarters instead of eight.

The products are those of `strassen_steps.py`. Upper and lower rows are halves of one image's pixels
or of one sequence. A task sums the left factors of a block of pairs of rows in scratch. Then, for
each register tile of columns, it multiplies them by the right factors, of which four are kept as
weights and three are differences that the register tiles take that use them first. Register tiles
begin with what their products are added to (Huang, Smith, Henry and van de Geijn, "Strassen's
Algorithm Reloaded", 2016), so that sums and stores wait behind multiply-adds.
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
    prefetch,
    scratch_parts,
    unflatten,
)
from graphopt.backends.kernels.conv_finish import finish, finish_pixels
from graphopt.backends.kernels.conv_spec import Accessors
from graphopt.backends.kernels.lanes import QUAD, multiply, multiply_by_lanes, vectors_of
from graphopt.backends.kernels.product import by_size, span
from graphopt.backends.kernels.strassen_plan import KEPT, StrassenPlan
from graphopt.backends.kernels.strassen_steps import BOTH, STEPS, of
from graphopt.backends.kernels.tiling import LINE, split
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr


def pack_weights(weight: npt.NDArray[Any], plan: StrassenPlan) -> npt.NDArray[np.float32]:
    """Pack the factors of `(oc, ic, 1, 1)` weights that are kept, in the order tasks read them.

    That is by group, part, register tile, factor, input channel, output channel.
    """
    matrix = np.zeros((2 * plan.half_depth, 2 * plan.half_channels))
    matrix[: plan.spec.icg, : plan.spec.ocg] = weight.reshape(weight.shape[:2]).T
    (b11, b12), (b21, b22) = (np.split(half, 2, axis=1) for half in np.split(matrix, 2))
    t1 = b12 - b11
    factors = np.stack([b11, b21, b22 - t1, -t1])
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
    """A register tile of channels in one part of the depth, and one of its products.

    Attributes:
        part: the part's number.
        step: the product's number, and that of its left factor.
        right, less, start, keep, row: what the table says of it.
        origin: where the tile's factors of weights begin.
        quarter: where the quarter of the result waits that is complete then.
        pixel: that quarter's first pixel of the task's block.
        channel_block: that quarter's first block of output channels.
        vectors: its blocks.
    """

    part: Expr
    step: Expr
    right: Expr
    less: Expr
    start: Expr
    keep: Expr
    row: Expr
    origin: Expr
    quarter: Expr
    pixel: Expr
    channel_block: Expr
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
                first, _ = span(channels, number)
                by_size(channels, number < channels.large, partial(self._steps, part, t, first))

    def _input(self, number: Expr, pair: Expr, channel: Expr, lane: Expr) -> Expr:
        """Where an element of a left factor is; `channel` and `lane` are of one block."""
        plan, size = self.plan, self.plan.block
        if plan.plain:
            return number * plan.factor + pair * plan.row + channel + lane
        place = (channel // size * plan.pairs.size + pair) * size + channel % size
        return number * plan.factor + place + lane

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

                def put(value: Callable[[Expr], Expr], number: int = number) -> None:
                    with loop(size, "vectorized") as lane:
                        T.buffer_store(quarters, value(lane), [number * size + lane])

                def read(lane: Expr, lower: int = lower, channel: Expr = channel) -> Expr:
                    return self.access.x(self.n, channel + lane, 0, pixel(pair, lower))

                if behind and plan.half_depth * 2 > plan.spec.icg:
                    with T.If(channel < plan.spec.icg):
                        with T.Then():
                            put(read)
                        with T.Else():
                            put(lambda _: f32(0.0))
                else:
                    put(read)
            with loop(size, "vectorized") as lane:
                a11, a12, a21, a22 = (quarters[i * size + lane] for i in range(4))
                s1 = a21 + a22
                s2 = s1 - a11
                for number, value in enumerate((a11, a12, s2, a11 - a21, -s1, a12 - s2, a22)):
                    place = self._input(number, pair, block * size, lane)
                    T.buffer_store(self.inputs, value, [place])

        # In the order in which they lie in memory.
        if plan.plain:
            with T.serial(0, self.count) as pair, loop(plan.depth // size) as block:
                one(pair, block)
        else:
            with loop(plan.depth // size) as block, T.serial(0, self.count) as pair:
                one(pair, block)

    def _steps(self, part: Expr, t: Expr, channel_block: Expr, vectors: int) -> None:
        """All products of one channel tile in the part, one code for all of them."""
        plan = self.plan
        panel = (self.group * plan.parts + part) * plan.group + t
        origin = share(panel * (KEPT * plan.panel))
        with T.serial(0, len(STEPS)) as step:
            row, column = of(step, "row"), of(step, "column")
            quarter = 2 * row + column + (4 * t if plan.parts > 1 else 0)
            behind = column * (plan.half_channels // plan.block)
            self._step(
                _Tile(
                    part, step, of(step, "right"), of(step, "less"), of(step, "start"),
                    of(step, "keep"), row, origin, share(quarter * plan.sums),
                    share(self.first + row * plan.upper), share(channel_block + behind), vectors,
                )
            )  # fmt: skip

    def _step(self, tile: _Tile) -> None:
        """One product of all pairs of the block by one channel tile."""
        is_full = self.count == self.plan.pairs.size
        with T.If(tile.less < 0):
            with T.Then():
                by_size(self.plan.pairs, is_full, partial(self._pairs, tile, False))
            with T.Else():
                by_size(self.plan.pairs, is_full, partial(self._pairs, tile, True))
        if self.waits:
            last = self.plan.parts - 1
            with T.If(tirx.all(tile.row >= 0, tile.part == last)), T.Then():
                self._finish_later(tile)

    def _pairs(self, tile: _Tile, forms: bool, total: int) -> None:
        """The register tiles of so many pairs, the first of which forms the right factor or not."""
        pieces = split(total, self.plan.pixels)
        factor = (self.formed, 0) if forms else (self.weights, self._factor(tile, tile.right))
        for pixels, start, before, count in pieces.kinds():
            # Overlapped with products, differences of weights cost little: on their own they took
            # 5 % of 128×768 by 768×768.
            forming = int(forms and not before)
            if forming:
                self._product(tile, factor, _Rows(start, pixels, 0, pieces.count), forming=True)
            if count > forming:
                with loop(count - forming) as i:
                    at = i + forming
                    rows = _Rows(start + at * pixels, pixels, before + at, pieces.count)
                    self._product(tile, factor, rows)

    def _factor(self, tile: _Tile, number: Expr) -> Expr:
        """Where a factor of weights begins that is kept."""
        return share(tile.origin + number * self.plan.panel)

    def _product(
        self, tile: _Tile, factor: tuple[Any, Expr], rows: _Rows, *, forming: bool = False
    ) -> None:
        """One register tile of one product, from what it is added to, to what that makes.

        `factor` is the buffer of its right factor, and where that begins; `forming` says to write
        it first.
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

        def put(value: Expr, slot: Expr) -> None:
            T.buffer_store(acc, value, [slot])

        def add_to_both(slot: Expr, at: Expr) -> None:
            T.buffer_store(self.partial, self.partial[at] + acc[slot], [at])
            put(self.partial[plan.sums + at] + acc[slot], slot)

        start, keep = share(tile.start * plan.sums), share(tile.keep * plan.sums)
        with T.If(tile.start < 0):
            with T.Then():
                each_slot(lambda slot, at: put(f32(0.0), slot))
            with T.Else():
                each_slot(lambda slot, at: put(self.partial[start + at], slot))
        self._multiply(tile, factor, acc, rows, forming)
        with T.If(tile.keep >= 0), T.Then():
            each_slot(lambda slot, at: T.buffer_store(self.partial, acc[slot], [keep + at]))
        with T.If(tile.row >= 0), T.Then():
            if not forming:
                with T.If(tile.step == BOTH), T.Then():
                    each_slot(add_to_both)
            self._end(tile, acc, rows, each_slot)

    def _multiply(
        self, tile: _Tile, factor: tuple[Any, Expr], acc: Any, rows: _Rows, forming: bool
    ) -> None:
        """The products; meanwhile their share of the next tile's weights is asked for."""
        plan = self.plan
        width, pixels, (weights, origin) = tile.vectors * plan.block, range(rows.count), factor
        turns = plan.depth // QUAD
        lines = KEPT * plan.panel // LINE // len(STEPS)
        each = -(-lines // (rows.pieces * turns))
        ahead = share(tile.origin + KEPT * plan.panel + (tile.step * lines) * LINE)
        if forming:
            left, right = (self._factor(tile, number) for number in (tile.right, tile.less))

        def form(channel: Expr) -> None:
            for first, count in vectors_of(width, plan.wide):
                with T.vectorized(0, count) as lane:
                    at = channel * plan.width + first + lane
                    T.buffer_store(
                        weights, self.weights[left + at] - self.weights[right + at], [at]
                    )

        def x(channel: Expr, p: int, lane: Expr) -> Expr:
            return self.inputs[self._input(tile.step, rows.first + p, channel, lane)]

        with loop(turns) as turn:
            for line in range(each):
                asked = (rows.piece * turns + turn) * each + line
                prefetch(self.weights[ahead + asked * LINE])
            channel = turn * QUAD
            row = origin + channel * plan.width
            if plan.by_lane:
                # As in `conv_direct`: LLVM would load two fours at once, and spill.
                for c in range(QUAD if forming else 0):
                    barrier()
                    form(channel + c)
                barrier()
                multiply_by_lanes(acc, weights, row, plan.width, width, plan.wide, pixels,
                                  partial(x, channel))  # fmt: skip
            else:
                for c in range(QUAD):
                    if forming:
                        form(channel + c)
                    multiply(acc, weights, row + c * plan.width, width, plan.wide, pixels,
                             partial(x, channel, lane=c), plan.in_place)  # fmt: skip

    def _end(
        self, tile: _Tile, acc: Any, rows: _Rows,
        each_slot: Callable[[Callable[[Expr, Expr], None]], None],
    ) -> None:  # fmt: skip
        """A register tile of a quarter of the result: added to that of the parts before, and kept
        for the next one or for a long epilogue, or stored."""

        def add(slot: Expr, at: Expr) -> None:
            T.buffer_store(acc, acc[slot] + self.quarters[tile.quarter + at], [slot])

        def keep(slot: Expr, at: Expr) -> None:
            T.buffer_store(self.quarters, acc[slot], [tile.quarter + at])

        if self.plan.parts > 1:
            with T.If(tile.part > 0), T.Then():
                each_slot(add)
        if self.waits:
            each_slot(keep)
        elif self.plan.parts == 1:
            self._finish(tile, acc, rows)
        else:
            with T.If(tile.part == self.plan.parts - 1):
                with T.Then():
                    self._finish(tile, acc, rows)
                with T.Else():
                    each_slot(keep)

    def _stored(self, tile: _Tile, store: Callable[[int], None]) -> None:
        """`store(blocks)` for the tile's blocks of channels, less the one that there is not."""
        plan = self.plan
        if plan.half_channels * 2 == plan.spec.ocg:
            store(tile.vectors)
            return
        with T.If(tile.channel_block + tile.vectors <= plan.spec.ocg // plan.block):
            with T.Then():
                store(tile.vectors)
            if tile.vectors > 1:
                with T.Else():
                    store(tile.vectors - 1)

    def _finish(self, tile: _Tile, acc: Any, rows: _Rows) -> None:
        """A short epilogue and the stores of a register tile."""
        plan, width = self.plan, tile.vectors * self.plan.block
        start = tile.pixel + rows.first

        def some(skipped: int, count: int) -> None:
            self._stored(tile, lambda vectors: finish(
                plan.spec, plan.block, acc, lambda p: (skipped + p) * width, count, vectors,
                self.n, 0, lambda p: (0, start + skipped + p), tile.channel_block, self.access,
            ))  # fmt: skip

        last = rows.count - plan.is_ragged
        some(0, last)
        if plan.is_ragged:
            with T.If(start + last < plan.spec.out_size[1]), T.Then():
                some(last, 1)

    def _finish_later(self, tile: _Tile) -> None:
        """A long epilogue and the stores of all pairs of the block, as a loop of its own."""
        plan, count = self.plan, self.count
        if plan.is_ragged:
            count = tirx.min(count, plan.spec.out_size[1] - tile.pixel)
        fence(self.access.fence)
        self._stored(tile, lambda vectors: finish_pixels(
            plan.spec, plan.block, self.quarters, lambda p: tile.quarter + p * plan.width, count,
            vectors, self.n, 0, lambda p: (0, tile.pixel + p), tile.channel_block, self.access,
            plan.together,
        ))  # fmt: skip
