"""Canonical forms of ops that overwrite a part of a copy; part of the pass `canonicalize`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.graph import constant, shape, value
from graphopt.passes._canonical import Handler, Outcome
from graphopt.passes._canonical_shapes import Arguments, cut, wrap
from graphopt.passes._nodes import aten, rank
from graphopt.passes.rewrite import Editor, Refusal


def _overwritten(ed: Editor, x: fx.Node, dim: int, start: int, end: int, new: fx.Node) -> fx.Node:
    """`x` with `new` in place of `x[start:end]` along `dim`."""
    size = shape(x)[dim]
    parts = [
        (cut(ed, x, dim, 0, start), start),
        (new, 1),
        (cut(ed, x, dim, end, size), size - end),
    ]
    kept = [part for part, extent in parts if extent]
    return kept[0] if len(kept) == 1 else ed.call(aten.cat.default, kept, dim)


def _slice_scatter(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """slice_scatter → cat of what stays and what is new; index_copy where there are steps."""
    x, dim = a["self"], wrap(a["dim"], rank(node))
    places = range(shape(x)[dim])[a["start"] : a["end"] : a["step"]]
    if not places:
        return x  # type: ignore[no-any-return]
    if places.step == 1:
        return _overwritten(ed, x, dim, places.start, places.stop, a["src"])
    where = ed.constant(f"{node.name}_places", torch.tensor(places))
    return ed.call(aten.index_copy.default, x, dim, where, a["src"])


def _index_copy(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """index_copy to neighbouring constant places → cat of what stays and what is new."""
    places = constant(ed.gm, a["index"])
    if places is None or places.ndim != 1 or not len(places):
        return None
    start = int(places[0])
    if start < 0 or not torch.equal(places, torch.arange(start, start + len(places))):
        return None
    dim = wrap(a["dim"], rank(node))
    return _overwritten(ed, a["self"], dim, start, start + len(places), a["source"])


def _copy(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """copy → the source, in the type and the shape of what it overwrites."""
    source = a["src"]
    if value(source).dtype != value(node).dtype:
        source = ed.call(aten._to_copy.default, source, dtype=value(node).dtype)
    return ed.call(aten.expand.default, source, list(shape(node)))


def _index_put(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """x[:, places] = values → index_copy."""
    x = a["self"]
    given = [(dim, index) for dim, index in enumerate(a["indices"]) if index is not None]
    if a["accumulate"] or len(given) != 1:
        return Refusal("adding to elements, or places given by several tensors")
    dim, index = given[0]
    if len(shape(index)) != 1 or value(index).dtype not in (torch.int32, torch.int64):
        return Refusal("places that are not a vector of integers")
    sizes = [*shape(x)[:dim], shape(index)[0], *shape(x)[dim + 1 :]]
    values = ed.call(aten.expand.default, a["values"], sizes)
    places = index
    if value(index).dtype != torch.int64:
        places = ed.call(aten._to_copy.default, index, dtype=torch.int64)
    negative = ed.call(aten.lt.Scalar, places, 0)
    wrapped = ed.call(aten.add.Tensor, places, shape(x)[dim])
    places = ed.call(aten.where.self, negative, wrapped, places)
    return ed.call(aten.index_copy.default, x, dim, places, values)


HANDLERS: dict[Any, Handler] = {
    aten.copy.default: _copy,
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.slice_scatter.default: _slice_scatter,
}
