"""3-D convolutions read padded frames: what surrounds their input is written out before them."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import graph as G
from graphopt.ops.opdef import Call

aten = torch.ops.aten


def with_padded_frames(gm: fx.GraphModule) -> None:
    """Give 3-D convolutions of `gm` inputs that are padded along depth, in place.

    Frames that do not exist would be a test in the innermost loop; copied with zero frames around
    them, all frames are alike. Depthwise ones get rows of zeros, too: they take rows of all the
    kernel's frames for one window.
    """
    padded: dict[tuple[fx.Node, int, int], fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not aten.convolution.default:
            continue
        call = Call(node)
        if len(call.shape) != 5 or call["transposed"]:
            continue
        padding = list(call["padding"])
        depth, rows = padding[0], padding[1] if is_depthwise(call) else 0
        if not depth and not rows:
            continue
        key = (call["input"], depth, rows)
        with gm.graph.inserting_before(node):
            if key not in padded:
                around = [0, 0, rows, rows, depth, depth]
                padded[key] = G.call(
                    gm.graph, aten.constant_pad_nd.default, (call["input"], around, 0.0), {},
                    origin=G.origin(node),
                )  # fmt: skip
            rest = [0, padding[1] - rows, padding[2]]
            args = list(call.arguments.values())
            args[0], args[4] = padded[key], rest
            new = G.call(gm.graph, node.target, tuple(args), {}, origin=G.origin(node))
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def is_depthwise(call: Call) -> bool:
    """Whether a convolution has one filter for each channel."""
    shape = call.shape_of("weight")
    return shape[1] == 1 and int(call["groups"]) == shape[0] > 1
