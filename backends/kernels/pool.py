"""Max and average pooling of blocked images: the windows of `depthwise` with another fold.

The pixels of a tile have accumulators of their own, whose folds do not wait for one another.
Windows of frames have the rows of all their frames side by side, as depthwise convolutions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from tvm import tirx

from graphopt.backends.kernels import depthwise
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View
from graphopt.backends.kernels.conv_frames import Place, side_by_side
from graphopt.backends.kernels.conv_spec import Accessors, ConvSpec
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.generic import combine, identity
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Expr, Reader, Reduction
from graphopt.ops.reduce import window_of
from graphopt.program.layout import PLAIN


def lower_pool(request: Request) -> KernelSource | None:
    """Pooling between tensors in the same blocks; the generic reduction does the rest."""
    call = request.call
    source: fx.Node = call["self"]
    layout = request.spec(source).layout
    windows = window_of(call)
    rank = len(windows[0]) + 2
    if layout == PLAIN or request.spec(request.root).layout != layout or len(call.shape) != rank:
        return None
    op = OPS[request.anchor.target]
    assert op.compute is not None
    probe: Reduction = op.compute(call, lambda index: index)
    kind = probe.combine
    spec, inside, index_of = _as_images(call, windows, kind)
    plan = depthwise.plan(spec, request.target.isa)
    if plan is None:
        return None

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        def store(n: Expr, c: Expr, h: Expr, w: Expr, value: Expr) -> None:
            index = index_of(n, c, h, w)
            value = probe.finish(value, index)
            group.give(request.anchor, lambda _: value)
            out.store(index, group.read(request.root, index))

        def fold(acc: Expr, x: Expr, cb: Expr, kh: Expr, kw: int, lane: Expr) -> Expr:
            return combine(kind, acc, x)

        access = Accessors(
            x=lambda n, c, h, w: inside(group.reader(source), n, c, h, w),
            store=store,
            vector=True,
            padded=True,
            heavy=request.heavy_epilogue,
        )
        depthwise.emit_windows(plan, task, identity(kind, "float32"), fold, access)

    flops = spec.flops // 2
    return KernelSource(
        f"pool {plan.describe().split()[1]}", plan.tasks, flops, emit, request.reads
    )


Inside = Callable[[Reader, Expr, Expr, Expr, Expr], Expr]
"""`(reader of the input, n, channel, row, column)` of the spec → the element."""


def _as_images(
    call: Call, windows: Sequence[Sequence[int]], kind: str
) -> tuple[ConvSpec, Inside, Place]:
    """The pooling as one of images, and where that reads and stores."""
    n, channels, *out = call.shape
    size = call.shape_of("self")[2:]
    if len(size) == 2:
        by_two = ((each[0], each[1]) for each in windows)
        spec = ConvSpec(n, channels, 1, 1, (size[0], size[1]), (out[0], out[1]), *by_two)
        return spec, lambda read, *index: read(index), lambda *index: index
    kernel, stride, padding, dilation = windows
    spec, place, index = side_by_side(
        n, channels, size[2], out, kernel, stride, padding[2], dilation
    )

    def inside(read: Reader, n: Expr, c: Expr, h: Expr, w: Expr) -> Expr:
        at = [value - padding[axis] for axis, value in enumerate(place(h))]
        there: list[Expr] = []
        for axis in range(2):
            last = (kernel[axis] - 1) * dilation[axis] + (out[axis] - 1) * stride[axis]
            if padding[axis] or last - padding[axis] >= size[axis]:
                there += [at[axis] >= 0, at[axis] < size[axis]]
                at[axis] = tirx.max(tirx.min(at[axis], size[axis] - 1), 0)
        value = read((n, c, *at, w))
        return tirx.Select(tirx.all(*there), value, identity(kind, "float32")) if there else value

    return spec, inside, index
