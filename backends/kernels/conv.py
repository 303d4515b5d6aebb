"""Lowers `convolution` to its generators: direct, depthwise, and the fold that always applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from torch import fx

from graphopt.backends.kernels import depthwise, winograd, winograd_plan
from graphopt.backends.kernels.base import (
    KernelSource,
    Request,
    collapse,
    collapsible,
    same_place,
)
from graphopt.backends.kernels.builder import View
from graphopt.backends.kernels.conv_direct import Accessors, ConvSpec
from graphopt.backends.kernels.conv_product import conv_product
from graphopt.backends.kernels.fusion import Group
from graphopt.ops.opdef import Call, Expr, Index
from graphopt.program.layout import PLAIN, block_of


def spec_of(call: Call) -> ConvSpec | None:
    """The convolution as rows and columns; None for 3-D and transposed ones."""
    if call["transposed"]:
        return None
    size, out, weight = call.shape_of("input"), call.shape, call.shape_of("weight")
    rank = len(size) - 2
    if rank > 2:
        return None

    def two(values: Any, fill: int) -> tuple[int, int]:
        values = [int(v) for v in values]
        values = values * rank if len(values) == 1 else values
        return (fill, values[0]) if rank == 1 else (values[0], values[1])

    groups = int(call["groups"])
    return ConvSpec(
        batch=size[0],
        groups=groups,
        icg=weight[1],
        ocg=weight[0] // groups,
        in_size=two(size[2:], 1),
        out_size=two(out[2:], 1),
        kernel=two(weight[2:], 1),
        stride=two(call["stride"], 1),
        padding=two(call["padding"], 0),
        dilation=two(call["dilation"], 1),
    )


def _swapped(spec: ConvSpec) -> ConvSpec:
    """Rows and columns exchanged."""
    flip = {
        name: getattr(spec, name)[::-1]
        for name in ("in_size", "out_size", "kernel", "stride", "padding", "dilation")
    }
    return replace(spec, **flip)


def _place(rank: int, swapped: bool) -> Callable[[Expr, Expr, Expr, Expr], Index]:
    """The tensor's index of (n, channel, row, column) of the spec."""

    def index(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
        if rank == 3:
            return (n, c, w)
        return (n, c, w, h) if swapped else (n, c, h, w)

    return index


def _one_row(spec: ConvSpec) -> ConvSpec:
    """A pointwise convolution as a single row of pixels."""
    pixels = (1, spec.in_size[0] * spec.in_size[1])
    return replace(spec, in_size=pixels, out_size=pixels)


def lower_direct(request: Request) -> KernelSource | None:
    """Direct convolution; see `conv_direct`."""
    call = request.call
    spec = spec_of(call)
    weight = request.constant(call["weight"])
    if spec is None or weight is None:
        return None
    rank = len(call.shape)
    spatial = tuple(range(2, rank))
    pointwise = (
        spec.kernel == (1, 1) and spec.stride == (1, 1) and spec.padding == (0, 0) and rank == 4
    )
    one_row = pointwise and collapsible(request, spatial)
    column = rank == 4 and spec.in_size[1] == 1 and spec.kernel[1] == 1 and not one_row
    if one_row:
        spec = _one_row(spec)
    elif column:
        spec = _swapped(spec)
    source = call["input"]
    blocked = request.spec(source).layout != PLAIN
    product = conv_product(spec, weight, request.target, may_gather=blocked)
    far = prod(call.shape_of("input")) * 4 > request.target.l2_bytes // 2
    out_spec = request.spec(request.root)
    block = block_of(out_spec.layout)
    in_blocks = block is not None and (spec.groups == 1 or spec.ocg % block == 0)

    index = _place(rank, column)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        x = views[source]
        if one_row:
            x = collapse(x, call.shape, spatial)
            out = collapse(out, call.shape, spatial)
            group = group.with_views(lambda view: collapse(view, call.shape, spatial))
        store = epilogue_store(request, group, out, index)
        access = Accessors(
            x=lambda n, c, h, w: x.load(index(n, c, h, w)),
            store=store,
            vector=in_blocks,
            padded=in_blocks and spec.groups == 1,
            heavy=request.heavy_epilogue,
            ahead=one_row and blocked and far,
        )
        product.emit(task, constants[0], scratch, access)

    reads = request.reads_without(call["weight"])
    return KernelSource(product.origin, product.tasks, spec.flops, emit, reads, (product.weights,),
                        scratch=product.scratch,
                        in_place=same_place(request, taken=[source]))  # fmt: skip


def lower_winograd(request: Request) -> KernelSource | None:
    """3×3 with fewer products, where that is estimated to pay; see `winograd`."""
    call = request.call
    spec = spec_of(call)
    weight = request.constant(call["weight"])
    if spec is None or weight is None or not request.winograd:
        return None
    if not winograd_plan.supports(spec):
        return None
    source = call["input"]
    layout = request.spec(source).layout
    if layout == PLAIN or request.spec(request.root).layout != layout:
        return None
    isa, l2_bytes = request.target.isa, request.target.l2_bytes
    best = winograd_plan.plan(spec, isa, l2_bytes)
    if winograd_plan.cost(best, isa, l2_bytes) >= winograd_plan.direct_cost(spec, isa, l2_bytes):
        return None
    packed = winograd.pack_weights(weight, best)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        x = views[source]
        access = Accessors(
            x=lambda n, c, h, w: x.load((n, c, h, w)),
            store=epilogue_store(request, group, out, lambda n, c, h, w: (n, c, h, w)),
            vector=True,
            padded=True,
            heavy=True,
        )
        winograd.emit(best, task, constants[0], scratch, access)

    reads = request.reads_without(call["weight"])
    return KernelSource(best.describe(), best.tasks, spec.flops, emit, reads, (packed,),
                        scratch=best.scratch,
                        in_place=same_place(request, taken=[source]))  # fmt: skip


def epilogue_store(request: Request, group: Group, out: View, index: Any) -> Any:
    """A function that adds the bias, runs the epilogue and stores one element."""
    bias = request.call["bias"]

    def store(n: Expr, c: Expr, h: Expr, w: Expr, value: Expr) -> None:
        place = index(n, c, h, w)
        if bias is not None:
            value = value + group.read(bias, (c,))
        group.give(request.anchor, lambda _: value)
        out.store(place, group.read(request.root, place))

    return store


def lower_depthwise(request: Request) -> KernelSource | None:
    """One filter per channel; see `depthwise`. Input and output must be blocked alike."""
    call = request.call
    spec = spec_of(call)
    weight = request.constant(call["weight"])
    if spec is None or weight is None or spec.icg != 1 or spec.ocg != 1:
        return None
    source = call["input"]
    layout = request.spec(source).layout
    if layout == PLAIN or request.spec(request.root).layout != layout:
        return None
    rank = len(call.shape)
    column = rank == 4 and spec.in_size[1] == 1 and spec.kernel[1] == 1
    spec = _swapped(spec) if column else spec
    plan = depthwise.plan(spec, request.target.isa)
    if plan is None:
        return None
    packed = depthwise.pack_weights(weight, plan)

    index = _place(rank, column)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        x = views[source]
        access = Accessors(
            x=lambda n, c, h, w: x.load(index(n, c, h, w)),
            store=epilogue_store(request, group, out, index),
            vector=True,
            padded=True,
            heavy=request.heavy_epilogue,
        )
        depthwise.emit(plan, task, constants[0], access)

    reads = request.reads_without(call["weight"])
    return KernelSource(plan.describe(), plan.tasks, spec.flops, emit, reads, (packed,),
                        in_place=same_place(request, taken=[source]))  # fmt: skip
