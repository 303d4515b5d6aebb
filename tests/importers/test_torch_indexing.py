"""Reading and writing by indices: what their graphs compute, and the library made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import UnsupportedError


class Reads(nn.Module):
    """By indices given at run time or computed from sizes; i [3] and n [3] are in range."""

    def forward(self, x: torch.Tensor, i: torch.Tensor, n: torch.Tensor) -> list[torch.Tensor]:
        image = x[None]
        return [
            x[i], x[:, i], x[i, n], x[torch.arange(3), i], x[i[None]], x[i, :, n],
            x[:, i[:, None], n], x[-1, n], x.flip(1), x.flip(0, -1), x.roll(2, 1),
            (x > 1).any(1), (x > -9).all(),
            *(F.pad(image, (1, 2, 2, 1), mode=m) for m in ("reflect", "replicate", "circular")),
            F.unfold(image, 3, padding=1, stride=2),
            F.fold(F.unfold(image, 3, padding=1, stride=2), (5, 6), 3, padding=1, stride=2),
            F.interpolate(image, size=(7, 4), mode="nearest-exact"),
            F.interpolate(image, scale_factor=2, mode="bicubic"),
            F.interpolate(image[None], scale_factor=2, mode="trilinear"),
            F.grid_sample(
                image, torch.tanh(x[None, 0, :, :2, None].expand(1, 5, 2, 2)), align_corners=False
            ),
            torch.einsum("bij,bkj->bik", x, x), x.cumsum(1),
        ]  # fmt: skip


class Writes(nn.Module):
    """To a copy; y stays as it is."""

    def forward(self, x: torch.Tensor, i: torch.Tensor, n: torch.Tensor) -> list[torch.Tensor]:
        results = [x.clone() for _ in range(8)]
        results[0][:, 1] = 0
        results[1][:, :, 1:3] = x[:, :, :2] * 2
        results[2][i] = x[:3] * 2
        results[3][:, n - 5] = 7
        results[4][..., -1:] = x[..., :1].double().float()
        results[5].index_copy_(2, i, x[:, :, :3] * 3)
        results[6][:, 1::2] = x[:, :2] * 4
        results[7][:, 5:] = 1
        mask = torch.zeros(3, 4).scatter(1, i[:, None], 1.0) + x[0, 0, 0]
        # Kept in a layout of its own, which says nothing here.
        filled = torch.cat([x, x], 1)[:, ::3].index_fill(0, torch.tensor([1]), 0.5)
        return [
            *results,
            mask,
            filled,
            x.scatter(0, i[:, None, None].expand(3, 2, 2), x[1:, :2, :2]),
        ]


@pytest.mark.parametrize("module", [Reads(), Writes()], ids=["reads", "writes"])
def test_compiled(module: nn.Module) -> None:
    g = torch.Generator().manual_seed(0)
    args = (torch.randn(4, 5, 6, generator=g), torch.tensor([2, 0, 3]), torch.tensor([1, 4, 0]))
    module.eval()
    expected = module(*args)
    compiled = graphopt.compile(module, args)
    for number, (have, want) in enumerate(
        zip(compiled(*(x.numpy() for x in args)), expected, strict=True)
    ):
        assert have.dtype == want.numpy().dtype, number
        # Interpolation adds up to 16 products.
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-5, err_msg=f"result {number}")


def test_as_many_results_as_truth_values_are_refused() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._unsafe_index(x, [torch.ones(3, dtype=torch.bool)])

    with pytest.raises((UnsupportedError, graphopt.GraphoptError)):
        graphopt.compile(Masked().eval(), (torch.ones(3, 2),))
