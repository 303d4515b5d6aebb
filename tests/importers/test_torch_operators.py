"""Operators of PyTorch models that are broken up or renamed: what the libraries compute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt

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


CASES: dict[str, tuple[Callable[..., Results], tuple[Tensor, ...]]] = {
    "elementwise": (
        elementwise,
        (normal(3, 5), normal(3, 5, seed=1), whole(90, 3, 5) - 45, whole(70, 5)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_pytorch(name: str) -> None:
    function, args = CASES[name]
    check(function, *args)
