"""The schedule that always applies: any fused group of elementwise, injective and reduction ops.

Outputs are computed a vector at a time along the innermost dimension of the output's memory; the
dimensions outside it are the tasks. A reduction keeps its vector of partial results in registers;
one along a contiguous axis runs its vectors along that axis and folds them at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import View, each, loop, unflatten
from graphopt.ops.math import dtype_of, is_nan
from graphopt.ops.opdef import Expr, Index, Reader, Reduction
from graphopt.program.layout import block_of, physical_shape

_FLAT_TASK = 4096
"""Elements per task when the output is treated as one row."""
_CHAINS = 4
"""Folds that do not wait for one another; one alone runs at the latency of an addition."""
_LONG_BOX = 32
_IDENTITY = {"sum": 0.0, "prod": 1.0}


@dataclass(frozen=True)
class Space:
    """The output's iteration space: `outer` tasks, `middle` serial steps, `inner` contiguous."""

    outer: tuple[int, ...]
    middle: tuple[int, ...]
    inner: int
    to_logical: Callable[[list[Expr], list[Expr], Expr], Index]


def space_of(shape: tuple[int, ...], layout: str) -> Space:
    """How to walk a tensor so that the innermost loop is contiguous in memory."""
    block = block_of(layout)
    if block is not None:
        physical = physical_shape(shape, layout)
        split_at = max(2, len(physical) - 2)
        outer, middle = physical[:split_at], physical[split_at:-1]

        def blocked_index(out: list[Expr], mid: list[Expr], lane: Expr) -> Index:
            n, c, *rest = [*out, *mid]
            return (n, c * block + lane, *rest)

        return Space(outer, middle, block, blocked_index)
    # Trailing dimensions of extent 1 do not count: the last real one is contiguous.
    rank = len(shape)
    while rank > 0 and shape[rank - 1] == 1:
        rank -= 1
    ones = (0,) * (len(shape) - rank)
    if rank == 0:
        return Space((), (), 1, lambda out, mid, lane: ones)
    split_at = max(0, rank - 2) if prod(shape[: rank - 1]) > 64 * shape[rank - 2] else rank - 1
    if shape[rank - 1] >= 64:
        split_at = rank - 1
    return Space(
        shape[:split_at],
        shape[split_at : rank - 1],
        shape[rank - 1],
        lambda out, mid, lane: (*out, *mid, lane, *ones),
    )


def tasks_of(space: Space) -> int:
    """Number of tasks of a space."""
    return prod(space.outer)


def emit_map(task: Expr, out: View, element: Reader, lanes: int) -> None:
    """Emit one task of an output each of whose elements is an expression of its index."""
    space = space_of(out.spec.shape, out.spec.layout)
    outer = unflatten(task, space.outer)

    def at(middle: list[Expr]) -> None:
        def one(lane: Expr) -> None:
            index = space.to_logical(outer, middle, lane)
            out.store(index, element(index))

        each(space.inner, lanes, one)

    _nest(list(space.middle), at)


