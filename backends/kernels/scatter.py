"""Copies of which some elements or slices are replaced, at places known at run time."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx
from tvm import tirx

from graphopt import graph as G
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, each, loop, only_if, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.ops import OPS
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr
from graphopt.ops.scalar import to_dtype
from graphopt.ops.shape import wrapped


def lower_scatter(request: Request) -> KernelSource:
    """`scatter` and `index_copy`: a task has all places that differ along the axis only.

    Of what goes to the same place, the last stays.
    """
    call = request.call
    shape = call.shape
    axis = call["dim"] % len(shape)
    index: fx.Node = call["index"]
    slices = OPS[request.anchor.target].name == "index_copy"
    source = call.arguments.get("source", call.arguments.get("src"))
    given = shape if slices else G.shape(index)
    count = G.shape(index)[0] if slices and G.shape(index) else 1 if slices else given[axis]
    outer, inner = shape[:axis], shape[axis + 1 :]
    lanes = request.target.isa.block

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        before = unflatten(task, outer)

        def store(i: Expr, after: list[Expr], value: Expr) -> None:
            place = (*before, i, *after)
            group.give(request.anchor, lambda _: value)
            out.store(place, group.read(request.root, place))

        def copy(number: Expr) -> None:
            i, *after = unflatten(number, shape[axis:])
            store(i, after, group.read(call["self"], (*before, i, *after)))

        each(prod(shape[axis:]), lanes, copy)
        # Where the index has fewer places than the result, the rest stays as it is.
        inside = [place < most for place, most, size in zip(before, given, outer, strict=False)
                  if most < size]  # fmt: skip
        with only_if(tirx.all(*inside) if inside else None), loop(count) as k:
            if slices:
                place = wrapped(group.read(index, (k,) if G.shape(index) else ()), shape[axis])

                def replace(number: Expr) -> None:
                    after = unflatten(number, inner)
                    value = group.read(source, (*before, k, *after))
                    store(place, after, to_dtype(value, call.dtype))

                each(prod(inner), lanes, replace)
                return
            with loop(prod(given[axis + 1 :])) as number:
                after = unflatten(number, given[axis + 1 :])
                at = (*before, k, *after)
                place = wrapped(group.read(index, at), shape[axis])
                value = group.read(source, at) if source is not None else call["value"]
                store(place, after, share(to_dtype(value, call.dtype)))

    return KernelSource("scatter", max(1, prod(outer)), 2 * prod(shape), emit, request.reads)
