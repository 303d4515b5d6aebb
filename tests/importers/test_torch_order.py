"""topk, sort, argmax and their kin: what their graphs compute, and the libraries made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.importers import import_model
from graphopt.ops.order import order
from tests.importers.onnx_cases import check_form


class All(nn.Module):
    """Everything, of values with ties; first of floats, then of integers and of a scalar."""

    def forward(self, x: torch.Tensor, n: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        results = [
            *x.topk(1), *x.topk(3, 1), *x.topk(2, -2, largest=False),
            x.topk(4, sorted=False)[0].sum(-1),
            *torch.sort(x, stable=True), *torch.sort(x, dim=0, descending=True, stable=True),
            torch.argsort(x, dim=1, stable=True), torch.argsort(x, -1, True),
            *x.max(1), *x.min(2, keepdim=True), x.max(0)[0], x.max(0)[1],
            x.argmax(), x.argmin(), x.argmax(1), x.argmin(-1, keepdim=True), x.argmax(keepdim=True),
            *n.topk(5, 0), *n.max(1), n.argmin(0), *s.max(0), s.argmax(), *s.sort(stable=True),
        ]  # fmt: skip
        return results


def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    # Without ties along the axes of `topk`, whose order PyTorch leaves open.
    x = torch.stack([torch.randperm(24, generator=g).reshape(4, 6) for _ in range(3)])
    return x.float(), torch.randperm(35, generator=g).reshape(7, 5), torch.tensor(3.0)


def test_all_forms() -> None:
    args = inputs()
    gm = import_model(All().eval(), args)
    check_form(gm)
    for have, want in zip(gm(*args), All()(*args), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)
    compiled = graphopt.compile(All().eval(), args)
    for result, want in zip(compiled(*(x.numpy() for x in args)), All()(*args), strict=True):
        np.testing.assert_array_equal(result, want.numpy())


class Ranks(nn.Module):
    """Medians, ranks and places among boundaries; e has NaN in three of its rows."""

    def forward(
        self, x: torch.Tensor, n: torch.Tensor, s: torch.Tensor, e: torch.Tensor
    ) -> list[torch.Tensor]:
        rows = x.sort(-1)[0]
        return [
            *x.kthvalue(2), *x.kthvalue(3, 1, keepdim=True), *s.kthvalue(1, 0),
            x.median(), *x.median(1), *x.median(-1, keepdim=True), n.median(), *n.median(0),
            *s.median(0), e.median(), *e.median(1), e.nanmedian(),
            *e[:3].nanmedian(-1, keepdim=True),
            e.nanmedian(0)[0], e.nanmedian(1)[0], *n.nanmedian(1),
            *(torch.bucketize(y, x[0, 0].sort()[0], right=right, out_int32=right)
              for y in (x, s, e) for right in (True, False)),
            torch.searchsorted(rows, x), torch.searchsorted(rows, x, side="right"),
            torch.searchsorted(rows[0, 0], e),
        ]  # fmt: skip


def test_ranks() -> None:
    nan = float("nan")
    e = torch.tensor([[1, 5, 2, 4], [nan, 2, 3, nan], [1, 2, 3, nan], [nan, nan, nan, nan]])
    args = (*inputs(), e)
    compiled = graphopt.compile(Ranks().eval(), args)
    results = compiled(*(x.numpy() for x in args))
    for number, (have, want) in enumerate(zip(results, Ranks()(*args), strict=True)):
        np.testing.assert_array_equal(have, want.numpy(), err_msg=f"result {number}")
        assert have.dtype == want.numpy().dtype


def test_ties_keep_their_order() -> None:
    class Ties(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x.topk(2)[1], x.argmax(1), x.max(1)[1], x.min(1)[1], x.sort()[1]]

    x = torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, -0.0, 0.0, -0.0]])
    results = graphopt.compile(Ties().eval(), (x,))(x.numpy())
    assert results[0].tolist() == [[1, 2], [0, 1]]
    assert results[1].tolist() == results[2].tolist() == [1, 0]
    assert results[3].tolist() == [0, 0]
    assert results[4].tolist() == [[0, 3, 1, 2], [0, 1, 2, 3]]


def test_the_first_nan_is_the_largest_and_the_smallest() -> None:
    class Places(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x.argmin(1), x.argmax(1), *x.min(0), *x.max(0), x.argmin(), x.sort()[1]]

    nan = float("nan")
    x = torch.tensor([[1.0, nan, nan, 0.0], [0.0, -0.0, 3.0, 0.0], [2.0, 1.0, nan, -float("inf")]])
    for result, want in zip(
        graphopt.compile(Places().eval(), (x,))(x.numpy()), Places()(x), strict=True
    ):
        np.testing.assert_array_equal(result, want.numpy())


def test_values_alone_need_no_places() -> None:
    class Largest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.max(1)[0]

    gm = import_model(Largest().eval(), (torch.ones(2, 3),))
    assert order not in [node.target for node in gm.graph.nodes]


def test_none_of_the_elements() -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.topk(0)[0]

    with pytest.raises(UnsupportedError, match="without elements"):
        graphopt.compile(Nothing().eval(), (torch.ones(2, 3),))
