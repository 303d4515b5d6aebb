"""Remove nodes and constants that no output depends on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch._ops import OpOverload

from graphopt import graph as g
from graphopt.passes.base import EXACT, Context, NoteBook, Pass, PassResult


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove nodes and constants that no output depends on. Inputs stay: they are the interface.

    ::

        x ─┬─ relu ─ output            x ─ relu ─ output
           └─ exp ─ mul        →

    An op that writes into its inputs is kept even if nobody reads its result.
    """

    name = "eliminate_dead_code"
    effect = EXACT

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Go through the nodes once, from the outputs back."""
        notes = NoteBook()
        for node in reversed(graph.graph.nodes):
            if node.users or node.op in ("placeholder", "output"):
                continue
            if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
                notes.refused("remove unread node", "it writes into its input", g.origin(node))
                continue
            notes.changed(f"remove unread {node.op}", g.origin(node))
            graph.graph.erase_node(node)
        before = {name for name, _ in graph.named_buffers(recurse=False)}
        g.remove_unused_constants(graph)
        dropped = before - {name for name, _ in graph.named_buffers(recurse=False)}
        if dropped:
            notes.changed("remove unread constant data", count=len(dropped))
        return notes.result()
