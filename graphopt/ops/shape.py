"""Operators that only move data: views, permutes, slices, pads, concatenation, gathers, resizes."""

from __future__ import annotations

from typing import Any

import torch
from tvm import tirx

from graphopt import graph as G
from graphopt.ops.math import dtype_of, share
from graphopt.ops.opdef import Call, Expr, Index, Kind, OpDef, Reader, Sample, broadcast_index
from graphopt.ops.scalar import to_dtype

aten = torch.ops.aten


def _permute(call: Call, x: Reader, index: Index) -> Expr:
    source: list[Any] = [0] * len(index)
    for place, axis in zip(index, call["dims"], strict=True):
        source[axis] = place
    return x(tuple(source))


def _expand(call: Call, x: Reader, index: Index) -> Expr:
    return x(broadcast_index(index, call.shape_of("self")))


def _slice(call: Call, x: Reader, index: Index) -> Expr:
    dim, size = call["dim"] % len(index), call.shape_of("self")
    start = call["start"] or 0
    start = max(0, start + size[dim]) if start < 0 else min(start, size[dim])
    return x((*index[:dim], index[dim] * call["step"] + start, *index[dim + 1 :]))


def _select(call: Call, x: Reader, index: Index) -> Expr:
    size = call.shape_of("self")
    dim = call["dim"] % len(size)
    return x((*index[:dim], call["index"] % size[dim], *index[dim:]))


def _cat(call: Call, *rest: Any) -> Expr:
    *readers, index = rest
    dim = call["dim"] % len(index)
    extents = [G.shape(node)[dim] for node in call["tensors"]]
    starts = [sum(extents[:i]) for i in range(len(extents))]
    place = index[dim]
    result = to_dtype(
        readers[-1]((*index[:dim], place - starts[-1], *index[dim + 1 :])), call.dtype
    )
    for reader, start, end in reversed(list(zip(readers[:-1], starts, starts[1:], strict=False))):
        piece = reader((*index[:dim], place - start, *index[dim + 1 :]))
        result = tirx.if_then_else(place < end, to_dtype(piece, call.dtype), result)
    return result


