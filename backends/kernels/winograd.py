"""Winograd convolution F(m×n, KH×KW) for stride 1: fewer products, for transforms around them.

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A            (Lavin and Gray, "Fast Algorithms for Convolutional
                                                 Neural Networks", 2016)

An m×n tile of outputs takes (m+KH-1)·(n+KW-1) products per pair of channels instead of m·n·KH·KW:
36 instead of 144 for 4×4 outputs of a 3×3 kernel, 6 instead of 12 for 1×4 of a 1×3. A task works on
a block of tiles small enough for the second-level cache: it transforms their inputs into scratch,
multiplies by each tile of output channels (one small matrix product per transformed place), and
transforms that back with the epilogue, so that nothing but input and output leaves the cache.

Where tasks take whole images, the last tiles of rows and columns have only the outputs that are
left and only the places those need: F(r) at a subset of F(m)'s points, with the same weights. Each
place is then multiplied with the tiles that have it. A dilated kernel meets the pixels of one phase
of the image only, whose tiles are the same but for the distance between their pixels.

A stride s is s² convolutions of stride 1, of every s-th pixel and tap, whose results add up: they
are multiplied as if they were channels, and transformed back once. Where a part of the kernel has
a tap less, F(m)'s points without infinity are enough for it.

Of an image whose channels are no neighbours in memory, the first one mostly, each task gathers what
its tiles need.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import (
    barrier,
    f32,
    fence,
    interleaved,
    loop,
    prefetch,
    unflatten,
)
from graphopt.backends.kernels.conv_spec import Accessors
from graphopt.backends.kernels.lanes import multiply, multiply_by_lanes, vectors_of
from graphopt.backends.kernels.tiling import LINE, TOGETHER, split
from graphopt.backends.kernels.winograd_plan import PlaceClass, WinogradPlan
from graphopt.backends.kernels.winograd_tiles import Tile, each_tile
from graphopt.backends.kernels.winograd_transforms import transforms, two_sided
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr

_PANELS_AHEAD = 3
"""How long before their use weights from beyond the second-level cache are asked for."""


def pack_weights(weight: npt.NDArray[Any], conv: WinogradPlan) -> npt.NDArray[np.float32]:
    """Transform the weights, `(oc, ic, …)`, and pack them in the order in which tasks read them.

    That is by tiles multiplied at once, place, part of the depth, tile, input channel, channel of
    the tile.
    """
    down, along = (
        np.array([[float(v) for v in row] for row in transforms(m, kernel)[1]])
        for m, kernel in zip(conv.m, conv.taps, strict=True)
    )
    taps = weight.reshape(*weight.shape[:2], *conv.spec.kernel).astype(np.float64)
    (high, wide), passes = conv.spec.stride, conv.out_tiles // conv.at_once
    spectra = {}
    for row, column in conv.residues:
        part = taps[:, :, row::high, column::wide]
        matrices = down[:, : part.shape[2]], along[:, : part.shape[3]]
        spectra[row, column] = np.einsum("ai,ocij,bj->aboc", matrices[0], part, matrices[1])
    packed = []
    for each in conv.classes:
        depth = len(each.residues) * weight.shape[1]
        padded = np.zeros((len(each.places), conv.out_tiles * conv.width, depth), np.float32)
        for number, place in enumerate(each.places):
            every = [spectra[residue][place] for residue in each.residues]
            padded[number, : weight.shape[0]] = np.concatenate(every, axis=1)
        shape = (len(padded), passes, conv.at_once, conv.width, conv.depth_parts(each), -1)
        packed.append(padded.reshape(shape).transpose(1, 0, 4, 2, 5, 3).reshape(passes, -1))
    return np.concatenate(packed, axis=1).ravel()


def emit(conv: WinogradPlan, task: Expr, weights: Any, scratch: Any, access: Accessors) -> None:
    """Emit one task; `weights` is the flat TIR buffer of the packed weights."""
    block = conv.block
    inputs = T.decl_buffer((conv.places, conv.inputs_stride), "float32", data=scratch)
    products = T.decl_buffer(
        (conv.at_once, conv.places, conv.products_stride), "float32", data=scratch,
        elem_offset=conv.places * conv.inputs_stride,
    )  # fmt: skip
    part, group = unflatten(task, [conv.cut.count, conv.groups])
    with loop(conv.in_blocks) as cb:
        for tile in each_tile(conv, part):
            if not conv.gathers:
                _ask_for_input(conv, tile, cb, access)
            with loop(block // conv.lanes) as piece:
                for residue in conv.residues:
                    _transform_input(conv, inputs, tile, residue, cb, piece * conv.lanes, access)
    passes = conv.out_tiles // conv.groups // conv.at_once
    with loop(passes) as k:
        number = group * passes + k
        first_tile = number * conv.at_once
        before, behind = 0, number * (conv.weights // 4 // (conv.out_tiles // conv.at_once))
        for each in conv.classes:
            parts = conv.depth_parts(each)
            panel = len(each.residues) * conv.spec.icg // parts * conv.width
            with loop(len(each.places)) as i, loop(parts) as depth, loop(conv.at_once) as j:
                origin = share(behind + ((i * parts + depth) * conv.at_once + j) * panel)
                _multiply(conv, each, inputs, products, weights, origin, j, before + i, depth)
            before += len(each.places)
            behind += len(each.places) * parts * conv.at_once * panel
        fence(access.fence)
        with loop(conv.at_once) as j:
            for tile in each_tile(conv, part):
                with loop(conv.vectors) as v:
                    start = (first_tile + j) * conv.width
                    _ask_for_output(conv, tile, start + v * block, access)
                    with loop(block // conv.lanes) as piece:
                        first = v * block + piece * conv.lanes
                        _transform_output(conv, products, tile, j, start, first, access)


def _ask_for_input(conv: WinogradPlan, tile: Tile, cb: Expr, access: Accessors) -> None:
    """Columns that the tile after the next one reads, the first ones of which the next one has."""
    spec, (down, along), (over, step) = conv.spec, conv.spec.dilation, conv.spec.stride
    wide = conv.m[1] * step
    left = tile.column * step - spec.padding[1] + (2 * wide + spec.kernel[1] - step) * along
    for i in range((tile.outputs[0] - 1) * over + spec.kernel[0]):
        for j in range(0, wide, _pixels_of_a_line(conv)):
            row = tile.row * over - spec.padding[0] + i * down
            prefetch(access.x(tile.n, cb * conv.block, row, left + j * along), level=1)


def _pixels_of_a_line(conv: WinogradPlan) -> int:
    """A tile's pixels in a row that share a cache line."""
    return max(1, LINE // conv.block // conv.spec.dilation[1])


def _transform_input(
    conv: WinogradPlan, inputs: Any, tile: Tile, residue: tuple[int, int], cb: Expr, first: Expr,
    access: Accessors,
) -> None:  # fmt: skip
    """Bᵀ d B of a vector of a block's channels, from `first` on, of one tile, into scratch.

    Of a tile's rows and columns those of one residue.
    """
    spec, block, lanes = conv.spec, conv.block, conv.lanes
    down, along = conv.into(tile.outputs, residue)
    high, wide = len(down), len(along)
    top, left = (
        at * step + rest - before
        for at, step, rest, before in zip(
            (tile.row, tile.column), spec.stride, residue, spec.padding, strict=True
        )
    )
    numbers = conv.numbers
    in_rows = [top + i * spec.stride[0] * spec.dilation[0] for i in range(high)]
    in_columns = [left + j * spec.stride[1] * spec.dilation[1] for j in range(wide)]

    def put(i: int, j: int, lane: Expr, value: Expr) -> None:
        place = tile.places[0][i], tile.places[1][j]
        channels = conv.having(place).index(residue) * conv.in_blocks + cb
        number = channels * conv.cut.size + tile.number(*place)
        T.buffer_store(inputs, value, [numbers[place], number * block + first + lane])

    def load(tile_: Any, i: int, j: int) -> None:
        run = access.run if conv.gathers else lanes
        with loop(lanes // run) as number, T.vectorized(0, run) as lane:
            which = cb * (block // run) + first // run + number
            if conv.gathers:
                # Those behind the last one are not multiplied.
                which = tirx.min(which, spec.icg // run - 1)
            value = access.x(tile.n, which * run + lane, in_rows[i], in_columns[j])
            T.buffer_store(tile_, value, [(i * wide + j) * lanes + number * run + lane])

    rows = [_within(row, spec.in_size[0]) for row in in_rows]
    columns = [_within(column, spec.in_size[1]) for column in in_columns]
    with T.If(tirx.all(rows[0], rows[-1], columns[0], columns[-1])):
        with T.Then():
            whole = T.alloc_buffer((high * wide * lanes,), "float32", scope="local")
            for i, j in product(range(high), range(wide)):
                load(whole, i, j)
            two_sided(down, along, whole, lanes, put)
        with T.Else():
            # Filled by a loop, this tile stays in memory; the other one lives in registers.
            border = T.alloc_buffer((high * wide * lanes,), "float32", scope="local")
            with T.serial(0, high * wide) as place, T.vectorized(0, lanes) as lane:
                T.buffer_store(border, f32(0.0), [place * lanes + lane])
            for i in range(high):
                with T.If(rows[i]), T.Then():
                    for j in range(wide):
                        with T.If(columns[j]), T.Then():
                            load(border, i, j)
            two_sided(down, along, border, lanes, put)


def _within(at: Expr, size: int) -> Expr:
    """Whether a row or column is inside an image."""
    return tirx.all(at >= 0, at < size)


def _multiply(
    conv: WinogradPlan, each: PlaceClass, inputs: Any, products: Any, weights: Any, origin: Expr,
    j: Expr, place: Expr, part: Expr,
) -> None:  # fmt: skip
    """The products of the tiles that have a place with a panel of its weights: a channel tile.

    Meanwhile a later panel is asked for, each piece of tiles taking its share.
    """
    cut = split(conv.tiles_of(each), conv.pixels)
    for pixels, start, before, count in cut.kinds():
        with loop(count) as i:
            _product(conv, each, inputs, products, weights, origin, j, place, part,
                     start + i * pixels, pixels, before + i, cut.count)  # fmt: skip


def _product(
    conv: WinogradPlan, each: PlaceClass, inputs: Any, products: Any, weights: Any, origin: Expr,
    j: Expr, place: Expr, part: Expr, first: Expr, pixels: int, piece: Expr, pieces: int,
) -> None:  # fmt: skip
    """One register tile: some tiles of the image by a channel tile, over a part of the depth."""
    block, width = conv.block, conv.width
    channels = len(each.residues) * conv.spec.icg
    full, rest = divmod(channels, block)
    parts = conv.depth_parts(each)
    acc = T.alloc_buffer((pixels * width,), "float32", scope="local")

    def each_slot(body: Any) -> None:
        for p in range(pixels):
            for start, count in vectors_of(width, conv.wide):
                with T.vectorized(0, count) as lane:
                    at = (first + p) * width + start + lane
                    body(p * width + start + lane, [j, place, at])

    def clear() -> None:
        each_slot(lambda slot, place_: T.buffer_store(acc, f32(0.0), [slot]))

    if parts == 1:
        clear()
    else:
        with T.If(part == 0):
            with T.Then():
                clear()
            with T.Else():
                each_slot(lambda slot, place_: T.buffer_store(acc, products[tuple(place_)], [slot]))

    def x(number: Expr, p: int, ci: Expr) -> Expr:
        """An input of block `number` of this part."""
        at = part * (full // parts) + number
        return inputs[place, (at * conv.cut.size + first + p) * block + ci]

    def row(number: Expr, ci: Expr) -> Expr:
        return origin + (number * block + ci) * width

    def step(number: Expr, ci: Expr) -> None:
        multiply(acc, weights, row(number, ci), width, conv.wide, range(pixels),
                 lambda p: x(number, p, ci), conv.in_place)  # fmt: skip

    def four(number: Expr, ci: Expr) -> None:
        if conv.by_lane:
            # As in `conv_direct`: LLVM would load two fours at once, and spill.
            barrier()
            multiply_by_lanes(acc, weights, row(number, ci), width, width, conv.wide, range(pixels),
                              lambda p, lane: x(number, p, ci + lane))  # fmt: skip
            return
        for c in range(4):
            step(number, ci + c)

    if full:
        with loop(full // parts) as number, loop(block // 4) as outer:
            if conv.streams:
                ahead = _PANELS_AHEAD * (channels // parts) + number * block + outer * 4
                for line in range(0, 4 * width // LINE, pieces):
                    prefetch(weights[origin + ahead * width + (line + piece) * LINE])
            four(number, outer * 4)
    last = tirx.const(full, "int32")
    for ci in range(0, rest - 3, 4):
        four(last, tirx.const(ci, "int32"))
    for ci in range(rest - rest % 4, rest):
        step(last, tirx.const(ci, "int32"))
    each_slot(lambda slot, place_: T.buffer_store(products, acc[slot], place_))


def _ask_for_output(conv: WinogradPlan, tile: Tile, channel: Expr, access: Accessors) -> None:
    """What the next tile stores, over one of the epilogue's operands perhaps."""
    assert access.out is not None
    (high, wide), (down, along) = tile.outputs, conv.spec.dilation
    for i in range(high):
        for k in range(0, wide, _pixels_of_a_line(conv)):
            column = tile.column + (conv.m[1] + k) * along
            prefetch(access.out(tile.n, channel, tile.row + i * down, column))


def _transform_output(
    conv: WinogradPlan, products: Any, tile: Tile, j: Expr, start: Expr, first: Expr,
    access: Accessors,
) -> None:  # fmt: skip
    """Aᵀ (…) A of a vector of channels of one tile, the epilogue and the stores.

    The channels are those of register tile `j`, which begins at channel `start`, from `first` on.
    """
    spec, lanes = conv.spec, conv.lanes
    high, wide = tile.outputs
    down, along = (conv.transforms(axis, extent)[0] for axis, extent in enumerate(tile.outputs))
    numbers = conv.numbers
    rows = [tile.row + i * spec.dilation[0] for i in range(high)]
    columns = [tile.column + k * spec.dilation[1] for k in range(wide)]

    def transform(put: Any) -> None:
        every = [(i, k) for i in tile.places[0] for k in tile.places[1]]
        whole = T.alloc_buffer((len(every) * lanes,), "float32", scope="local")
        for slot, place in enumerate(every):
            with T.vectorized(0, lanes) as lane:
                where = tile.number(*place) * conv.width + first + lane
                value = products[j, numbers[place], where]
                T.buffer_store(whole, value, [slot * lanes + lane])
        two_sided(down, along, whole, lanes, put)

    def store(i: int, k: int, lane: Expr, value: Expr) -> None:
        access.store(tile.n, start + first + lane, rows[i], columns[k], value)

    def results() -> Any:
        out = T.alloc_buffer((high * wide * lanes,), "float32", scope="local")

        def keep(i: int, k: int, lane: Expr, value: Expr) -> None:
            T.buffer_store(out, value, [(i * wide + k) * lanes + lane])

        transform(keep)
        return out

    def finish(out: Any, places: Sequence[tuple[int, int]]) -> None:
        """The epilogue of some results, in turn."""
        with T.vectorized(0, lanes) as lane:
            interleaved(
                partial(store, i, k, lane, out[(i * wide + k) * lanes + lane]) for i, k in places
            )

    every = list(product(range(high), range(wide)))

    # Neither is a loop: LLVM would take it for the hottest one, and keep the constants of a long
    # epilogue in the registers that the products need: 80 GFLOP/s with SiLU instead of 270.
    def finish_all(out: Any) -> None:
        for number in range(0, len(every), TOGETHER):
            finish(out, every[number : number + TOGETHER])

    def finish_some(out: Any) -> None:
        for place in every:
            with T.If(inside(*place)), T.Then():
                finish(out, [place])

    def inside(i: int, k: int) -> Expr:
        return tirx.all(rows[i] < spec.out_size[0], columns[k] < spec.out_size[1])

    out = results() if access.heavy else None
    if tile.fits:
        transform(store) if out is None else finish_all(out)
        return
    with T.If(inside(high - 1, wide - 1)):
        with T.Then():
            transform(store) if out is None else finish_all(out)
        with T.Else():
            finish_some(results() if out is None else out)
