"""Max and average pooling of blocked images: windows of several pixels at a time.

As in `depthwise`, a task computes some rows of one block of channels, pixels whose windows reach
over the left or right border have code of their own, and the pixels of a tile have accumulators of
their own, whose folds do not wait for one another.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels import depthwise
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, unflatten
from graphopt.backends.kernels.conv_direct import ConvSpec, Segment, kernel_rows
from graphopt.backends.kernels.depthwise import DepthwisePlan
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
    if request.heavy_epilogue:
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

        def store(index: tuple[Expr, ...], value: Expr) -> None:
            value = reduction.finish(value, index)
            group.give(request.anchor, lambda _: value)
            out.store(index, group.read(request.root, index))

        _Pool(plan, reduction.combine, group, source, store).emit(task)

    flops = spec.flops // 2
    return KernelSource(
        f"pool {plan.describe().split()[1]}", plan.tasks, flops, emit, request.reads
    )


class _Pool:
    """What one task emits."""

    def __init__(
        self, plan: DepthwisePlan, kind: str, group: Group, source: fx.Node, store: Any
    ) -> None:
        self.plan, self.kind, self.group, self.source, self.store = plan, kind, group, source, store

    def emit(self, task: Expr) -> None:
        plan, spec = self.plan, self.plan.spec
        blocks = -(-spec.groups // plan.block)
        bands = -(-spec.out_size[0] // plan.rows)
        n, cb, band = unflatten(task, [spec.batch, blocks, bands])
        first = band * plan.rows
        count: Expr = plan.rows
        if spec.out_size[0] % plan.rows:
            count = tirx.min(count, spec.out_size[0] - first)
        with T.serial(0, count) as r:
            for segment in plan.segments:
                with T.serial(0, segment.last - segment.first) as i:
                    column = segment.start + i * segment.pixels
                    self._tile(segment, n, cb, first + r, column)

    def _tile(self, segment: Segment, n: Expr, cb: Expr, oh: Expr, column: Expr) -> None:
        spec, block = self.plan.spec, self.plan.block
        acc = T.alloc_buffer((segment.pixels * block,), "float32", scope="local")
        for p in range(segment.pixels):
            with T.vectorized(0, block) as lane:
                T.buffer_store(acc, identity(self.kind, "float32"), [p * block + lane])
        row = oh * spec.stride[0] - spec.padding[0]
        low, high = kernel_rows(spec, row)
        left = column * spec.stride[1] - spec.padding[1]
        with T.serial(0, high - low) as step:
            ih = row + (low + step) * spec.dilation[0]
            for kw in range(spec.kernel[1]):
                for p in range(segment.pixels):
                    if (p, kw) in segment.skip:
                        continue
                    iw = left + p * spec.stride[1] + kw * spec.dilation[1]
                    with T.vectorized(0, block) as lane:
                        x = self.group.read(self.source, (n, cb * block + lane, ih, iw))
                        slot = p * block + lane
                        T.buffer_store(acc, combine(self.kind, acc[slot], x), [slot])
        for p in range(segment.pixels):
            with T.vectorized(0, block) as lane:
                self.store((n, cb * block + lane, oh, column + p), acc[p * block + lane])
