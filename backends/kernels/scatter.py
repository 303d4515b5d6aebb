"""Copies of which elements or slices are replaced or added to, at places known at run time."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx
from tvm import tirx

from graphopt import graph as G
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, each, loop, only_if, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.generic import combine
from graphopt.ops import OPS
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr
from graphopt.ops.scalar import to_dtype
from graphopt.ops.shape import wrapped

_FOLDS = {"sum": "sum", "prod": "prod", "amax": "max", "amin": "min"}


def _fold(request: Request) -> str | None:
    """How what goes to a place is joined with what is there, None if it replaces it."""
    name = OPS[request.anchor.target].name
    if name == "index_add":
        return "sum"
    return _FOLDS[request.call["reduce"]] if name == "scatter_reduce" else None


def lower_scatter(request: Request) -> KernelSource:
    """`scatter`, `index_copy` and their kin: a task has all places that differ along the axis only.

    Of what goes to the same place, the last stays; `scatter_reduce` and `index_add` fold it all.
    """
    call = request.call
    shape = call.shape
    axis = call["dim"] % len(shape)
    index: fx.Node = call["index"]
    slices = OPS[request.anchor.target].name in ("index_copy", "index_add")
    fold = _fold(request)
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

        def change(i: Expr, after: list[Expr], value: Expr) -> None:
            value = share(to_dtype(value, call.dtype))
            if fold is not None:
                # No epilogue has changed what is there: see `partition`.
                value = share(combine(fold, share(out.load((*before, i, *after))), value))
            store(i, after, value)

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
                    change(place, after, group.read(source, (*before, k, *after)))

                each(prod(inner), lanes, replace)
                return
            with loop(prod(given[axis + 1 :])) as number:
                after = unflatten(number, given[axis + 1 :])
                at = (*before, k, *after)
                place = wrapped(group.read(index, at), shape[axis])
                value = group.read(source, at) if source is not None else call["value"]
                change(place, after, value)

    return KernelSource("scatter", max(1, prod(outer)), 2 * prod(shape), emit, request.reads)
