"""Products of computed matrices against PyTorch: batches, broadcasts, vectors, tails, epilogues."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.backends.harness import Builder, aten, check, origins

SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 17, 33])


@st.composite
def products(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of two operands whose batch dimensions broadcast."""
    m, k, n = (draw(SIZES) for _ in range(3))
    batch = draw(st.lists(st.integers(1, 3), max_size=3))
    left = [draw(st.sampled_from([extent, 1])) for extent in batch]
    right = [draw(st.sampled_from([extent, 1])) for extent in batch]
    right = right[draw(st.integers(0, len(right))) :]
    return (*left, m, k), (*right, k, n)


@settings(max_examples=3, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.lists(products(), min_size=6, max_size=6), st.integers(0, 2**31))
def test_any_product(cases: list[tuple[tuple[int, ...], tuple[int, ...]]], seed: int) -> None:
    b = Builder(seed)
    for left, right in cases:
        b.returns(b.op(aten.matmul.default, b.input(b.random(*left)), b.input(b.random(*right))))
    program = check(b)
    assert set(origins(program)) == {"matmul"}


def test_vectors_on_either_side() -> None:
    b = Builder(1)
    for left, right in [((9,), (9, 5)), ((5, 9), (9,)), ((9,), (9,)), ((9,), (2, 9, 3)),
                        ((2, 3, 9), (9,))]:  # fmt: skip
        y = b.op(aten.matmul.default, b.input(b.random(*left)), b.input(b.random(*right)))
        b.returns(b.op(aten.relu.default, y))
    y = b.op(aten.bmm.default, b.input(b.random(2, 3, 4)), b.input(b.random(2, 4, 5)))
    b.returns(y, b.op(aten.mm.default, b.input(b.random(3, 4)), b.input(b.random(4, 5))))
    check(b)


@pytest.mark.parametrize("threads", [1, 3])
def test_epilogue_and_the_same_matrix_twice(threads: int) -> None:
    b = Builder(2)
    x = b.input(b.random(2, 3, 40, 40))
    y = b.op(aten.matmul.default, x, x)
    y = b.op(aten.add.Tensor, b.op(aten.mul.Tensor, y, 0.5), x)
    transposed = b.op(aten.permute.default, x, [0, 1, 3, 2])
    b.returns(b.op(aten.tanh.default, y), b.op(aten.matmul.default, x, transposed))
    program = check(b, threads=threads)
    assert sorted(origins(program)) == ["map", "matmul", "matmul"]


def test_product_of_constants_and_blocked_operands() -> None:
    b = Builder(3)
    left = b.constant(b.random(2, 5, 9))
    b.returns(b.op(aten.matmul.default, left, b.input(b.random(9, 11))))
    # A sequence in blocks of channels: the matrices are its channels by its length.
    x = b.conv(b.input(b.random(2, 3, 12)), 10, (1,))
    again = b.conv(x, 10, (1,))
    b.returns(b.op(aten.matmul.default, x, b.input(b.random(2, 12, 7))), again)
    check(b)


@pytest.mark.parametrize("target", ["x86-64-v2", "arm"])
def test_other_instruction_sets(target: str) -> None:
    b = Builder(4)
    y = b.op(aten.matmul.default, b.input(b.random(2, 19, 33)), b.input(b.random(33, 21)))
    b.returns(y)
    check(b, target=target)


def test_infinities_stay_where_they_are() -> None:
    b = Builder(5)
    x = b.random(3, 9)
    x[1, 4] = torch.inf
    y = b.op(aten.matmul.default, b.input(x), b.input(b.random(9, 10).abs() + 1))
    b.returns(b.op(aten.isinf.default, y))
    check(b)


@pytest.mark.parametrize(("rows", "columns", "depth"), [(40, 521, 600), (131, 512, 48)])
def test_a_right_operand_the_cache_cannot_hold_as_it_lies(
    rows: int, columns: int, depth: int
) -> None:
    """Its panels are copied to scratch memory, one after the other."""
    b = Builder(6)
    y = b.op(aten.matmul.default, b.input(b.random(2, rows, depth)),
             b.input(b.random(2, depth, columns)))  # fmt: skip
    b.returns(b.op(aten.relu.default, y))
    # Sums of 600 products of both signs.
    program = check(b, threads=2, tolerance=4e-6)
    assert program.scratch > 0
