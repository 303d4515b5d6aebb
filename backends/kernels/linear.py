"""Lowers `linear` and `matmul` by a constant to the direct kernel: a row of M pixels."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from torch import fx

from graphopt.backends.kernels.base import (
    KernelSource,
    Request,
    collapse,
    collapsible,
    same_place,
)
from graphopt.backends.kernels.builder import View, unflatten
from graphopt.backends.kernels.conv_direct import Accessors, ConvSpec
from graphopt.backends.kernels.conv_product import conv_product
from graphopt.backends.kernels.fusion import Group
from graphopt.ops import OPS
from graphopt.ops.opdef import Expr, Index
from graphopt.program.layout import PLAIN


def lower_linear(request: Request) -> KernelSource | None:
    """`x @ weight.T + bias` (linear), `x @ constant` (matmul)."""
    call = request.call
    is_linear = "weight" in call.arguments
    source: fx.Node = call["input" if is_linear else "self"]
    weight_node = call.operands(OPS[request.anchor.target].operands)[1]
    weight = request.constant(weight_node)
    bias = call.arguments.get("bias")
    shape = call.shape
    if weight is None or weight.ndim != 2:
        return None
    # Blocks are rare here: a convolution over sequences whose result goes through a linear layer.
    plain = all(request.spec(node).layout == PLAIN for node in (source, request.root))
    matrix = weight if is_linear else np.ascontiguousarray(weight.T)
    n_out, n_in = matrix.shape
    lead = tuple(range(len(shape) - 1))
    merge = plain and len(lead) > 0 and collapsible(request, lead)
    m = prod(shape[:-1])
    spec = ConvSpec(1, 1, n_in, n_out, (1, m), (1, m), (1, 1))
    product = conv_product(spec, matrix.reshape(n_out, n_in, 1, 1), request.target)

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
                return (*(0 for _ in lead[:-1]), row, c)
            return (*unflatten(row, shape[:-1]), c)

        def load(row: Expr, c: Expr) -> Expr:
            return x.load((row, c) if plain else (*unflatten(row, shape[:-1]), c))

        def store(n: Expr, c: Expr, h: Expr, w: Expr, value: Expr) -> None:
            if bias is not None:
                value = value + group.read(bias, (c,))
            group.give(request.anchor, lambda _: value)
            place = index(w, c)
            out.store(place, group.read(request.root, place))

        access = Accessors(
            x=lambda n, c, h, w: load(w, c),
            store=store,
            vector=request.spec(request.root).layout == PLAIN,
            padded=False,
            heavy=request.heavy_epilogue,
        )
        product.emit(task, constants[0], scratch, access)

    reads = request.reads_without(weight_node)
    origin = product.origin.replace("conv_direct", "gemm").replace("conv_deep", "gemm_deep")
    return KernelSource(origin, product.tasks, spec.flops, emit, reads, (product.weights,),
                        scratch=product.scratch,
                        in_place=same_place(request, taken=[source]))  # fmt: skip
