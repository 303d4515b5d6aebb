"""Transposed convolution as one convolution for each phase of the output.

With stride s, output rows q·s + r for one r see only the kernel rows congruent to r + padding
modulo s: seen alone, they are a convolution with stride 1 by a part of the kernel, turned round
(Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016). The phases write
to interleaved places; their tasks follow one another. Where there are few output channels, or
Winograd's algorithm saves more, all phases are the channels of one convolution instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.base import KernelSource, Request, same_place
from graphopt.backends.kernels.builder import View
from graphopt.backends.kernels.conv import accessors, place_of
from graphopt.backends.kernels.conv_product import (
    Product,
    direct_products,
    products,
    winograd_products,
)
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.fusion import Group
from graphopt.ops.opdef import Call, Expr, Index
from graphopt.program.layout import PLAIN, block_of

_MOST_PHASES = 16
"""Each has code of its own."""


@dataclass(frozen=True)
class _Axis:
    """One axis of one phase.

    Attributes:
        phase: the outputs are `place · stride + phase`.
        taps: the kernel's places, in the order in which they meet the input.
        padding: how far the first tap of output 0 is before the input; negative if it is inside.
        size: outputs.
    """

    phase: int
    taps: tuple[int, ...]
    padding: int
    size: int


def _axes(kernel: int, stride: int, padding: int, out: int) -> list[_Axis] | None:
    """The phases of an axis; None where one of them would see no tap at all."""
    phases = []
    for phase in range(min(stride, out)):
        first = (phase + padding) % stride
        taps = tuple(range(first, kernel, stride))[::-1]
        if not taps:
            return None
        # Tap k of output q·s + phase meets input q + (phase + padding - k) / s.
        start = (phase + padding - taps[0]) // stride
        phases.append(_Axis(phase, taps, -start, -(-(out - phase) // stride)))
    return phases


@dataclass(frozen=True)
class _Phase:
    """A phase of both axes, how it is computed, and where its tasks and weights begin."""

    rows: _Axis
    columns: _Axis
    spec: ConvSpec
    product: Product
    first_task: int
    first_weight: int


def lower_transposed(request: Request) -> KernelSource | None:
    """Transposed 1-D and 2-D convolution without dilation; the fold does the rest."""
    call = request.call
    weight = request.constant(call["weight"])
    rank = len(call.shape)
    if not call["transposed"] or rank > 4 or weight is None:
        return None
    if rank == 3:
        weight = np.expand_dims(weight, 2)
    stride, dilation = (_two(call[n], 1, rank) for n in ("stride", "dilation"))
    padding, out_size = _two(call["padding"], 0, rank), _two(call.shape[2:], 1, rank)
    rows, columns = (_axes(weight.shape[2 + i], stride[i], padding[i], out_size[i]) for i in (0, 1))
    if dilation != (1, 1) or rows is None or columns is None:
        return None
    pairs = list(product(rows, columns))
    if len(pairs) > _MOST_PHASES:
        return None
    phases, packed = _plan(request, call, weight, pairs)
    source: fx.Node = call["input"]
    flops = sum(phase.spec.flops for phase in phases)
    joint = _joint(call, weight, rows, columns)
    best = _joint_product(request, joint[0], phases) if joint is not None else None
    if joint is not None and best is not None:
        return _lower_joint(request, best, joint[1], (len(rows), len(columns)), flops)
    index = place_of(rank)
    block = block_of(request.spec(request.root).layout)
    groups = int(call["groups"])
    in_blocks = block is not None and (groups == 1 or (call.shape[1] // groups) % block == 0)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        def one(phase: _Phase) -> None:
            def place(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
                row, column = h * stride[0] + phase.rows.phase, w * stride[1] + phase.columns.phase
                return index(n, c, row, column)

            access = accessors(
                request, group, views[source], index, out, place,
                vector=in_blocks,
                padded=in_blocks and groups == 1,
                vector_in=request.spec(source).layout != PLAIN,
            )  # fmt: skip
            weights = T.decl_buffer(
                (packed.size - phase.first_weight,), "float32", data=constants[0].data,
                elem_offset=phase.first_weight,
            )  # fmt: skip
            # Never negative; said so that divisions stay plain ones.
            number = tirx.max(task - phase.first_task, 0)
            phase.product.emit(number, weights, scratch, access)

        _branch(task, phases, one)

    tasks = phases[-1].first_task + phases[-1].product.tasks
    reads = request.reads_without(call["weight"])
    origin = f"transposed {phases[0].product.origin}"
    scratch = max(phase.product.scratch for phase in phases)
    return KernelSource(origin, tasks, flops, emit, reads, (packed,), scratch=scratch,
                        in_place=same_place(request, taken=[source]))  # fmt: skip


def _two(values: Any, fill: int, rank: int) -> tuple[int, int]:
    """By rows and columns; a line is an image of one row."""
    values = [int(v) for v in values]
    return (fill if rank == 3 else values[0]), values[-1]


def _plan(
    request: Request, call: Call, weight: npt.NDArray[Any], pairs: list[tuple[_Axis, _Axis]]
) -> tuple[list[_Phase], npt.NDArray[np.float32]]:
    """Plan each phase as a convolution with stride 1, and pack its part of the weights."""
    groups = int(call["groups"])
    n, channels, *_ = call.shape_of("input")
    size = _two(call.shape_of("input")[2:], 1, len(call.shape))
    icg, ocg = channels // groups, weight.shape[1]
    # (groups · icg, ocg, KH, KW) → (groups · ocg, icg, KH, KW)
    grouped = weight.reshape(groups, icg, ocg, *weight.shape[2:])
    turned = np.moveaxis(grouped, 1, 2).reshape(groups * ocg, icg, *weight.shape[2:])
    phases: list[_Phase] = []
    packed: list[npt.NDArray[np.float32]] = []
    tasks = weights = 0
    plain = request.spec(call["input"]).layout == PLAIN
    for rows, columns in pairs:
        spec = ConvSpec(
            n, groups, icg, ocg, size, (rows.size, columns.size),
            (len(rows.taps), len(columns.taps)), padding=(rows.padding, columns.padding),
        )  # fmt: skip
        best = products(spec, request.target, plain=plain)[0]
        phases.append(_Phase(rows, columns, spec, best, tasks, weights))
        packed.append(best.pack(turned[:, :, list(rows.taps)][..., list(columns.taps)]))
        tasks += best.tasks
        weights += packed[-1].size
    return phases, np.concatenate(packed)


def _joint(
    call: Call, weight: npt.NDArray[Any], rows: list[_Axis], columns: list[_Axis]
) -> tuple[ConvSpec, npt.NDArray[np.float32]] | None:
    """All phases as one convolution to (phase, channel), the taps that one lacks zero.

    None where phases have different sizes, and for groups.
    """
    even = all(axis.size == axes[0].size for axes in (rows, columns) for axis in axes)
    if not even or int(call["groups"]) > 1:
        return None
    n, icg, *_ = call.shape_of("input")
    ocg = weight.shape[1]
    first = [min(-axis.padding for axis in axes) for axes in (rows, columns)]
    last = [max(len(axis.taps) - axis.padding for axis in axes) for axes in (rows, columns)]
    kernel = last[0] - first[0], last[1] - first[1]
    count = len(rows) * len(columns)
    spec = ConvSpec(
        n, 1, icg, ocg * count, _two(call.shape_of("input")[2:], 1, len(call.shape)),
        (rows[0].size, columns[0].size), kernel, padding=(-first[0], -first[1]),
    )  # fmt: skip
    spread = np.zeros((count, ocg, icg, *kernel), np.float32)
    turned = np.moveaxis(weight, 0, 1)
    for part, (row, column) in zip(spread, product(rows, columns), strict=True):
        top, left = -row.padding - first[0], -column.padding - first[1]
        part[:, :, top : top + len(row.taps), left : left + len(column.taps)] = turned[
            :, :, list(row.taps)
        ][..., list(column.taps)]
    return spec, spread.reshape(count * ocg, icg, *kernel)


def _joint_product(request: Request, spec: ConvSpec, phases: list[_Phase]) -> Product | None:
    """The best way to compute `_joint`'s convolution; None where its phases apart are faster.

    For few output channels, which would leave most of a vector empty (a pixel shuffle's), that is
    `conv_direct`. On blocks it is `winograd`, whose places cost less than the zeros among the taps.
    """
    target = request.target
    layouts = [request.spec(node).layout for node in (request.call["input"], request.root)]
    if layouts[1] == PLAIN:
        best = direct_products(spec, target)[0]
        return best if best.cycles < sum(phase.product.cycles for phase in phases) else None
    if PLAIN in layouts or not request.winograd or request.call.shape[1] % target.isa.block:
        return None
    fewer, pays = winograd_products(spec, target, [phase.spec for phase in phases])
    return fewer[0] if pays else None


def _lower_joint(
    request: Request, joint: Product, weight: npt.NDArray[np.float32], stride: tuple[int, int],
    flops: int,
) -> KernelSource:  # fmt: skip
    """Make the kernel of what `_joint_product` chose."""
    call = request.call
    source: fx.Node = call["input"]
    index, channels = place_of(len(call.shape)), call.shape[1]
    in_blocks = request.spec(request.root).layout != PLAIN
    # In whole blocks, so that a vector of channels stays one.
    step = request.target.isa.block if in_blocks else 1

    def place(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
        phase, channel = c // step // (channels // step), c // step % (channels // step)
        channel = channel * step + c % step
        row, column = h * stride[0] + phase // stride[1], w * stride[1] + phase % stride[1]
        return index(n, channel, row, column)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        access = accessors(
            request, group, views[source], index, out, place, vector=in_blocks, padded=in_blocks
        )
        joint.emit(task, constants[0], scratch, access)

    reads = request.reads_without(call["weight"])
    origin = f"transposed joint {joint.origin}"
    return KernelSource(origin, joint.tasks, flops, emit, reads, (joint.pack(weight),),
                        scratch=joint.scratch, own_flops=joint.own_flops,
                        in_place=same_place(request, taken=[source]))  # fmt: skip


def _branch(task: Expr, phases: list[_Phase], one: Any) -> None:
    """Emit the phase that the task belongs to."""
    phase, rest = phases[0], phases[1:]
    if not rest:
        one(phase)
        return
    with T.If(task < rest[0].first_task):
        with T.Then():
            one(phase)
        with T.Else():
            _branch(task, rest, one)
