"""Lowers `linear` and `matmul` by a constant to the direct kernel: a row of M pixels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

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
from graphopt.backends.kernels.builder import View, unflatten
from graphopt.backends.kernels.conv_product import Product, key_of, products, with_strassen
from graphopt.backends.kernels.conv_spec import Accessors, ConvSpec
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.tiling import MOST_PIXELS, most_apart
from graphopt.backends.target import Target
from graphopt.ops import OPS
from graphopt.ops.opdef import Expr, Index
from graphopt.program.layout import PLAIN


def lower_linear(request: Request) -> Alternatives | None:
    """`x @ weight.T + bias` (linear), `x @ constant` (matmul)."""
    call = request.call
    is_linear = "weight" in call.arguments
    weight = request.constant(_weight_node(request))
    if weight is None or weight.ndim != 2:
        return None
    matrix = weight if is_linear else np.ascontiguousarray(weight.T)
    n_out, n_in = matrix.shape
    m = prod(call.shape[:-1])
    merged = "merged" if _merges(request) else "apart"
    spec = ConvSpec(1, 1, n_in, n_out, (1, m), (1, m), (1, 1))
    ways = products(spec, _for_rows(request.target, m), most=_rows(request, n_in))
    samples = _samples(request)
    if request.strassen and _is_plain(request):
        row = (1, m // samples)
        apart = replace(spec, batch=samples, in_size=row, out_size=row)
        ways = with_strassen(ways, apart, request.target, plain=True)
    taps = matrix.reshape(n_out, n_in, 1, 1)
    candidates = [
        Candidate(_origin(each), each.cycles, partial(_product, request, spec, each, taps))
        for each in ways
    ]
    layouts = [request.spec(node).layout for node in (_source(request), request.root)]
    return Alternatives(
        key_of("linear", spec, request, *layouts, merged, f"samples={samples}"), tuple(candidates)
    )


def _for_rows(target: Target, rows: int) -> Target:
    """The target with the blocks that fit a product of so many rows.

    Where a single row multiplies by lanes, a block is one vector: the inner loop then takes four
    inputs, whose weights, each used once, lie within the reach of paired loads (1 KB).
    """
    isa = target.isa
    if rows > 1 or not isa.lane_operand:
        return target
    return replace(target, isa=replace(isa, block=isa.lanes()))


def _rows(request: Request, depth: int) -> int:
    """The most rows of a register tile: those of a plain input may meet in the cache."""
    target = request.target
    if not _is_plain(request):
        return MOST_PIXELS
    return most_apart(4 * depth, target.l1_bytes // target.l1_ways, target.l1_ways)


def _weight_node(request: Request) -> Any:
    return request.call.operands(OPS[request.anchor.target].operands)[1]


def _source(request: Request) -> fx.Node:
    call = request.call
    source: fx.Node = call["input" if "weight" in call.arguments else "self"]
    return source


def _is_plain(request: Request) -> bool:
    # Blocks are rare here: a convolution over sequences whose result goes through a linear layer.
    return all(request.spec(node).layout == PLAIN for node in (_source(request), request.root))


def _samples(request: Request) -> int:
    """Samples, whose rows are not to be summed with each other's: the first axis is taken for
    theirs."""
    shape = request.call.shape[:-1]
    return 1 if request.one_sample or not shape else shape[0]


def _merges(request: Request) -> bool:
    """Whether all axes but the last are walked as one."""
    rank = len(request.call.shape)
    return rank > 1 and _is_plain(request) and collapsible(request, tuple(range(rank - 1)))


def _origin(product: Product) -> str:
    return product.origin.replace("conv_direct", "gemm").replace("conv_deep", "gemm_deep")


def _product(
    request: Request, spec: ConvSpec, product: Product, weight: npt.NDArray[Any]
) -> KernelSource:
    """The kernel; `weight` is `(columns, depth, 1, 1)`."""
    shape = request.call.shape
    source = _source(request)
    bias = request.call.arguments.get("bias")
    plain, merge = _is_plain(request), _merges(request)
    lead = tuple(range(len(shape) - 1))
    walked = walked_axis(shape, lead) if merge else 0
    m, n_in = spec.out_size[1], spec.icg
    of_sample = m // _samples(request)

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        x = views[source].reshaped((m, n_in)) if plain else views[source]
        if merge:
            out = collapse(out, shape, lead)
            # The bias is one-dimensional and stays as it is.
            group = group.with_views(
                lambda view: collapse(view, shape, lead) if len(view.spec.shape) > 1 else view
            )

        def index(row: Expr, c: Expr) -> Index:
            if merge:
                return (*(row if axis == walked else 0 for axis in lead), c)
            return (*unflatten(row, shape[:-1]), c)

        def load(row: Expr, c: Expr) -> Expr:
            return x.load((row, c) if plain else (*unflatten(row, shape[:-1]), c))

        def store(n: Expr, c: Expr, h: Expr, w: Expr, value: Expr) -> None:
            w += n * of_sample
            if bias is not None:
                value = value + group.read(bias, (c,))
            group.give(request.anchor, lambda _: value)
            place = index(w, c)
            out.store(place, group.read(request.root, place))

        access = Accessors(
            x=lambda n, c, h, w: load(n * of_sample + w, c),
            store=store,
            vector=request.spec(request.root).layout == PLAIN,
            padded=False,
            heavy=request.heavy_epilogue,
            fence=request.fence,
            vector_in=plain,
        )
        product.emit(task, constants[0], scratch, access)

    reads = request.reads_without(_weight_node(request))
    return KernelSource(_origin(product), product.tasks, spec.flops, emit, reads,
                        (product.pack(weight),), scratch=product.scratch,
                        in_place=same_place(request, taken=[source]),
                        own_flops=product.own_flops)  # fmt: skip
