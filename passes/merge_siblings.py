"""Compute layers that read the same tensor as one layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes import _affine
from graphopt.passes._affine import Layer
from graphopt.passes._nodes import aten, bind, calls, only_user
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal

_WHAT = "merge siblings"
_VIEWS = (aten.reshape.default, aten.permute.default, aten.slice.Tensor)


@dataclass(frozen=True)
class MergeSiblings(Pass):
    """Compute layers that read the same tensor as one, with their weights put together.

    ::

        x ─┬─ linear(q) ─                                         ┬─ slice ─
           ├─ linear(k) ─   →   x ─ linear(cat(q, k, v)) ─────────┼─ slice ─
           └─ linear(v) ─                                         └─ slice ─

        x ─┬─ convolution(a) ─┐
           └─ convolution(b) ─ cat ─   →   x ─ convolution(cat(a, b)) ─

    Also for convolutions of the same kernel size, stride, padding and dilation. The input is read
    once instead of several times, and small layers fill the registers better.

    It pays where the parts of the result need no copies of their own: where a `cat` joins them, or
    where they are permuted into the heads of attention and so are copied anyway. Elsewhere it is
    refused unless `copies` is set. Refused too are layers of different geometry,
    with groups, transposed, with weights that are computed, large and shared, or of different
    dtypes, and results so small that there is nothing to win.

    Attributes:
        copies: merge where the parts have to be copied as well.
        smallest: fewest elements of a merged result.
        copy_limit: a shared weight of at most this many bytes may be copied into a merged one.
    """

    name = "merge_siblings"
    # Matrix products of another size may be summed up in another order.
    effect = APPROX(rtol=1e-5, atol=1e-6)
    after = ("canonicalize",)

    copies: bool = False
    smallest: int = 256
    copy_limit: int = 1 << 16

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Look at the readers of each node once."""
        notes = NoteBook()
        editor = Editor(graph)
        position = {node: number for number, node in enumerate(graph.graph.nodes)}
        for x in list(position):
            readers = sorted(
                (user for user in x.users if user in position), key=position.__getitem__
            )
            found = [layer for layer in map(_affine.layer, readers) if layer and layer.x is x]
            if len(found) > 1:
                self._merge_readers(editor, found, notes)
        if notes.result().changed:
            g.remove_unused_constants(graph)
        return notes.result()

    def _merge_readers(self, editor: Editor, layers: list[Layer], notes: NoteBook) -> None:
        """Merge those of the layers, which all read one tensor, that go together."""
        fitting: defaultdict[Any, list[Layer]] = defaultdict(list)
        for layer in layers:
            problem = self._problem(editor.gm, layer)
            if problem is not None:
                notes.refused(_WHAT, problem.reason, g.origin(layer.node))
            else:
                fitting[_geometry(layer)].append(layer)
        if len(fitting) > 1:
            kinds = "kernel size, stride, padding, dilation, dtype or kind"
            places = g.merge_origins(layer.node for layer in layers)
            notes.refused(_WHAT, f"layers that read one tensor differ in {kinds}", places)
        for group in fitting.values():
            if len(group) < 2:
                continue
            refusal = self._merge(editor, group)
            places = g.merge_origins(layer.node for layer in group)
            if refusal is None:
                notes.changed(_WHAT, places)
            else:
                notes.refused(_WHAT, refusal.reason, places)

    def _problem(self, gm: fx.GraphModule, layer: Layer) -> Refusal | None:
        if layer.groups != 1:
            return Refusal("a convolution with groups reads another part of the tensor in each")
        if layer.transposed:
            return Refusal("a transposed convolution")
        return _affine.weight_problem(gm, layer, self.copy_limit)

    def _merge(self, editor: Editor, group: list[Layer]) -> Refusal | None:
        """Merge all layers of the group, or those whose results need no copy."""
        joined = _joined(group)
        if joined is None and not self.copies:
            free = [layer for layer in group if _permuted_for_attention(layer.node)]
            if len(free) < 2:
                others = ", ".join(layer.node.name for layer in group if layer not in free)
                return Refusal(f"the parts of the merged result would be copied for {others}")
            group = free
        size = sum(math.prod(g.shape(layer.node)) for layer in group)
        if size < self.smallest:
            return Refusal(f"the merged result would have {size} elements only")
        origins = g.merge_origins(layer.node for layer in group)
        if joined is not None:
            cat, group = joined
        with editor.at(min(layer.node for layer in group)):
            merged = _merged(editor, group, origins)
        if joined is not None:
            _put_into(editor, cat, merged, [layer.node for layer in group])
            return None
        start = 0
        for layer in group:
            end = start + g.shape(layer.node)[layer.out_axis]
            _put_slice(editor, merged, layer, start, end)
            start = end
        return None


