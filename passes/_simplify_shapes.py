"""Rules of the pass `simplify` for shape and data-movement ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.graph import shape, value
from graphopt.passes._nodes import aten, bind, calls, only_user, rank, same_type
from graphopt.passes.rewrite import Editor, Rule

# Ops that cannot change their input's values where they keep its type.
_MOVES = (
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten._to_copy.default,
    aten.constant_pad_nd.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool3d.default,
    aten.upsample_nearest2d.vec,
)

# Every value of the key dtype is also a value of these.
_HOLDS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.bool: (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    torch.uint8: (
        *(torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    torch.int8: (
        *(torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    torch.int16: (torch.int32, torch.int64, torch.float32, torch.float64),
    torch.int32: (torch.int64, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}

Pair = tuple[fx.Node, fx.Node]


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _does_nothing(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x = _source(node)
    if not same_type(value(x), value(node)):
        return None
    a = bind(node)
    if calls(node, aten.constant_pad_nd.default) and any(a["pad"]):
        return None  # negative padding on one side can make up for the other
    if calls(node, aten.slice.Tensor) and a["step"] != 1 and shape(x)[a["dim"]] > 1:
        return None
    if "kernel_size" in a and not _is_pointwise_pool(a):
        return None
    if any(scale != 1 for scale in a.get("scale_factors") or ()):
        return None  # a scale of 1.01 keeps the size, but not which pixel goes where
    return x


def _is_pointwise_pool(a: dict[str, Any]) -> bool:
    ones = [*a["kernel_size"], *a["stride"]]
    return all(n == 1 for n in ones) and not any(a["padding"]) and not a.get("divisor_override")


def _input(_ed: Editor, x: fx.Node) -> fx.Node:
    return x


def _twice(*targets: Any) -> Any:
    """A pattern: the root reads another call of one of the targets."""

    def pattern(_gm: fx.GraphModule, node: fx.Node) -> Pair | None:
        inner = _source(node)
        return (inner, node) if calls(inner, *targets) else None

    return pattern


def _skip_inner(ed: Editor, pair: Pair) -> fx.Node:
    inner, outer = pair
    return ed.call(outer.target, _source(inner), *outer.args[1:], **outer.kwargs)  # type: ignore[arg-type]


def _idle_permute(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    return node if list(node.args[1]) == list(range(rank(node))) else None  # type: ignore[arg-type]


def _compose_permutes(ed: Editor, pair: Pair) -> fx.Node:
    inner, outer = pair
    first: Any = inner.args[1]
    then: Any = outer.args[1]
    return ed.call(aten.permute.default, _source(inner), [first[dim] for dim in then])


def _moves_ones_only(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    order: Any = node.args[1]
    real = [dim for dim in order if shape(_source(node))[dim] != 1]
    return node if real == sorted(real) else None


def _as_reshape(ed: Editor, node: fx.Node) -> fx.Node:
    return ed.call(aten.reshape.default, _source(node), list(shape(node)))


def _ones_after_permute(_gm: fx.GraphModule, node: fx.Node) -> Pair | None:
    """A reshape that only adds or drops dimensions of size 1, of a permuted tensor."""
    inner = _source(node)
    if not calls(inner, aten.permute.default) or only_user(inner) is None:
        return None
    real = [[n for n in shape(x) if n != 1] for x in (inner, node)]
    return (inner, node) if real[0] == real[1] and 0 not in shape(node) else None


def _ones_before_permute(ed: Editor, pair: Pair) -> fx.Node:
    """Reshape first: permutes then meet, and what is left of them is closer to its reader."""
    inner, outer = pair
    x, order = _source(inner), list(inner.args[1])  # type: ignore[arg-type]
    moved = [axis for axis in order if shape(x)[axis] != 1]
    kept = sorted(moved)
    # Where the permute leaves a dimension in place, those of size 1 stay beside it.
    sizes: list[int] = []
    home: dict[int, int] = {}
    waiting = iter(kept)
    for size in shape(outer):
        if size != 1:
            axis = next(waiting)
            home[axis] = len(sizes)
            size = shape(x)[axis]
        sizes.append(size)
    axes = iter(moved)
    dims = [at if size == 1 else home[next(axes)] for at, size in enumerate(shape(outer))]
    reshaped = ed.call(aten.reshape.default, x, sizes)
    return ed.call(aten.permute.default, reshaped, dims)


def _slice_of_permute(_gm: fx.GraphModule, node: fx.Node) -> Pair | None:
    """A slice of a permuted tensor that only slices read, as queries, keys and values are cut."""
    inner = _source(node)
    if not calls(inner, aten.permute.default):
        return None
    return (inner, node) if all(calls(user, aten.slice.Tensor) for user in inner.users) else None


def _slice_before_permute(ed: Editor, pair: Pair) -> fx.Node:
    inner, outer = pair
    cut = bind(outer)
    order: Any = inner.args[1]
    bounds = (order[cut["dim"]], cut["start"], cut["end"], cut["step"])
    piece = ed.call(aten.slice.Tensor, _source(inner), *bounds)
    return ed.call(aten.permute.default, piece, list(order))


@dataclass(frozen=True)
class _Heads:
    """A slice, its reshape, and what is the same: a reshape to `sizes`, sliced along `dim`."""

    inner: fx.Node
    outer: fx.Node
    sizes: list[int]
    dim: int
    start: int


def _heads_of_slice(_gm: fx.GraphModule, node: fx.Node) -> _Heads | None:
    """A reshape of a slice that only permutes read, as heads of attention are cut."""
    inner = _source(node)
    if not calls(inner, aten.slice.Tensor) or bind(inner)["step"] != 1 or only_user(inner) is None:
        return None
    if not all(calls(user, aten.permute.default) for user in node.users) or 0 in shape(node):
        return None
    cut, sizes = bind(inner), list(shape(node))
    before, behind = (math.prod(part) for part in _around(shape(inner), cut["dim"]))
    first, whole = cut["start"] * behind, shape(cut["self"])[cut["dim"]] * behind
    for dim in range(len(sizes)):
        lead, unit = (math.prod(part) for part in _around(sizes, dim))
        if lead == before and first % unit == whole % unit == 0:
            sizes[dim] = whole // unit
            return _Heads(inner, node, sizes, dim, first // unit)
    return None


def _around(sizes: Sequence[int], dim: int) -> tuple[Sequence[int], Sequence[int]]:
    return sizes[:dim], sizes[dim + 1 :]


def _reshape_before_slice(ed: Editor, found: _Heads) -> fx.Node:
    """Reshape first: attention reads through what is left."""
    whole = ed.call(aten.reshape.default, _source(found.inner), found.sizes)
    end = found.start + shape(found.outer)[found.dim]
    return ed.call(aten.slice.Tensor, whole, found.dim, found.start, end, 1)


def _slice_of_slice(_gm: fx.GraphModule, node: fx.Node) -> Pair | None:
    inner = _source(node)
    if not calls(inner, aten.slice.Tensor) or bind(inner)["dim"] != bind(node)["dim"]:
        return None
    return inner, node


def _compose_slices(ed: Editor, pair: Pair) -> fx.Node:
    inner, outer = (bind(node) for node in pair)
    start = inner["start"] + outer["start"] * inner["step"]
    end = min(inner["end"], inner["start"] + outer["end"] * inner["step"])
    step = inner["step"] * outer["step"]
    end = max(start, end)
    return ed.call(aten.slice.Tensor, inner["self"], inner["dim"], start, end, step)


def _pad_of_pad(_gm: fx.GraphModule, node: fx.Node) -> Pair | None:
    inner = _source(node)
    if not calls(inner, aten.constant_pad_nd.default) or only_user(inner) is None:
        return None
    a, b = bind(inner), bind(node)
    if repr(float(a["value"])) != repr(float(b["value"])) or min(*a["pad"], *b["pad"], 0) < 0:
        return None
    return inner, node


def _compose_pads(ed: Editor, pair: Pair) -> fx.Node:
    inner, outer = (bind(node) for node in pair)
    count = max(len(inner["pad"]), len(outer["pad"]))
    pads = [[*a["pad"], *[0] * (count - len(a["pad"]))] for a in (inner, outer)]
    both = [p + q for p, q in zip(*pads, strict=True)]
    return ed.call(aten.constant_pad_nd.default, inner["self"], both, inner["value"])


def _cat_of_one(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    parts: Any = node.args[0]
    return parts[0] if len(parts) == 1 else None


def _cat_of_pieces(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The tensor that was cut into slices and is put together again in the same order."""
    a = bind(node)
    at = 0
    whole: fx.Node | None = None
    for part in a["tensors"]:
        if not calls(part, aten.slice.Tensor):
            return None
        cut = bind(part)
        whole = whole or cut["self"]
        if (cut["self"], cut["dim"], cut["start"], cut["step"]) != (whole, a["dim"], at, 1):
            return None
        at = cut["end"]
    return whole if whole is not None and shape(whole) == shape(node) else None


