"""Bring every op to its one canonical form, so that all later code knows one spelling of each."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt import graph as g
from graphopt.passes import (
    _canonical_arithmetic,
    _canonical_layers,
    _canonical_shapes,
    _canonical_windows,
    _canonical_writes,
)
from graphopt.passes._canonical import Handler, Outcome
from graphopt.passes._nodes import aten, bind, calls, parameters, results, same_type
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal

TABLE: dict[Any, Handler] = {
    **_canonical_shapes.HANDLERS,
    **_canonical_arithmetic.HANDLERS,
    **_canonical_layers.HANDLERS,
    **_canonical_windows.HANDLERS,
    **_canonical_writes.HANDLERS,
}

# Give a view of their input: writing in place to what they return would write to the input too.
_VIEWS = (aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.expand.default)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Give every op its one canonical form.

    ::

        view, flatten, squeeze          →  reshape
        transpose, t, movedim           →  permute
        conv2d, conv_transpose1d, …     →  convolution
        split + getitem                 →  slice
        native_layer_norm + getitem     →  layer_norm
        addmm(b, x, permute(w))         →  linear(x, w, b)
        clone, detach, dropout          →  (nothing)
        relu_                           →  relu

    Afterwards positional arguments are all there, defaults included, keyword-only ones only where
    they differ from the default, dimensions count from the front, and no `getitem` is left but
    under ops this table does not know, which stay as they are. Rounding differs where a matrix
    product or a pooling takes another, equivalent, kernel of PyTorch.
    """

    name = "canonicalize"
    effect = APPROX(rtol=1e-5, atol=1e-6)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Go through the nodes once, inputs first."""
        notes = NoteBook()
        editor = Editor(graph)
        for node in list(graph.graph.nodes):
            if node.op != "call_function" or editor.gone(node):
                continue
            if calls(node, aten._assert_tensor_metadata.default) and not node.users:
                notes.changed("drop _assert_tensor_metadata", g.origin(node))
                editor.prune(node)
                continue
            _canonicalize(editor, _functional(editor, node, notes), notes)
        for node in graph.graph.nodes:
            if isinstance(node.target, OpOverload) and _spell_out(node):
                notes.changed("spell out arguments", g.origin(node))
        return notes.result()


def _canonicalize(editor: Editor, node: fx.Node, notes: NoteBook) -> None:
    handler = TABLE.get(node.target)
    if handler is None:
        return
    origin = g.origin(node)
    editor.added = []
    with editor.at(node):
        outcome: Outcome = handler(editor, node, bind(node))
    if outcome is None:
        return
    label = str(node.target).removeprefix("aten.")
    refusal = outcome if isinstance(outcome, Refusal) else _misfit(node, outcome)
    if refusal is not None:
        editor.discard(editor.added)
        notes.refused(f"canonicalize {label}", refusal.reason, origin)
        return
    if isinstance(outcome, fx.Node):
        editor.replace(node, outcome)
    elif isinstance(outcome, list):
        for getitem in [user for user in node.users if user.target is operator.getitem]:
            new = outcome[int(getitem.args[1])]  # type: ignore[arg-type]
            if new is None:
                editor.prune(getitem)
            else:
                editor.replace(getitem, new)
        editor.prune(node)
    # A result nobody reads leaves nothing but what stood in for it.
    editor.discard(editor.added)
    notes.changed(label, origin)


def _misfit(node: fx.Node, outcome: fx.Node | list[fx.Node | None] | None) -> Refusal | None:
    """Why the outcome cannot stand for the node: a result is missing or has another type."""
    if isinstance(outcome, fx.Node):
        if same_type(g.value(outcome), g.value(node)):
            return None
        made, old = g.value(outcome), g.value(node)
        return Refusal(
            f"the canonical form would give {made.dtype}{list(made.shape)} "
            f"instead of {old.dtype}{list(old.shape)}"
        )
    vals = results(node)
    for getitem in node.users:
        if not calls(getitem, operator.getitem):
            return Refusal(f"{getitem.name} reads all results at once")
        index = int(getitem.args[1])  # type: ignore[arg-type]
        new = (outcome or [])[index]
        if new is None and getitem.users:
            return Refusal(f"result {index} is used, which has no canonical form")
        if new is not None and not same_type(g.value(new), vals[index]):
            return Refusal(f"the canonical form would change the type of result {index}")
    return None


def _functional(editor: Editor, node: fx.Node, notes: NoteBook) -> fx.Node:
    """The node itself, or what computes the same without writing into its input: relu_ → relu."""
    target = node.target
    if not (isinstance(target, OpOverload) and target._schema.is_mutable):
        return node
    name = target._schema.name.partition("::")[2]
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    functional = getattr(packet, target._overloadname, None)
    written = node.args[0] if node.args else None
    if not name.endswith("_") or functional is None or not isinstance(written, fx.Node):
        notes.refused(f"canonicalize {name}", "no form of it without side effects", g.origin(node))
        return node
    if written.op != "call_function" or len(written.users) > 1 or calls(written, *_VIEWS):
        reason = f"it overwrites {written.name}, which is read elsewhere"
        notes.refused(f"canonicalize {name}", reason, g.origin(node))
        return node
    with editor.at(node):
        kwargs: dict[str, Any] = dict(node.kwargs)
        new = editor.call(functional, *node.args, **kwargs)
    editor.replace(node, new)
    notes.changed(name, g.origin(new))
    return new


def _spell_out(node: fx.Node) -> bool:
    """Fill in positional defaults, drop keyword defaults; whether that changed anything."""
    assert isinstance(node.target, OpOverload)
    bound = bind(node)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, keyword_only, has_default, default in parameters(node.target):
        if not keyword_only:
            args.append(bound[name])
        elif not (has_default and bound[name] == default):
            kwargs[name] = bound[name]
    if len(args) == len(node.args) and kwargs == dict(node.kwargs):
        return False
    node.args, node.kwargs = tuple(args), kwargs
    return True
