"""Windows of pooling: how adaptive pooling divides an axis, and which elements are in windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor


def adaptive_window(place: int, size: int, parts: int) -> tuple[int, int]:
    """Where the window of one part begins and ends, as PyTorch divides the axis."""
    return place * size // parts, -(-(place + 1) * size // parts)


def even_windows(size: int, parts: int) -> tuple[int, int] | None:
    """(length, step) of the windows of an axis where they are alike, else None."""
    bounds = [adaptive_window(place, size, parts) for place in range(parts)]
    lengths = {end - start for start, end in bounds}
    steps = {b[0] - a[0] for a, b in pairwise(bounds)} or {size}
    if len(lengths) != 1 or len(steps) != 1 or steps == {0}:
        return None
    return lengths.pop(), steps.pop()


def adaptive_axis(size: int, parts: int) -> Tensor:
    """The elements of windows that divide an axis, the last one again in the shorter windows."""
    number = torch.arange(parts)
    start, end = number * size // parts, ((number + 1) * size + parts - 1) // parts
    length = -(-size // parts) + (1 if size % parts else 0)
    return torch.minimum(start[:, None] + torch.arange(length), end[:, None] - 1)


def window_axis(size: int, windows: int, kernel: int, step: tuple[int, int, int]) -> Tensor:
    """The elements of the windows of an axis [windows, kernel]; `step`: stride, padding, dilation.

    For those in the padding it has the nearest that is not; every window has one of these.
    """
    stride, padding, dilation = step
    start = (torch.arange(windows) * stride - padding)[:, None]
    first = start + (-start).clamp(min=0).add(dilation - 1) // dilation * dilation
    last = start + ((size - 1 - start) // dilation).clamp(max=kernel - 1) * dilation
    elements = start + torch.arange(kernel) * dilation
    return torch.minimum(torch.maximum(elements, first), last)


def places_in_windows(axes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The numbers, in an image's flat memory, of the elements of all windows [windows, elements].

    `axes` has for each axis, of these sizes, the elements of its windows. An element may be there
    twice.
    """
    rank = len(axes)
    total = torch.zeros([1] * (2 * rank), dtype=torch.int64)
    for axis, part in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = part.shape
        total = total + part.reshape(shape) * prod(sizes[axis + 1 :])
    return total.reshape(prod(int(part.shape[0]) for part in axes), -1)