def flat_tasks(count: int) -> int:
    """Tasks of `emit_flat`."""
    return -(-count // _FLAT_TASK)


def emit_flat(task: Expr, out: View, element: Reader, lanes: int) -> None:
    """Emit one task of an output treated as one row; `out` has one dimension."""
    count = out.spec.shape[0]
    base = task * _FLAT_TASK
    size: Expr = _FLAT_TASK if count % _FLAT_TASK == 0 else tirx.min(_FLAT_TASK, count - base)

    def one(lane: Expr) -> None:
        index = (base + lane,)
        out.store(index, element(index))

    with T.serial(0, size // lanes) as step, T.vectorized(0, lanes) as lane:
        one(step * lanes + lane)
    if count % lanes:
        with T.serial(0, size % lanes) as rest:
            one(size // lanes * lanes + rest)


def emit_reduction(
    task: Expr,
    out: View,
    reduction: Reduction,
    epilogue: Callable[[Index, Expr], Expr],
    dtype: str,
    lanes: int,
    contiguous: bool,
) -> None:
    """Emit one task of a reduction, its epilogue and the store.

    Args:
        task: the task variable.
        out: the output.
        reduction: what to fold.
        epilogue: `(output index, folded value)` → stored value.
        dtype: dtype to fold in.
        lanes: vector length in elements.
        contiguous: whether to run vectors along the box's last axis, not along the output.
    """
    space = space_of(out.spec.shape, out.spec.layout)
    outer = unflatten(task, space.outer)

    def finish(index: Index, value: Expr) -> None:
        out.store(index, epilogue(index, reduction.finish(value, index)))

    def at(middle: list[Expr]) -> None:
        if contiguous:
            with loop(space.inner) as place:
                index = space.to_logical(outer, middle, place)
                finish(index, _fold_row(reduction, index, dtype, lanes))
            return

        def vector(start: Expr, width: int) -> None:
            def at_lane(lane: Expr) -> Index:
                return space.to_logical(outer, middle, start + lane)

            acc = _fold_vector(reduction, at_lane, dtype, width)
            with loop(width, "vectorized") as lane:
                finish(at_lane(lane), acc[lane])

        full, rest = divmod(space.inner, lanes)
        if full:
            with loop(full) as i:
                vector(i * lanes, lanes)
        if rest:
            vector(tirx.const(full * lanes, "int32"), rest)

    _nest(list(space.middle), at)


def _fold_vector(
    reduction: Reduction, at_lane: Callable[[Expr], Index], dtype: str, width: int
) -> Any:
    """Fold the boxes of `width` neighbouring outputs; gives the buffer of the folded values."""
    kind = reduction.combine
    *lead, last = reduction.extents or (1,)
    chains = min(_CHAINS, last) if prod(reduction.extents) >= _LONG_BOX else 1
    acc = T.alloc_buffer((chains * width,), dtype, scope="local")
    for chain in range(chains):
        _fill(acc, chain * width, width, identity(kind, dtype))

    def fold(chain: int, item: Callable[[Expr], Expr]) -> None:
        with loop(width, "vectorized") as lane:
            slot = chain * width + lane
            T.buffer_store(acc, combine(kind, acc[slot], item(lane)), [slot])

    def row(box: list[Expr]) -> None:
        def element(place: Expr) -> Callable[[Expr], Expr]:
            return lambda lane: reduction.element(at_lane(lane), (*box, place))

        with loop(last // chains) as i:
            for chain in range(chains):
                fold(chain, element(i * chains + chain))
        for chain in range(last % chains):
            fold(chain, element(tirx.const(last - last % chains + chain, "int32")))

    _nest(lead, row)
    for chain in range(1, chains):
        with loop(width, "vectorized") as lane:
            T.buffer_store(acc, combine(kind, acc[lane], acc[chain * width + lane]), [lane])
    return acc


def _fold_row(reduction: Reduction, index: Index, dtype: str, lanes: int) -> Expr:
    """Fold a box whose last axis is contiguous: vectors along it, then across the lanes."""
    *lead, row = reduction.extents

    def join(a: Expr, b: Expr) -> Expr:
        return combine(reduction.combine, a, b)

    fold = RowFold(row, lanes, identity(reduction.combine, dtype), join)
    _nest(list(lead), lambda box: fold.add(lambda i: reduction.element(index, (*box, i))))
    return fold.result()


class RowFold:
    """Folds rows of contiguous elements into one: vectors along them, then across the lanes.

    Long rows go to several accumulators in turn, lest every vector wait for the one before.
    """

    def __init__(
        self, count: int, lanes: int, start: Expr, join: Callable[[Expr, Expr], Expr]
    ) -> None:
        """Rows of `count` elements, folded from `start` on by `join`."""
        dtype = dtype_of(start)
        self._join, self._lanes = join, lanes
        self._vectors, self._rest = divmod(count, lanes)
        self._chains = _CHAINS if self._vectors >= 2 * _CHAINS else 1
        self._acc = T.alloc_buffer((self._chains * lanes,), dtype, scope="local")
        self._total = T.alloc_buffer((1,), dtype, scope="local")
        for chain in range(self._chains if self._vectors else 0):
            _fill(self._acc, chain * lanes, lanes, start)
        T.buffer_store(self._total, start, [0])

    def add(self, element: Callable[[Expr], Expr]) -> None:
        """Fold one more row, whose elements are `element(0)` to `element(count - 1)`."""
        chains, lanes = self._chains, self._lanes

        def vector(chain: int, number: Expr) -> None:
            with T.vectorized(0, lanes) as lane:
                item = element(number * lanes + lane)
                slot = chain * lanes + lane
                T.buffer_store(self._acc, self._join(self._acc[slot], item), [slot])

        if self._vectors:
            with loop(self._vectors // chains) as i:
                for chain in range(chains):
                    vector(chain, i * chains + chain)
        for chain in range(self._vectors % chains):
            vector(chain, tirx.const(self._vectors - self._vectors % chains + chain, "int32"))
        if self._rest:
            with loop(self._rest) as i:
                item = element(self._vectors * lanes + i)
                T.buffer_store(self._total, self._join(self._total[0], item), [0])

    def result(self) -> Expr:
        """What all rows fold to."""
        width = self._chains * self._lanes if self._vectors else 0
        while width > 1:
            width //= 2
            with loop(width, "vectorized") as lane:
                both = self._join(self._acc[lane], self._acc[width + lane])
                T.buffer_store(self._acc, both, [lane])
        if self._vectors:
            T.buffer_store(self._total, self._join(self._total[0], self._acc[0]), [0])
        return self._total[0]


def identity(kind: str, dtype: str) -> Expr:
    """The value that leaves a fold unchanged."""
    if kind in _IDENTITY:
        return tirx.const(_IDENTITY[kind], dtype)
    if dtype.startswith("float"):
        return tirx.const(float("-inf") if kind == "max" else float("inf"), dtype)
    return tirx.min_value(dtype) if kind == "max" else tirx.max_value(dtype)


def combine(kind: str, a: Expr, b: Expr) -> Expr:
    """Fold one more value into `a`; NaN wins in `max` and `min`, as in PyTorch."""
    if kind == "sum":
        return a + b
    if kind == "prod":
        return a * b
    if not dtype_of(b).startswith("float"):
        return tirx.max(a, b) if kind == "max" else tirx.min(a, b)
    # A false comparison gives b, which is then the NaN, or a is.
    value = tirx.Select(a > b if kind == "max" else a < b, a, b)
    return tirx.Select(is_nan(a), a, value)


def _fill(buffer: object, first: Expr, count: int, value: Expr) -> None:
    with loop(count, "vectorized") as lane:
        T.buffer_store(buffer, value, [first + lane])


def _nest(extents: list[int], body: Callable[[list[Expr]], None]) -> None:
    """Serial loops, one per extent, around `body`."""

    def enter(done: list[Expr]) -> None:
        if len(done) == len(extents):
            body(done)
            return
        with loop(extents[len(done)]) as place:
            enter([*done, place])

    enter([])
