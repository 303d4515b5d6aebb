"""Memory layouts: where the element of a logical index lies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

PLAIN = "plain"


def blocked(block: int) -> str:
    """The layout of `(N, C, …)` tensors stored as `(N, ⌈C/block⌉, …, block)`."""
    return f"NCHW{block}c"


@cache
def block_of(layout: str) -> int | None:
    """Channels per block of a blocked layout; None for plain."""
    match = re.fullmatch(r"NCHW(\d+)c", layout)
    return int(match[1]) if match else None


def physical_shape(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """The row-major shape of a tensor's memory; a blocked layout pads the channels."""
    block = block_of(layout)
    if block is None:
        return tuple(shape)
    n, c, *rest = shape
    return (n, -(-c // block), *rest, block)


def physical_size(shape: Sequence[int], layout: str, itemsize: int) -> int:
    """Bytes a tensor occupies."""
    return prod(physical_shape(shape, layout)) * itemsize


def same_bytes(shape: Sequence[int], layout: str, other: Sequence[int], other_layout: str) -> bool:
    """Whether both layouts put the elements, in row-major logical order, at the same places.

    Padding may differ only behind the last element.
    """
    return _is_row_major(shape, layout) and _is_row_major(other, other_layout)


def _is_row_major(shape: Sequence[int], layout: str) -> bool:
    block = block_of(layout)
    if block is None:
        return True
    n, c, *rest = shape
    one_pixel = prod(rest) == 1
    return one_pixel and (n == 1 or c % block == 0)


def pack(data: npt.NDArray[Any], layout: str) -> npt.NDArray[Any]:
    """Lay out an array; padding channels are zero."""
    block = block_of(layout)
    if block is None:
        return np.ascontiguousarray(data)
    n, c, *rest = data.shape
    padded = np.zeros((n, -(-c // block) * block, *rest), data.dtype)
    padded[:, :c] = data
    return np.ascontiguousarray(np.moveaxis(padded.reshape(n, -1, block, *rest), 2, -1))