def _cat_of_cat(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    a = bind(node)
    nested = any(
        calls(part, aten.cat.default) and bind(part)["dim"] == a["dim"] and only_user(part)
        for part in a["tensors"]
    )
    return node if nested else None


def _flatten_cat(ed: Editor, node: fx.Node) -> fx.Node:
    a = bind(node)
    parts: list[fx.Node] = []
    for part in a["tensors"]:
        inner = calls(part, aten.cat.default) and bind(part)["dim"] == a["dim"] and only_user(part)
        parts.extend(bind(part)["tensors"] if inner else [part])
    return ed.call(aten.cat.default, parts, a["dim"])


def _permute_of_cat(_gm: fx.GraphModule, node: fx.Node) -> Pair | None:
    """A permute of a cat most of which is permuted the other way round."""
    cat = _source(node)
    if not calls(cat, aten.cat.default) or only_user(cat) is not node:
        return None
    undone = [part for part in bind(cat)["tensors"] if _undoes(node, part)]
    return (cat, node) if 2 * sum(value(x).numel() for x in undone) > value(cat).numel() else None


def _undoes(outer: fx.Node, inner: fx.Node) -> bool:
    """Whether two permutes together move dimensions of size 1 only."""
    if not calls(inner, aten.permute.default):
        return False
    first: Any = inner.args[1]
    then: Any = outer.args[1]
    order = [first[dim] for dim in then if shape(inner)[dim] != 1]
    return order == sorted(order)


def _permute_before_cat(ed: Editor, pair: Pair) -> fx.Node:
    cat, permute = pair
    a = bind(cat)
    order: Any = permute.args[1]
    parts = [ed.call(aten.permute.default, part, order) for part in a["tensors"]]
    return ed.call(aten.cat.default, parts, order.index(a["dim"]))


def _lossless_cast(_gm: fx.GraphModule, node: fx.Node) -> Pair | None:
    inner = _source(node)
    if not calls(inner, aten._to_copy.default):
        return None
    held = _HOLDS.get(value(_source(inner)).dtype, ())
    return (inner, node) if value(inner).dtype in held else None


def _over_ones(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    a = bind(node)
    sizes = shape(a["self"])
    if value(a["self"]).dtype != value(node).dtype:
        return None
    # Summing one value adds 0.0 to it, which loses the sign of -0.0.
    exact = calls(node, aten.amax.default, aten.amin.default)
    # A scalar takes an axis and has none.
    return node if exact and (not sizes or all(sizes[dim] == 1 for dim in a["dim"])) else None


RULES: tuple[Rule[Any], ...] = (
    Rule("drop op that does nothing", _MOVES, _does_nothing, _input),
    Rule("drop identity permute", (aten.permute.default,), _idle_permute, lambda _, n: _source(n)),
    Rule(
        "merge permutes",
        (aten.permute.default,),
        _twice(aten.permute.default),
        _compose_permutes,
    ),
    Rule(
        "turn permute of size-1 dimensions into reshape",
        (aten.permute.default,),
        _moves_ones_only,
        _as_reshape,
    ),
    Rule(
        "reshape before permute where only dimensions of size 1 come or go",
        (aten.reshape.default,),
        _ones_after_permute,
        _ones_before_permute,
    ),
    Rule(
        "reshape before slice where heads of attention are cut",
        (aten.reshape.default,),
        _heads_of_slice,
        _reshape_before_slice,
    ),
    Rule(
        "permute before cat where that undoes a permute",
        (aten.permute.default,),
        _permute_of_cat,
        _permute_before_cat,
    ),
    Rule("slice before permute", (aten.slice.Tensor,), _slice_of_permute, _slice_before_permute),
    Rule("merge reshapes", (aten.reshape.default,), _twice(aten.reshape.default), _skip_inner),
    Rule("merge expands", (aten.expand.default,), _twice(aten.expand.default), _skip_inner),
    Rule("merge slices", (aten.slice.Tensor,), _slice_of_slice, _compose_slices),
    Rule("merge pads", (aten.constant_pad_nd.default,), _pad_of_pad, _compose_pads),
    Rule("drop cat of one tensor", (aten.cat.default,), _cat_of_one, _input),
    Rule("drop cat of the pieces of a tensor", (aten.cat.default,), _cat_of_pieces, _input),
    Rule("merge cats", (aten.cat.default,), _cat_of_cat, _flatten_cat),
    Rule("drop lossless cast before a cast", (aten._to_copy.default,), _lossless_cast, _skip_inner),
    Rule(
        "turn amax over one element into reshape",
        (aten.amax.default, aten.amin.default),
        _over_ones,
        _as_reshape,
    ),
)
