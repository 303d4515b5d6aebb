"""Lowers every group without a generator of its own to the generic schedule."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx
from tvm import tirx

from graphopt import graph as G
from graphopt.backends.kernels import generic
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.turned import emit_turned, find_turned
from graphopt.ops import OPS
from graphopt.ops.opdef import Expr, Index, Kind, Reduction
from graphopt.ops.scalar import TIR_NAMES, to_dtype
from graphopt.program.layout import PLAIN, block_of, physical_shape


def _lanes(request: Request) -> int:
    return request.target.isa.block


def lower_map(request: Request) -> KernelSource:
    """Elementwise and injective groups."""
    out = request.spec(request.root)
    elementwise = all(OPS[node.target].kind is Kind.ELEMENTWISE for node in request.nodes)
    flat = elementwise and all(
        (request.spec(node).shape, request.spec(node).layout) == (out.shape, out.layout)
        for node in request.reads
    )
    # Nodes inside with a smaller shape are broadcast: the flat index does not fit them.
    flat = flat and all(G.shape(node) == out.shape for node in request.nodes)
    in_place = [node for node in request.reads if request.spec(node) == out] if elementwise else []
    flops = prod(out.shape) * sum(
        OPS[node.target].kind is Kind.ELEMENTWISE for node in request.nodes
    )
    count = prod(physical_shape(out.shape, out.layout))
    # Nothing lies behind the last channel of a plain image where the last block has more of them.
    past_the_end = (
        block_of(out.layout) is not None
        and out.shape[1] % _lanes(request) > 0
        and not elementwise
        and any(n.op != "get_attr" and request.spec(n).layout == PLAIN for n in request.reads)
    )

    turned = find_turned(request)

    def element(group: Group, index: Index) -> Expr:
        if past_the_end:
            index = (index[0], tirx.min(index[1], out.shape[1] - 1), *index[2:])
        return group.read(request.root, index)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], target: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        if flat:
            group = group.flattened()
            generic.emit_flat(
                task, target.flat(), lambda index: group.read(request.root, index), _lanes(request)
            )
            return
        if turned is not None:
            emit_turned(turned, request.root, task, target, group)
            return
        generic.emit_map(task, target, lambda index: element(group, index), _lanes(request))

    if flat:
        tasks, origin = generic.flat_tasks(count), "map flat"
    elif turned is not None:
        tasks, origin = turned.tasks, "map turned"
    else:
        tasks, origin = generic.tasks_of(generic.space_of(out.shape, out.layout)), "map"
    return KernelSource(origin, tasks, flops, emit, request.reads, in_place=in_place)


def lower_reduction(request: Request) -> KernelSource:
    """A reduction with what is fused before and after it."""
    out = request.spec(request.root)
    call = request.call
    op = OPS[request.anchor.target]
    operands = call.operands(op.operands)
    source = operands[0]
    space = generic.space_of(out.shape, out.layout)
    # Truth values are folded as bytes: TVM has no least bool.
    dtype = "uint8" if call.dtype == torch.bool else TIR_NAMES[call.dtype]
    assert op.compute is not None
    probe: Reduction = op.compute(call, *(lambda index: index for _ in operands))
    contiguous = _runs_along_last_axis(request, probe, source)
    flops = prod(call.shape) * prod(probe.extents)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], target: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        assert op.compute is not None
        reduction: Reduction = op.compute(call, *(group.reader(x) for x in operands))

        def element(index: Index, box: Index) -> Expr:
            value = reduction.element(index, box)
            return tirx.Cast(dtype, value) if call.dtype == torch.bool else value

        def epilogue(index: Index, value: Expr) -> Expr:
            value = to_dtype(value, call.dtype)
            group.give(request.anchor, lambda _: value)
            return group.read(request.root, index)

        generic.emit_reduction(
            task,
            target,
            replace(reduction, element=element),
            epilogue,
            dtype,
            _lanes(request),
            contiguous,
        )

    origin = "reduce row" if contiguous else "reduce"
    return KernelSource(origin, generic.tasks_of(space), flops, emit, request.reads)


def _runs_along_last_axis(request: Request, reduction: Reduction, source: fx.Node) -> bool:
    """Whether the reduced axes end with the operand's contiguous one.

    An operand that is computed inside has the layout of what it is computed from.
    """
    shape = G.shape(source)
    if reduction.axes is None or len(shape) - 1 not in reduction.axes:
        return False
    return request.spec(source).layout == PLAIN and shape[-1] > 1
