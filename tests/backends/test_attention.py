"""Scaled dot-product attention against PyTorch: masks, causal, scale, grouped heads, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.backends.harness import Builder, aten, check, origins


def attend(
    b: Builder, q: tuple[int, ...], k: tuple[int, ...], mask: torch.Tensor | None = None,
    width: int | None = None, **kwargs: Any,
) -> fx.Node:  # fmt: skip
    """Attention over random inputs; `width` is the values' head dimension."""
    v = (*k[:-1], width or k[-1])
    return b.op(
        aten.scaled_dot_product_attention.default,
        *(b.input(b.random(*shape)) for shape in (q, k, v)),
        None if mask is None else b.input(mask),
        **kwargs,
    )


def test_lengths_and_head_dimensions() -> None:
    b = Builder(1)
    for length, depth in [(1, 1), (7, 8), (31, 7), (33, 64), (64, 8)]:
        b.returns(attend(b, (2, 2, length, depth), (2, 2, length, depth)))
    for queries, keys in [(1, 33), (33, 1), (7, 64), (64, 31)]:
        b.returns(attend(b, (1, 2, queries, 8), (1, 2, keys, 8), width=5))
    program = check(b)
    assert set(origins(program)) == {"attention"}


def test_masks() -> None:
    b = Builder(2)
    q, k = (2, 3, 7, 8), (2, 3, 33, 8)
    keep = torch.rand(2, 3, 7, 33, generator=b.generator) > 0.3
    keep[..., 0] = True
    for mask in (keep, keep[:, :1, :1], keep[0, 0], keep[:1, :, :1]):
        b.returns(attend(b, q, k, mask))
        b.returns(attend(b, q, k, torch.randn(mask.shape, generator=b.generator)))
        b.returns(attend(b, q, k, torch.where(mask, 0.0, -torch.inf)))
    check(b)


def test_a_row_with_nothing_to_attend_to_gives_zeros() -> None:
    b = Builder(3)
    keep = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    keep[..., 4, :] = False
    b.returns(attend(b, (1, 2, 9, 8), (1, 2, 9, 8), keep))
    b.returns(attend(b, (1, 2, 9, 8), (1, 2, 9, 8), torch.where(keep, 0.0, -torch.inf)))
    check(b)


def test_causal_scale_and_grouped_heads() -> None:
    b = Builder(4)
    for length in (1, 7, 33, 64):
        b.returns(attend(b, (2, 2, length, 8), (2, 2, length, 8), is_causal=True))
    b.returns(attend(b, (1, 2, 7, 8), (1, 2, 33, 8), is_causal=True))
    b.returns(attend(b, (1, 2, 33, 8), (1, 2, 7, 8), is_causal=True))
    b.returns(attend(b, (1, 2, 7, 8), (1, 2, 7, 8), scale=0.7))
    b.returns(attend(b, (2, 6, 9, 8), (2, 2, 9, 8), enable_gqa=True))
    b.returns(attend(b, (2, 4, 9, 8), (2, 1, 9, 8), enable_gqa=True, is_causal=True))
    check(b)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 1, 3, 5, 8)])
def test_ranks(shape: tuple[int, ...]) -> None:
    b = Builder(5)
    y = attend(b, shape, shape)
    b.returns(b.op(aten.mul.Tensor, y, b.input(b.random(8))))
    program = check(b)
    assert origins(program) == ["attention"]


@pytest.mark.parametrize(("target", "threads"), [("host", 4), ("x86-64-v2", 1), ("arm", 2)])
def test_threads_and_other_instruction_sets(target: str, threads: int) -> None:
    """Threads have scratch memory of their own."""
    b = Builder(6)
    b.returns(attend(b, (2, 3, 65, 24), (2, 3, 47, 24)), attend(b, (1, 1, 3, 8), (1, 1, 3, 8)))
    check(b, target=target, threads=threads)


def test_one_head_is_several_tasks() -> None:
    """Every task packs the keys and values for itself."""
    b = Builder(7)
    keep = torch.rand(131, 45, generator=b.generator) > 0.3
    b.returns(attend(b, (1, 1, 131, 12), (1, 1, 45, 12), keep))
    program = check(b, threads=3)
    assert program.steps[0].tasks > 1


