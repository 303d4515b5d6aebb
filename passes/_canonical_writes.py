"""Canonical forms of ops that overwrite parts of a copy or add to them; part of `canonicalize`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt.graph import constant, shape, value
from graphopt.passes._canonical import Handler, Outcome
from graphopt.passes._canonical_shapes import Arguments, cut, wrap
from graphopt.passes._nodes import aten, bind, is_float, parameters, rank
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
    """x[:, rows, columns] = values, or += → index_copy, or index_add, of lines by one number."""
    x = a["self"]
    given = [(dim, index) for dim, index in enumerate(a["indices"]) if index is not None]
    first, end = given[0][0], given[-1][0] + 1
    if end - first != len(given):
        return Refusal("places given by tensors for dimensions that are no neighbours")
    if any(value(index).dtype not in (torch.int32, torch.int64) for _, index in given):
        return Refusal("places that are not integers")
    sizes, many = shape(x), _broadcast([shape(index) for _, index in given])
    number = None
    for dim, index in given:
        place = _from_front(ed, index, sizes[dim])
        step = math.prod(sizes[dim + 1 : end])
        term = ed.call(aten.mul.Tensor, place, step) if step != 1 else place
        number = term if number is None else ed.call(aten.add.Tensor, number, term)
    before, after, count = list(sizes[:first]), list(sizes[end:]), math.prod(many)
    places = ed.call(aten.expand.default, number, many)
    places = ed.call(aten.reshape.default, places, [count])
    values = ed.call(aten.expand.default, a["values"], [*before, *many, *after])
    values = ed.call(aten.reshape.default, values, [*before, count, *after])
    lines = [*before, math.prod(sizes[first:end]), *after]
    flat = ed.call(aten.reshape.default, x, lines)
    write = aten.index_add.default if a["accumulate"] else aten.index_copy.default
    return ed.call(aten.reshape.default, ed.call(write, flat, first, places, values), list(sizes))


def _broadcast(shapes: list[tuple[int, ...]]) -> list[int]:
    return list(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _from_front(ed: Editor, index: fx.Node, size: int) -> fx.Node:
    """Places as int64, negative ones counted from the end."""
    places = index
    if value(index).dtype != torch.int64:
        places = ed.call(aten._to_copy.default, index, dtype=torch.int64)
    negative = ed.call(aten.lt.Scalar, places, 0)
    return ed.call(aten.where.self, negative, ed.call(aten.add.Tensor, places, size), places)


def _index_add(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """alpha → a product of its own; adding neighbours to zeros → sum."""
    dim = wrap(a["dim"], rank(node))
    if a["alpha"] == 1 and is_float(node) and _sums_runs(ed, a, dim):
        sizes = list(shape(node))
        runs = [*sizes[: dim + 1], shape(a["source"])[dim] // sizes[dim], *sizes[dim + 1 :]]
        apart = ed.call(aten.reshape.default, a["source"], runs)
        return ed.call(aten.sum.dim_IntList, apart, [dim + 1], False)
    if a["alpha"] == 1 and dim == a["dim"]:
        return None
    source = a["source"]
    if a["alpha"] != 1:
        source = ed.call(aten.mul.Tensor, source, a["alpha"])
    return ed.call(aten.index_add.default, a["self"], dim, a["index"], source)


def _sums_runs(ed: Editor, a: Arguments, dim: int) -> bool:
    """Whether each place gets the same number of neighbours, and nothing was there before."""
    before, places = constant(ed.gm, a["self"]), constant(ed.gm, a["index"])
    if before is None or places is None or places.ndim != 1 or bool(before.any()):
        return False
    each, rest = divmod(len(places), shape(a["self"])[dim])
    runs = torch.arange(shape(a["self"])[dim]).repeat_interleave(each)
    return rest == 0 and each > 0 and torch.equal(places, runs)


_REDUCTIONS = {"add": "sum", "multiply": "prod"}


def _scatter_reduce(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """scatter_add and all reductions → scatter_reduce to sum, prod, amax or amin, self included."""
    named: str = a.get("reduce", "sum")
    reduce = _REDUCTIONS.get(named, named)
    x, dim, index, src = a["self"], wrap(a["dim"], rank(node)), a["index"], a.get("src")
    include = a.get("include_self", True)
    done = node.target is aten.scatter_reduce.two and reduce != "mean" and include
    if done and dim == a["dim"]:
        return None
    if src is None:
        number = ed.constant(f"{node.name}_value", torch.tensor(a["value"], dtype=value(x).dtype))
        src = ed.call(aten.expand.default, number, list(shape(index)))

    def reduced(to: fx.Node, parts: fx.Node, how: str) -> fx.Node:
        return ed.call(aten.scatter_reduce.two, to, dim, index, parts, how)

    def replaced(by: bool | int | float) -> fx.Node:
        """`self` without the elements that do not count."""
        return x if include else ed.call(aten.scatter.value, x, dim, index, by)

    if reduce != "mean":
        return reduced(replaced(_identity(reduce, value(x).dtype)), src, reduce)
    total = reduced(replaced(0), src, "sum")
    one = ed.constant(f"{node.name}_one", torch.ones((), dtype=value(x).dtype))
    start = ed.call(aten.expand.default, one, list(shape(x)))
    if not include:
        start = ed.call(aten.scatter.value, start, dim, index, 0)
    count = reduced(start, ed.call(aten.expand.default, one, list(shape(index))), "sum")
    if is_float(node):
        return ed.call(aten.div.Tensor, total, count)
    return ed.call(aten.div.Tensor_mode, total, count, rounding_mode="floor")


def _identity(reduce: str, dtype: torch.dtype) -> int | float:
    """What changes nothing when it is folded in."""
    if reduce in ("sum", "prod"):
        return int(reduce == "prod")
    if dtype.is_floating_point:
        return -math.inf if reduce == "amax" else math.inf
    kind = torch.iinfo(dtype)
    return kind.min if reduce == "amax" else kind.max


def _lifted(handler: Handler) -> Handler:
    """Writing to a scalar → writing to a vector of one element; all else is the handler's."""

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        if rank(a["self"]):
            return handler(ed, node, a)
        vectors = {
            name: ed.call(aten.reshape.default, given, [math.prod(shape(given))])
            if isinstance(given, fx.Node)
            else given
            for name, given in a.items()
        }
        assert isinstance(node.target, OpOverload)
        named = {name for name, keyword_only, *_ in parameters(node.target) if keyword_only}
        args = [given for name, given in vectors.items() if name not in named]
        kwargs: dict[str, Any] = {name: vectors[name] for name in named}
        written = ed.call(node.target, *args, **kwargs)
        outcome = handler(ed, written, bind(written))
        if isinstance(outcome, Refusal):
            return outcome
        if isinstance(outcome, fx.Node):
            written = outcome
        return ed.call(aten.reshape.default, written, [])

    return handle


def _scatter(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """scatter: only gets its `dim` counted from the front."""
    dim = wrap(a["dim"], rank(node))
    if dim == a["dim"]:
        return None
    what = a["src"] if "src" in a else a["value"]
    assert isinstance(node.target, OpOverload)
    return ed.call(node.target, a["self"], dim, a["index"], what)


HANDLERS: dict[Any, Handler] = {
    aten.copy.default: _copy,
    aten.index_add.default: _lifted(_index_add),
    aten.index_copy.default: _lifted(_index_copy),
    aten.index_put.default: _index_put,
    aten.scatter.src: _lifted(_scatter),
    aten.scatter.value: _lifted(_scatter),
    **dict.fromkeys(
        [
            aten.scatter.reduce,
            aten.scatter.value_reduce,
            aten.scatter_add.default,
            aten.scatter_reduce.two,
        ],
        _lifted(_scatter_reduce),
    ),
    aten.slice_scatter.default: _slice_scatter,
}
