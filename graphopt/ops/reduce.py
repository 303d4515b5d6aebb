"""Operators that fold many elements into one: means, sums, maxima and pooling windows."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from tvm import tirx

from graphopt.ops.math import dtype_of
from graphopt.ops.opdef import (
    Call,
    Expr,
    Index,
    Kind,
    OpDef,
    Reader,
    Reduction,
    Sample,
    normalize_axes,
)

aten = torch.ops.aten


def _axes_fold(kind: str, dim_name: str = "dim") -> Any:
    def build(call: Call, x: Reader) -> Reduction:
        size = call.shape_of("self")
        axes = normalize_axes(call.arguments.get(dim_name), len(size))
        keep = bool(call.arguments.get("keepdim", False))
        extents = tuple(size[axis] for axis in axes)
        count = prod(extents)

        def element(index: Index, box: Index) -> Expr:
            kept = iter(index)
            folded = iter(box)
            place: list[Any] = []
            for axis in range(len(size)):
                if axis in axes:
                    place.append(next(folded))
                    if keep:
                        next(kept)
                else:
                    place.append(next(kept))
            value = x(tuple(place))
            wanted = str(call.dtype).removeprefix("torch.")
            return value if dtype_of(value) == wanted else tirx.Cast(wanted, value)

        def finish(value: Expr, index: Index) -> Expr:
            return value * tirx.const(1.0 / count, dtype_of(value)) if kind == "mean" else value

        return Reduction(extents, element, "sum" if kind == "mean" else kind, finish, axes)

    return build


_OF_FRAMES = (aten.max_pool3d.default, aten.avg_pool3d.default)


def _pooled_axes(call: Call) -> int:
    return 3 if call.node.target in _OF_FRAMES else 2


Axes = tuple[int, ...]


def window_of(call: Call) -> tuple[Axes, Axes, Axes, Axes]:
    """A pooling's kernel, stride, padding and dilation, by rows and columns, frames before them."""
    count = _pooled_axes(call)

    def each(value: Any, default: Axes) -> Axes:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return tuple(values * count if len(values) == 1 else values) or default

    kernel = each(call["kernel_size"], ())
    return (
        kernel,
        each(call["stride"], kernel),
        each(call["padding"], (0,) * count),
        each(call.arguments.get("dilation", 1), ()),
    )


def _max_pool(call: Call, x: Reader) -> Reduction:
    kernel, stride, padding, dilation = window_of(call)
    count = len(kernel)
    size = call.shape_of("self")[-count:]

    def element(index: Index, box: Index) -> Expr:
        lead, spatial = index[:-count], index[-count:]
        place: list[Expr] = []
        inside: list[Expr] = []
        for axis in range(count):
            at = spatial[axis] * stride[axis] - padding[axis] + box[axis] * dilation[axis]
            reach = (call.shape[axis - count] - 1) * stride[axis] - padding[axis]
            if dilation[axis] == 1:
                # The nearest element inside is in the window too, and a maximum may see it twice.
                if padding[axis]:
                    at = tirx.max(at, 0)
                if reach + kernel[axis] > size[axis]:
                    at = tirx.min(at, size[axis] - 1)
            elif padding[axis] or reach + (kernel[axis] - 1) * dilation[axis] >= size[axis]:
                inside += [at >= 0, at < size[axis]]
            place.append(at)
        value = x((*lead, *place))
        if not inside:
            return value
        lowest = tirx.const(float("-inf"), dtype_of(value))
        return tirx.if_then_else(tirx.all(*inside), value, lowest)

    return Reduction(kernel, element, "max", lambda value, index: value)