def test_many_keys_go_through_in_small_bands() -> None:
    b = Builder(8)
    b.returns(attend(b, (1, 2, 50, 4), (1, 2, 5003, 4), width=3))
    program = check(b)
    # Packed operands and less than half of a second-level cache of scores.
    assert program.scratch < 5008 * (4 + 16) * 4 + 256 * 1024


def test_heads_that_lie_between_each_other() -> None:
    """One matrix of queries, keys and values of all heads, as transformers compute it."""
    b = Builder(9)
    qkv = b.input(b.random(2, 21, 3 * 4 * 10))
    parts = []
    for first in (0, 40, 80):
        part = b.op(aten.slice.Tensor, qkv, 2, first, first + 40)
        part = b.op(aten.reshape.default, part, [2, 21, 4, 10])
        parts.append(b.op(aten.permute.default, part, [0, 2, 1, 3]))
    b.returns(b.op(aten.scaled_dot_product_attention.default, *parts))
    check(b)


@pytest.mark.parametrize("target", ["host", "arm"])
def test_permutes_behind_it_are_where_it_stores(target: str) -> None:
    b = Builder(12)
    y = attend(b, (2, 5, 7, 12), (2, 5, 9, 12))
    y = b.op(aten.permute.default, b.op(aten.relu.default, y), [2, 0, 1, 3])
    # Read where the result is stored, not where the head is.
    y = b.op(aten.mul.Tensor, y, b.input(b.random(7, 2, 5, 12)))
    y = b.op(aten.permute.default, y, [1, 0, 2, 3])
    b.returns(b.op(aten.reshape.default, y, [2, 7, 60]))
    # Of equal lengths, so that the order of axes does not show in the shape.
    square = attend(b, (1, 6, 6, 8), (1, 6, 6, 8))
    b.returns(b.op(aten.permute.default, square, [0, 2, 1, 3]))
    # The last axis moves: a copy.
    last = attend(b, (1, 6, 6, 8), (1, 6, 6, 8))
    b.returns(b.op(aten.permute.default, last, [0, 1, 3, 2]))
    program = check(b, target=target)
    made = [step.ops for step in program.steps if "attention" in step.ops]
    assert [ops.count("permute") for ops in made] == [2, 1, 0]


@pytest.mark.parametrize("target", ["host", "arm"])
def test_causal_leaves_out_what_is_above_the_diagonal(target: str) -> None:
    """Bands of queries, several tasks, fewer or more queries than keys, values of any width."""
    b = Builder(13)
    for queries, keys, heads in [(131, 131, 1), (70, 133, 2), (133, 45, 6), (50, 50, 6)]:
        shape = (1, heads, queries, 12)
        b.returns(attend(b, shape, (1, heads, keys, 12), width=21, is_causal=True))
        keep = torch.rand(queries, keys, generator=b.generator) > 0.5
        full = keep & torch.ones(queries, keys, dtype=torch.bool).tril()
        b.returns(attend(b, shape, (1, heads, keys, 12), full))
    check(b, target=target, threads=2)


def test_scores_of_any_size() -> None:
    """Scales of both signs, scores far apart, and masks of the lowest float instead of -inf."""
    b = Builder(10)
    shape = (1, 2, 13, 8)
    for scale in (-0.4, 30.0, 0.0):
        b.returns(attend(b, shape, shape, scale=scale))
    lowest = torch.full((13, 13), torch.finfo(torch.float32).min).triu(1)
    lowest[5] = torch.finfo(torch.float32).min
    b.returns(attend(b, shape, shape, lowest))
    # exp(100) is no float32, and a score of 300 has steps of 3e-5.
    check(b, tolerance=2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_nan_stays_in_its_row(masked: bool) -> None:
    b = Builder(11)
    q = b.random(1, 1, 9, 8)
    q[0, 0, 4, 3] = torch.nan
    k, v = b.input(b.random(1, 1, 11, 8)), b.input(b.random(1, 1, 11, 8))
    mask = b.input(torch.randn(9, 11, generator=b.generator)) if masked else None
    y = b.op(aten.scaled_dot_product_attention.default, b.input(q), k, v, mask)
    b.returns(b.op(aten.isnan.default, y))
    # PyTorch's fused kernel takes a row of NaN for one with nothing to attend to where the keys do
    # not fill a vector of the machine: zeros.
    with sdpa_kernel(SDPBackend.MATH):
        check(b)
        is_nan = b.gm(*b.inputs)[0]
    assert is_nan.all(-1).flatten().tolist() == [row == 4 for row in range(9)]
