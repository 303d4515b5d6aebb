"""The multiply-adds of a register tile, and how to load four of its inputs at once.

Where an instruction multiplies by one lane of a vector, inputs that are neighbours in memory come
in fours: channels of a pixel where they lie in blocks, columns of a row in a plain image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import gcd
from operator import attrgetter
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import barrier, loop, multiply_add
from graphopt.ops.opdef import Expr

QUAD = 4
"""Inputs that one load takes where multiply-adds take a lane."""


@dataclass(frozen=True)
class Tap:
    """One product of a tile: a kernel column and a pixel, and the image column they meet in."""

    kernel_column: int
    pixel: int
    column: int


def vectors_of(width: int, wide: int) -> list[tuple[int, int]]:
    """(first, count) of the vectors of so many channels, all of one size: at most `wide`.

    Beside narrower vectors LLVM spills: 96 to 24 channels on 56×56 took 141 µs in vectors of 16 and
    of 8 channels, and takes 125 in vectors of 8. What touches accumulators before their products
    are complete takes them so, all of it: LLVM keeps them in registers as they are accessed.
    """
    size = gcd(width, wide)
    return [(first, size) for first in range(0, width, size)]


def multiply(
    acc: Any, weights: Any, base: Expr, width: int, wide: int, pixels: Sequence[int],
    x: Callable[[int], Expr], in_place: bool = False,
) -> None:  # fmt: skip
    """Multiply and add one channel of some pixels of a tile; its weights begin at `base`.

    The tile has `width` output channels, of which `wide` are computed as one.

    `in_place` says that there is `Isa.multiply_add`. Tiles of one vector use it: 8×13 ran at 50 to
    72 GFLOP/s without, and at 75 to 89 with it. For wider ones LLVM's own order is better.
    """
    for p in pixels:
        value = x(p)
        if in_place and width == wide:
            slot = tirx.Ramp(p * wide, 1, wide)
            row = weights[tirx.Ramp(base, 1, wide)]
            T.buffer_store(acc, multiply_add(value, row, acc[slot], wide), [slot])
            continue
        for first, count in vectors_of(width, wide):
            with T.vectorized(0, count) as lane:
                slot = p * width + first + lane
                T.buffer_store(acc, acc[slot] + value * weights[base + first + lane], [slot])


def multiply_by_lanes(
    acc: Any, weights: Any, base: Expr, apart: int, width: int, wide: int, pixels: Sequence[int],
    x: Callable[[int, Expr], Expr],
) -> None:  # fmt: skip
    """Multiply and add four channels, for instruction sets that multiply by one lane of a vector.

    One load takes all four of a pixel; on its own LLVM would load them one by one. `x` gives a
    pixel's input by channel, counted from the first of the four, whose weights begin at `base`,
    those of the next one `apart` floats on.
    """
    inputs = T.alloc_buffer(((pixels[-1] + 1) * QUAD,), "float32", scope="local")
    for p in pixels:
        with T.vectorized(0, QUAD) as lane:
            T.buffer_store(inputs, x(p, lane), [p * QUAD + lane])

    def channel(c: int, p: int) -> Expr:
        return inputs[p * QUAD + c]

    for c in range(QUAD):
        multiply(acc, weights, base + c * apart, width, wide, pixels, partial(channel, c))


def multiply_row(
    acc: Any, weights: Any, base: Expr, width: int, wide: int, taps: Sequence[Tap],
    x: Callable[[Expr], Expr],
) -> None:  # fmt: skip
    """Multiply and add one row of the kernel for one channel of a plain image.

    `x` gives the input by image column. The weights of kernel column 0 begin at `base`; each column
    has `width`.
    """
    columns = [tap.column for tap in taps]
    last = max(columns)
    lanes = QUAD if last - min(columns) >= QUAD - 1 else 1
    for number, part in enumerate(_parts(taps, last, lanes)):
        if number:
            # LLVM would begin with the loads of all parts, and spill.
            barrier()
        starts = _starts(part, last, lanes)
        inputs = T.alloc_buffer((len(starts) * lanes,), "float32", scope="local")
        places: dict[int, int] = {}
        for i, start in enumerate(starts):
            with loop(lanes, "vectorized") as lane:
                T.buffer_store(inputs, x(start + lane), [i * lanes + lane])
            places |= {start + lane: i * lanes + lane for lane in range(lanes)}
        for kernel_column, group in groupby(part, attrgetter("kernel_column")):
            at = {tap.pixel: places[tap.column] for tap in group}
            multiply(acc, weights, base + kernel_column * width, width, wide, [*at],
                     partial(_element, inputs, at))  # fmt: skip


def _element(inputs: Any, places: Mapping[int, int], pixel: int) -> Expr:
    return inputs[places[pixel]]


def _starts(taps: Iterable[Tap], last: int, lanes: int) -> list[int]:
    """Where loads of `lanes` columns begin that take all columns and none behind the last."""
    starts: list[int] = []
    for column in sorted({tap.column for tap in taps}):
        if not starts or column >= starts[-1] + lanes:
            starts.append(min(column, last - lanes + 1))
    return starts


def _parts(taps: Sequence[Tap], last: int, lanes: int) -> list[list[Tap]]:
    """Whole kernel columns at a time, with no more loads than the tile has pixels.

    That many registers are free: see `tiling.fits`.
    """
    most = len({tap.pixel for tap in taps})
    parts: list[list[Tap]] = [[]]
    for _, group in groupby(taps, attrgetter("kernel_column")):
        column = list(group)
        if parts[-1] and len(_starts([*parts[-1], *column], last, lanes)) > most:
            parts.append([])
        parts[-1] += column
    return parts
