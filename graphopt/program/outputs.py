"""Every output becomes a tensor that a kernel can write to the caller's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt import graph as G
from graphopt.ops import OPS
from graphopt.ops.opdef import Kind


def with_own_outputs(gm: fx.GraphModule, in_blocks: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """A copy of the graph whose every output is a node that a kernel writes to the caller's memory.

    Inputs, constants, views, values read by others, values returned twice, and those that are made
    `in_blocks`, are returned through a copy.
    """
    graph = fx.Graph()
    returned: Any = graph.graph_copy(gm.graph, {})
    seen: set[fx.Node] = set()
    fresh: list[fx.Node] = []
    for node in returned:
        computed = node.op == "call_function" and OPS[node.target].kind is not Kind.VIEW
        # A tensor that kernels read too may be blocked for them; the caller's copy is row-major.
        blocked = computed and len(G.shape(node)) >= 3 and (bool(node.users) or in_blocks(node))
        if computed and not blocked and node not in seen:
            seen.add(node)
            fresh.append(node)
            continue
        identity = list(range(len(G.shape(node))))
        origin = G.origin(node) or (f"output of {node.name}",)
        fresh.append(G.call(graph, torch.ops.aten.permute.default, (node, identity), origin=origin))
    graph.output(tuple(fresh))
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    return copy
