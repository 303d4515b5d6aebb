"""PyTorch's sorting, ranks and picking of extremes, broken up into `graphopt::order` and gathers.

Each rule has the arguments of the operator it stands for. What nobody reads of two results, places
or values, goes away later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.order import first_places

aten = torch.ops.aten


def _at(x: Tensor, dim: int, places: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.gather(x, dim, places) if x.dim() else x), places


def _topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    return _at(x, dim, first_places(x, k, dim, largest))


def _all_places(x: Tensor, dim: int, descending: bool) -> Tensor:
    return first_places(x, x.shape[dim] if x.dim() else 1, dim, descending)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _at(x, dim, _all_places(x, dim, descending))


def _stable_sort(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return _sort(x, dim, descending)


def _argsort(x: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return _all_places(x, dim, descending)


def _stable_argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return _all_places(x, dim, descending)


def _place(x: Tensor, dim: int | None, keepdim: bool, largest: bool) -> Tensor:
    """That of the first of the largest or smallest elements, or of the first NaN."""
    if not largest and x.dtype.is_floating_point:
        x, largest = -x, True  # NaN comes first among the largest only.
    if dim is None:
        place = first_places(x.reshape(-1), 1, 0, largest)
        return place.reshape([1] * x.dim() if keepdim else [])
    place = first_places(x, 1, dim, largest)
    return place.squeeze(dim) if x.dim() and not keepdim else place


def _argument(largest: bool) -> Callable[..., Tensor]:
    def rule(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        return _place(x, dim, keepdim, largest)

    return rule


def _extreme(largest: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    fold = torch.amax if largest else torch.amin

    def rule(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
        return fold(x, dim, keepdim), _place(x, dim, keepdim, largest)

    return rule


def _ranked(x: Tensor, k: int, dim: int, keepdim: bool) -> Tensor:
    """The place of the k-th smallest element, counted from 0."""
    if x.dim() == 0:
        return first_places(x, 1, dim, False)
    place = first_places(x, k + 1, dim, False).narrow(dim, k, 1)
    return place if keepdim else place.squeeze(dim)


def _read(x: Tensor, dim: int, place: Tensor, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The elements at one place along an axis each, and those places."""
    if x.dim() == 0:
        return x, place
    whole = place if keepdim else place.unsqueeze(dim)
    found = torch.gather(x, dim, whole)
    return found if keepdim else found.squeeze(dim), place


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _read(x, dim, _ranked(x, k - 1, dim, keepdim), keepdim)


def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower one of two; of elements with a NaN, the first NaN."""
    place = _ranked(x, (x.shape[dim] - 1) // 2 if x.dim() else 0, dim, keepdim)
    if x.is_floating_point():
        last = _place(x, dim, keepdim, True)
        place = torch.where(torch.isnan(_read(x, dim, last, keepdim)[0]), last, place)
    return _read(x, dim, place, keepdim)


def _nanmedian(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Of those that are no NaN, if there are any."""
    if not x.is_floating_point() or x.dim() == 0:
        return _median(x, dim, keepdim)
    count = torch.sum(x == x, dim, keepdim=True)
    middle = torch.clamp(count - 1, min=0) // 2
    place = torch.gather(_all_places(x, dim, False), dim, middle)
    return _read(x, dim, place if keepdim else place.squeeze(dim), keepdim)


def _of_all(rule: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    return lambda x: rule(x.reshape(-1), 0)[0]


def _bucketize(
    x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    """How many boundaries are below each number, or if `right`, not above it."""
    upper = boundaries > x[..., None] if right else boundaries >= x[..., None]
    kind = torch.int32 if out_int32 else torch.int64
    return torch.sum(torch.logical_not(upper), -1, dtype=kind)


def _searchsorted(
    boundaries: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Any:
    """Each number among boundaries of its own row, or of the one row there is."""
    if sorter is not None:
        return NotImplemented
    lines = boundaries.unsqueeze(-2) if boundaries.dim() > 1 else boundaries
    return _bucketize(x, lines, out_int32=out_int32, right=right or side == "right")


RULES: dict[Any, Callable[..., Any]] = {
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
    aten.argsort.default: _argsort,
    aten.argsort.stable: _stable_argsort,
    aten.max.dim: _extreme(True),
    aten.min.dim: _extreme(False),
    aten.kthvalue.default: _kthvalue,
    aten.median.default: _of_all(_median),
    aten.median.dim: _median,
    aten.nanmedian.default: _of_all(_nanmedian),
    aten.nanmedian.dim: _nanmedian,
    aten.bucketize.Tensor: _bucketize,
    aten.searchsorted.Tensor: _searchsorted,
    aten.argmax.default: _argument(True),
    aten.argmin.default: _argument(False),
}
