"""Softmax, log-softmax and layer norm against PyTorch: every axis, odd rows, masks."""

from __future__ import annotations

import pytest
import torch

from graphopt import graph as G
from tests.backends.harness import Builder, aten, check, origins

ROWS = (1, 7, 8, 9, 31, 64, 165)


@pytest.mark.parametrize("op", [aten.softmax.int, aten.log_softmax.int], ids=["softmax", "log"])
def test_every_axis_and_odd_rows(op: object) -> None:
    b = Builder(1)
    for length in ROWS:
        b.returns(b.op(op, b.input(b.random(3, length) * 4), -1))
    x = b.input(b.random(2, 5, 3, 9) * 4)
    b.returns(*(b.op(op, x, axis) for axis in (0, 1, 2, 3, -3)))
    for last in (1, 3, 8, 16, 19):
        y = b.input(b.random(2, 6, last) * 4)
        b.returns(b.op(op, y, 1), b.op(aten.relu.default, b.op(op, y, 0)))
    program = check(b)
    assert set(origins(program)) == {"softmax"}


def test_masked_softmax() -> None:
    """-inf in part of a row gives zeros there; a row of nothing but -inf is NaN, as in PyTorch."""
    b = Builder(2)
    for length in ROWS[1:]:
        x = b.random(4, length)
        x[0, 3:] = -torch.inf
        x[1, :-1] = -torch.inf
        b.returns(b.op(aten.softmax.int, b.input(x), -1))
    nothing = b.op(aten.softmax.int, b.input(torch.full((2, 9), -torch.inf)), -1)
    b.returns(b.op(aten.isnan.default, nothing))
    check(b)


def test_masked_strided_softmax() -> None:
    """Rows along another axis than the last: masked ones, one with nothing in it, one with NaN."""
    x = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0)) * 50
    x[0, 2:, 3] = -torch.inf
    empty, broken = x.clone(), x.clone()
    empty[1, :, 9] = -torch.inf
    broken[1, 4, 2] = torch.nan
    b = Builder()
    b.returns(b.op(aten.softmax.int, b.input(x), 1))
    for value in (empty, broken):
        b.returns(b.op(aten.isnan.default, b.op(aten.softmax.int, b.input(value), 1)))
    check(b)


def test_softmax_of_large_values_and_nan() -> None:
    b = Builder(3)
    x = b.random(3, 17) * 1e4
    b.returns(b.op(aten.softmax.int, b.input(x), -1), b.op(aten.log_softmax.int, b.input(x), -1))
    x = b.random(3, 17)
    x[1, 8] = torch.nan
    b.returns(b.op(aten.isnan.default, b.op(aten.softmax.int, b.input(x), -1)))
    check(b)


@pytest.mark.parametrize("axes", [1, 2])
def test_layer_norm(axes: int) -> None:
    b = Builder(4)
    for length in (*ROWS[1:], 1):
        shape = (2, 3, length) if axes == 1 else (2, 3, 5, length)
        # An offset that E[x²] − E[x]² would cancel on. The numbers have few enough bits for
        # the sums to be exact, so that the comparison does not depend on their order.
        x = b.input((b.random(*shape) * 64).round() / 64 + 100)
        tail = list(shape[-axes:])
        if length == 1 and axes == 1:
            # The deviation of one number is 0.
            b.returns(b.op(aten.layer_norm.default, x, tail))
            continue
        weight, bias = b.constant(b.random(*tail)), b.constant(b.random(*tail))
        for more in ((), (weight,), (None, bias), (weight, bias, 0.5)):
            b.returns(b.op(aten.layer_norm.default, x, tail, *more))
    # At 100 a float32 has steps of 2⁻¹⁷; the mean's rounding is that share of the deviation.
    program = check(b, tolerance=3e-5)
    assert set(origins(program)) == {"layer_norm"}


def test_what_follows_is_fused() -> None:
    b = Builder(5)
    x = b.input(b.random(2, 4, 19))
    y = b.op(aten.softmax.int, x, -1)
    b.returns(b.op(aten.add.Tensor, b.op(aten.mul.Tensor, y, 2.0), x))
    z = b.op(aten.layer_norm.default, x, [19], b.constant(b.random(19)))
    b.returns(b.op(aten.gelu.default, b.op(aten.add.Tensor, z, b.input(b.random(19)))))
    program = check(b)
    assert len(program.steps) == 2, [step.ops for step in program.steps]


def test_softmax_that_ends_in_another_type() -> None:
    """Its powers cannot wait where the result goes."""
    b = Builder(6)
    y = b.op(aten.softmax.int, b.input(b.random(3, 40)), -1)
    b.returns(b.op(aten.gt.Scalar, y, 0.025))
    assert origins(check(b)) == ["softmax"]


@pytest.mark.parametrize("target", ["x86-64-v2", "arm"])
def test_other_instruction_sets(target: str) -> None:
    b = Builder(6)
    x = b.input(b.random(3, 21) * 3)
    y = b.op(aten.softmax.int, x, -1)
    b.returns(y, b.op(aten.log_softmax.int, x, 0), b.op(aten.layer_norm.default, x, [21]))
    assert G.shape(y) == (3, 21)
    check(b, target=target, threads=2)
