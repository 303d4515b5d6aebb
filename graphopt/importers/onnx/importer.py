"""The walk over an ONNX graph that builds graphopt's graph and collects what it cannot import."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import fx

from graphopt import graph as G
from graphopt.errors import GraphoptError, ModelError, UnsupportedError
from graphopt.importers.inputs import ExampleInputs
from graphopt.importers.onnx.dtypes import to_torch
from graphopt.importers.onnx.interface import input_specs
from graphopt.importers.onnx.load import describe, load
from graphopt.importers.onnx.values import (
    Context,
    OnnxNode,
    Refused,
    Value,
    dtype,
    number,
    shape,
)

Handler = Callable[[Context, OnnxNode], Value | tuple[Value, ...]]
_OWN_DOMAINS = (None, "", "ai.onnx")


class _Lost:
    """Stands for the result of a node that could not be imported."""


def import_graph(
    source: Path | onnx.ModelProto, inputs: ExampleInputs, handlers: Mapping[str, Handler]
) -> fx.GraphModule:
    """Import a model with these operator handlers.

    Raises:
        GraphoptError: see `graphopt.importers.import_model`.
    """
    graph, opset = load(source)
    specs = input_specs(graph, inputs)
    gm = G.empty_graph()
    walk = _Walk(Context(gm, opset), handlers)
    for tensor in graph.inputs:
        sizes, kind = specs[tensor.name]
        node = gm.graph.placeholder(_identifier(tensor.name))
        node.meta["val"] = torch.empty(sizes, dtype=kind, device="meta")
        node.meta["origin"] = (f"ONNX input {tensor.name!r}",)
        walk.values[id(tensor)] = node
    walk.nodes(graph)
    walk.raise_refusals()
    results = tuple(walk.ctx.node(walk.result(tensor)) for tensor in graph.outputs)
    gm.graph.output(results).meta["val"] = tuple(G.value(result) for result in results)
    gm.meta["input_names"] = tuple(tensor.name for tensor in graph.inputs)
    gm.meta["output_names"] = tuple(tensor.name for tensor in graph.outputs)
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            gm.graph.erase_node(node)
    G.remove_unused_constants(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _identifier(name: str) -> str:
    """A Python name like an ONNX name, for the generated code; the interface keeps the original."""
    stem = re.sub(r"\W", "_", name)
    return f"input_{stem}" if not stem.isidentifier() or keyword.iskeyword(stem) else stem


class _Walk:
    """Values of tensors met so far (by identity: names repeat in subgraphs), and refusals."""

    def __init__(self, ctx: Context, handlers: Mapping[str, Handler]) -> None:
        self.ctx = ctx
        self.handlers = handlers
        self.values: dict[int, Value | _Lost] = {}
        self.refusals: list[tuple[str, str]] = []

    def nodes(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            self.node(node, {id(tensor) for tensor in graph.outputs})

    def node(self, node: gs.Node, graph_outputs: set[int]) -> None:
        origin = describe(node.op, node.name, [tensor.name for tensor in node.outputs])
        operands = [self.operand(tensor) for tensor in node.inputs]
        try:
            if node.domain not in _OWN_DOMAINS:
                raise Refused(f"it belongs to the operator domain {node.domain!r}")
            if node.op != "If" and node.op not in self.handlers:
                raise Refused("no such operator is known")
            if any(isinstance(operand, _Lost) for operand in operands):
                results: Any = _Lost()
            else:
                self.ctx.origin = (origin,)
                used = tuple(bool(t.outputs) or id(t) in graph_outputs for t in node.outputs)
                view = OnnxNode(node.op, tuple(operands), dict(node.attrs), used, origin)
                results = self.branch(view) if node.op == "If" else self.handle(view)
        except Refused as refusal:
            self.refusals.append((origin, str(refusal)))
            results = _Lost()
        if not isinstance(results, tuple):
            results = (results,) * (len(node.outputs) if isinstance(results, _Lost) else 1)
        for tensor, result in zip(node.outputs, results, strict=False):
            self.values[id(tensor)] = result
            if isinstance(result, torch.Tensor) and id(result) not in self.ctx.names:
                self.ctx.name(result, tensor.name)

    def handle(self, node: OnnxNode) -> Value | tuple[Value, ...]:
        try:
            return self.handlers[node.op](self.ctx, node)
        except (Refused, GraphoptError):
            raise
        except Exception as error:
            seen = ", ".join(
                "none" if value is None else f"{dtype(value)}{shape(value)}".removeprefix("torch.")
                for value in node.operands
            )
            reason = str(error).strip().splitlines()
            raise ModelError(
                f"an operator does not fit its inputs ({seen}): "
                f"{reason[0] if reason else type(error).__name__}",
                where=(node.origin,),
                hint="check the example inputs' sizes, and the model with "
                "onnx.checker.check_model(model, full_check=True)",
            ) from error

    def branch(self, node: OnnxNode) -> tuple[Value | _Lost, ...]:
        """An `If` whose condition is constant is the branch it takes."""
        condition = number(node.value(0), "condition")
        taken = node.attributes["then_branch" if condition else "else_branch"]
        self.nodes(taken)
        return tuple(self.result(tensor) for tensor in taken.outputs)

    def operand(self, tensor: gs.Tensor) -> Any:
        return None if tensor.is_empty() else self.result(tensor)

    def result(self, tensor: gs.Tensor) -> Any:
        found = self.values.get(id(tensor))
        if found is None and isinstance(tensor, gs.Constant):
            try:
                found = to_torch(tensor.values)
            except Refused as refusal:
                self.refusals.append((f"ONNX constant {tensor.name!r}", str(refusal)))
                found = _Lost()
            else:
                self.ctx.name(found, tensor.name)
            self.values[id(tensor)] = found
        return _Lost() if found is None else found

    def raise_refusals(self) -> None:
        if not self.refusals:
            return
        count = len(self.refusals)
        raise UnsupportedError(
            "the model uses an operator in a way that cannot be compiled"
            if count == 1
            else f"the model uses {count} operators in ways that cannot be compiled",
            where=[f"{origin}: {reason}" for origin, reason in self.refusals],
            hint="replace these operators before exporting to ONNX, or simplify the model",
        )
