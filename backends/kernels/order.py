"""The places of the largest or smallest elements of rows, in order (see `ops/order.py`).

Elements become integers, *keys*, of which the smaller one comes first. One place, as argmax wants
it, is found by vectors that each remember the best they saw. A few are kept in a sorted list, into
which elements are inserted. Many are sorted by the digits of their keys, the lowest first (Knuth,
"The Art of Computer Programming", 5.2.5), which is as fast for any input; where most elements are
not wanted, those whose first digit is too large are left out before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt import graph as G
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, loop, only_if, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.ops.math import bits, dtype_of, equal, is_nan, share
from graphopt.ops.opdef import Expr
from graphopt.ops.scalar import to_dtype

_LIST = 16
"""So many places are kept in a list, and rows of up to four times as many elements sorted in one:
an element passes half of it at worst, which a long row would make dear."""
_SHORT_ROW = 4096
"""Elements of a row below which 256 counters for each digit are cheaper than 2048."""


@dataclass(frozen=True)
class _Keys:
    """The integers that stand for elements.

    Attributes:
        dtype: int32, or int64 where an element has as many bits.
        of: the key of the row's element at a place.
    """

    dtype: str
    of: Callable[[Expr], Expr]

    @property
    def bits(self) -> int:
        """In one key."""
        return 64 if self.dtype == "int64" else 32


def _key(x: Expr, dtype: torch.dtype, largest: bool) -> Expr:
    """The key of an element: of two, the smaller one is that of the element that comes first."""
    if dtype.is_floating_point:
        x = share(to_dtype(x, torch.float32))
        pattern = share(bits(x))
        # Bits of floats are ordered as integers are, but for those of negative ones.
        key = pattern ^ ((pattern >> 31) & 0x7FFFFFFF)
        key = tirx.Select(equal(x, tirx.const(0.0, "float32")), tirx.const(0, "int32"), key)
        key = tirx.Select(is_nan(x), tirx.const(2**31 - 1, "int32"), key)
    else:
        key = to_dtype(x, torch.int64 if dtype == torch.int64 else torch.int32)
    return key ^ tirx.const(-1, "int64" if dtype == torch.int64 else "int32") if largest else key


def lower_order(request: Request) -> KernelSource:
    """`order` along any axis."""
    call = request.call
    source: fx.Node = call["self"]
    shape, dtype = G.shape(source), G.value(source).dtype
    axis, k = call["dim"] % len(shape), int(call["k"])
    count, largest = shape[axis], bool(call["largest"])
    outer = (*shape[:axis], *shape[axis + 1 :])
    lanes = request.target.isa.block
    key_type = "int64" if dtype == torch.int64 else "int32"
    sort = _Sort(count, k, key_type) if k > _LIST and count > 4 * _LIST else None
    # Of many rows, neighbours lie in the lanes of a vector.
    across = k == 1 and axis != len(shape) - 1 and shape[-1] > 1

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        def row(places: Sequence[Expr]) -> tuple[_Keys, Callable[[Expr, Expr], None]]:
            """The keys of the row with these other places, and how to store its results."""

            def at(i: Expr) -> tuple[Expr, ...]:
                return (*places[:axis], i, *places[axis:])

            def give(number: Expr, place: Expr) -> None:
                value = tirx.Cast("int64", place)
                group.give(request.anchor, lambda _: value)
                out.store(at(number), group.read(request.root, at(number)))

            of = lambda i: _key(group.read(source, at(i)), dtype, largest)  # noqa: E731
            return _Keys(key_type, of), give

        if across:
            *places, number = unflatten(task, (*outer[:-1], -(-outer[-1] // lanes)))
            full, rest = divmod(outer[-1], lanes)
            if full:
                with only_if(number < full if rest else None):
                    _best_across(count, lanes, lambda lane: row((*places, number * lanes + lane)))
            if rest:
                with only_if(number == full if full else None):
                    _best_across(count, rest, lambda lane: row((*places, full * lanes + lane)))
            return
        keys, give = row(unflatten(task, outer))
        if k == 1:
            _best(keys, count, lanes, give)
        elif sort is None:
            _insert(keys, count, k, scratch, give)
        else:
            sort.emit(keys, scratch, give)

    wide = 8 if key_type == "int64" else 4
    scratch = 0 if k == 1 else sort.scratch if sort else (k + 1) * (wide + 4)
    tasks = prod(outer[:-1]) * -(-outer[-1] // lanes) if across else prod(outer)
    work = 4 * prod(shape) * (1 if k == 1 else 8)
    return KernelSource("order", max(1, tasks), work, emit, request.reads, scratch=scratch)


def _fill(buffer: Any, count: int, value: int, dtype: str) -> None:
    with loop(count, "vectorized" if count > 1 else "serial") as lane:
        T.buffer_store(buffer, tirx.const(value, dtype), [lane])


def _limit(keys_type: str) -> int:
    return 2**63 - 1 if keys_type == "int64" else 2**31 - 1


def _best(
    keys: _Keys, count: int, lanes: int, give: Callable[[Expr, Expr], None]
) -> None:  # fmt: skip
    """The first place of the smallest key of a row."""
    full = count // lanes
    best, where = (T.alloc_buffer((lanes,), kind, scope="local") for kind in (keys.dtype, "int32"))
    first, place = (T.alloc_buffer((1,), kind, scope="local") for kind in (keys.dtype, "int32"))
    T.buffer_store(first, tirx.const(_limit(keys.dtype), keys.dtype), [0])
    T.buffer_store(place, tirx.const(0, "int32"), [0])
    if full:
        _fill(best, lanes, _limit(keys.dtype), keys.dtype)
        _fill(where, lanes, 0, "int32")
        with loop(full) as i, T.vectorized(0, lanes) as lane:
            key = share(keys.of(i * lanes + lane))
            T.buffer_store(where, tirx.Select(key < best[lane], i, where[lane]), [lane])
            T.buffer_store(best, tirx.Select(key < best[lane], key, best[lane]), [lane])
        T.buffer_store(place, tirx.const(count, "int32"), [0])
        with loop(lanes) as lane:
            key, at = share(best[lane]), share(where[lane] * lanes + lane)
            sooner = tirx.all(equal(key, first[0]), at < place[0])
            with only_if(tirx.any(key < first[0], sooner)):
                T.buffer_store(first, key, [0])
                T.buffer_store(place, at, [0])
    if count % lanes:
        with loop(count % lanes) as i:
            key = share(keys.of(full * lanes + i))
            with only_if(key < first[0]):
                T.buffer_store(first, key, [0])
                T.buffer_store(place, full * lanes + i, [0])
    give(0, place[0])


def _best_across(
    count: int, width: int,
    row: Callable[[Expr], tuple[_Keys, Callable[[Expr, Expr], None]]],
) -> None:  # fmt: skip
    """The same for neighbouring strided rows, one to a lane."""
    keys_type = row(0)[0].dtype
    kind = "vectorized" if width > 1 else "serial"
    best, place = (T.alloc_buffer((width,), t, scope="local") for t in (keys_type, "int32"))
    _fill(best, width, _limit(keys_type), keys_type)
    _fill(place, width, 0, "int32")
    with loop(count) as i, loop(width, kind) as lane:
        key = share(row(lane)[0].of(i))
        T.buffer_store(place, tirx.Select(key < best[lane], i, place[lane]), [lane])
        T.buffer_store(best, tirx.Select(key < best[lane], key, best[lane]), [lane])
    with loop(width, kind) as lane:
        row(lane)[1](0, place[lane])


def _insert(
    keys: _Keys, count: int, k: int, scratch: Any, give: Callable[[Expr, Expr], None]
) -> None:
    """The first `k` places by a sorted list, whose place 0 is smaller than every key."""
    wide = keys.bits // 32
    listed = T.decl_buffer((k + 1,), keys.dtype, data=scratch)
    places = T.decl_buffer((k + 1,), "int32", data=scratch, elem_offset=wide * (k + 1))
    slot = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(listed, tirx.const(-_limit(keys.dtype) - 1, keys.dtype), [0])

    def insert(place: Expr, key: Expr, last: Expr) -> None:
        """Put an element into the list, whose place `last` is free or will be lost."""
        T.buffer_store(slot, last, [0])
        with T.While(listed[slot[0] - 1] > key):
            T.buffer_store(listed, listed[slot[0] - 1], [slot[0]])
            T.buffer_store(places, places[slot[0] - 1], [slot[0]])
            T.buffer_store(slot, slot[0] - 1, [0])
        T.buffer_store(listed, key, [slot[0]])
        T.buffer_store(places, place, [slot[0]])

    with loop(k) as i:
        insert(i, share(keys.of(i)), i + 1)
    if count > k:
        with loop(count - k) as i:
            key = share(keys.of(k + i))
            with only_if(key < listed[k]):
                insert(k + i, key, tirx.const(k, "int32"))
    with loop(k) as i:
        give(i, places[i + 1])


class _Sort:
    """The first `k` places of a row by the digits of the keys.

    Attributes:
        scratch: bytes.
    """

    def __init__(self, count: int, k: int, dtype: str) -> None:
        """Of `count` elements with keys of this type."""
        self.count, self.k = count, k
        self.bits = 64 if dtype == "int64" else 32
        self.digit = 8 if count < _SHORT_ROW else 11
        self.filters = 4 * k <= count
        keys = count * self.bits // 32
        # Keys first: those of 64 bits are aligned then.
        self.offsets = [0, keys, 2 * keys, 2 * keys + count, 2 * (keys + count)]
        self.scratch = 4 * (self.offsets[-1] + (1 << self.digit))

    def emit(self, keys: _Keys, scratch: Any, give: Callable[[Expr, Expr], None]) -> None:
        """Sort a row."""
        types = (keys.dtype, keys.dtype, "int32", "int32")
        wide = self.bits // 32
        buffers = [
            T.decl_buffer((self.count,), kind, data=scratch,
                          elem_offset=offset // (wide if kind == "int64" else 1))
            for kind, offset in zip(types, self.offsets, strict=False)
        ]  # fmt: skip
        counts = T.decl_buffer(
            (1 << self.digit,), "int32", data=scratch, elem_offset=self.offsets[-1]
        )
        size = self._collect(keys, buffers[0], buffers[2], counts)
        shifts = range(0, self.bits, self.digit)
        for turn, shift in enumerate(shifts):
            have, to = turn % 2, 1 - turn % 2
            self._by_digit(
                shift, size, counts, (buffers[have], buffers[2 + have]),
                (buffers[to], buffers[2 + to]),
            )  # fmt: skip
        sorted_places = buffers[2 + len(shifts) % 2]
        with loop(self.k) as i:
            give(i, sorted_places[i])

    def _value(self, key: Expr, shift: int) -> Expr:
        """The digit that begins at this bit; the highest one has the sign."""
        width = min(self.digit, self.bits - shift)
        value = tirx.Cast("int32", key >> tirx.const(shift, dtype_of(key)))
        if shift + width == self.bits:
            return value + (1 << (width - 1))
        return value & ((1 << width) - 1)

    def _clear(self, counts: Any) -> None:
        with loop(1 << self.digit) as i:
            T.buffer_store(counts, tirx.const(0, "int32"), [i])

    def _collect(self, keys: _Keys, listed: Any, places: Any, counts: Any) -> Expr:
        """List keys and places of the elements that may be among the first; how many they are."""
        if not self.filters:
            with loop(self.count) as i:
                T.buffer_store(listed, keys.of(i), [i])
                T.buffer_store(places, i, [i])
            return self.count
        shift = self.bits - self.digit
        sum_, top = (T.alloc_buffer((1,), "int32", scope="local") for _ in range(2))
        self._clear(counts)
        with loop(self.count) as i:
            digit = share(self._value(keys.of(i), shift))
            T.buffer_store(counts, counts[digit] + 1, [digit])
        # The digit of the k-th key is the first up to which there are as many.
        for buffer in (sum_, top):
            T.buffer_store(buffer, tirx.const(0, "int32"), [0])
        with loop(1 << self.digit) as i:
            T.buffer_store(top, tirx.Select(sum_[0] < self.k, i, top[0]), [0])
            T.buffer_store(sum_, sum_[0] + counts[i], [0])
        T.buffer_store(sum_, tirx.const(0, "int32"), [0])
        with loop(self.count) as i:
            key = share(keys.of(i))
            T.buffer_store(listed, key, [sum_[0]])
            T.buffer_store(places, i, [sum_[0]])
            kept = tirx.Select(self._value(key, shift) <= top[0], 1, 0)
            T.buffer_store(sum_, sum_[0] + kept, [0])
        return sum_[0]

    def _by_digit(
        self, shift: int, size: Expr, counts: Any, have: tuple[Any, Any], to: tuple[Any, Any]
    ) -> None:
        """Order by one digit, elements with the same one as they were."""
        total = T.alloc_buffer((1,), "int32", scope="local")
        self._clear(counts)
        with T.serial(0, size) as i:
            digit = share(self._value(have[0][i], shift))
            T.buffer_store(counts, counts[digit] + 1, [digit])
        T.buffer_store(total, tirx.const(0, "int32"), [0])
        with loop(1 << self.digit) as i:
            number = share(counts[i])
            T.buffer_store(counts, total[0], [i])
            T.buffer_store(total, total[0] + number, [0])
        with T.serial(0, size) as i:
            key = share(have[0][i])
            digit = share(self._value(key, shift))
            place = share(counts[digit])
            T.buffer_store(to[0], key, [place])
            T.buffer_store(to[1], have[1][i], [place])
            T.buffer_store(counts, place + 1, [digit])