def _geometry(layer: Layer) -> Any:
    """What layers must agree on to be merged."""
    rest = tuple(tuple(v) if isinstance(v, list | tuple) else v for v in layer.rest.values())
    return layer.node.target, g.value(layer.weight).dtype, g.shape(layer.weight)[1:], rest


def _joined(group: Sequence[Layer]) -> tuple[fx.Node, list[Layer]] | None:
    """The `cat` that joins the results of all the layers side by side, and their order in it."""
    cat = only_user(group[0].node)
    if cat is None or not calls(cat, aten.cat.default):
        return None
    a = bind(cat)
    parts = list(a["tensors"])
    if a["dim"] != group[0].out_axis or any(only_user(layer.node) is not cat for layer in group):
        return None
    if any(parts.count(layer.node) != 1 for layer in group):
        return None
    ordered = sorted(group, key=lambda layer: parts.index(layer.node))
    first = parts.index(ordered[0].node)
    together = parts[first : first + len(group)] == [layer.node for layer in ordered]
    return (cat, ordered) if together else None


def _permuted_for_attention(node: fx.Node, permuted: bool = False) -> bool:
    """Whether all readers are attention behind views of the node, a permute among them."""
    return all(
        (permuted and calls(user, aten.scaled_dot_product_attention.default))
        or (
            calls(user, *_VIEWS)
            and _permuted_for_attention(user, permuted or calls(user, aten.permute.default))
        )
        for user in node.users
    )


def _merged(editor: Editor, group: Sequence[Layer], origins: g.Origin) -> fx.Node:
    first = group[0]
    weights, biases = [], []
    for layer in group:
        weight, bias = g.constant(editor.gm, layer.weight), g.constant(editor.gm, layer.bias)
        assert weight is not None
        weights.append(weight)
        biases.append(weight.new_zeros(weight.shape[0]) if bias is None else bias)
    stem = str(first.weight.target)
    weight_node = editor.constant(f"{stem}_merged", torch.cat(weights), origins)
    bias_node = None
    if any(layer.bias is not None for layer in group):
        bias_node = editor.constant(f"{stem}_merged_bias", torch.cat(biases), origins)
    rest = first.rest.values()
    target: Any = first.node.target
    return editor.call(target, first.x, weight_node, bias_node, *rest, origin=origins)


def _put_into(editor: Editor, cat: fx.Node, merged: fx.Node, parts: Sequence[fx.Node]) -> None:
    """Let the `cat` read the merged result instead of the parts; it goes if that is all of it."""
    tensors = list(bind(cat)["tensors"])
    first = tensors.index(parts[0])
    left = [*tensors[:first], merged, *tensors[first + len(parts) :]]
    new = merged
    if len(left) > 1:
        with editor.at(cat):
            new = editor.call(aten.cat.default, left, bind(cat)["dim"])
    editor.replace(cat, new)


def _put_slice(editor: Editor, merged: fx.Node, layer: Layer, start: int, end: int) -> None:
    """Let the readers of the layer read their part of the merged result.

    A reader that splits the features into heads of some width gets a slice of whole heads: that
    slice and the permute after it are one copy, which a reshape between them would make two.
    """
    axis = layer.out_axis
    reader = only_user(layer.node)
    if reader is not None and calls(reader, aten.reshape.default):
        *lead, heads, width = (1, *g.shape(reader))
        whole = g.shape(merged)[axis]
        splits = [1, *g.shape(layer.node)[:-1]] == lead and heads * width == end - start
        if splits and layer.is_linear and start % width == whole % width == 0:
            with editor.at(reader):
                apart = editor.call(
                    aten.reshape.default, merged, [*lead[1:], whole // width, width]
                )
                bounds = start // width, end // width
                part = editor.call(aten.slice.Tensor, apart, axis, *bounds, 1)
            editor.replace(reader, part)
            return
    with editor.at(layer.node):
        part = editor.call(aten.slice.Tensor, merged, axis, start, end, 1)
    editor.replace(layer.node, part)
