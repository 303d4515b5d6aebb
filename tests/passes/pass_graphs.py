"""Building small graphs, running passes on them, and comparing before and after."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes import Context, Note, Pass, PassResult, run_passes
from graphopt.passes._numeric import disagreement, evaluate

aten = torch.ops.aten


class Build:
    """Builds a graph node by node; each node's origin is its number."""

    def __init__(self) -> None:
        self.gm = g.empty_graph()
        self.count = 0

    def input(self, *sizes: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        name = f"in{len(self.gm.meta['input_names'])}"
        node = self.gm.graph.placeholder(name)
        node.meta["val"] = torch.empty(sizes, dtype=dtype, device="meta")
        self.gm.meta["input_names"] += (name,)
        return node

    def const(self, tensor: torch.Tensor | float) -> fx.Node:
        return g.add_constant(
            self.gm, "c", torch.as_tensor(tensor), origin=(f"const{self._next()}",)
        )

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.gm.graph.call_function(target, args, kwargs)
        if target is operator.getitem:
            node.meta["val"] = args[0].meta["val"][args[1]]
        else:
            val = g.infer(target, args, kwargs)
            if isinstance(val, torch.Tensor):
                val = val.to("meta")  # arange and the like make their tensor on the CPU
            node.meta["val"] = tuple(val) if isinstance(val, list) else val
        node.meta["origin"] = (f"op{self._next()}",)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def done(self, *outputs: fx.Node) -> fx.GraphModule:
        self.gm.graph.output(tuple(outputs))
        self.gm.meta["output_names"] = tuple(f"out{i}" for i in range(len(outputs)))
        self.gm.recompile()
        return self.gm

    def _next(self) -> int:
        self.count += 1
        return self.count


def ops(gm: fx.GraphModule) -> list[str]:
    """The called ops in order, without overload names."""
    return [
        str(n.target).removeprefix("aten.").split(".")[0]
        if n.target is not operator.getitem
        else "getitem"
        for n in gm.graph.nodes
        if n.op == "call_function"
    ]


def inputs_for(gm: fx.GraphModule, seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    made = []
    for node in g.placeholders(gm):
        like = g.value(node)
        if like.dtype.is_floating_point:
            made.append(torch.randn(like.shape, generator=random, dtype=like.dtype))
        else:
            made.append(torch.randint(0, 2, like.shape, generator=random).to(like.dtype))
    return tuple(made)


def run(
    gm: fx.GraphModule, each: Pass, *, samples: Sequence[tuple[torch.Tensor, ...]] = ()
) -> PassResult:
    """Run one pass, twice; hold it to its effect, to well-formed graphs and to idempotence."""
    gm.meta["passes"] = each.after
    before = deepcopy(gm)
    ctx = Context(samples=tuple(samples))
    record = run_passes(gm, [each], ctx)[0]
    for inputs in samples or [inputs_for(before)]:
        problem = disagreement(each.effect, evaluate(before, inputs), evaluate(gm, inputs))
        assert not problem, problem
    (again,) = run_passes(gm, [each], ctx)
    assert not again.changed, [str(note) for note in again.notes]
    return PassResult(record.changed, record.notes)


def refusals(result: PassResult) -> dict[str, str]:
    """The reasons of what was refused, by rewrite."""
    return {note.what: note.reason for note in result.notes if note.action == "refused"}


def changes(result: PassResult) -> dict[str, int]:
    """How often each rewrite was done."""
    return {note.what: note.count for note in result.notes if note.action == "changed"}


def origins(notes: Sequence[Note]) -> set[str]:
    return {place for note in notes for place in note.origins}
