"""The order of elements along an axis: what topk, sort, argsort, argmax and their kin are made of.

`graphopt::order` gives the places of the `k` largest, or smallest, elements along an axis, best
first; a gather of them gives the elements themselves. It belongs to `torch.library`, so that a
graph with it runs in PyTorch.

As PyTorch sorts stably: of equal elements the first one comes first, -0 equals 0, and NaN is larger
than every number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.ops.opdef import Call, Kind, OpDef, Sample
from graphopt.ops.scalar import TIR_NAMES

_library: Any = torch.library.Library
_LIBRARY: Any = _library("graphopt", "FRAGMENT")
_LIBRARY.define("order(Tensor self, int k, int dim, bool largest) -> Tensor")

order: Any = torch.ops.graphopt.order.default


def _order(x: Tensor, k: int, dim: int, largest: bool) -> Tensor:
    places = torch.sort(x, dim=dim, descending=largest, stable=True)[1]
    return places.narrow(dim, 0, k).contiguous()


def _shape(x: Tensor, k: int, dim: int, largest: bool) -> Tensor:
    """The rule for the result's shape, which checks the arguments, too."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dimension {dim} of a tensor of {x.dim()}")
    if not 0 <= k <= x.shape[dim]:
        raise ValueError(f"{k} of {x.shape[dim]} elements")
    sizes = list(x.shape)
    sizes[dim] = k
    return x.new_empty(sizes, dtype=torch.int64)


_LIBRARY.impl("order", _order, "CompositeExplicitAutograd")
torch.library.register_fake("graphopt::order", _shape, lib=_LIBRARY)


def first_places(x: Tensor, k: int, dim: int, largest: bool) -> Tensor:
    """`order`, also of a scalar, whose one element is at place 0."""
    if x.dim() == 0:
        return torch.zeros(torch.Size(), dtype=torch.int64)
    return order(x, k, dim, largest)  # type: ignore[no-any-return]


def _check(call: Call) -> str | None:
    dtype = call.node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    if dtype not in TIR_NAMES or dtype == torch.float64:
        return f"{dtype} is not supported"
    return None


def _random(shape: tuple[int, ...], *rest: Any) -> Sample:
    return Sample(lambda g: (torch.randn(shape, generator=g), *rest))


def _ties(*rest: Any, dtype: torch.dtype = torch.float32) -> Sample:
    return Sample(lambda g: (torch.randint(0, 5, (3, 40), generator=g).to(dtype), *rest))


ORDER: tuple[OpDef, ...] = (
    OpDef("order", (order,), Kind.ANCHOR, check=_check, samples=(
        *(_random((2, 3, 9), k, -1, largest) for k in (1, 2, 9) for largest in (True, False)),
        *(_random((2, 10, 5), k, 1, True) for k in (1, 3, 10)),
        _ties(1, 1, True), _ties(40, 1, True), _ties(40, 1, False),
        _ties(7, 1, True, dtype=torch.int64), _random((100,), 100, 0, True),
        _random((1,), 1, 0, True),
    )),
)  # fmt: skip
