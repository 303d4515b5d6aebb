"""Softmax, log-softmax and layer norm: a task is a row, read while in cache; strided rows go along
beside their neighbours.

Layer norm takes the mean first and then the sum of squared deviations, which does not cancel the
way E[x²] − E[x]² does. Softmax subtracts the maximum (Goodfellow et al., "Deep Learning", 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt import graph as G
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import BufferSpec, View, each, f32, loop, only_if, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.generic import RowFold, identity
from graphopt.ops import math as M
from graphopt.ops.opdef import Expr, Index


def fold(count: int, lanes: int, kind: str, element: Callable[[Expr], Expr]) -> Expr:
    """Fold `element(0 … count-1)` with vectors.

    A maximum may miss NaN, which the sum of the exponentials then finds.
    """

    def join(a: Expr, b: Expr) -> Expr:
        return a + b if kind == "sum" else tirx.Select(a > b, a, b)

    row = RowFold(count, lanes, identity(kind, "float32"), join)
    row.add(element)
    return row.result()


def lower_softmax(request: Request) -> KernelSource | None:
    """Softmax and log-softmax over any axis, with vectors along the last one."""
    call = request.call
    shape = call.shape or (1,)
    axis = call["dim"] % len(shape)
    source = call["self"]
    log = "log_softmax" in str(call.node.target)
    lanes = request.target.isa.block
    flops = 5 * prod(shape)

    # The powers wait where the results go. An epilogue's operand may not lie there: `in_place` is
    # empty.
    keeps_powers = not log and request.spec(request.root) == BufferSpec(call.shape, "float32")

    def result(x: Expr, top: Expr, factor: Expr) -> Expr:
        return x - top - factor if log else M.exp_nonpositive(x - top) * factor

    def factor_of(total: Expr) -> Expr:
        return M.log_natural(total) if log else f32(1.0) / total

    def along_last(group: Group, out: View, places: Sequence[Expr]) -> None:
        """One row."""

        def at(i: Expr) -> Index:
            return (*places, i) if call.shape else ()

        def x(i: Expr) -> Expr:
            return group.read(source, at(i))

        top = fold(shape[axis], lanes, "max", x)

        def power(i: Expr) -> Expr:
            # Differences of -inf are NaN: a row with nothing in it is NaN in PyTorch, too.
            return M.exp_nonpositive(x(i) - top)

        def kept_power(i: Expr) -> Expr:
            out.store(at(i), power(i))
            return out.load(at(i))

        total = fold(shape[axis], lanes, "sum", kept_power if keeps_powers else power)
        factor = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(factor, factor_of(total), [0])

        def one(i: Expr) -> None:
            value = out.load(at(i)) * factor[0] if keeps_powers else result(x(i), top, factor[0])
            group.give(request.anchor, lambda _: value)
            out.store(at(i), group.read(request.root, at(i)))

        each(shape[axis], lanes, one)

    def across(group: Group, out: View, places: Sequence[Expr], first: Expr, width: int) -> None:
        """Neighbouring strided rows, one to a lane."""
        top, total = (T.alloc_buffer((width,), "float32", scope="local") for _ in range(2))

        def at(i: Expr, lane: Expr) -> Index:
            return (*places[:axis], i, *places[axis:], first + lane)

        def x(i: Expr, lane: Expr) -> Expr:
            return group.read(source, at(i, lane))

        for buffer, start in ((top, identity("max", "float32")), (total, f32(0.0))):
            with loop(width, "vectorized") as lane:
                T.buffer_store(buffer, start, [lane])
        with loop(shape[axis]) as i, loop(width, "vectorized") as lane:
            value = x(i, lane)
            T.buffer_store(top, tirx.Select(top[lane] > value, top[lane], value), [lane])
        with loop(shape[axis]) as i, loop(width, "vectorized") as lane:
            value = M.exp_nonpositive(x(i, lane) - top[lane])
            T.buffer_store(total, total[lane] + value, [lane])
        with loop(width, "vectorized") as lane:
            T.buffer_store(total, factor_of(total[lane]), [lane])
        with loop(shape[axis]) as i, loop(width, "vectorized") as lane:
            value = result(x(i, lane), top[lane], total[lane])
            group.give(request.anchor, lambda _: value)
            out.store(at(i, lane), group.read(request.root, at(i, lane)))

    outer = tuple(extent for i, extent in enumerate(shape[:-1]) if i != axis)
    full, rest = divmod(shape[-1], lanes)
    strided = axis != len(shape) - 1

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        if not strided:
            along_last(group, out, unflatten(task, outer))
            return
        *places, number = unflatten(task, (*outer, full + (rest > 0)))
        if full:
            with only_if(number < full if rest else None):
                across(group, out, places, number * lanes, lanes)
        if rest:
            with only_if(number == full if full else None), loop(rest) as i:
                across(group, out, places, full * lanes + i, 1)

    tasks = prod(outer) * (full + (rest > 0) if strided else 1)
    return KernelSource("softmax", max(1, tasks), flops, emit, request.reads)


def lower_layer_norm(request: Request) -> KernelSource | None:
    """Layer norm over the trailing `normalized_shape`."""
    call = request.call
    shape = call.shape
    tail = tuple(int(n) for n in call["normalized_shape"])
    lead = shape[: len(shape) - len(tail)]
    row = prod(tail)
    source, weight, bias = call["input"], call["weight"], call["bias"]
    lanes = request.target.isa.block

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        places = unflatten(task, lead)

        def at(i: Expr) -> Index:
            return (*places, *unflatten(i, tail))

        def x(i: Expr) -> Expr:
            return group.read(source, at(i))

        total = fold(row, lanes, "sum", x)
        mean = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(mean, total * f32(1.0 / row), [0])
        squares = fold(row, lanes, "sum", lambda i: (x(i) - mean[0]) * (x(i) - mean[0]))
        scale = T.alloc_buffer((1,), "float32", scope="local")
        spread = squares * f32(1.0 / row) + f32(float(call["eps"]))
        T.buffer_store(scale, f32(1.0) / tirx.sqrt(spread), [0])

        def one(i: Expr) -> None:
            value = (x(i) - mean[0]) * scale[0]
            if weight is not None:
                value = value * group.read(weight, tuple(unflatten(i, tail)))
            if bias is not None:
                value = value + group.read(bias, tuple(unflatten(i, tail)))
            group.give(request.anchor, lambda _: value)
            out.store(at(i), group.read(request.root, at(i)))

        each(row, lanes, one)

    flops = 8 * prod(G.shape(source))
    return KernelSource("layer_norm", max(1, prod(lead)), flops, emit, request.reads)
