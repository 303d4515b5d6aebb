"""Which elements are in the windows of pooling, for its second result: where the largest were."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


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
