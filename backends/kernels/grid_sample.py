"""Images read at computed places between pixels, as flow networks and deformable attention do.

A task takes some neighbouring output pixels of an image. Where each of them reads, and the shares
of what it reads, is the same for all channels: that is computed once, into tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt import graph as G
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, each, f32, loop, only_if
from graphopt.backends.kernels.fusion import Group
from graphopt.ops import math as M
from graphopt.ops.opdef import Expr

BILINEAR, NEAREST = 0, 1
_ZEROS, _BORDER = 0, 1
_BAND = 128
"""Pixels of a task: their tables, of eight numbers each, take 4 KB."""


@dataclass(frozen=True)
class _Neighbour:
    """A pixel's neighbour along one axis: its place, inside the image, and its share."""

    place: Expr
    share: Expr


def lower_grid_sample(request: Request) -> KernelSource:
    """`grid_sampler_2d`, bilinear or of the nearest pixel, with any padding."""
    call = request.call
    source: fx.Node = call["input"]
    images, channels, rows, columns = call.shape
    height, width = G.shape(source)[2:]
    pixels = rows * columns
    band = min(_BAND, pixels)
    bands = -(-pixels // band)
    lanes = request.target.isa.block
    corners = 4 if call["interpolation_mode"] == BILINEAR else 1

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        image, first = task // bands, task % bands * band
        flat = views[source].reshaped((images, channels, 1, height * width))
        places, shares = (
            T.decl_buffer((corners * band,), dtype, data=scratch, elem_offset=start)
            for dtype, start in (("int32", 0), ("float32", corners * band))
        )

        def index(pixel: Expr) -> tuple[Expr, Expr]:
            number = first + pixel
            if pixels % band:
                number = tirx.min(number, pixels - 1)
            return number // columns, number % columns

        def look(pixel: Expr) -> None:
            """Find the neighbours of one pixel."""
            axes = []
            for axis, size in ((1, height), (0, width)):
                at = group.read(call["grid"], (image, *index(pixel), axis))
                axes.append(_neighbours(at, size, call))
            pairs = [(y, x) for y in axes[0] for x in axes[1]]
            for number, (y, x) in enumerate(pairs):
                slot = number * band + pixel
                T.buffer_store(places, y.place * width + x.place, [slot])
                T.buffer_store(shares, y.share * x.share, [slot])

        def mix(channel: Expr, pixel: Expr) -> None:
            value: Expr = None
            for number in range(corners):
                slot = number * band + pixel
                part = flat.load((image, channel, 0, places[slot])) * shares[slot]
                value = part if value is None else value + part
            group.give(request.anchor, lambda _: value)
            at = (image, channel, *index(pixel))
            out.store(at, group.read(request.root, at))

        each(band, lanes, look)
        left = pixels % band
        for count, condition in (
            (band, first + band <= pixels if left else None),
            *([(left, first + band > pixels)] if left else []),
        ):
            with only_if(condition), loop(channels) as channel:
                each(count, lanes, lambda pixel: mix(channel, pixel))

    work = images * pixels * (40 + channels * 2 * corners)
    return KernelSource("grid_sample", images * bands, work, emit, request.reads,
                        scratch=8 * corners * band)  # fmt: skip


def _neighbours(at: Expr, size: int, call: Any) -> list[_Neighbour]:
    """The pixels along an axis that a place of the grid, from -1 to 1, lies between."""
    align, padding = bool(call["align_corners"]), call["padding_mode"]
    last = size - 1
    if align:
        place = (at + f32(1.0)) * f32(0.5 * last)
    else:
        place = ((at + f32(1.0)) * f32(size) - f32(1.0)) * f32(0.5)
    place = M.share(place)
    if padding == _ZEROS:
        place = _between(place, -1.0, float(size))
    elif padding == _BORDER:
        place = _between(place, 0.0, float(last))
    else:
        place = _between(_reflected(place, size, align), 0.0, float(last))
    if call["interpolation_mode"] == NEAREST:
        near = M.share(tirx.Cast("int32", M.round_half_even(place)))
        return [_pixel(near, f32(1.0), size)]
    low = M.share(M.floor(place))
    high_share = M.share(place - low)
    number = M.share(tirx.Cast("int32", low))
    return [
        _pixel(number, f32(1.0) - high_share, size),
        _pixel(number + 1, high_share, size),
    ]


def _between(place: Expr, low: float, high: float) -> Expr:
    """A place within these bounds, which nothing beyond differs from; NaN at the lower one."""
    place = M.share(tirx.Select(place > f32(low), place, f32(low)))
    return M.share(tirx.Select(place < f32(high), place, f32(high)))


def _reflected(place: Expr, size: int, align: bool) -> Expr:
    """A place outside the image reflected at its borders, as often as needed."""
    low, span = (0.0, size - 1.0) if align else (-0.5, float(size))
    if span == 0:
        return f32(0.0)
    distance = M.share(tirx.abs(place - f32(low)))
    turns = M.share(M.floor(distance * f32(1.0 / span)))
    rest = M.share(distance - turns * f32(span))
    half = M.share(turns * f32(0.5))
    even = M.equal(half, M.floor(half))
    return M.share(tirx.Select(even, rest, f32(span) - rest) + f32(low))


def _pixel(number: Expr, share: Expr, size: int) -> _Neighbour:
    """One pixel, whose share is 0 where it lies outside."""
    inside = tirx.all(number >= 0, number < size)
    place = tirx.max(0, tirx.min(number, size - 1))
    return _Neighbour(M.share(place), M.share(tirx.Select(inside, share, f32(0.0))))
