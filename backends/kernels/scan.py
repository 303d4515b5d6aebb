"""Running sums and products along an axis: row by row, or strided rows side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, loop, only_if, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.generic import combine, identity
from graphopt.ops import OPS
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr
from graphopt.ops.scalar import TIR_NAMES, to_dtype


def lower_scan(request: Request) -> KernelSource:
    """`cumsum` and `cumprod`; totals of floats are kept in float64, as PyTorch does."""
    name = OPS[request.anchor.target].name
    fold = "prod" if name == "cumprod" else "sum"
    call = request.call
    shape = call.shape or (1,)
    axis = call["dim"] % len(shape)
    source: fx.Node = call["self"]
    lanes = request.target.isa.block
    stored = TIR_NAMES[call.dtype]
    kept = "float64" if stored == "float32" else stored
    across = axis != len(shape) - 1
    outer = tuple(extent for i, extent in enumerate(shape) if i != axis)
    full, rest = divmod(shape[-1], lanes)
    counts = (*outer[:-1], full + (rest > 0)) if across else outer

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        def rows(places: Sequence[Expr], width: int, other: Callable[[Expr], Expr]) -> None:
            """`width` of them, whose last index is `other` of the lane."""
            total = T.alloc_buffer((width,), kept, scope="local")
            kind = "vectorized" if width > 1 else "serial"

            def at(i: Expr, lane: Expr) -> tuple[Expr, ...]:
                if not call.shape:
                    return ()
                return (*places[:axis], i, *places[axis:], *([other(lane)] if across else []))

            with loop(width, kind) as lane:
                T.buffer_store(total, identity(fold, kept), [lane])
            with loop(shape[axis]) as i, loop(width, kind) as lane:
                x = to_dtype(group.read(source, at(i, lane)), call.dtype)
                so_far = share(combine(fold, total[lane], tirx.Cast(kept, x)))
                T.buffer_store(total, so_far, [lane])
                value = tirx.Cast(stored, so_far)
                group.give(request.anchor, lambda _: value)
                out.store(at(i, lane), group.read(request.root, at(i, lane)))

        if not across:
            rows(unflatten(task, outer), 1, lambda lane: lane)
            return
        *places, number = unflatten(task, counts)
        if full:
            with only_if(number < full if rest else None):
                rows(places, lanes, lambda lane: number * lanes + lane)
        if rest:
            with only_if(number == full if full else None), loop(rest) as column:
                rows(places, 1, lambda lane: full * lanes + column)

    return KernelSource(name, max(1, prod(counts)), prod(shape), emit, request.reads)
