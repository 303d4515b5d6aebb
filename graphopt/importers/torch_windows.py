"""PyTorch's adaptive pooling, pooling that says where the largest elements were, and unpooling.

Each rule has the arguments of the operator it stands for. Places count the elements of one image,
as PyTorch's do; they come from windows that are written out, but only where somebody reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.adaptive import adaptive_max_pool2d
from graphopt.ops.order import first_places
from graphopt.windows import adaptive_axis, even_windows, places_in_windows, window_axis

aten = torch.ops.aten


def _pooled_places(x: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """The place of the first of the largest elements of each window of an image.

    `axes` has for each axis of the image the elements of its windows [windows, elements].
    """
    rank = len(axes)
    lead, sizes = list(x.shape[:-rank]), x.shape[-rank:]
    places = places_in_windows(axes, sizes)
    count, width = places.shape
    windows = x.reshape([*lead, prod(sizes)]).index_select(-1, places.reshape(-1))
    best = first_places(windows.reshape([*lead, count, width]), 1, -1, True)
    number = best.reshape([*lead, count]) + torch.arange(count) * width
    chosen = places.reshape(-1).index_select(0, number.reshape(-1))
    return chosen.reshape([*lead, *(int(part.shape[0]) for part in axes)])


def _largest(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Adaptive max pooling; plain pooling where the windows are alike."""
    if all(size == 1 for size in output_size):
        return torch.amax(x, (-2, -1), True)
    windows = [even_windows(n, o) for n, o in zip(x.shape[-2:], output_size, strict=True)]
    if None in windows:
        return adaptive_max_pool2d(x, output_size)  # type: ignore[no-any-return]
    kernel, stride = (list(part) for part in zip(*filter(None, windows), strict=True))
    return torch.max_pool2d(x, kernel, stride)


def _adaptive_max_pool2d(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    axes = [adaptive_axis(n, o) for n, o in zip(x.shape[-2:], output_size, strict=True)]
    return _largest(x, output_size), _pooled_places(x, axes)


def _in_two_steps(
    x: Tensor, output_size: Sequence[int], pool: Callable[[Tensor, list[int]], Tensor]
) -> Tensor:
    """3-D pooling: windows of frames first, then of the rows and columns of each."""
    *lead, frames, rows, columns = x.shape
    depth, height, width = output_size
    flat = x.reshape([1, prod(lead), frames, rows * columns])
    deep = pool(flat, [depth, rows * columns])
    pooled = pool(deep.reshape([1, prod(lead) * depth, rows, columns]), [height, width])
    return pooled.reshape([*lead, depth, height, width])


def _adaptive_max_pool3d(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    axes = [adaptive_axis(n, o) for n, o in zip(x.shape[-3:], output_size, strict=True)]
    return _in_two_steps(x, output_size, _largest), _pooled_places(x, axes)


def _adaptive_avg_pool3d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    if list(output_size) == [1, 1, 1]:
        return x.mean((-3, -2, -1), keepdim=True)
    return _in_two_steps(x, output_size, aten.adaptive_avg_pool2d.default)


def _two(numbers: Sequence[int] | int) -> list[int]:
    listed = [numbers] if isinstance(numbers, int) else list(numbers)
    return listed * 2 if len(listed) == 1 else listed


def _max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    ceil_mode: bool = False,
) -> Any:
    kernel, padding, dilation = _two(kernel_size), _two(padding), _two(dilation)
    step = _two(stride) if stride else kernel
    axes = zip(x.shape[-2:], kernel, dilation, strict=True)
    if any(d > 1 and (k - 1) * d >= size for size, k, d in axes):
        return NotImplemented  # A window might have nothing but padding.
    pooled = torch.max_pool2d(x, kernel, step, padding, dilation, ceil_mode)
    elements = [
        window_axis(x.shape[i - 2], pooled.shape[i - 2], kernel[i], (step[i], padding[i], way))
        for i, way in enumerate(dilation)
    ]
    return pooled, _pooled_places(x, elements)


def _max_unpool2d(x: Tensor, indices: Tensor, output_size: Sequence[int]) -> Tensor:
    """Zeros, and each element at its place."""
    lead = list(x.shape[:-2])
    pixels = prod(x.shape[-2:])
    empty = torch.zeros([*lead, prod(output_size)], dtype=x.dtype)
    filled = empty.scatter(-1, indices.reshape([*lead, pixels]), x.reshape([*lead, pixels]))
    return filled.reshape([*lead, *output_size])


RULES: dict[Any, Callable[..., Any]] = {
    aten._adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    aten.adaptive_max_pool3d.default: _adaptive_max_pool3d,
    aten.max_pool2d_with_indices.default: _max_pool2d,
    aten.max_unpool2d.default: _max_unpool2d,
}
