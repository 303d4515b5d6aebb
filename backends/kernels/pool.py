"""Max and average pooling of blocked images: the windows of `depthwise` with another fold.

The pixels of a tile have accumulators of their own, whose folds do not wait for one another.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.backends.kernels import depthwise
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View
from graphopt.backends.kernels.conv_spec import Accessors, ConvSpec
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.generic import combine, identity
from graphopt.ops import OPS
from graphopt.ops.opdef import Expr, Reduction
from graphopt.ops.reduce import window_of
from graphopt.program.layout import PLAIN


def lower_pool(request: Request) -> KernelSource | None:
    """Pooling between tensors in the same blocks; the generic reduction does the rest."""
    call = request.call
    source: fx.Node = call["self"]
    layout = request.spec(source).layout
    if layout == PLAIN or request.spec(request.root).layout != layout or len(call.shape) != 4:
        return None
    n, channels, height, width = call.shape
    kernel, stride, padding, dilation = window_of(call)
    *_, rows, columns = call.shape_of("self")
    spec = ConvSpec(n, channels, 1, 1, (rows, columns), (height, width), kernel, stride, padding,
                    dilation)  # fmt: skip
    plan = depthwise.plan(spec, request.target.isa)
    if plan is None:
        return None
    op = OPS[request.anchor.target]

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        assert op.compute is not None
        reduction: Reduction = op.compute(call, group.reader(source))

        kind = reduction.combine

        def store(n: Expr, c: Expr, h: Expr, w: Expr, value: Expr) -> None:
            index = (n, c, h, w)
            value = reduction.finish(value, index)
            group.give(request.anchor, lambda _: value)
            out.store(index, group.read(request.root, index))

        def fold(acc: Expr, x: Expr, cb: Expr, kh: Expr, kw: int, lane: Expr) -> Expr:
            return combine(kind, acc, x)

        access = Accessors(
            x=lambda n, c, h, w: group.read(source, (n, c, h, w)),
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