def _pad(call: Call, x: Reader, index: Index) -> Expr:
    pads, size = call["pad"], call.shape_of("self")
    place = list(index)
    inside: list[Expr] = []
    for i in range(len(pads) // 2):
        axis = len(size) - 1 - i
        before, after = pads[2 * i], pads[2 * i + 1]
        place[axis] = place[axis] - before
        if before > 0:
            inside.append(place[axis] >= 0)
        if after > 0:
            inside.append(place[axis] < size[axis])
    value = x(tuple(place))
    if not inside:
        return value
    return tirx.if_then_else(tirx.all(*inside), value, tirx.const(call["value"], dtype_of(value)))


def wrapped(place: Expr, extent: int) -> Expr:
    """A run-time index, negative ones counted from the end, kept inside the extent.

    PyTorch raises on an index outside; a library on a board must not read outside its memory.
    """
    place = tirx.Cast("int32", place)
    place = tirx.Select(place < 0, place + extent, place)
    # Shared, so that no comparison around the load can talk TVM out of the clamp.
    return share(tirx.max(0, tirx.min(place, extent - 1)))


def _index_select(call: Call, x: Reader, indices: Reader, index: Index) -> Expr:
    dim, size = call["dim"] % len(index), call.shape_of("self")
    place = wrapped(indices((index[dim],) if call.shape_of("index") else ()), size[dim])
    return x((*index[:dim], place, *index[dim + 1 :]))


def _index(call: Call, x: Reader, *rest: Any) -> Expr:
    """Elements at places given by a tensor for some of the dimensions, which broadcast."""
    *readers, index = rest
    given = call["indices"]
    indexed = [dim for dim, node in enumerate(given) if node is not None]
    depth = max(len(G.shape(given[dim])) for dim in indexed)
    adjacent = indexed[-1] - indexed[0] == len(indexed) - 1
    first = indexed[0] if adjacent else 0
    many, others = index[first : first + depth], [*index[:first], *index[first + depth :]]
    place: list[Expr] = []
    for dim, size in enumerate(call.shape_of("self")):
        node = given[dim] if dim < len(given) else None
        if node is None:
            place.append(others.pop(0))
        else:
            place.append(wrapped(readers[dim](broadcast_index(many, G.shape(node))), size))
    return x(tuple(place))


def _check_index(call: Call) -> str | None:
    kinds = {G.value(node).dtype for node in call["indices"] if node is not None}
    if kinds & {torch.bool, torch.uint8}:
        return "by truth values: how many elements it has depends on them"
    return None


def _foldable(call: Call) -> str | None:
    if call.dtype in (torch.bool, torch.float16):
        return f"folding {call.dtype} is not supported"
    if call.arguments.get("alpha", 1) != 1 or not call.arguments.get("include_self", True):
        return "a factor, or elements that are replaced; canonicalize writes them out"
    if call.arguments.get("reduce") == "mean":
        return "a mean; canonicalize writes it out"
    return None


def _flip(call: Call, x: Reader, index: Index) -> Expr:
    axes = [dim % len(index) for dim in call["dims"]]
    size = call.shape
    return x(tuple(size[i] - 1 - at if i in axes else at for i, at in enumerate(index)))


def _unfold(call: Call, x: Reader, index: Index) -> Expr:
    """Windows along an axis, whose elements lie along a new one, the last."""
    rank = len(call.shape_of("self"))
    if rank == 0:
        return x(())
    dim = call["dimension"] % rank
    return x((*index[:dim], index[dim] * call["step"] + index[-1], *index[dim + 1 : -1]))


def _diagonal(call: Call, x: Reader, index: Index) -> Expr:
    """Elements with two equal indices, but for an offset; those make one axis, the last."""
    rank, offset = len(call.shape_of("self")), call["offset"]
    at = {
        call["dim1"] % rank: index[-1] + max(-offset, 0),
        call["dim2"] % rank: index[-1] + max(offset, 0),
    }
    rest = iter(index)
    return x(tuple(at[axis] if axis in at else next(rest) for axis in range(rank)))


def _gather(call: Call, x: Reader, indices: Reader, index: Index) -> Expr:
    dim, size = call["dim"] % len(index), call.shape_of("self")
    return x((*index[:dim], wrapped(indices(index), size[dim]), *index[dim + 1 :]))


def _embedding(call: Call, weight: Reader, indices: Reader, index: Index) -> Expr:
    return weight((wrapped(indices(index[:-1]), call.shape_of("weight")[0]), index[-1]))


def _scale(call: Call, axis: int) -> float:
    """Input step per output step of a resize, as PyTorch computes it."""
    size, out = call.shape_of("input"), call.shape
    factors = call.arguments.get("scale_factors")
    if factors is not None:
        return 1.0 / float(factors[axis - 2])
    return size[axis] / out[axis]


def _upsample_nearest(call: Call, x: Reader, index: Index) -> Expr:
    size = call.shape_of("input")
    place: list[Any] = list(index[:2])
    for axis in range(2, len(index)):
        ratio = call.shape[axis] / size[axis]
        if ratio == int(ratio) and _scale(call, axis) == 1 / ratio:
            place.append(index[axis] // int(ratio))
            continue
        moved = tirx.Cast("float32", index[axis]) * tirx.const(_scale(call, axis), "float32")
        place.append(tirx.min(tirx.Cast("int32", moved), size[axis] - 1))
    return x(tuple(place))


def _image(*rest: Any, shape: tuple[int, ...] = (2, 10, 5, 7), **kwargs: Any) -> Sample:
    return Sample(lambda g: (torch.randn(shape, generator=g), *rest), kwargs, ulp=0)


def _small(*rest: Any) -> Sample:
    """Three dimensions of an integer dtype."""
    return Sample(lambda g: (torch.randint(-9, 9, (3, 4, 5), generator=g), *rest), ulp=0)


def _resized(*rest: Any, shape: tuple[int, ...] = (2, 10, 5, 7), ulp: float = 4) -> Sample:
    return Sample(lambda g: (torch.randn(shape, generator=g), *rest), ulp=ulp)


def _joined(dim: int, *extents: int) -> Sample:
    def make(g: torch.Generator) -> tuple[Any, ...]:
        shape = [2, 8, 5, 7]
        parts = []
        for extent in extents:
            shape[dim] = extent
            parts.append(torch.randn(shape, generator=g))
        return parts, dim

    return Sample(make, ulp=0)


def _mixed(g: torch.Generator) -> tuple[Any, ...]:
    return [torch.randint(9, (3, 2), generator=g), torch.randn(3, 4, generator=g)], 1


def _gathered(g: torch.Generator) -> tuple[Any, ...]:
    return torch.randn(3, 4, 5, generator=g), -1, torch.randint(5, (3, 2, 7), generator=g)


def _scattered(g: torch.Generator) -> tuple[Any, ...]:
    places = torch.randn(2, 4, 3, generator=g).argsort(-1)
    return torch.randn(3, 4, 5, generator=g), -1, places, torch.randn(2, 4, 4, generator=g)


def _repeated(g: torch.Generator) -> tuple[Any, ...]:
    """Several go to one place; the index is smaller than both."""
    places = torch.randint(5, (2, 4, 9), generator=g)
    return torch.randn(3, 4, 5, generator=g), -1, places, torch.randn(2, 4, 9, generator=g)


def _rows(count: int, width: int, index: Any, **kwargs: Any) -> Sample:
    places = torch.tensor(index)
    return Sample(lambda g: (torch.randn(count, width, generator=g), places), kwargs, ulp=0)


_NEAREST = (
    *(_resized(size, None, ulp=0) for size in ([10, 14], [3, 11], [5, 7], [1, 1])),
    *(_resized(None, factors, ulp=0) for factors in ([2.0, 3.0], [1.7, 0.6], [0.5, 2.5])),
)
_LINE = (2, 3, 11)

SHAPE: tuple[OpDef, ...] = (
    OpDef("reshape", (aten.reshape.default, aten.view.default, aten._unsafe_view.default),
          Kind.VIEW, samples=(
              _image([2, 10, 35]), _image([10, 2, 7, 5]), _image([700]), _image([2, 2, 5, 5, 7]),
              _image([1, 1], shape=(1,)), _image([], shape=(1, 1)), _image([2, -1]),
              _image([2, 10], shape=(2, 10, 1, 1)), _small([-1, 6]),
          )),
    OpDef("clone", (aten.clone.default, aten.alias.default, aten.contiguous.default), Kind.VIEW,
          samples=(_image(), _small())),
    OpDef("permute", (aten.permute.default,), Kind.INJECTIVE, _permute, samples=(
        _image([0, 2, 3, 1]), _image([-1, 0, 1, 2]), _image([0, 1, 3, 2]), _image([], shape=()),
        _small([2, 0, 1]),
    )),
    OpDef("expand", (aten.expand.default,), Kind.INJECTIVE, _expand, samples=(
        _image([2, 10, 5, 7], shape=(2, 10, 1, 1)), _image([3, -1, -1, 4], shape=(1, 3, 2, 1)),
        _image([2, 3, 7], shape=(7,)), _image([2, 3], shape=()), _small([2, 3, 4, 5]),
    )),
    OpDef("slice", (aten.slice.Tensor,), Kind.INJECTIVE, _slice, samples=(
        _image(1, 8, 10), _image(1, 3, 9), _image(1, 0, 5), _image(1, 1, None, 2), _image(1, 8),
        _image(2, 1, -1), _image(-1, -4, 100), _image(-1, 1, None, 3), _image(0, 1, 2), _small(),
        _small(-2, None, -1),
    )),
    OpDef("select", (aten.select.int,), Kind.INJECTIVE, _select, samples=(
        _image(1, 4), _image(0, -1), _image(-1, -2), _image(0, 3, shape=(5,)), _small(1, 2),
    )),
    OpDef("cat", (aten.cat.default,), Kind.INJECTIVE, _cat, operands=("tensors",), samples=(
        _joined(1, 8, 16), _joined(1, 8, 3), _joined(1, 3, 5, 1), _joined(-1, 2, 9),
        _joined(0, 1, 2), _joined(2, 4), Sample(_mixed, ulp=0),
    )),
    OpDef("pad", (aten.constant_pad_nd.default,), Kind.INJECTIVE, _pad, samples=(
        _image([1, 2, 3, 0]), _image([1, 0], 2.5), _image([0, 0, 0, 0, 2, 3]),
        _image([-1, 2, -1, -2]), _image([0, 0, 0, 0, 0, 0, 1, 0], float("-inf")),
        _image([-2, -1]), _small([1, 2, 0, 1], 7),
        Sample(lambda g: (torch.randn(3, 4, generator=g) > 0, [1, 2], 1.0), ulp=0),
    )),
    OpDef("index_select", (aten.index_select.default,), Kind.INJECTIVE, _index_select,
          operands=("self", "index"), samples=(
              _image(1, torch.tensor([9, 0, 3, 3])), _image(-1, torch.tensor([6, 1])),
              _image(0, torch.tensor([1, 0, 1], dtype=torch.int32)), _image(2, torch.tensor(3)),
              _small(1, torch.tensor([2])), _image(0, torch.tensor([2, 1]), shape=(3,)),
          )),
    OpDef("index", (aten.index.Tensor, aten._unsafe_index.Tensor), Kind.INJECTIVE, _index,
          operands=("self", "indices"), check=_check_index, samples=tuple(
              _image(indices) for indices in (
                  [torch.tensor([1, 0, -1])], [None, torch.tensor([[9, 0], [3, -2]])],
                  [None, None, torch.tensor([[4], [0]]), torch.tensor([6, 1, 1])],
                  [torch.tensor([1, 0]), None, torch.tensor([4, 2])],
                  [torch.tensor([1, 0]), torch.tensor(7)], [None, torch.tensor(7)],
              )
          )),
    OpDef("flip", (aten.flip.default,), Kind.INJECTIVE, _flip, samples=(
        _image([1]), _image([-1, 0]), _image([]), _small([0, 2]),
    )),
    OpDef("unfold", (aten.unfold.default, aten.unfold_copy.default), Kind.INJECTIVE, _unfold,
          samples=(
              _image(2, 3, 1), _image(-1, 2, 3), _image(1, 10, 1), _image(0, 1, 1, shape=()),
              _image(0, 4, 2, shape=(9,)), _small(1, 2, 2),
          )),
    OpDef("diagonal", (aten.diagonal.default, aten.diagonal_copy.default), Kind.INJECTIVE,
          _diagonal, samples=(
              _image(), _image(0, 2, 3), _image(-2, -1, 1), _image(1, 3, 0), _small(0, 1, 2),
              _image(shape=(4, 4)),
          )),
    OpDef("gather", (aten.gather.default,), Kind.INJECTIVE, _gather, operands=("self", "index"),
          samples=(
              Sample(_gathered, ulp=0), _image(1, torch.tensor([[[[3, 9]]]])),
              _image(0, torch.tensor([2, 2, 0, 1]), shape=(3,)),
          )),
    OpDef("scatter", (aten.scatter.src, aten.scatter.value), Kind.ANCHOR,
          operands=("self", "index", "src"), samples=(
              Sample(_scattered, ulp=0),
              _image(1, torch.tensor([[[[3, 9, -1 % 10]]]]), 2.5),
              _image(0, torch.tensor([2, 0]), torch.tensor([7.0, 8.0, 9.0]), shape=(3,)),
              _small(1, torch.tensor([[[3], [0]]]), 7),
          )),
    OpDef("index_copy", (aten.index_copy.default,), Kind.ANCHOR,
          operands=("self", "index", "source"), samples=(
              _image(1, torch.tensor([9, 0]), torch.ones(2, 2, 5, 7)),
              _image(-1, torch.tensor([3]), torch.ones(2, 10, 5, 1)),
              _image(0, torch.tensor([1, 0]), torch.ones(2, 9), shape=(3, 9)),
              _image(0, torch.tensor(2), torch.ones(1), shape=(3,)),
          )),
    OpDef("scatter_reduce", (aten.scatter_reduce.two,), Kind.ANCHOR,
          operands=("self", "index", "src"), check=_foldable, samples=(
              *(Sample(_repeated, {"reduce": kind}, ulp=4)
                for kind in ("sum", "prod", "amax", "amin")),
              *(_small(1, torch.tensor([[[3], [0], [3]]]), torch.full((1, 3, 1), 4), kind)
                for kind in ("sum", "prod", "amax", "amin")),
              Sample(lambda g: (torch.ones(3), 0, torch.tensor([1, 1, 0]),
                                torch.tensor([float("nan"), 2.0, 3.0]), "amax"), ulp=0),
          )),
    OpDef("index_add", (aten.index_add.default,), Kind.ANCHOR,
          operands=("self", "index", "source"), check=_foldable, samples=(
              _image(1, torch.tensor([9, 0, 9]), torch.ones(2, 3, 5, 7)),
              _image(-1, torch.tensor([3]), torch.ones(2, 10, 5, 1)),
              _image(0, torch.tensor([1, 1, 1]), torch.ones(3, 9), shape=(3, 9)),
              _image(0, torch.tensor(2), torch.ones(1), shape=(3,)),
              _small(0, torch.tensor([2, 2]), torch.full((2, 4, 5), 3)),
          )),
    OpDef("embedding", (aten.embedding.default,), Kind.INJECTIVE, _embedding,
          operands=("weight", "indices"), samples=(
              _rows(5, 7, [[0, 4, 2], [1, 1, 3]]), _rows(3, 9, 2),
              _rows(4, 1, [3, 0], padding_idx=0),
          )),
    OpDef("upsample_nearest", (aten.upsample_nearest2d.vec, aten.upsample_nearest1d.vec),
          Kind.INJECTIVE, _upsample_nearest, operands=("input",), samples=(
              *_NEAREST, _resized([25], None, shape=_LINE, ulp=0),
              _resized(None, [2.6], shape=_LINE, ulp=0),
          )),
)  # fmt: skip
