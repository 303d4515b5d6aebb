"""Layouts as data: where elements lie, how much memory a tensor takes, which views are free."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.program.layout import (
    PLAIN,
    block_of,
    blocked,
    pack,
    physical_shape,
    physical_size,
    same_bytes,
)

SHAPES = st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 3)] * 2)


def test_names() -> None:
    assert blocked(8) == "NCHW8c"
    assert block_of("NCHW16c") == 16
    assert block_of(PLAIN) is None


def test_physical_shape_pads_channels() -> None:
    assert physical_shape((2, 10, 5, 7), "NCHW8c") == (2, 2, 5, 7, 8)
    assert physical_shape((2, 8, 5), "NCHW8c") == (2, 1, 5, 8)
    assert physical_shape((2, 10), PLAIN) == (2, 10)
    assert physical_size((2, 10, 5, 7), "NCHW8c", 4) == 2 * 16 * 35 * 4
    assert physical_size((), PLAIN, 8) == 8


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.sampled_from([4, 8, 16]))
def test_pack_puts_every_element_in_its_place(shape: tuple[int, ...], block: int) -> None:
    data = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    packed = pack(data, blocked(block))
    assert packed.shape == physical_shape(shape, blocked(block))
    assert packed.flags.c_contiguous
    for n, c, h, w in np.ndindex(*shape):
        assert packed[n, c // block, h, w, c % block] == data[n, c, h, w]
    assert np.count_nonzero(packed) == data.size


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.sampled_from([4, 8]))
def test_same_bytes_only_where_they_are(shape: tuple[int, ...], block: int) -> None:
    """A free view's bytes are those of the row-major tensor, up to padding behind the end."""
    data = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    flat = pack(data, blocked(block)).reshape(-1)[: data.size]
    free = same_bytes(shape, blocked(block), (data.size,), PLAIN)
    if free:
        np.testing.assert_array_equal(flat, data.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "free"),
    [((1, 10, 1, 1), True), ((2, 16, 1, 1), True), ((2, 10, 1, 1), False), ((1, 8, 2, 1), False)],
)
def test_pooled_tensors_flatten_for_free(shape: tuple[int, ...], free: bool) -> None:
    assert same_bytes(shape, "NCHW8c", (shape[0], shape[1] * shape[2]), PLAIN) is free


def test_plain_tensors_are_always_the_same() -> None:
    assert same_bytes((2, 3, 4), PLAIN, (6, 4), PLAIN)
