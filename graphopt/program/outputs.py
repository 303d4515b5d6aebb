"""Every output becomes a tensor that a kernel can write to the caller's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import graph as G
from graphopt.ops import OPS
from graphopt.ops.opdef import Kind


def with_own_outputs(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph whose every output is a node that a kernel writes to the caller's memory.

    Inputs, constants, views, values read by others and values returned twice are returned through a
    copy.
    """
    graph = fx.Graph()
    returned: Any = graph.graph_copy(gm.graph, {})
    seen: set[fx.Node] = set()
    fresh: list[fx.Node] = []
    for node in returned:
        computed = node.op == "call_function" and OPS[node.target].kind is not Kind.VIEW
        # A tensor that kernels read too may be blocked for them; the caller's copy is row-major.
        shared = bool(node.users) and len(G.shape(node)) >= 3
        if computed and not shared and node not in seen:
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
