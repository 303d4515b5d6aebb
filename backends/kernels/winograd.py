"""Winograd convolution F(m×m, 3×3) for stride 1: fewer products, for a transform before and after.

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A            (Lavin and Gray, "Fast Algorithms for Convolutional
                                                 Neural Networks", 2016)

An m×m tile of outputs takes (m+2)² products per pair of channels instead of 9·m². A task works on a
block of tiles small enough for the second-level cache: it transforms their inputs into scratch,
multiplies by each tile of output channels (one small matrix product per transformed place), and
transforms that back with the epilogue, so that nothing but input and output leaves the cache.

The transforms are built from interpolation points (Toom–Cook; Winograd, "Arithmetic Complexity of
Computations", 1980), in float64 for the weights. Opposite points share half their work, and 0,
±3/4, ±3/2 gave about half the error of the usual 0, ±1, ±2 (`tests/backends/test_winograd.py`
measures both).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import barrier, f32, loop, prefetch, unflatten
from graphopt.backends.kernels.conv_direct import Accessors, multiply, multiply_by_lanes
from graphopt.backends.kernels.tiling import LINE, split
from graphopt.backends.kernels.winograd_plan import (
    KERNEL,
    Matrix,
    WinogradPlan,
    transforms,
)
from graphopt.ops.opdef import Expr


def pack_weights(weight: npt.NDArray[Any], conv: WinogradPlan) -> npt.NDArray[np.float32]:
    """Transform `(oc, ic, 3, 3)` weights and pack them in the order in which tasks read them.

    That is by tiles multiplied at once, place, tile, input channel, channel of the tile.
    """
    _, g, _ = transforms(conv.m)
    matrix = np.array([[float(v) for v in row] for row in g])
    spectrum = np.einsum("ai,ocij,bj->aboc", matrix, weight.astype(np.float64), matrix)
    places = spectrum.reshape(conv.places, *spectrum.shape[2:])
    width = conv.width
    padded = np.zeros((conv.places, conv.out_tiles * width, weight.shape[1]))
    padded[:, : weight.shape[0]] = places
    passes = conv.out_tiles // conv.at_once
    tiled = padded.reshape(conv.places, passes, conv.at_once, width, -1).transpose(1, 0, 2, 4, 3)
    return np.ascontiguousarray(tiled, np.float32).ravel()


def emit(conv: WinogradPlan, task: Expr, weights: Any, scratch: Any, access: Accessors) -> None:
    """Emit one task; `weights` is the flat TIR buffer of the packed weights."""
    size, block = conv.cut.size, conv.block
    inputs = T.decl_buffer((conv.places, conv.inputs_stride), "float32", data=scratch)
    products = T.decl_buffer(
        (conv.at_once, conv.places, conv.products_stride), "float32", data=scratch,
        elem_offset=conv.places * conv.inputs_stride,
    )  # fmt: skip
    part, group = unflatten(task, [conv.cut.count, conv.groups])
    first = part * size
    count = tirx.min(size, conv.cut.total - first)
    extents = [conv.spec.batch, *conv.grid]
    with loop(conv.in_blocks) as cb, T.serial(0, count) as t:
        n, row, column = unflatten(first + t, extents)
        _transform_input(conv, inputs, n, row * conv.m, column * conv.m, cb, t, access)
    passes = conv.out_tiles // conv.groups // conv.at_once
    with loop(passes) as k:
        number = group * passes + k
        first_tile = number * conv.at_once
        with loop(conv.places) as place, loop(conv.at_once) as j:
            panel = (number * conv.places + place) * conv.at_once + j
            _multiply(conv, inputs, products, weights, panel, j, place)
        with loop(conv.at_once) as j, T.serial(0, count) as t, loop(conv.vectors) as v:
            n, row, column = unflatten(first + t, extents)
            channel = ((first_tile + j) * conv.vectors + v) * block
            _transform_output(
                conv, products, n, row * conv.m, column * conv.m, channel, j, t, v, access
            )


def _transform_input(
    conv: WinogradPlan, inputs: Any, n: Expr, row: Expr, column: Expr, cb: Expr, t: Expr,
    access: Accessors,
) -> None:  # fmt: skip
    """Bᵀ d B of one block of channels of one tile, into scratch."""
    spec, block = conv.spec, conv.block
    side = conv.m + KERNEL - 1
    top, left = row - spec.padding[0], column - spec.padding[1]
    _, _, b_t = transforms(conv.m)

    def put(i: int, j: int, lane: Expr, value: Expr) -> None:
        T.buffer_store(inputs, value, [i * side + j, (cb * conv.cut.size + t) * block + lane])

    inside = tirx.all(
        top >= 0, left >= 0, top + side <= spec.in_size[0], left + side <= spec.in_size[1]
    )
    with T.If(inside):
        with T.Then():
            tile = T.alloc_buffer((side * side * block,), "float32", scope="local")
            for i in range(side):
                for j in range(side):
                    with T.vectorized(0, block) as lane:
                        value = access.x(n, cb * block + lane, top + i, left + j)
                        T.buffer_store(tile, value, [(i * side + j) * block + lane])
            _two_sided(b_t, tile, side, block, put)
        with T.Else():
            # Indexed at run time, this tile stays in memory; the other one lives in registers.
            border = T.alloc_buffer((side * side * block,), "float32", scope="local")
            with T.serial(0, side * side) as place, T.vectorized(0, block) as lane:
                T.buffer_store(border, f32(0.0), [place * block + lane])
            # Loops from 0: TVM computes other bounds with the wrong task number.
            first_i, rows = _met(top, side, spec.in_size[0])
            first_j, columns = _met(left, side, spec.in_size[1])
            with loop(rows) as y, loop(columns) as x, T.vectorized(0, block) as lane:
                i, j = first_i + y, first_j + x
                value = access.x(n, cb * block + lane, top + i, left + j)
                T.buffer_store(border, value, [(i * side + j) * block + lane])
            _two_sided(b_t, border, side, block, put)


def _met(start: Expr, side: int, size: int) -> tuple[Expr, Expr]:
    """Which of `side` places from `start` on are inside 0 … size - 1: the first, and how many."""
    first = tirx.max(0, -start)
    return first, tirx.max(0, tirx.min(side, size - start) - first)


def _two_sided(matrix: Matrix, tile: Any, side: int, block: int, put: Any) -> None:
    """`matrix · tile · matrixᵀ`: down the columns into a second tile, then along its rows."""
    rows = len(matrix)
    half = T.alloc_buffer((rows * side * block,), "float32", scope="local")

    def put_half(i: int, j: int, lane: Expr, value: Expr) -> None:
        T.buffer_store(half, value, [(i * side + j) * block + lane])

    for j in range(side):
        _one_sided(matrix, block, lambda k, lane, j=j: tile[(k * side + j) * block + lane],
                   lambda i, lane, value, j=j: put_half(i, j, lane, value))  # fmt: skip
    for i in range(rows):
        _one_sided(matrix, block, lambda k, lane, i=i: half[(i * side + k) * block + lane],
                   lambda j, lane, value, i=i: put(i, j, lane, value))  # fmt: skip


def _one_sided(matrix: Matrix, block: int, item: Any, put: Any) -> None:
    """`matrix · vector`; rows of opposite points are the sum and difference of two halves."""
    done: set[int] = set()
    for i, row in enumerate(matrix):
        if i in done:
            continue
        twin = next((k for k in range(i + 1, len(matrix)) if _opposite(row, matrix[k])), None)
        if twin is None:
            with T.vectorized(0, block) as lane:
                put(i, lane, _combine(row, lambda k, lane=lane: item(k, lane)))
            continue
        done.add(twin)
        halves = T.alloc_buffer((2 * block,), "float32", scope="local")
        for half, same in enumerate((True, False)):
            part = tuple(
                a if (a == b) is same else Fraction(0) for a, b in zip(row, matrix[twin],
                                                                       strict=True)
            )  # fmt: skip
            with T.vectorized(0, block) as lane:
                value = _combine(part, lambda k, lane=lane: item(k, lane))
                T.buffer_store(halves, value, [half * block + lane])
        with T.vectorized(0, block) as lane:
            put(i, lane, halves[lane] + halves[block + lane])
        with T.vectorized(0, block) as lane:
            put(twin, lane, halves[lane] - halves[block + lane])


def _opposite(a: tuple[Fraction, ...], b: tuple[Fraction, ...]) -> bool:
    """Whether the rows differ only in signs, with something equal and something opposite."""
    same = [x == y for x, y in zip(a, b, strict=True) if x or y]
    return all(abs(x) == abs(y) for x, y in zip(a, b, strict=True)) and any(same) and not all(same)


def _combine(coefficients: tuple[Fraction, ...], item: Any) -> Expr:
    """Σ coefficient · item, without the products by 0, 1 and −1."""
    total: Expr | None = None
    # Positive ones first, so that a sum never begins with a negation where it can be avoided.
    order = sorted(range(len(coefficients)), key=lambda k: coefficients[k] < 0)
    for k in order:
        c = coefficients[k]
        if c == 0:
            continue
        term = item(k) if abs(c) == 1 else item(k) * f32(float(abs(c)))
        if total is None:
            total = term if c > 0 else f32(0.0) - term
        else:
            total = total + term if c > 0 else total - term
    return f32(0.0) if total is None else total


def _multiply(
    conv: WinogradPlan, inputs: Any, products: Any, weights: Any, panel: Expr, j: Expr,
    place: Expr,
) -> None:  # fmt: skip
    """The products of all tiles of the block with a panel of weights: one place, one tile.

    Meanwhile the next panel is asked for, each piece of tiles taking its share.
    """
    parts = conv.depth_parts
    cut = split(conv.cut.size, conv.pixels)
    with loop(parts) as part:
        for pixels, start, before, count in cut.kinds():
            with loop(count) as i:
                _product(conv, inputs, products, weights, panel, j, place, part,
                         start + i * pixels, pixels, before + i, cut.count)  # fmt: skip


def _product(
    conv: WinogradPlan, inputs: Any, products: Any, weights: Any, panel: Expr, j: Expr,
    place: Expr, part: Expr, first: Expr, pixels: int, piece: Expr, pieces: int,
) -> None:  # fmt: skip
    """One register tile: some tiles of the image by a channel tile, over a part of the depth."""
    spec, block, vectors, width = conv.spec, conv.block, conv.vectors, conv.width
    full, rest = divmod(spec.icg, block)
    parts = conv.depth_parts
    origin = panel * (spec.icg * width)
    acc = T.alloc_buffer((pixels * width,), "float32", scope="local")

    def each_slot(body: Any) -> None:
        for p in range(pixels):
            for v in range(vectors):
                with T.vectorized(0, block) as lane:
                    body(
                        (p * vectors + v) * block + lane,
                        [j, place, (first + p) * width + v * block + lane],
                    )

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

    def x(cb: Expr, p: int, ci: Expr) -> Expr:
        return inputs[place, (cb * conv.cut.size + first + p) * block + ci]

    def four(cb: Expr, ci: Expr) -> None:
        base = origin + (cb * block + ci) * width
        if conv.by_lane:
            # As in `conv_direct`: LLVM would load two fours at once, and spill.
            barrier()
            multiply_by_lanes(acc, weights, base, width, block, range(pixels), vectors,
                              lambda p, lane: x(cb, p, ci + lane))  # fmt: skip
            return
        for c in range(4):
            step(cb, ci + c)

    def step(cb: Expr, ci: Expr) -> None:
        base = origin + (cb * block + ci) * width
        multiply(acc, weights, base, block, range(pixels), vectors, lambda p: x(cb, p, ci))

    if full:
        with loop(full // parts) as inner, loop(block // 4) as outer:
            cb = part * (full // parts) + inner
            if conv.streams:
                ahead = spec.icg // parts + cb * block + outer * 4
                for line in range(0, 4 * width // LINE, pieces):
                    prefetch(weights[origin + ahead * width + (line + piece) * LINE])
            four(cb, outer * 4)
    if rest:
        with T.If(part == parts - 1), T.Then():
            for ci in range(rest):
                step(tirx.const(full, "int32"), tirx.const(ci, "int32"))
    each_slot(lambda slot, place_: T.buffer_store(products, acc[slot], place_))


def _transform_output(
    conv: WinogradPlan, products: Any, n: Expr, row: Expr, column: Expr, channel: Expr, j: Expr,
    t: Expr, v: Expr, access: Accessors,
) -> None:  # fmt: skip
    """Aᵀ (…) A of one block of channels of one tile, the epilogue and the stores."""
    spec, m, block = conv.spec, conv.m, conv.block
    side = m + KERNEL - 1
    a_t, _, _ = transforms(m)

    def transform(put: Any) -> None:
        tile = T.alloc_buffer((side * side * block,), "float32", scope="local")
        for place in range(side * side):
            with T.vectorized(0, block) as lane:
                value = products[j, place, t * conv.width + v * block + lane]
                T.buffer_store(tile, value, [place * block + lane])
        _two_sided(a_t, tile, side, block, put)

    def store(i: int, k: int, lane: Expr, value: Expr) -> None:
        access.store(n, channel + lane, row + i, column + k, value)

    def store_some() -> None:
        out = T.alloc_buffer((m * m * block,), "float32", scope="local")

        def put(i: int, k: int, lane: Expr, value: Expr) -> None:
            T.buffer_store(out, value, [(i * m + k) * block + lane])

        transform(put)
        rows = tirx.min(m, spec.out_size[0] - row)
        columns = tirx.min(m, spec.out_size[1] - column)
        with loop(rows) as y, loop(columns) as x, T.vectorized(0, block) as lane:
            value = out[(y * m + x) * block + lane]
            access.store(n, channel + lane, row + y, column + x, value)

    if access.heavy:
        store_some()
        return
    with T.If(tirx.all(row + m <= spec.out_size[0], column + m <= spec.out_size[1])):
        with T.Then():
            transform(store)
        with T.Else():
            store_some()
