"""Operators of PyTorch models that are broken up or renamed: what the libraries compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.importers import import_model

Results = list[Tensor] | tuple[Tensor, ...]


class Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Results]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Results:
        return self.function(*args)


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(high, sizes, generator=torch.Generator().manual_seed(seed))


def check(function: Callable[..., Results], *args: Tensor) -> None:
    """The library's results are PyTorch's: 8 ulp of the largest, for sums of some 10 products."""
    module = Calls(function).eval()
    expected = module(*args)
    compiled = graphopt.compile(module, args)
    results = compiled(*(x.numpy() for x in args))
    results = results if isinstance(results, tuple) else (results,)
    for number, (have, want) in enumerate(zip(results, expected, strict=True)):
        assert have.shape == want.shape, number
        assert have.dtype == want.numpy().dtype, number
        most = float(want[want.isfinite()].abs().max()) if want.is_floating_point() else 0.0
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-6 * most, err_msg=f"{number}")


def elementwise(x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> Results:
    return [
        torch.hypot(x, y), torch.copysign(x, y), torch.copysign(n, -2.0), torch.fmax(x, y),
        torch.fmin(x, y), torch.erfc(x), torch.signbit(x), n << 2, n >> 1, n << m,
        torch.bitwise_right_shift(n, m), n.to(torch.uint8) + 300,
    ]  # fmt: skip


def adaptive_pools(x: Tensor, line: Tensor, frames: Tensor) -> Results:
    return [
        *(F.adaptive_max_pool2d(x, size) for size in ((3, 4), (1, 1), (7, 5), (4, 3), (9, 2))),
        F.adaptive_max_pool2d(x[0], 2), F.adaptive_max_pool1d(line, 4),
        F.adaptive_max_pool1d(line, 1), F.adaptive_max_pool3d(frames, (2, 4, 3)),
        *F.adaptive_max_pool2d(x, (3, 4), return_indices=True),
        F.adaptive_max_pool1d(line, 4, return_indices=True)[1],
        F.adaptive_max_pool3d(frames, (2, 4, 3), return_indices=True)[1],
        F.adaptive_avg_pool2d(x, (3, 2)), F.adaptive_avg_pool2d(x, (4, 3)),
        F.adaptive_avg_pool3d(frames, (2, 4, 3)), F.adaptive_avg_pool3d(frames, (5, 3, 1)),
    ]  # fmt: skip


def pools_with_places(x: Tensor, line: Tensor) -> Results:
    pool = partial(F.max_pool2d, return_indices=True)
    values, places = pool(x, 2)
    return [
        F.max_unpool2d(values, places, 2, output_size=x.shape), *pool(x, 2, ceil_mode=True),
        pool(x, 3, 2, 1)[1], pool(x, 3, 1, 1, 2)[1], pool(x, (3, 2), (1, 2), (1, 0), (2, 1))[1],
        F.max_pool1d(line, 3, 2, 1, return_indices=True)[1], pool(x[0], 3, 2, 1, 1, True)[1],
    ]  # fmt: skip


def windows_and_diagonals(x: Tensor, line: Tensor) -> Results:
    return [
        x.unfold(2, 3, 2), x.unfold(2, 3, 1).unfold(3, 2, 2).sum(-1), line.unfold(-1, 11, 1),
        x.diagonal(0, 2, 3), x.diagonal(-1, 1, -1), line[0].trace(),
    ]  # fmt: skip


def scans(x: Tensor, n: Tensor) -> Results:
    return [x.cumprod(1), x.cumprod(-1), n.cumprod(0), (x > 0).cumprod(2), x.relu().cumprod(0)]


def folds(x: Tensor, i: Tensor, source: Tensor, n: Tensor) -> Results:
    """x [4, 6] and n alike, i [4, 3] in 0 … 3, source [4, 3]."""
    kinds = ("sum", "prod", "amax", "amin", "mean")
    whole = source.mul(9).long()
    return [
        x.scatter_add(1, i, source).relu(), x.scatter(1, i, source, reduce="multiply"),
        x.scatter(1, i, 2.5, reduce="add"), x.scatter(1, i, source, reduce="add").long(),
        *(x.scatter_reduce(-1, i, source, kind) for kind in kinds),
        *(x.scatter_reduce(0, i, source, kind, include_self=False) for kind in kinds),
        *(n.scatter_reduce(1, i, whole, kind) for kind in kinds),
        *(n.scatter_reduce(1, i[:2], whole, kind, include_self=False) for kind in kinds),
        x.index_add(1, i[0], source), x.index_add(-2, i[1], source.repeat(1, 2)[:3], alpha=-2),
        n.index_add(1, i[0], whole),
    ]  # fmt: skip


def writes(x: Tensor, i: Tensor, source: Tensor, n: Tensor) -> Results:
    """Places in several dimensions; i[0] repeats none."""
    results = [x.clone() for _ in range(5)]
    results[0][i[0], i[1] - 2] = source[0]
    results[1].index_put_((i, i.flip(0) - 4), source, accumulate=True)
    results[2].index_put_((i[:, :1].int(), i[0]), torch.tensor(1.5), accumulate=True)
    results[3][:, i[0]] += source
    cube = x.reshape(2, 2, 6, 1).repeat(1, 1, 1, 2)
    cube[:, i[0] % 2, i[0]] = source[:2, :, None]
    return [*results, cube]


def scalars(x: Tensor, i: Tensor, y: Tensor) -> Results:
    """All of one element, i is 0."""
    return [
        x.gather(0, i), x.gather(0, i[None]), x.index_select(0, i), x.scatter(0, i, y),
        x.scatter(0, i[None], 3.0), x.scatter_add(-1, i, y), x.scatter_reduce(0, i, y, "mean"),
        x.scatter_reduce(0, i, y, "amin", include_self=False), x.index_add(0, i, y, alpha=2),
        x.index_copy(0, i[None], y[None]), x.cumprod(0), x.unfold(0, 1, 1),
    ]  # fmt: skip


def distances(x: Tensor, y: Tensor) -> Results:
    orders = (2.0, 1.0, 0.0, 3.0, 0.5, float("inf"))
    return [
        *(torch.cdist(x, y, p) for p in orders), torch.cdist(x, y[0]),
        torch.cdist(x.repeat(1, 9, 1), y.repeat(1, 9, 1)),  # By a product.
        *(x.norm(p, -1) for p in (*orders, -2.0, -float("inf"))), x.norm(3, (0, 1), keepdim=True),
    ]  # fmt: skip


def products(x: Tensor, y: Tensor, z: Tensor) -> Results:
    return [
        torch.addbmm(z, x, y), torch.addbmm(z, x, y, beta=0, alpha=0.5),
        torch.addbmm(z, x, y, beta=2, alpha=3), F.rrelu(x), F.rrelu(x, 0.2, 0.4),
    ]  # fmt: skip


CASES: dict[str, tuple[Callable[..., Results], tuple[Tensor, ...]]] = {
    "elementwise": (
        elementwise,
        (normal(3, 5), normal(3, 5, seed=1), whole(90, 3, 5) - 45, whole(70, 5)),
    ),
    "adaptive pools": (adaptive_pools, (normal(2, 3, 7, 5), normal(2, 3, 11), normal(2, 5, 6, 7))),
    # With equal elements, of which the first one counts.
    "pools with places": (
        pools_with_places,
        (whole(4, 2, 3, 7, 5).float(), whole(4, 2, 3, 11).float()),
    ),
    "scans": (scans, (normal(2, 7, 9), whole(5, 3, 4))),
    "folds": (folds, (normal(4, 6), whole(4, 4, 3), normal(4, 3, seed=1), whole(9, 4, 6))),
    "writes": (
        writes,
        (normal(4, 6), torch.tensor([[0, 3, 1], [1, 1, 2]]).repeat(2, 1), normal(4, 3), whole(2)),
    ),
    "scalars": (scalars, (torch.tensor(1.5), torch.tensor(0), torch.tensor(-2.0))),
    "distances": (distances, (normal(2, 4, 7), normal(2, 5, 7, seed=1))),
    "products": (products, (normal(2, 3, 7), normal(2, 7, 5), normal(3, 5))),
    "windows, diagonals": (windows_and_diagonals, (normal(2, 3, 7, 5), normal(2, 3, 11))),
}


@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter")
@pytest.mark.parametrize("name", CASES)
def test_as_pytorch(name: str) -> None:
    function, args = CASES[name]
    check(function, *args)


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Bilinear(3, 4, 5, bias=bias).eval()
    args = (normal(2, 6, 3), normal(2, 6, 4))
    compiled = graphopt.compile(layer, args)
    # Sums of 12 products.
    np.testing.assert_allclose(
        compiled(*(x.numpy() for x in args)), layer(*args).detach(), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 2])
def test_bags_of_embeddings(mode: str, padding: int | None) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Parameter(torch.randn(6, 5))

        def forward(self, rows: Tensor, line: Tensor, starts: Tensor) -> Results:
            bag = partial(F.embedding_bag, mode=mode, padding_idx=padding)
            results = [
                bag(rows, self.table), bag(line, self.table, starts),
                bag(line, self.table, torch.tensor([0, 3, 3, 7])),
                bag(line, self.table, starts, include_last_offset=True),
            ]  # fmt: skip
            if mode == "sum":
                weights = line.float() - 1.5
                results.append(bag(line, self.table, starts, per_sample_weights=weights))
            return results

    # The second and the last bag are empty.
    args = (whole(6, 3, 4), whole(6, 9), torch.tensor([0, 4, 4, 9]))
    args[0][1] = 2  # One has nothing but padding.
    module = Bags().eval()
    results = graphopt.compile(module, args)(*(x.numpy() for x in args))
    for number, (have, want) in enumerate(zip(results, module(*args), strict=True)):
        # Sums of 5 rows at most.
        np.testing.assert_allclose(
            have, want.detach(), rtol=0, atol=5e-6, err_msg=f"result {number}"
        )


def test_bags_of_one_size_are_plain_sums() -> None:
    compiled = graphopt.compile(nn.EmbeddingBag(6, 5, mode="sum").eval(), (whole(6, 3, 4),))
    names = {str(node.target) for node in compiled.graph.graph.nodes}
    assert "aten.sum.dim_IntList" in names
    assert "aten.index_add.default" not in names


@pytest.mark.parametrize(
    ("size", "name"),
    [(1, "amax"), ((7, 1), "max_pool2d"), ((3, 2), "max_pool2d"), (4, "adaptive_max_pool2d")],
)
def test_adaptive_pools_with_equal_windows_are_plain(size: int, name: str) -> None:
    """From 7 to 3 the windows overlap: 3 long, 2 apart."""
    gm = import_model(nn.AdaptiveMaxPool2d(size).eval(), (normal(1, 2, 7, 5),))
    called = [node.target.name() for node in gm.graph.nodes if node.op == "call_function"]
    assert [each.split("::")[1].split(".")[0] for each in called] == [name]
