"""Winograd convolution: a task's tiles, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import loop, unflatten
from graphopt.backends.kernels.winograd_plan import WinogradPlan
from graphopt.ops.opdef import Expr

_LONG = 2
"""How many times a task's tiles a row has where looking for them costs more than divisions."""


@dataclass(frozen=True)
class Tile:
    """A tile, or all those that a loop around stands for.

    Attributes:
        n: the image.
        row: where its outputs start.
        column: likewise.
        outputs: their extents.
        fits: whether all of them are inside the image.
        number: its number among a task's tiles that have a place (row, column).
        places: the places of each axis that it has.
    """

    n: Expr
    row: Expr
    column: Expr
    outputs: tuple[int, int]
    fits: bool
    number: Callable[[int, int], Expr]
    places: tuple[tuple[int, ...], tuple[int, ...]]


def each_tile(conv: WinogradPlan, part: Expr) -> Iterator[Tile]:
    """A task's tiles: what the caller emits for each one is within loops over the others."""
    spec, size = conv.spec, conv.cut.size
    steps = [m * d for m, d in zip(conv.m, spec.dilation, strict=True)]

    def start(phase: Expr, y: Expr, x: Expr) -> tuple[Expr, Expr, Expr]:
        """The image, row and column of a phase's first output."""
        if spec.dilation == (1, 1):
            return phase, y * steps[0], x * steps[1]
        n, row, column = unflatten(phase, [spec.batch, *spec.dilation])
        return n, y * steps[0] + row, x * steps[1] + column

    if not conv.images:
        # Whole rows of tiles, without those of other tasks: LLVM makes poor code of any loops but
        # those of constant length.
        high, wide = conv.grid
        first = part * size
        count = tirx.min(size, conv.cut.total - first)
        fits = all(extent % step == 0 for extent, step in zip(spec.out_size, steps, strict=True))
        places = tuple(range(conv.side[0])), tuple(range(conv.side[1]))
        if wide >= _LONG * size:
            with loop(size) as t, T.If(t < count), T.Then():
                phase, row, column = unflatten(first + t, [conv.phases, high, wide])
                yield Tile(*start(phase, row, column), conv.m, fits, lambda i, j: t, places)
            return
        with loop(min(conv.cut.total, size + 2 * wide - 2) // wide) as y, loop(wide) as column:
            t = y * wide + column - first % wide
            with T.If(tirx.all(t >= 0, t < count)), T.Then():
                phase, row = unflatten(first // wide + y, [conv.phases, high])
                yield Tile(*start(phase, row, column), conv.m, fits, lambda i, j: t, places)
        return
    columns = {place: each.columns for each in conv.classes for place in each.places}
    rows = {place: each.rows for each in conv.classes for place in each.places}
    for region in conv.regions:
        with (
            loop(conv.images) as image, loop(region.rows[1]) as y, loop(region.columns[1]) as x,
        ):  # fmt: skip
            row, column = region.rows[0] + y, region.columns[0] + x

            def number(
                i: int, j: int, image: Expr = image, row: Expr = row, column: Expr = column
            ) -> Expr:
                return (image * rows[i, j] + row) * columns[i, j] + column

            high, wide = region.outputs
            yield Tile(*start(part * conv.images + image, row, column), region.outputs, True,
                        number, (conv.kept(0, high), conv.kept(1, wide)))  # fmt: skip
