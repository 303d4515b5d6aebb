"""Any convolution as a plain fold over its taps: 3-D, transposed, and what the others refuse.

A transposed convolution with dilation 1 only visits the taps that meet its output element: kernel
places congruent to the output place modulo the stride.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx
from tvm import tirx

from graphopt import graph as G
from graphopt.backends.kernels import generic
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, f32, flatten
from graphopt.backends.kernels.fusion import Group
from graphopt.ops.opdef import Call, Expr, Index, Reduction


def pack_weights(weight: npt.NDArray[Any], call: Call, block: int) -> npt.NDArray[np.float32]:
    """Weights as `(icg, *kernel, output channels padded to the block)`, flat."""
    groups = int(call["groups"])
    if call["transposed"]:
        icg, ocg = weight.shape[0] // groups, weight.shape[1]
        grouped = weight.reshape(groups, icg, ocg, *weight.shape[2:])
        by_input = np.moveaxis(grouped, 1, 0)
        by_input = np.moveaxis(by_input, (1, 2), (-2, -1))
        packed = by_input.reshape(icg, *weight.shape[2:], groups * ocg)
    else:
        packed = np.moveaxis(weight, 0, -1)
    channels = packed.shape[-1]
    pad = [(0, 0)] * (packed.ndim - 1) + [(0, -channels % block)]
    return np.ascontiguousarray(np.pad(packed, pad), np.float32).ravel()


def _spatial(values: Any, rank: int) -> list[int]:
    sizes = [int(v) for v in values]
    return sizes * rank if len(sizes) == 1 else sizes


def lower_fold(request: Request) -> KernelSource | None:
    """Convolution by the generic reduction; the weight must be constant."""
    call = request.call
    weight = request.constant(call["weight"])
    if weight is None:
        return None
    source, bias = call["input"], call["bias"]
    size = G.shape(source)[2:]
    rank = len(size)
    kernel = weight.shape[2:]
    groups = int(call["groups"])
    channels = call.shape[1]
    icg, ocg = G.shape(source)[1] // groups, channels // groups
    block = request.target.isa.block
    padded = -(-channels // block) * block
    packed = pack_weights(weight, call, block)
    taps = _taps(call, size, kernel, rank)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        def element(index: Index, box: Index) -> Expr:
            n, c, *place = index
            inside, at, tap = taps.visit(place, box[1:])
            # Padding channels of a block belong to no group: they read the last one's inputs.
            own = tirx.min(c, channels - 1) if channels % block else c
            first = (own // ocg) * icg if groups > 1 else 0
            w = constants[0][flatten((box[0], *tap, c), (icg, *kernel, padded))]
            value = group.read(source, (n, first + box[0], *at))
            if inside:
                value = tirx.if_then_else(tirx.all(*inside), value, f32(0.0))
            return value * w

        def finish(value: Expr, index: Index) -> Expr:
            return value + group.read(bias, (index[1],)) if bias is not None else value

        def epilogue(index: Index, value: Expr) -> Expr:
            group.give(request.anchor, lambda _: value)
            return group.read(request.root, index)

        reduction = Reduction((icg, *taps.box), element, "sum", finish)
        generic.emit_reduction(task, out, reduction, epilogue, "float32", block, False)

    space = generic.space_of(*_shape_and_layout(request))
    flops = 2 * prod(call.shape) * icg * prod(taps.box)
    reads = request.reads_without(call["weight"])
    return KernelSource("conv_fold", generic.tasks_of(space), flops, emit, reads, (packed,))


def _shape_and_layout(request: Request) -> tuple[tuple[int, ...], str]:
    spec = request.spec(request.root)
    return spec.shape, spec.layout


class _Taps:
    """Which input places and kernel places an output place folds."""

    def __init__(
        self, box: tuple[int, ...], visit: Callable[[list[Expr], Index], tuple[Any, Any, Any]]
    ) -> None:
        self.box = box
        self.visit = visit


def _taps(call: Call, size: tuple[int, ...], kernel: tuple[int, ...], rank: int) -> _Taps:
    stride = _spatial(call["stride"], rank)
    padding = _spatial(call["padding"], rank)
    dilation = _spatial(call["dilation"], rank)
    out = call.shape[2:]

    def forward(place: list[Expr], box: Index) -> tuple[list[Expr], list[Expr], Index]:
        at = [
            p * s - pad + k * d
            for p, s, pad, k, d in zip(place, stride, padding, box, dilation, strict=True)
        ]
        inside: list[Expr] = []
        for axis in range(rank):
            reach = (out[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis]
            if padding[axis] or reach - padding[axis] >= size[axis]:
                inside += [at[axis] >= 0, at[axis] < size[axis]]
        return inside, at, box

    if not call["transposed"]:
        return _Taps(tuple(kernel), forward)

    phased = [d == 1 for d in dilation]
    box = tuple(-(-k // s) if by_phase else k
                for k, s, by_phase in zip(kernel, stride, phased, strict=True))  # fmt: skip

    def backward(place: list[Expr], steps: Index) -> tuple[list[Expr], list[Expr], Index]:
        at: list[Expr] = []
        tap: list[Expr] = []
        inside: list[Expr] = []
        for axis in range(rank):
            moved = place[axis] + padding[axis]
            if phased[axis]:
                k = moved % stride[axis] + steps[axis] * stride[axis]
                source = moved // stride[axis] - steps[axis]
                if kernel[axis] % stride[axis]:
                    inside.append(k < kernel[axis])
                    k = tirx.min(k, kernel[axis] - 1)
                last = (out[axis] - 1 + padding[axis]) // stride[axis]
                if box[axis] > 1 or padding[axis]:
                    inside.append(source >= 0)
                if last >= size[axis]:
                    inside.append(source < size[axis])
            else:
                k = steps[axis]
                distance = moved - k * dilation[axis]
                source = distance // stride[axis]
                inside += [distance >= 0, distance % stride[axis] == 0, source < size[axis]]
            at.append(source)
            tap.append(k)
        return inside, at, tuple(tap)

    return _Taps(box, backward)
