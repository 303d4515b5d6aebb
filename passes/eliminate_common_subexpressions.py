"""Compute once what is computed several times."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt import graph as g
from graphopt.passes._nodes import freeze, is_random
from graphopt.passes._numeric import same_bits
from graphopt.passes.base import EXACT, Context, NoteBook, Pass, PassResult


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Keep one of equal nodes, and one of equal constants.

    ::

        x ─┬─ relu ─ a                 x ─ relu ─┬─ a
           └─ relu ─ b          →                └─ b

    Equal means: the same op with the same arguments, or constants of the same type and bytes.
    Random ops and ops that write into their inputs are left alone.
    """

    name = "eliminate_common_subexpressions"
    effect = EXACT
    after = ("canonicalize",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Go through the nodes once, inputs first, looking up each in a table of those seen."""
        notes = NoteBook()
        seen: dict[Hashable, fx.Node] = {}
        constants: dict[Hashable, list[fx.Node]] = {}
        for node in list(graph.graph.nodes):
            if node.op == "get_attr":
                first = _equal_constant(graph, node, constants)
            elif node.op == "call_function" and _is_function(node):
                key = (node.target, freeze(node.args, id), freeze(node.kwargs, id))
                first = seen.setdefault(key, node)
            else:
                continue
            if first is not node:
                what = "constant" if node.op == "get_attr" else str(node.target)
                notes.changed(f"merge equal {what.removeprefix('aten.')}", g.origin(node))
                g.replace(node, first)
        if notes.result().changed:
            g.remove_unused_constants(graph)
        return notes.result()


def _is_function(node: fx.Node) -> bool:
    """Whether the result depends on the arguments only, and nothing else happens."""
    target = node.target
    if not isinstance(target, OpOverload):
        return True  # getitem
    return not (is_random(target) or target._schema.is_mutable)


def _equal_constant(
    graph: fx.GraphModule, node: fx.Node, constants: dict[Hashable, list[fx.Node]]
) -> fx.Node:
    """The first constant with the same contents, or the node itself."""
    tensor = g.constant(graph, node)
    assert tensor is not None
    # A few values tell most tensors apart without reading all of a large model's weights.
    flat = tensor.reshape(-1)
    probe = flat[:: max(1, flat.numel() // 32)].contiguous()
    key = (tensor.dtype, tuple(tensor.shape), bytes(probe.view(torch.uint8).tolist()))
    bucket = constants.setdefault(key, [])
    for other in bucket:
        first = g.constant(graph, other)
        assert first is not None
        if first is tensor or same_bits(first, tensor):
            return other
    bucket.append(node)
    return node
