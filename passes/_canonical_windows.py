"""Canonical form of sums over overlapping windows; part of the pass `canonicalize`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.graph import shape, value
from graphopt.passes._canonical import Handler, Outcome
from graphopt.passes._canonical_shapes import cut
from graphopt.passes._nodes import aten, rank
from graphopt.passes.rewrite import Editor


def _shifted(ed: Editor, x: fx.Node, axis: int, shift: int, size: int) -> fx.Node | None:
    """y[i] = x[i + shift] along an axis, i below `size`, 0 outside; None if all is outside."""
    start, end = max(shift, 0), min(size + shift, shape(x)[axis])
    if start >= end:
        return None
    part = cut(ed, x, axis, start, end)
    before, after = start - shift, size + shift - end
    if not before and not after:
        return part
    pads = [*[0, 0] * (rank(x) - 1 - axis), before, after]
    return ed.call(aten.constant_pad_nd.default, part, pads, 0.0)


def _fold(
    ed: Editor, x: fx.Node, taps: int, axis: int, size: int, step: tuple[int, int, int]
) -> fx.Node:
    """Add up the windows along `axis`, whose elements lie along an earlier axis `taps`, which goes.

    Element k of window o belongs at o·stride + k·dilation - padding. With the results of one
    remainder by the stride side by side, each element adds to them a shifted row of windows.
    """
    dilation, padding, stride = step
    count = -(-size // stride)
    sizes = list(shape(x)[:taps] + shape(x)[taps + 1 :])
    phases = []
    for phase in range(stride):
        total: fx.Node | None = None
        for tap in range(shape(x)[taps]):
            shift, off = divmod(phase + padding - tap * dilation, stride)
            if off:
                continue
            row = ed.call(aten.reshape.default, cut(ed, x, taps, tap, tap + 1), sizes)
            part = _shifted(ed, row, axis - 1, shift, count)
            if part is not None:
                total = part if total is None else ed.call(aten.add.Tensor, total, part)
        if total is None:
            zero = ed.constant("zero", torch.zeros([1] * len(sizes), dtype=value(x).dtype))
            total = ed.call(aten.expand.default, zero, [*sizes[: axis - 1], count, *sizes[axis:]])
        alone = [*sizes[: axis - 1], count, 1, *sizes[axis:]]
        phases.append(ed.call(aten.reshape.default, total, alone))
    sizes[axis - 1] = count * stride
    mixed = phases[0] if stride == 1 else ed.call(aten.cat.default, phases, axis)
    folded = ed.call(aten.reshape.default, mixed, sizes)
    return cut(ed, folded, axis - 1, 0, size)


def _col2im(ed: Editor, node: fx.Node, a: dict[str, Any]) -> Outcome:
    """fold → shifted sums of the windows' elements, along rows and then along columns."""
    x, kernel = a["self"], a["kernel_size"]
    steps = list(zip(a["dilation"], a["padding"], a["stride"], strict=True))
    windows = [
        (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for size, k, (dilation, padding, stride) in zip(
            a["output_size"], kernel, steps, strict=True
        )
    ]
    *lead, channels, _ = shape(x)
    apart = [*lead, channels // (kernel[0] * kernel[1]), *kernel, *windows]
    tall = ed.call(aten.reshape.default, x, apart)
    first = len(lead) + 1
    # Now […, C, kernel rows, kernel columns, window rows, window columns].
    rows = _fold(ed, tall, first, first + 2, a["output_size"][0], steps[0])
    return _fold(ed, rows, first, first + 2, a["output_size"][1], steps[1])


HANDLERS: dict[Any, Handler] = {aten.col2im.default: _col2im}
