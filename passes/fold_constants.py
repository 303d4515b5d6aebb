"""Compute at build time what does not depend on the inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt import graph as g
from graphopt.passes._nodes import gives_several, is_random
from graphopt.passes.base import EXACT, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute nodes whose inputs are all constants, and keep their results as constants.

    ::

        arange ─ reshape ─ cos ─ mul(x, ·)      →      constant ─ mul(x, ·)

    Refused where the result would take much more room than what it is computed from, for random
    ops, and for quantized constants, which stay integers.

    Attributes:
        growth: how many bytes more than the constants it replaces a result may take.
    """

    name = "fold_constants"
    effect = EXACT
    after = ("canonicalize",)

    growth: int = 1 << 20

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Go through the nodes once, inputs first: a folded one is a constant for the next."""
        notes = NoteBook()
        editor = Editor(graph)
        for node in list(graph.graph.nodes):
            # Nobody reads it: that is for eliminate_dead_code.
            if node.op != "call_function" or editor.gone(node) or not node.users:
                continue
            if not all(source.op == "get_attr" for source in node.all_input_nodes):
                continue
            origin = g.origin(node)
            what = f"fold {str(node.target).removeprefix('aten.')}"
            reason = self._reason_against(graph, node)
            if reason:
                notes.refused(what, reason, origin)
                continue
            try:
                result = _compute(graph, node)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                notes.refused(
                    what, f"PyTorch cannot compute it: {str(error).splitlines()[0]}", origin
                )
                continue
            places = g.merge_origins((node, *node.all_input_nodes))
            editor.added = []
            with editor.at(node):
                constant = editor.constant(node.name, result, places)
            editor.replace(node, constant)
            notes.changed(what, origin)
        if notes.result().changed:
            g.remove_unused_constants(graph)
        return notes.result()

    def _reason_against(self, graph: fx.GraphModule, node: fx.Node) -> str:
        """Why the node must be computed on every run, or empty."""
        target = node.target
        if not isinstance(target, OpOverload) or gives_several(node):
            return "not an operator with one result"
        if is_random(target):
            return "its result is random"
        if target._schema.is_mutable:
            return "it writes into its input"
        if target.namespace not in ("aten", "graphopt"):
            return "quantized constants stay integers"
        # Constants that others read too are kept, so they do not pay for the result.
        freed = sum(_bytes(source) for source in node.all_input_nodes if len(source.users) == 1)
        grown = _bytes(node) - freed
        if grown > self.growth:
            return f"the result would take {grown} bytes more than what it is computed from"
        return ""


def _bytes(node: fx.Node) -> int:
    return math.prod(g.shape(node)) * g.value(node).element_size()


def _compute(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    def tensor(source: fx.Node) -> torch.Tensor:
        found = g.constant(graph, source)
        assert found is not None
        return found

    args = fx.map_arg(node.args, tensor)
    kwargs: dict[str, Any] = dict(fx.map_arg(dict(node.kwargs), tensor))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    assert isinstance(node.target, OpOverload)
    with torch.no_grad():
        result: torch.Tensor = node.target(*args, **kwargs)
    # A copy: views keep all of what they look into alive.
    return result.detach().clone(memory_format=torch.contiguous_format)
