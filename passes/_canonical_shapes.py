"""Canonical forms of shape and data-movement ops; part of the pass `canonicalize`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.graph import constant, shape, value
from graphopt.passes._canonical import Handler, Outcome, used
from graphopt.passes._nodes import aten, rank, results
from graphopt.passes.rewrite import Editor, Refusal

Arguments = dict[str, Any]


def wrap(dim: int, dims: int) -> int:
    """A dimension counted from the front."""
    return dim + dims if dim < 0 else dim


def cut(ed: Editor, x: fx.Node, dim: int, start: int, end: int) -> fx.Node:
    """`x[start:end]` along `dim`."""
    return ed.call(aten.slice.Tensor, x, dim, start, end, 1)


def _same(_ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    return a.get("self", a.get("input"))


def _to_reshape(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """view, flatten, squeeze, unsqueeze … → reshape to the static shape."""
    sizes = list(shape(node))
    if node.target is aten.reshape.default and list(a["shape"]) == sizes:
        return None
    return ed.call(aten.reshape.default, a["self"], sizes)


def _permute_by(order: Callable[[int, Arguments], list[int]]) -> Handler:
    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        dims = order(rank(a["self"]), a)
        if node.target is aten.permute.default and list(a["dims"]) == dims:
            return None
        return ed.call(aten.permute.default, a["self"], dims)

    return handle


def _swapped(dims: int, a: Arguments) -> list[int]:
    order = list(range(dims))
    names = ("dim0", "dim1") if "dim0" in a else ("axis0", "axis1")
    if dims:
        i, j = (wrap(a[name], dims) for name in names)
        order[i], order[j] = order[j], order[i]
    return order


def _moved(dims: int, a: Arguments) -> list[int]:
    sources = a["source"] if isinstance(a["source"], list | tuple) else [a["source"]]
    places = a["destination"] if isinstance(a["destination"], list | tuple) else [a["destination"]]
    at = {wrap(p, dims): wrap(s, dims) for s, p in zip(sources, places, strict=True)}
    rest = iter([dim for dim in range(dims) if dim not in at.values()])
    return [at[dim] if dim in at else next(rest) for dim in range(dims)]


def _expand(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    sizes = list(shape(node))
    if node.target is aten.expand.default and list(a["size"]) == sizes:
        return None
    return ed.call(aten.expand.default, a["self"], sizes)


def _repeat(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """repeat → reshape, expand, reshape: each dimension gets a copy dimension in front."""
    x = a["self"]
    repeats = list(a["repeats"] if "repeats" in a else a["dims"])
    padding = max(0, len(repeats) - rank(x))
    sizes = [1] * padding + list(shape(x))
    repeats = [1] * (len(sizes) - len(repeats)) + repeats
    if 0 in shape(node):
        return Refusal("an empty result")
    pairs = list(zip(repeats, sizes, strict=True))
    apart = ed.call(aten.reshape.default, x, [n for _, size in pairs for n in (1, size)])
    copied = ed.call(aten.expand.default, apart, [n for pair in pairs for n in pair])
    return ed.call(aten.reshape.default, copied, list(shape(node)))


def _slice(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    x, step = a["self"], a["step"]
    dim = wrap(a["dim"], rank(x))
    size = shape(x)[dim]
    start, end = (
        default if at is None else min(max(wrap(at, size), 0), size)
        for at, default in ((a["start"], 0), (a["end"], size))
    )
    end = max(start, end)
    if (a["dim"], a["start"], a["end"]) == (dim, start, end):
        return None
    return ed.call(aten.slice.Tensor, x, dim, start, end, step)


def _narrow(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    if not isinstance(a["start"], int):
        return Refusal("the start is only known at run time")
    x = a["self"]
    dim = wrap(a["dim"], rank(x))
    start = wrap(a["start"], shape(x)[dim])
    return cut(ed, x, dim, start, start + a["length"])


def _select(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    x = a["self"]
    dim = wrap(a["dim"], rank(x))
    index = wrap(a["index"], shape(x)[dim])
    return ed.call(aten.reshape.default, cut(ed, x, dim, index, index + 1), list(shape(node)))


def _pieces(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """split, chunk, unbind … + getitem → one slice for each piece somebody reads."""
    x = a["self"]
    dim = wrap(a["dim"], rank(x))
    pieces: list[fx.Node | None] = []
    start = 0
    for index, piece in enumerate(results(node)):
        dropped = piece.ndim < rank(x)
        size = 1 if dropped else int(piece.shape[dim])
        new = cut(ed, x, dim, start, start + size) if used(node, index) else None
        if new is not None and dropped:
            new = ed.call(aten.reshape.default, new, list(piece.shape))
        pieces.append(new)
        start += size
    return pieces


def _stack(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    dim = wrap(a["dim"], rank(node))
    sizes = list(shape(node))
    sizes[dim] = 1
    parts = [ed.call(aten.reshape.default, part, sizes) for part in a["tensors"]]
    return ed.call(aten.cat.default, parts, dim)


def _cat(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    # Parts without elements add nothing but their dtype: what a roll by 0 is exported with.
    parts = [part for part in a["tensors"] if 0 not in shape(part)]
    # torch.cat skips 1-D empty tensors whatever the rank of the others.
    parts = parts or [part for part in a["tensors"] if rank(part) == rank(node)]
    dim = wrap(a["dim"], rank(node))
    if dim == a["dim"] and len(parts) == len(a["tensors"]):
        return None
    joined = ed.call(aten.cat.default, parts, dim)
    dtype = value(node).dtype
    return (
        joined
        if value(joined).dtype == dtype
        else ed.call(aten._to_copy.default, joined, dtype=dtype)
    )


def _pad(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    if a["mode"] != "constant":
        return Refusal(f"padding mode {a['mode']}")
    return ed.call(aten.constant_pad_nd.default, a["self"], list(a["pad"]), a["value"] or 0.0)


def _index(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """x[:, rows, columns] → index_select by each constant (+ reshape when they are not vectors)."""
    x = a["self"]
    given = [(dim, index) for dim, index in enumerate(a["indices"]) if index is not None]
    places: list[tuple[int, torch.Tensor]] = []
    for dim, index in given:
        at = constant(ed.gm, index)
        if at is None or at.dtype not in (torch.int32, torch.int64):
            # index_select takes no negative indices, and those of an input can be negative.
            return Refusal("indices that are not constant integers")
        places.append((dim, at))
    if not _crossed(places):
        return Refusal("indexing by several tensors that vary together")
    for dim, at in places:
        flat = at.reshape(-1).to(torch.int64)
        flat = torch.where(flat < 0, flat + shape(x)[dim], flat)
        x = ed.call(aten.index_select.default, x, dim, ed.constant(f"{node.name}_index", flat))
    return x if shape(x) == shape(node) else ed.call(aten.reshape.default, x, list(shape(node)))


def _crossed(places: list[tuple[int, torch.Tensor]]) -> bool:
    """Whether neighbouring dimensions are indexed by what varies along an axis of its own each.

    As in x[:, rows[:, None], columns], which resizing and unfolding of pictures come to.
    """
    dims = [dim for dim, _ in places]
    axes = [axis for _, at in places for axis in range(-at.ndim, 0) if at.shape[axis] != 1]
    return dims == list(range(dims[0], dims[0] + len(dims))) and axes == sorted(set(axes))


def _gathered(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """index_select, gather: only get their `dim` counted from the front. Scalars have one place."""
    x = a["self"]
    if not rank(x):
        return ed.call(aten.expand.default, x, list(shape(node)))
    dim = wrap(a["dim"], rank(x))
    if dim == a["dim"]:
        return None
    assert callable(node.target)
    return ed.call(node.target, x, dim, a["index"])


def _cast(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    x = a["self"]
    dtype = value(node).dtype
    if dtype == value(x).dtype:
        return x  # type: ignore[no-any-return]
    if node.target is aten._to_copy.default and dict(node.kwargs) == {"dtype": dtype}:
        return None
    return ed.call(aten._to_copy.default, x, dtype=dtype)


def _filled(number: float | None) -> Handler:
    """zeros_like, new_ones, full_like … → a scalar constant, expanded."""

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        fill = a["fill_value"] if number is None else number
        scalar = ed.constant(f"{node.name}_value", torch.tensor(fill, dtype=value(node).dtype))
        return ed.call(aten.expand.default, scalar, list(shape(node)))

    return handle


def _masked_fill(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    fill = a["value"]
    if not isinstance(fill, fx.Node):
        fill = ed.constant(f"{node.name}_value", torch.tensor(fill, dtype=value(node).dtype))
    return ed.call(aten.where.self, a["mask"], fill, a["self"])


def _where_scalar(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    sides = [
        side
        if isinstance(side, fx.Node)
        else ed.constant(f"{node.name}_{name}", torch.tensor(side, dtype=value(node).dtype))
        for name, side in (("self", a["self"]), ("other", a["other"]))
    ]
    return ed.call(aten.where.self, a["condition"], *sides)


def _dropout(_ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    if a["train"]:
        return Refusal("dropout in training mode")
    return a["input"]  # type: ignore[no-any-return]


def _native_dropout(_ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    if a["train"] is not False:
        return Refusal("dropout in training mode")
    return [a["input"], None]


HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(
        [
            aten.clone.default,
            aten.alias.default,
            aten.contiguous.default,
            aten.detach.default,
            aten.detach_copy.default,
            aten.alias_copy.default,
            aten.lift_fresh.default,
            aten.lift_fresh_copy.default,
            aten.positive.default,
            aten.resolve_conj.default,
            aten.resolve_neg.default,
        ],
        _same,
    ),
    **dict.fromkeys([aten.dropout.default, aten.feature_dropout.default], _dropout),
    aten.alpha_dropout.default: _dropout,
    aten.native_dropout.default: _native_dropout,
    **dict.fromkeys(
        [
            aten.reshape.default,
            aten.view.default,
            aten._unsafe_view.default,
            aten.view_copy.default,
            aten._reshape_copy.default,
            aten.view_as.default,
            aten.reshape_as.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.ravel.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze_copy.dim,
            aten.squeeze_copy.dims,
            aten.unsqueeze.default,
            aten.unsqueeze_copy.default,
        ],
        _to_reshape,
    ),
    aten.permute.default: _permute_by(lambda dims, a: [wrap(d, dims) for d in a["dims"]]),
    aten.permute_copy.default: _permute_by(lambda dims, a: [wrap(d, dims) for d in a["dims"]]),
    **dict.fromkeys(
        [aten.transpose.int, aten.transpose_copy.int, aten.swapaxes.default, aten.swapdims.default],
        _permute_by(_swapped),
    ),
    **dict.fromkeys(
        [aten.t.default, aten.numpy_T.default],
        _permute_by(lambda dims, a: list(reversed(range(dims)))),
    ),
    **dict.fromkeys(
        [aten.mT.default, aten.adjoint.default],
        _permute_by(lambda dims, a: [*range(dims - 2), dims - 1, dims - 2]),
    ),
    **dict.fromkeys([aten.movedim.int, aten.movedim.intlist], _permute_by(_moved)),
    **dict.fromkeys(
        [
            aten.expand.default,
            aten.expand_copy.default,
            aten.expand_as.default,
            aten.broadcast_to.default,
        ],
        _expand,
    ),
    aten.repeat.default: _repeat,
    aten.tile.default: _repeat,
    aten.slice.Tensor: _slice,
    aten.slice_copy.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.select_copy.int: _select,
    **dict.fromkeys(
        [
            aten.split.Tensor,
            aten.split_copy.Tensor,
            aten.split.sizes,
            aten.split_with_sizes.default,
            aten.split_with_sizes_copy.default,
            aten.chunk.default,
            aten.tensor_split.sections,
            aten.tensor_split.indices,
            aten.unbind.int,
            aten.unbind_copy.int,
        ],
        _pieces,
    ),
    aten.stack.default: _stack,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.pad.default: _pad,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    **dict.fromkeys([aten.index_select.default, aten.gather.default], _gathered),
    **dict.fromkeys(
        [
            aten._to_copy.default,
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten.type_as.default,
        ],
        _cast,
    ),
    aten.zeros_like.default: _filled(0),
    aten.new_zeros.default: _filled(0),
    aten.ones_like.default: _filled(1),
    aten.new_ones.default: _filled(1),
    aten.full_like.default: _filled(None),
    aten.new_full.default: _filled(None),
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.where.ScalarSelf: _where_scalar,
    aten.where.ScalarOther: _where_scalar,
    aten.where.Scalar: _where_scalar,
}
