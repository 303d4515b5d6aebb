"""Which ATen operators `torch.export` keeps whole for graphopt, and which it breaks up.

Operators in `KEPT` have a form that later stages lower as one; `EXTRA` breaks up a few that PyTorch
counts among its core operators but that are sums of simpler ones. All else follows PyTorch's own
default decompositions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._decomp import get_decompositions

from graphopt.importers import torch_order, torch_recurrent, torch_windows

aten = torch.ops.aten

KEPT: tuple[Any, ...] = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
    aten.linear.default,
    aten.matmul.default,
    aten.batch_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten.gelu.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.relu6.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool2d.default,
    aten.col2im.default,
    aten.index_add.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_linear1d.vec,
)

Shape = Sequence[int] | int


def _vector_norm(
    x: torch.Tensor,
    ord: float = 2,
    dim: Shape | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """‖x‖ over `dim`."""
    if dtype is not None:
        x = x.to(dtype)
    if isinstance(dim, int):
        dim = [dim]
    axes = list(range(x.dim())) if dim is None else list(dim)
    if ord == 2:
        return torch.sqrt(torch.sum(x * x, axes, keepdim))
    size = torch.abs(x)
    if ord == 1:
        return torch.sum(size, axes, keepdim)
    if ord == math.inf:
        return torch.amax(size, axes, keepdim)
    if ord == -math.inf:
        return torch.amin(size, axes, keepdim)
    if ord == 0:
        return torch.sum((x != 0).to(x.dtype), axes, keepdim)
    return torch.pow(torch.sum(torch.pow(size, ord), axes, keepdim), 1 / ord)


def _distances(
    a: torch.Tensor, b: torch.Tensor, p: float, compute_mode: int | None = None
) -> torch.Tensor:
    """Of all rows of `a` from all rows of `b`; by differences, which lose no digits."""
    return _vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def _rrelu(
    x: torch.Tensor,
    noise: torch.Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """The mean slope below 0, when it is not trained."""
    if training:
        return NotImplemented
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2), noise


def _bilinear(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y[o] = Σ a[i]·weight[o, i, j]·b[j]: a product by a constant matrix, then one of rows."""
    outputs, width, other = weight.shape
    matrix = weight.permute(0, 2, 1).reshape(outputs * other, width)
    products = torch.nn.functional.linear(a, matrix).reshape([*a.shape[:-1], outputs, other])
    y = torch.sum(products * b.unsqueeze(-2), -1)
    return y if bias is None else y + bias


def _embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[torch.Tensor, ...]:
    """The sum (mode 0), mean (1) or maximum (2) of the rows in each bag; 0 in an empty one.

    Of the four results only the first has a form here.
    """
    bags = int(offsets.shape[0]) - int(include_last_offset)
    place = torch.arange(int(indices.shape[0]))
    # The bag of a row is the last that has begun.
    bag = torch.sum(offsets[:bags] <= place[:, None], 1) - 1
    rows = torch.nn.functional.embedding(indices, weight)
    counted = torch.ones([len(place)], dtype=weight.dtype)
    if padding_idx >= 0:
        counted = (indices != padding_idx).to(weight.dtype)
        nothing = -math.inf if mode == 2 else 0.0
        rows = torch.where((indices != padding_idx)[:, None], rows, nothing)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    empty = torch.zeros([bags, int(weight.shape[1])], dtype=weight.dtype)
    if mode == 2:
        each = bag[:, None].expand(rows.shape)
        result = empty.scatter_reduce(0, each, rows, "amax", include_self=False)
        # A bag of nothing but padding is an empty one.
        result = torch.where(result == -math.inf, 0.0, result)
    else:
        result = torch.index_add(empty, 0, bag, rows)
    if mode == 1:
        count = torch.index_add(torch.zeros([bags], dtype=weight.dtype), 0, bag, counted)
        result = result / count.clamp(min=1)[:, None]
    return result, bag, offsets, offsets


def _addbmm(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """The sum over a batch is one product of longer rows."""
    batch, rows, inner = a.shape
    product = torch.matmul(
        a.permute(1, 0, 2).reshape(rows, batch * inner), b.reshape(batch * inner, b.shape[2])
    )
    return product * alpha if beta == 0 else x * beta + product * alpha


def _full_like(
    x: torch.Tensor, fill_value: Any, *, dtype: torch.dtype | None = None, **_: Any
) -> torch.Tensor:
    """Only the shape of `x` matters, and that is static: so this is a constant."""
    return torch.full(list(x.shape), fill_value, dtype=dtype or x.dtype)


def _any(x: torch.Tensor, dim: Shape | None = None, keepdim: bool = False) -> torch.Tensor:
    """Truth values are 0 and 1: the largest of them."""
    axes = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return torch.amax(x != 0, axes, keepdim)


def _empty(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    """Memory that is written before anybody reads it, as circular padding does."""
    return torch.zeros(size, dtype=dtype)


EXTRA: dict[Any, Callable[..., Any]] = {
    aten.linalg_vector_norm.default: _vector_norm,
    aten._cdist_forward.default: _distances,
    aten.rrelu_with_noise_functional.default: _rrelu,
    aten.bilinear.default: _bilinear,
    aten.addbmm.default: _addbmm,
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten.full_like.default: _full_like,
    aten.empty.memory_format: _empty,
    aten.any.default: _any,
    aten.any.dim: _any,
    aten.any.dims: _any,
    **torch_order.RULES,
    **torch_recurrent.RULES,
    **torch_windows.RULES,
    **get_decompositions([aten.native_group_norm.default, aten._log_softmax.default]),
}


def decompositions() -> Any:
    """The table for `ExportedProgram.run_decompositions`."""
    table: Any = torch.export.default_decompositions()
    for operator in KEPT:
        table.pop(operator, None)
    for operator, rule in EXTRA.items():
        table[operator] = rule
    return table
