"""Linear layers and products by constants against PyTorch: all tails, epilogues, ranks."""

from __future__ import annotations

import pytest
import torch

from graphopt import graph as G
from tests.backends.harness import Builder, aten, check, origins


@pytest.mark.parametrize("m", [1, 2, 7, 33])
def test_tails(m: int) -> None:
    b = Builder(m)
    for k in (1, 3, 100):
        x = b.input(b.random(m, k))
        for n in (1, 5, 8, 1000):
            weight = b.constant(b.random(n, k) / k**0.5)
            bias = b.constant(b.random(n)) if n != 5 else None
            b.returns(b.op(aten.linear.default, x, weight, bias))
    program = check(b)
    assert set(origins(program)) == {"gemm"}


def test_single_row_by_lanes() -> None:
    """NEON takes four inputs at a time: depths and widths that are no multiple of four."""
    b = Builder(1)
    for k in (1, 4, 31, 100):
        x = b.input(b.random(1, k))
        for n in (1, 6, 60, 123):
            weight = b.constant(b.random(n, k) / k**0.5)
            b.returns(b.op(aten.linear.default, x, weight, b.constant(b.random(n))))
    program = check(b, target="arm", tolerance=4e-6)
    assert set(origins(program)) == {"gemm"}


def test_epilogues_are_fused() -> None:
    b = Builder(1)
    x = b.input(b.random(3, 7, 24))
    weight, bias = b.constant(b.random(24, 24) / 5), b.constant(b.random(24))
    y = b.op(aten.linear.default, x, weight, bias)
    y = b.op(aten.gelu.default, y)
    y = b.op(aten.add.Tensor, y, x)
    z = b.op(aten.linear.default, y, weight, None)
    # An operand for each column, one for each row, and one for each batch.
    for shape in ((24,), (7, 1), (3, 1, 1)):
        z = b.op(aten.mul.Tensor, z, b.input(b.random(*shape)))
    b.returns(b.op(aten.sigmoid.default, z))
    program = check(b)
    assert len(program.steps) == 2, [step.ops for step in program.steps]


def test_ranks_and_products_by_constants() -> None:
    b = Builder(2)
    weight = b.constant(b.random(9, 13))
    for shape in ((13,), (5, 13), (2, 3, 13), (2, 2, 3, 13), (1, 1, 13)):
        x = b.input(b.random(*shape))
        y = b.op(aten.linear.default, x, weight)
        b.returns(b.op(aten.relu.default, y))
    matrix = b.constant(b.random(13, 9))
    for shape in ((13,), (5, 13), (2, 3, 13)):
        b.returns(b.op(aten.matmul.default, b.input(b.random(*shape)), matrix))
    b.returns(b.op(aten.mm.default, b.input(b.random(4, 13)), matrix))
    # The matrix is an operand of the sum, too.
    square = b.constant(b.random(5, 5))
    y = b.op(aten.matmul.default, b.input(b.random(5, 5)), square)
    b.returns(b.op(aten.add.Tensor, y, square))
    program = check(b)
    assert set(origins(program)) == {"gemm"}


def test_operands_of_epilogues_with_axes_of_length_1() -> None:
    """Sequences of a batch of one with the batch second: an axis that broadcasting would skip."""
    b = Builder(4)
    weight, bias = b.constant(b.random(12, 12) / 4), b.constant(b.random(12))
    for shape in ((17, 1, 12), (1, 17, 12), (3, 1, 5, 1, 12), (1, 1, 12)):
        x = b.input(b.random(*shape))
        y = b.op(aten.linear.default, x, weight, bias)
        for other in (shape, (1,) * len(shape[:-1]) + (12,), shape[1:]):
            y = b.op(aten.add.Tensor, y, b.input(b.random(*other)))
        b.returns(y)
    program = check(b)
    assert len(program.steps) == 4, [step.ops for step in program.steps]


def test_bias_computed_at_run_time() -> None:
    b = Builder(3)
    weight = b.constant(b.random(9, 6))
    b.returns(b.op(aten.linear.default, b.input(b.random(4, 6)), weight, b.input(b.random(9))))
    check(b)


@pytest.mark.parametrize("keep", [False, True], ids=["alone", "and convolved"])
def test_sequence_in_blocks_through_a_linear_layer(keep: bool) -> None:
    """A convolution's result, read by another one (so kept in blocks) and along its length."""
    b = Builder(4)
    x = b.conv(b.input(b.random(2, 3, 14)), 12, (3,), padding=1)
    y = b.op(aten.linear.default, x, b.constant(b.random(14, 14) / 4), b.constant(b.random(14)))
    y = b.op(aten.add.Tensor, y, x)
    b.returns(b.op(aten.relu.default, y))
    if keep:
        b.returns(b.conv(x, 5, (1,)), b.conv(y, 5, (1,)))
    check(b)


def test_the_same_tensor_under_two_names() -> None:
    """Work in place must see that the residual is the layer's input under another name."""
    b = Builder(5)
    x = b.op(aten.relu.default, b.input(b.random(6, 16)))
    one, other = (b.op(aten.reshape.default, x, [1, 6, 16]) for _ in range(2))
    weight = b.constant(b.random(16, 16))
    y = b.op(aten.add.Tensor, b.op(aten.linear.default, one, weight), other)
    b.returns(b.op(aten.tanh.default, b.op(aten.linear.default, y, weight)))
    assert G.shape(y) == (1, 6, 16)
    check(b)


@pytest.mark.parametrize("target", ["x86-64-v2", "arm"])
def test_other_instruction_sets(target: str) -> None:
    b = Builder(6)
    x = b.input(b.random(9, 33))
    y = b.op(aten.linear.default, x, b.constant(b.random(21, 33)), b.constant(b.random(21)))
    b.returns(b.op(aten.silu.default, y))
    check(b, target=target, threads=2)


def test_infinite_inputs_do_not_spread() -> None:
    b = Builder(7)
    x = b.random(3, 9)
    x[1, 4] = torch.nan
    y = b.op(aten.linear.default, b.input(x), b.constant(b.random(11, 9)))
    b.returns(b.op(aten.isnan.default, y))
    check(b)
