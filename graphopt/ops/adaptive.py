"""Adaptive pooling: windows that divide an axis into a given number of parts, evenly or not.

`graphopt::adaptive_max_pool2d` gives the largest elements only; ATen's operator of that name has a
second result, their places. It belongs to `torch.library`, so that a graph with it runs in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tvm import tirx

from graphopt.ops.math import dtype_of
from graphopt.ops.opdef import Call, Expr, Index, Kind, OpDef, Reader, Reduction, Sample
from graphopt.ops.reduce import pooling
from graphopt.windows import adaptive_window

aten = torch.ops.aten

_library: Any = torch.library.Library
_LIBRARY: Any = _library("graphopt", "FRAGMENT")
_LIBRARY.define("adaptive_max_pool2d(Tensor self, int[2] output_size) -> Tensor")

adaptive_max_pool2d: Any = torch.ops.graphopt.adaptive_max_pool2d.default


def _largest(x: Tensor, output_size: Sequence[int]) -> Tensor:
    return torch.nn.functional.adaptive_max_pool2d(x, list(output_size)).contiguous()


def _shape(x: Tensor, output_size: Sequence[int]) -> Tensor:
    if x.dim() not in (3, 4) or len(output_size) != 2:
        raise ValueError(f"{len(output_size)} sizes for a tensor of {x.dim()} dimensions")
    return x.new_empty([*x.shape[:-2], *output_size])


_LIBRARY.impl("adaptive_max_pool2d", _largest, "CompositeExplicitAutograd")
torch.library.register_fake("graphopt::adaptive_max_pool2d", _shape, lib=_LIBRARY)


def _adaptive(combine: str) -> Any:
    def build(call: Call, x: Reader) -> Reduction:
        size, out = call.shape_of("self")[-2:], call.shape[-2:]
        kernel = tuple(
            max(end - start for start, end in (adaptive_window(i, n, o) for i in range(o)))
            for n, o in zip(size, out, strict=True)
        )

        def bounds(index: Index, axis: int) -> tuple[Expr, Expr]:
            place, n, o = index[axis - 2], size[axis], out[axis]
            if o == 1:
                return 0, n
            return (place * n) // o, ((place + 1) * n + o - 1) // o

        def even(axis: int) -> bool:
            return size[axis] % out[axis] == 0

        def element(index: Index, box: Index) -> Expr:
            place: list[Expr] = []
            inside: list[Expr] = []
            for axis in range(2):
                low, high = bounds(index, axis)
                at = low + box[axis]
                if not even(axis) and combine == "max":
                    at = tirx.min(at, high - 1)  # A maximum may see an element twice.
                elif not even(axis):
                    inside.append(at < high)
                place.append(at)
            value = x((*index[:-2], *place))
            if not inside:
                return value
            return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0.0, dtype_of(value)))

        def finish(value: Expr, index: Index) -> Expr:
            if combine == "max":
                return value
            count: Expr = 1
            for axis in range(2):
                low, high = bounds(index, axis)
                count = count * (size[axis] // out[axis] if even(axis) else high - low)
            if isinstance(count, int):
                return value * tirx.const(1.0 / count, dtype_of(value))
            return value / tirx.Cast(dtype_of(value), count)

        return Reduction(kernel, element, combine, finish)

    return build


def _image(size: list[int], shape: tuple[int, ...] = (2, 10, 5, 7), low: float = 1.0) -> Sample:
    return Sample(lambda g: (torch.randn(shape, generator=g) * 0.25 + low, size), ulp=16)


_SIZES = ([1, 1], [5, 7], [2, 3], [3, 1], [7, 9], [1, 7])

ADAPTIVE: tuple[OpDef, ...] = (
    OpDef("adaptive_avg_pool2d", (aten.adaptive_avg_pool2d.default,), Kind.REDUCTION,
          _adaptive("sum"), check=pooling, samples=tuple(_image(size) for size in _SIZES)),
    OpDef("adaptive_max_pool2d", (adaptive_max_pool2d,), Kind.REDUCTION, _adaptive("max"),
          check=pooling, samples=(
              *(_image(size) for size in _SIZES), _image([4, 3], (3, 9, 8), low=-9.0),
              Sample(lambda g: (torch.tensor([[[1.0, float("nan"), 3.0, 0.0, -1.0]]]), [1, 2])),
          )),
)  # fmt: skip
