"""Linear resizing of images and of lines, one axis after the other.

A row of the input is stretched to the output's width once and kept; output rows are sums of two
such rows, side by side in memory. An output element so costs one multiply-add more than its store
where images grow, and no address is computed for it: places and shares are tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, each, f32, loop, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.ops.math import share
from graphopt.ops.opdef import Call, Expr
from graphopt.program.layout import PLAIN, block_of

_TASK = 16384
"""Elements of a task, about: stretching one row more for each band of rows is little beside it."""


@dataclass(frozen=True)
class _Axis:
    """Where the places of an output's axis lie in the input.

    Attributes:
        low: the input's place before each, int32.
        high: the one behind it, int32; at the border the same.
        part: the share of `high`, float32; that of `low` is the rest.
    """

    low: npt.NDArray[np.int32]
    high: npt.NDArray[np.int32]
    part: npt.NDArray[np.float32]


def _axis(call: Call, axis: int) -> _Axis:
    """As PyTorch computes them, in float32."""
    size, out = call.shape_of("input")[axis], call.shape[axis]
    factors = call.arguments.get("scale_factors")
    place = np.arange(out, dtype=np.float32)
    if call["align_corners"]:
        source = place * np.float32((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        # An axis that keeps its size is copied, whatever its factor.
        step = size / out if factors is None or size == out else 1.0 / float(factors[axis - 2])
        half = np.float32(0.5)
        source = np.maximum((place + half) * np.float32(step) - half, np.float32(0.0))
    low = np.minimum(source.astype(np.int32), size - 1)
    high = np.minimum(low + 1, size - 1)
    return _Axis(low, high, source - low.astype(np.float32))


def _stretched(rows: _Axis, band: int) -> npt.NDArray[np.int32]:
    """For each output row the first input row to stretch before it, and how many.

    Two are kept, an even one and an odd one; a band of output rows begins with none.
    """
    kept: dict[int, int] = {}
    found = []
    for row, (low, high) in enumerate(zip(rows.low.tolist(), rows.high.tolist(), strict=True)):
        if row % band == 0:
            kept = {}
        new = [r for r in range(low, high + 1) if kept.get(r % 2) != r]
        kept |= {r % 2: r for r in new}
        found.append((new[0] if new else 0, len(new)))
    return np.array(found, np.int32)


def lower_resize(request: Request) -> KernelSource:
    """`upsample_bilinear2d` and `upsample_linear1d` between any layouts."""
    call = request.call
    source: fx.Node = call["input"]
    out_spec = request.spec(request.root)
    is_line = len(call.shape) == 3
    n, channels, *_, width = call.shape
    height = 1 if is_line else call.shape[2]
    line = _Axis(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.float32))
    rows, columns = line if is_line else _axis(call, 2), _axis(call, len(call.shape) - 1)
    block = block_of(out_spec.layout) or 0
    row_length = width * (block or 1)
    band = min(height, max(4, _TASK // row_length))
    bands = -(-height // band)
    new = _stretched(rows, band)
    constants = [
        np.concatenate((rows.low, rows.high, new[:, 0], new[:, 1])).astype(np.int32),
        rows.part,
        np.concatenate((columns.low, columns.high)),
        columns.part,
    ]
    lanes = request.target.isa.lanes()
    # Nothing lies behind the last channel of a plain image.
    last = channels - 1 if block and request.spec(source).layout == PLAIN else None

    def emit(
        task: Expr, views: dict[fx.Node, View], tables: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        image, c, part = unflatten(task, [n, -(-channels // (block or 1)), bands])
        row_table, row_part, column_table, column_part = tables
        kept = T.decl_buffer((2 * row_length,), "float32", data=scratch)

        def place(lane: Expr, h: Expr, w: Expr) -> tuple[Expr, ...]:
            channel = c * block + lane if block else c
            return (image, channel, w) if is_line else (image, channel, h, w)

        def read(lane: Expr, h: Expr, w: Expr) -> Expr:
            index = place(lane, h, w)
            if last is not None:
                index = (index[0], tirx.min(index[1], last), *index[2:])
            return group.read(source, index)

        def mixed(low: Expr, high: Expr, part: Expr) -> Expr:
            return low * (f32(1.0) - part) + high * part

        def stretch(row: Expr) -> None:
            begin = share(row % 2 * row_length)

            def one(w: Expr, lane: Expr, low: Expr, high: Expr, part: Expr) -> None:
                value = mixed(read(lane, row, low), read(lane, row, high), part)
                T.buffer_store(kept, value, [begin + (w * block + lane if block else w)])

            def at(w: Expr) -> tuple[Expr, Expr, Expr]:
                low, high = (share(column_table[i * width + w]) for i in range(2))
                return low, high, share(column_part[w])

            if block:
                with loop(width) as w:
                    shared = at(w)
                    with T.vectorized(0, block) as lane:
                        one(w, lane, *shared)
            else:
                each(width, lanes, lambda w: one(w, 0, *at(w)))

        def finish(row: Expr, w: Expr, lane: Expr, low: Expr, high: Expr, part: Expr) -> None:
            offset = w * block + lane if block else w
            value = mixed(kept[low + offset], kept[high + offset], part)
            index = place(lane, row, w)
            group.give(request.anchor, lambda _: value)
            out.store(index, group.read(request.root, index))

        count: Expr = band if height % band == 0 else tirx.min(band, height - part * band)
        with T.serial(0, count) as i:
            row = part * band + i
            with T.serial(0, row_table[3 * height + row]) as k:
                stretch(share(row_table[2 * height + row] + k))
            low, high = (share(row_table[j * height + row] % 2 * row_length) for j in range(2))
            share_of_high = share(row_part[row])
            if block:
                with loop(width) as w, T.vectorized(0, block) as lane:
                    finish(row, w, lane, low, high, share_of_high)
            else:
                each(width, lanes, lambda w: finish(row, w, 0, low, high, share_of_high))

    tasks = n * -(-channels // (block or 1)) * bands
    stretched = int(new[:, 1].sum()) * width * channels * n
    return KernelSource(
        "resize", tasks, 3 * (stretched + prod(call.shape)), emit, request.reads, constants,
        scratch=8 * row_length,
    )  # fmt: skip
