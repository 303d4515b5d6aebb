"""From sums to outputs: epilogue and stores of what a convolution or a product computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import interleaved, loop
from graphopt.backends.kernels.conv_spec import Accessors, ConvSpec
from graphopt.backends.kernels.product import transposed
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr

_BAND_BYTES = 2048
"""Sums that wait for a long epilogue."""


def finish(
    spec: ConvSpec, block: int, sums: Any, at: Callable[[Expr], Expr], pixels: int, vectors: int,
    n: Expr, g: Expr, place: Callable[[Expr], tuple[Expr, Expr]], tile_block: Expr,
    access: Accessors,
) -> None:  # fmt: skip
    """A short epilogue and the stores of a few pixels, of which all code is repeated.

    The sums of pixel `p` are in a buffer from `at(p)` on; `place` gives its row and column.
    """
    kind = "vectorized" if access.vector else "unroll"
    ragged = 0 if access.padded else spec.ocg % block

    def vector(v: int, count: int) -> None:
        for p in range(pixels):
            with loop(count, kind if count == block else "unroll") as lane:
                channel = g * spec.ocg + (tile_block + v) * block + lane
                access.store(n, channel, *place(p), sums[at(p) + v * block + lane])

    for v in range(vectors - 1 if ragged else vectors):
        vector(v, block)
    if ragged:
        # Only the last vector of the last tile of channels is cut.
        with T.If(tile_block + vectors <= spec.ocg // block):
            with T.Then():
                vector(vectors - 1, block)
            with T.Else():
                vector(vectors - 1, ragged)


def band_tiles(pixels: int, width: int, row: int) -> int:
    """Register tiles whose sums wait together for a long epilogue.

    They lie on the stack, and stay in the first-level cache. Where `row` pixels are stored side by
    side, the tiles make whole vectors of them.
    """
    tiles = max(1, _BAND_BYTES // (pixels * width * 4))
    turn = row // gcd(row, pixels) if row else 1
    return -(-tiles // turn) * turn


def finish_pixels(
    spec: ConvSpec, block: int, sums: Any, at: Callable[[Expr], Expr], count: Expr, vectors: int,
    n: Expr, g: Expr, place: Callable[[Expr], tuple[Expr, Expr]], tile_block: Expr,
    access: Accessors, together: int,
) -> None:  # fmt: skip
    """A long epilogue and the stores of `count` pixels.

    The sums of pixel `p` are in a buffer from `at(p)` on; `place` gives its row and column. At most
    `together` blocks of channels are computed in turn, one statement of each at a time.
    """
    if access.row:
        _finish_rows(spec, block, sums, at, count, vectors, n, g, place, tile_block, access,
                     together)  # fmt: skip
        return
    if not access.vector or (spec.ocg % block and not access.padded):
        with T.serial(0, count) as p:
            finish(spec, block, sums, lambda _: at(p), 1, vectors, n, g, lambda _: place(p),
                   tile_block, access)  # fmt: skip
        return

    def some(first: Expr, pixels: int) -> None:
        def one(p: int, v: int, lane: Expr) -> None:
            channel = g * spec.ocg + (tile_block + v) * block + lane
            value = sums[at(first + p) + v * block + lane]
            access.store(n, channel, *place(first + p), value)

        places = [(p, v) for v in range(vectors) for p in range(pixels)]
        for start in range(0, len(places), together):
            with T.vectorized(0, block) as lane:
                turn = places[start : start + together]
                interleaved(partial(one, p, v, lane) for p, v in turn)

    pixels = together
    with T.serial(0, count // pixels) as i:
        some(i * pixels, pixels)
    if pixels > 1:
        with T.serial(0, count % pixels) as i:
            some(count // pixels * pixels + i, 1)


def _finish_rows(
    spec: ConvSpec, block: int, sums: Any, at: Callable[[Expr], Expr], count: Expr, vectors: int,
    n: Expr, g: Expr, place: Callable[[Expr], tuple[Expr, Expr]], tile_block: Expr,
    access: Accessors, together: int,
) -> None:  # fmt: skip
    """`finish_pixels` where neighbouring pixels are stored side by side.

    Squares of pixels by channels are transposed in registers, so that the epilogue and the stores
    take vectors of pixels; the rest is done one by one.
    """
    lanes, first = access.row, tile_block * block
    channels = share(tirx.min(vectors * block, spec.ocg - first))
    turn = max(1, together * block // lanes)

    def some(start: Expr, c: Expr, kept: int) -> None:
        square = transposed(lanes, lambda p, lane: sums[at(start + p) + c + lane])

        def one(number: int, lane: Expr) -> None:
            channel = g * spec.ocg + first + c + number
            access.store(n, channel, *place(start + lane), square[number * lanes + lane])

        for number in range(0, kept, turn):
            with T.vectorized(0, lanes) as lane:
                numbers = range(number, min(number + turn, kept))
                interleaved(partial(one, number, lane) for number in numbers)

    with T.serial(0, channels // lanes) as i, T.serial(0, count // lanes) as j:
        some(j * lanes, i * lanes, lanes)
    rest = spec.ocg % lanes
    if rest:
        with T.If(channels % lanes > 0), T.Then(), T.serial(0, count // lanes) as j:
            some(j * lanes, channels - rest, rest)
    with T.serial(0, count % lanes) as i, T.serial(0, channels) as c:
        p = count - count % lanes + i
        access.store(n, g * spec.ocg + first + c, *place(p), sums[at(p) + c])
