"""Padding that is written out: zeros around the inputs of convolutions that would test for them."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import graph as G
from graphopt.ops.opdef import Call

aten = torch.ops.aten

_WIDE = 10
"""Columns of a kernel from which padding is written out. Narrower ones have code of their own for
the pixels at the borders, or are Winograd's."""
_FAR = 7
"""Padding, in columns, that more than one tile of pixels meets."""


def write_padding(gm: fx.GraphModule) -> None:
    """Give some convolutions of `gm` inputs that are padded already, in place.

    3-D ones along depth, unless their kernels are one pixel of some frames: frames that do not
    exist would be a test in the innermost loop; copied with zero frames around them, all are alike.
    Depthwise ones of these get rows of zeros, too: they take rows of all the kernel's frames for
    one window. And wide kernels along columns: for these each tile of pixels at a border would have
    code of its own, or each column a test.
    """
    padded: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not aten.convolution.default:
            continue
        call = Call(node)
        zeros = _written_out(call)
        if not any(zeros):
            continue
        key = (call["input"], zeros)
        with gm.graph.inserting_before(node):
            if key not in padded:
                around = [n for extent in reversed(zeros) for n in (extent, extent)]
                padded[key] = G.call(
                    gm.graph, aten.constant_pad_nd.default, (call["input"], around, 0.0), {},
                    origin=G.origin(node),
                )  # fmt: skip
            args = list(call.arguments.values())
            args[0] = padded[key]
            args[4] = [n - w for n, w in zip(_padding(call), zeros, strict=True)]
            new = G.call(gm.graph, node.target, tuple(args), {}, origin=G.origin(node))
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _written_out(call: Call) -> tuple[int, ...]:
    """The padding of each axis that is to be written out."""
    padding = _padding(call)
    rank = len(padding)
    zeros = [0] * rank
    if call["transposed"] or is_over_time(call):
        return tuple(zeros)
    if rank == 3:
        zeros[0] = padding[0]
        zeros[1] = padding[1] if is_depthwise(call) else 0
    elif not is_depthwise(call) and call.shape_of("weight")[-1] >= _WIDE and padding[-1] >= _FAR:
        zeros[-1] = padding[-1]
    return tuple(zeros)


def _padding(call: Call) -> list[int]:
    values = [int(n) for n in call["padding"]]
    rank = len(call.shape) - 2
    return values * rank if len(values) == 1 else values


def is_depthwise(call: Call) -> bool:
    """Whether a convolution has one filter for each channel."""
    shape = call.shape_of("weight")
    return shape[1] == 1 and int(call["groups"]) == shape[0] > 1


def is_over_time(call: Call) -> bool:
    """Whether a 3-D convolution, in no groups, takes the pixel at its place only, of any frames."""
    one_pixel = call.shape_of("weight")[3:] == (1, 1) and list(call["stride"][1:]) == [1, 1]
    return one_pixel and not any(call["padding"][1:]) and int(call["groups"]) == 1