def _avg_pool(call: Call, x: Reader) -> Reduction:
    kernel, stride, padding, _ = window_of(call)
    dims = len(kernel)
    size = call.shape_of("self")[-dims:]

    def start(index: Index, axis: int) -> Expr:
        return index[axis - dims] * stride[axis] - padding[axis]

    def spills(axis: int) -> bool:
        last = (call.shape[axis - dims] - 1) * stride[axis] - padding[axis] + kernel[axis]
        return padding[axis] > 0 or last > size[axis]

    def element(index: Index, box: Index) -> Expr:
        place = [start(index, axis) + box[axis] for axis in range(dims)]
        inside = [
            test
            for axis in range(dims)
            if spills(axis)
            for test in (place[axis] >= 0, place[axis] < size[axis])
        ]
        value = x((*index[:-dims], *place))
        if not inside:
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0.0, dtype_of(value)))

    def finish(value: Expr, index: Index) -> Expr:
        if call["divisor_override"] is not None:
            return value / tirx.const(float(call["divisor_override"]), dtype_of(value))
        if not any(spills(axis) for axis in range(dims)):
            return value * tirx.const(1.0 / prod(kernel), dtype_of(value))
        # As PyTorch counts: windows end at the padded border, and without count_include_pad
        # only real elements count.
        count: Expr = 1
        for axis in range(dims):
            low: Expr = start(index, axis)
            high: Expr = tirx.min(low + kernel[axis], size[axis] + padding[axis])
            if not call["count_include_pad"]:
                low, high = tirx.max(low, 0), tirx.min(high, size[axis])
            count = (high - low) * count
        return value / tirx.Cast(dtype_of(value), count)

    return Reduction(kernel, element, "sum", finish)


def _full_precision(call: Call) -> str | None:
    if call.dtype == torch.float16:
        return "sums in float16 would lose what PyTorch keeps; cast to float32"
    return None


def pooling(call: Call) -> str | None:
    """Reason against pooling of anything but images, or frames, of float32."""
    if call.dtype != torch.float32:
        return f"{call.dtype} is not supported, only float32"
    rank, axes = len(call.shape_of("self")), _pooled_axes(call)
    if rank in (axes + 1, axes + 2):
        return None
    return f"input has {rank} dimensions, not {axes + 1} or {axes + 2}"


def _folded(*rest: Any, shape: tuple[int, ...] = (2, 10, 5, 7), **kwargs: Any) -> Sample:
    """Values around 1, whose sums do not cancel; 1000 of them are added in another order."""
    return Sample(lambda g: (torch.randn(shape, generator=g) * 0.25 + 1, *rest), kwargs, ulp=16)


def _whole(*rest: Any, high: int = 9, **kwargs: Any) -> Sample:
    return Sample(lambda g: (torch.randint(-high, high, (3, 4, 5), generator=g), *rest), kwargs)


def _truths(*rest: Any) -> Sample:
    return Sample(lambda g: (torch.randn(3, 4, 5, generator=g) > 0.5, *rest))


def _pool(*rest: Any, shape: tuple[int, ...] = (2, 10, 9, 7)) -> Sample:
    return _folded(*rest, shape=shape)


_POOLS = (
    *(_pool([3, 3]), _pool([2, 2], [1, 1]), _pool([3, 2], [2, 1], [1, 0]), _pool(2, 2, 1)),
    *(_pool([9, 7]), _pool([3, 3], [2, 2], 1, shape=(5, 6, 7)), _pool([1, 1], [2, 2])),
    _pool([3, 3], [2, 2], [1, 1], shape=(1, 3, 8, 8)),
)
_POOLS_3D = (
    *(_pool(*rest, shape=(2, 10, 5, 6, 7)) for rest in (
        ([2, 3, 2],), ([3, 3, 3], [1, 1, 1], [1, 1, 1]), ([1, 3, 3], [1, 2, 2], [0, 1, 1]),
        (2, 2, 1), ([3, 1, 1], [2, 1, 1], [1, 0, 0]), ([5, 6, 7],),
    )),
    _pool([3, 3, 3], [2, 2, 2], [1, 1, 1], shape=(4, 5, 6, 7)),
)  # fmt: skip
_NEGATIVE = Sample(lambda g: (-torch.rand(1, 3, 5, 6, generator=g) - 1, [3, 3], [2, 2], [1, 1]))
_NAN = Sample(lambda g: (torch.tensor([[1.0, float("nan"), 3.0], [float("-inf"), 2.0, 5.0]]), [1]))
_AXES = tuple(
    _folded(axes, keep)
    for axes in ([2, 3], [-1], [1], [0, -2], [], [0], [1, 2, 3])
    for keep in (False, True)
)
_ROWS = tuple(_folded([-1], shape=(3, n)) for n in (1, 7, 8, 9, 31, 1000))
_SCALAR = (_folded(shape=()), _folded(shape=(1,)))
_LINES = tuple(_folded([-1], shape=shape) for shape in ((5,), ()))

