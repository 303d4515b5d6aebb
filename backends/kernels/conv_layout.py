"""Which convolutions are worth moving tensors into blocks for."""

from __future__ import annotations

from math import prod

from torch import fx

from graphopt import graph as G
from graphopt.backends.kernels.conv import images_of, is_pointwise, one_row
from graphopt.backends.kernels.conv_product import products, winograd_products, with_strassen
from graphopt.backends.target import Target
from graphopt.ops import OPS
from graphopt.ops.opdef import Call
from graphopt.program.layout import blocked, physical_size
from graphopt.program.layouts import InBlocks

_MOVE = 0.25
"""Cycles to copy a byte of a tensor from one layout to the other: twice what it takes in caches."""


def wants_blocks(
    gm: fx.GraphModule, node: fx.Node, target: Target, *, winograd: bool, strassen: bool
) -> InBlocks:
    """What a node of `gm` should read and make in blocks, since that saves more than moving it.

    It is a convolution with fewer multiplications: Winograd's needs both in blocks, of Strassen's
    products only the input.
    """
    if OPS[node.target].name != "convolution":
        return InBlocks()
    call, block = Call(node), target.isa.block
    spec, frames = images_of(call, block)
    if spec is None or G.constant(gm, call["weight"]) is None:
        return InBlocks()
    read = call.shape_of("input")
    if frames is not None and spec.groups > 1:
        return InBlocks()
    # What is no whole blocks stays as it is, and Winograd's reads that, too.
    plain = read[1] % block > 0
    moved = physical_size(call.shape, blocked(block), 1) + (0 if plain else prod(read))
    direct = products(spec, target, plain=plain)[0].cycles
    if winograd:
        found, pays = winograd_products(spec, target, [spec], plain=plain)
        if pays and direct - found[0].cycles > _MOVE * 4 * moved:
            return InBlocks(reads=not plain, makes=True)
    if strassen and is_pointwise(spec) and not plain:
        row = one_row(spec)
        fewer = with_strassen(products(row, target), row, target, plain=False)[0].cycles
        return InBlocks(reads=direct - fewer > _MOVE * 4 * prod(read))
    return InBlocks()
