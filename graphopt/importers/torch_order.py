"""PyTorch's sorting and picking of extremes, broken up into `graphopt::order` and gathers.

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


RULES: dict[Any, Callable[..., Any]] = {
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
    aten.argsort.default: _argsort,
    aten.argsort.stable: _stable_argsort,
    aten.max.dim: _extreme(True),
    aten.min.dim: _extreme(False),
    aten.argmax.default: _argument(True),
    aten.argmin.default: _argument(False),
}