REDUCE: tuple[OpDef, ...] = (
    OpDef("mean", (aten.mean.dim, aten.mean.default), Kind.REDUCTION, _axes_fold("mean"),
          check=_full_precision, samples=(
              *_AXES, *_ROWS, *_SCALAR, *_LINES, _folded(), _whole([1], dtype=torch.float32),
          )),
    OpDef("sum", (aten.sum.dim_IntList, aten.sum.default), Kind.REDUCTION, _axes_fold("sum"),
          check=_full_precision, samples=(
              *_AXES, *_ROWS, *_SCALAR, *_LINES, _folded(), _whole([1]), _whole(), _truths([0, 2]),
              _truths(),
          )),
    OpDef("amax", (aten.amax.default,), Kind.REDUCTION, _axes_fold("max"),
          check=_full_precision, samples=(
              *_AXES, *_ROWS, *_SCALAR, *_LINES, _whole([1]), _whole([-1]), _truths([0, 2]), _NAN,
          )),
    OpDef("amin", (aten.amin.default,), Kind.REDUCTION, _axes_fold("min"),
          check=_full_precision, samples=(
              *_AXES, *_ROWS, *_SCALAR, *_LINES, _whole([1]), _whole([-1]), _truths([0, 2]), _NAN,
          )),
    OpDef("prod", (aten.prod.dim_int, aten.prod.default), Kind.REDUCTION, _axes_fold("prod"),
          check=_full_precision, samples=(
              *(_folded(axis, keep) for axis in (0, 1, -1) for keep in (False, True)),
              *_SCALAR, _folded(shape=(3, 5)), _whole(1), _whole(high=3), _truths(-1),
          )),
    OpDef("max_pool2d", (aten.max_pool2d.default,), Kind.REDUCTION, _max_pool, check=pooling,
          samples=(
              *_POOLS, _pool([2, 3], [2, 1], [1, 1], [2, 1]), _pool([3, 3], [2, 2], [1, 1], [2, 2]),
              _pool([2, 2], [2, 2], 0, 1, True), _pool([3, 3], [2, 2], [1, 1], [1, 1], True),
              _pool([2, 2], [3, 3], 1, 2, True), _NEGATIVE,
          )),
    OpDef("max_pool3d", (aten.max_pool3d.default,), Kind.REDUCTION, _max_pool, check=pooling,
          samples=(
              *_POOLS_3D, _pool([2, 2, 2], [2, 2, 2], 0, 1, True, shape=(2, 5, 5, 7, 9)),
              _pool([2, 3, 2], [2, 1, 3], [1, 1, 1], [2, 1, 3], shape=(2, 3, 6, 7, 8)),
          )),
    OpDef("avg_pool2d", (aten.avg_pool2d.default,), Kind.REDUCTION, _avg_pool, check=pooling,
          samples=(
              *_POOLS,
              *(_pool([3, 3], [2, 2], [1, 1], ceil, count) for ceil in (False, True)
                for count in (False, True)),
              *(_pool([2, 2], [3, 3], [1, 0], True, count) for count in (False, True)),
              _pool([2, 3], [1, 2], 0, False, True, 5), _pool([3, 2], [2, 2], 1, True, False, 7),
          )),
    OpDef("avg_pool3d", (aten.avg_pool3d.default,), Kind.REDUCTION, _avg_pool, check=pooling,
          samples=(
              *_POOLS_3D,
              *(_pool([3, 3, 3], [2, 2, 2], [1, 1, 1], ceil, count, shape=(2, 3, 5, 6, 8))
                for ceil in (False, True) for count in (False, True)),
              _pool([2, 3, 2], [1, 2, 2], 0, False, True, 5, shape=(1, 3, 4, 5, 6)),
          )),
)  # fmt: skip
