"""Lowers `convolution` to its generators: depthwise, and the products to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx
from tvm import tirx

from graphopt.backends.kernels import depthwise
from graphopt.backends.kernels.base import (
    Alternatives,
    Candidate,
    KernelSource,
    Request,
    collapse,
    collapsible,
    same_place,
    walked_axis,
)
from graphopt.backends.kernels.builder import View, f32
from graphopt.backends.kernels.conv_frames import Frames, Place, frames_of
from graphopt.backends.kernels.conv_product import (
    Product,
    deep_products,
    direct_products,
    key_of,
    products,
    winograd_products,
    with_strassen,
)
from graphopt.backends.kernels.conv_spec import Accessors, ConvSpec
from graphopt.backends.kernels.fusion import Group
from graphopt.ops.opdef import Call, Expr, Index
from graphopt.program.layout import PLAIN, block_of

_ROW_CHANNELS = 3
"""Output channels from which turning them into rows of pixels is faster than storing one by one."""


def spec_of(call: Call) -> ConvSpec | None:
    """The convolution as rows and columns; None for 3-D (`conv_frames`) and transposed ones."""
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


def images_of(call: Call, block: int) -> tuple[ConvSpec | None, Frames | None]:
    """The convolution as rows and columns, None where it is none, and how it is that where 3-D."""
    frames = frames_of(call, block)
    return (spec_of(call), None) if frames is None else (frames.spec, frames)


def _swapped(spec: ConvSpec) -> ConvSpec:
    """Rows and columns exchanged."""
    flip = {
        name: getattr(spec, name)[::-1]
        for name in ("in_size", "out_size", "kernel", "stride", "padding", "dilation")
    }
    return replace(spec, **flip)


def place_of(rank: int, swapped: bool = False) -> Place:
    """The `Place` in a tensor of rank 3 or 4, whose rows and columns may be exchanged."""

    def index(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
        if rank == 3:
            return (n, c, w)
        return (n, c, w, h) if swapped else (n, c, h, w)

    return index


def is_pointwise(spec: ConvSpec) -> bool:
    """Whether each pixel of the output is made of the pixel at its place."""
    return spec.kernel == (1, 1) == spec.stride and spec.padding == (0, 0)


def one_row(spec: ConvSpec) -> ConvSpec:
    """A pointwise convolution as a single row of pixels."""
    pixels = (1, spec.in_size[0] * spec.in_size[1])
    return replace(spec, in_size=pixels, out_size=pixels)


@dataclass(frozen=True)
class _View:
    """How direct convolution walks an image.

    Attributes:
        spec: the convolution as it is walked.
        one_row: all pixels are one row, as a pointwise convolution allows.
        column: rows and columns are exchanged, as an image of one column is better off; with
            `one_row`, the index of a pixel is that of its row.
        window: rows and columns of the windows whose elements are taken for channels.
        offset: rows and columns of the first windows that are before the image.
        is_cut: whether any window is partly outside of the image, where there are zeros.
        frames: how a 3-D convolution is a 2-D one.
    """

    spec: ConvSpec
    one_row: bool = False
    column: bool = False
    window: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)
    is_cut: bool = False
    frames: Frames | None = None

    def is_whole(self, channels: int, block: int) -> bool:
        """Whether neighbouring channels are neighbours in blocks, those of other frames too."""
        return self.frames is None or not self.frames.joins or channels % block == 0

    def run(self, lanes: int) -> int:
        """Channels that are neighbours in a plain image, whole runs of them in a vector."""
        columns = self.window[1]
        return 1 if self.column or self.is_cut or lanes % columns else columns

    def index(self, rank: int) -> Place:
        """The output's index of (n, channel, row, column) of the spec."""
        return place_of(rank, self.column) if self.frames is None else self.frames.index

    def place(self, rank: int) -> Place:
        """The input's index of (n, channel, row, column) of the spec."""
        index = place_of(rank, self.column) if self.frames is None else self.frames.inside
        rows, columns = self.window
        top, left = self.offset
        if self.window == (1, 1):
            return index

        def inside(n: Expr, c: Expr, h: Expr, w: Expr) -> Index:
            row, column = c // columns % rows, c % columns
            row, column = h * rows + row - top, w * columns + column - left
            return index(n, c // (rows * columns), row, column)

        return inside


def _view_of(request: Request, spec: ConvSpec) -> _View:
    is_image = len(request.call.shape) == 4
    if is_image and is_pointwise(spec) and collapsible(request, (2, 3)):
        return _View(
            one_row(spec), one_row=True, column=walked_axis(request.call.shape, (2, 3)) == 2
        )
    if is_image and spec.in_size[1] == 1 and spec.kernel[1] == 1:
        return _View(_swapped(spec), column=True)
    return _View(spec)


def _patches(spec: ConvSpec) -> _View | None:
    """Windows side by side as pixels of a pointwise convolution; None where they are not.

    Transformers cut images so. Rows of a window are neighbours in a plain image, and so they are
    gathered fast.
    """
    side_by_side = spec.kernel == spec.stride != (1, 1) and spec.dilation == (1, 1)
    if not side_by_side or spec.padding != (0, 0) or spec.groups > 1 or spec.out_size[0] == 1:
        return None
    flat = replace(spec, icg=spec.icg * prod(spec.kernel), in_size=spec.out_size, kernel=(1, 1),
                   stride=(1, 1))  # fmt: skip
    return _View(flat, window=spec.kernel)


def _phases(view: _View, weight: npt.NDArray[Any]) -> tuple[_View, npt.NDArray[Any]]:
    """The pixels of a stride's windows as channels, of a convolution of stride 1, and its weights.

    Windows begin where the first one does, if that saves taps, or else at multiples of the stride,
    so that none is cut; the kernel gets taps of zeros around it.
    """
    spec, stride = view.spec, view.spec.stride
    if stride == (1, 1) or spec.groups > 1 or spec.dilation != (1, 1):
        return view, weight

    def windows(axis: int) -> tuple[int, int, int, int]:
        """The zeros in front of the kernel, windows it has and the image has, rows before it."""
        kernel, step, padding = (each[axis] for each in (spec.kernel, stride, spec.padding))
        front = -padding % step
        if -(-(front + kernel) // step) > -(-kernel // step):
            front = 0
        before = (front + padding) % step
        return (
            front,
            -(-(front + kernel) // step),
            -(-(spec.in_size[axis] + before) // step),
            before,
        )

    (top, rows, high, above), (left, columns, wide, beside) = windows(0), windows(1)
    ends = rows * stride[0] - top - spec.kernel[0], columns * stride[1] - left - spec.kernel[1]
    spread = np.pad(weight.reshape(*weight.shape[:2], *spec.kernel),
                    ((0, 0), (0, 0), (top, ends[0]), (left, ends[1])))  # fmt: skip
    cut = spread.reshape(*weight.shape[:2], rows, stride[0], columns, stride[1])
    phased = replace(
        spec, icg=spec.icg * prod(stride), in_size=(high, wide), kernel=(rows, columns),
        stride=(1, 1),
        padding=((spec.padding[0] + top) // stride[0], (spec.padding[1] + left) // stride[1]),
    )  # fmt: skip
    is_cut = above + beside > 0 or spec.in_size != (high * stride[0], wide * stride[1])
    channels = cut.transpose(0, 1, 3, 5, 2, 4).reshape(len(weight), phased.icg, rows, columns)
    phases = replace(view, spec=phased, window=stride, offset=(above, beside), is_cut=is_cut)
    return phases, channels


def _with_zeros(
    x: View, inside: Place, shape: tuple[int, ...]
) -> Callable[[Expr, Expr, Expr, Expr], Expr]:
    """Reads zeros outside of the image."""

    def load(n: Expr, c: Expr, h: Expr, w: Expr) -> Expr:
        place = inside(n, c, h, w)
        there = (tirx.all(i >= 0, i < size) for i, size in zip(place[2:], shape[2:], strict=True))
        return tirx.if_then_else(tirx.all(*there), x.load(place), f32(0.0))

    return load


def lower_products(request: Request) -> Alternatives | None:
    """Direct convolution, its deep twin, and Winograd's: the cost model's choice first."""
    call = request.call
    weight = request.constant(call["weight"])
    spec, frames = images_of(call, request.target.isa.block)
    if spec is None or weight is None or (frames is not None and spec.groups > 1):
        return None
    if frames is None:
        view = _view_of(request, spec)
    else:
        view, weight = _View(spec, frames=frames), frames.weight(weight)
    layouts = [request.spec(node).layout for node in (call["input"], request.root)]
    target, plain = request.target, layouts[0] == PLAIN
    whole = view.is_whole(call.shape_of("input")[1], target.isa.block)
    plan_all = products if whole else direct_products

    def ways(found: Iterable[Product], view: _View, weight: npt.NDArray[Any]) -> list[Candidate]:
        return [
            Candidate(each.origin, each.cycles, partial(_product, request, view, each, weight))
            for each in found
        ]

    direct = plan_all(view.spec, target, plain=plain)
    if request.strassen and whole and not plain:
        direct = with_strassen(direct, view.spec, target, plain=False)
    candidates = ways(direct, view, weight)
    patches = _patches(spec) if plain and frames is None else None
    if patches is not None:
        flat = weight.reshape(len(weight), -1, 1, 1)
        candidates = ways(deep_products(patches.spec, target), patches, flat) + candidates
    if (whole or plain) and request.winograd and layouts[1] != PLAIN:
        phases, taps = _phases(view, weight) if plain else (view, weight)
        found, pays = winograd_products(phases.spec, target, [view.spec], plain=plain)
        fewer = ways(found, phases, taps)
        candidates = [*fewer, *candidates] if pays else [*candidates, *fewer]
    key = key_of("convolution", view.spec, request, *layouts)
    return Alternatives(key, tuple(candidates))


def _product(
    request: Request, view: _View, product: Product, weight: npt.NDArray[Any]
) -> KernelSource:
    """Direct convolution, its deep twin, or Winograd's; see `conv_product`."""
    call, spec = request.call, view.spec
    source = call["input"]
    far = prod(call.shape_of("input")) * 4 > request.target.l2_bytes // 2
    block = block_of(request.spec(request.root).layout)
    in_blocks = block is not None and (spec.groups == 1 or spec.ocg % block == 0)
    ahead = view.one_row and request.spec(source).layout != PLAIN and far
    index, inside = view.index(len(call.shape)), view.place(len(call.shape))
    whole = view.is_whole(call.shape_of("input")[1], request.target.isa.block)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        x = views[source]
        if view.one_row:
            x = collapse(x, call.shape, (2, 3))
            out = collapse(out, call.shape, (2, 3))
            group = group.with_views(lambda each: collapse(each, call.shape, (2, 3)))
        access = accessors(
            request, group, x, inside, out, index,
            vector=in_blocks,
            padded=in_blocks and spec.groups == 1,
            ahead=ahead,
            vector_in=request.spec(source).layout != PLAIN and whole,
            run=view.run(request.target.isa.narrow),
            row=request.target.isa.narrow if block is None and spec.ocg >= _ROW_CHANNELS else 0,
        )  # fmt: skip
        if view.is_cut:
            access = replace(access, x=_with_zeros(x, inside, call.shape_of("input")))
        product.emit(task, constants[0], scratch, access)

    reads = request.reads_without(call["weight"])
    flops = 2 * prod(call.shape) * prod(call.shape_of("weight")[1:])
    return KernelSource(product.origin, product.tasks, flops, emit, reads,
                        (product.pack(weight),), scratch=product.scratch,
                        in_place=same_place(request, taken=[source]),
                        own_flops=product.own_flops)  # fmt: skip


def accessors(
    request: Request, group: Group, x: View, inside: Place, out: View, place: Place, **details: Any
) -> Accessors:
    """How the kernel reaches its operands: the input at `inside`, the output at `place`.

    A store adds the bias and runs the epilogue; `details` are what else `Accessors` says.
    """
    bias = request.call["bias"]

    def store(n: Expr, c: Expr, h: Expr, w: Expr, value: Expr) -> None:
        index = place(n, c, h, w)
        if bias is not None:
            value = value + group.read(bias, (index[1],))
        group.give(request.anchor, lambda _: value)
        out.store(index, group.read(request.root, index))

    return Accessors(
        x=lambda n, c, h, w: x.load(inside(n, c, h, w)),
        store=store,
        out=lambda n, c, h, w: out.load(place(n, c, h, w)),
        heavy=request.heavy_epilogue,
        fence=request.fence,
        **details,
    )


def lower_depthwise(request: Request) -> KernelSource | None:
    """One filter per channel; see `depthwise`. Input and output must be blocked alike."""
    call = request.call
    weight = request.constant(call["weight"])
    spec, frames = images_of(call, request.target.isa.block)
    if spec is None or weight is None or spec.icg != 1 or spec.ocg != 1:
        return None
    if frames is not None:
        weight = frames.weight(weight)
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

    index = place_of(rank, column) if frames is None else frames.index
    inside = index if frames is None else frames.inside

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        access = accessors(
            request, group, views[source], inside, out, index, vector=True, padded=True
        )
        depthwise.emit(plan, task, constants[0], access)

    reads = request.reads_without(call["weight"])
    return KernelSource(plan.describe(), plan.tasks, spec.flops, emit, reads, (packed,),
                        in_place=same_place(request, taken=[source]))  # fmt: skip
