"""Softmax, log-softmax and layer norm over the last axes: a task is a row, read while in cache.

Layer norm takes the mean first and then the sum of squared deviations, which does not cancel the
way E[x²] − E[x]² does. Softmax subtracts the maximum (Goodfellow et al., "Deep Learning", 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt import graph as G
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, each, f32, loop, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.generic import identity
from graphopt.ops import math as M
from graphopt.ops.opdef import Expr, Index


def fold(count: int, lanes: int, kind: str, element: Callable[[Expr], Expr]) -> Any:
    """Fold `element(0 … count-1)` with vectors; gives a one-element buffer holding the result.

    A maximum may miss NaN, which the sum of the exponentials then finds.
    """

    def join(a: Expr, b: Expr) -> Expr:
        return a + b if kind == "sum" else tirx.Select(a > b, a, b)

    acc = T.alloc_buffer((lanes,), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    start = identity(kind, "float32")
    with T.vectorized(0, lanes) as lane:
        T.buffer_store(acc, start, [lane])
    T.buffer_store(total, start, [0])
    full, rest = divmod(count, lanes)
    if full:
        with loop(full) as i, T.vectorized(0, lanes) as lane:
            T.buffer_store(acc, join(acc[lane], element(i * lanes + lane)), [lane])
    if rest:
        with loop(rest) as i:
            T.buffer_store(total, join(total[0], element(full * lanes + i)), [0])
    for lane in range(lanes):
        T.buffer_store(total, join(total[0], acc[lane]), [0])
    return total


def lower_softmax(request: Request) -> KernelSource | None:
    """Softmax and log-softmax over any axis; along the last one with vectors."""
    call = request.call
    shape = call.shape
    if not shape:
        shape = (1,)
    axis = call["dim"] % len(shape)
    source = call["self"]
    log = "log_softmax" in str(call.node.target)
    lanes = request.target.isa.block
    outer = tuple(extent for i, extent in enumerate(shape) if i != axis)
    row = shape[axis]
    # Strided rows are folded one element at a time: they are rare and short.
    width = lanes if prod(shape[axis + 1 :]) == 1 else 1

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        places = unflatten(task, outer)

        def at(i: Expr) -> Index:
            return (*places[:axis], i, *places[axis:]) if call.shape else ()

        def x(i: Expr) -> Expr:
            return group.read(source, at(i))

        top = fold(row, width, "max", x)
        # Differences of -inf are NaN: a row with nothing in it is NaN in PyTorch, too.
        total = fold(row, width, "sum", lambda i: M.exp_nonpositive(x(i) - top[0]))
        factor = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(factor, M.log_natural(total[0]) if log else f32(1.0) / total[0], [0])

        def one(i: Expr) -> None:
            moved = x(i) - top[0]
            value = moved - factor[0] if log else M.exp_nonpositive(moved) * factor[0]
            group.give(request.anchor, lambda _: value)
            out.store(at(i), group.read(request.root, at(i)))

        each(row, width, one)

    flops = 5 * prod(shape)
    return KernelSource("softmax", max(1, prod(outer)), flops, emit, request.reads)


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
        T.buffer_store(mean, total[0] * f32(1.0 / row), [0])
        squares = fold(row, lanes, "sum", lambda i: (x(i) - mean[0]) * (x(i) - mean[0]))
        scale = T.alloc_buffer((1,), "float32", scope="local")
        spread = squares[0] * f32(1.0 / row) + f32(float(call["eps"]))
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
