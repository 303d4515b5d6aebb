"""Maps with a transposition: squares turned in registers, with whatever else the map computes."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphopt.backends.target import get_target
from graphopt.program.ir import Program
from tests.backends.harness import Builder, aten, check

LANES = get_target("host").isa.narrow


def kernels(program: Program) -> list[str]:
    return [step.kernel.origin for step in program.steps]


@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.data())
def test_any_permutation(shape: list[int], data: st.DataObject) -> None:
    """Rows that are no multiple of a vector, several squares, a single one, none."""
    shape = [min(n, 12) if i < len(shape) - 2 else n for i, n in enumerate(shape)]
    dims = data.draw(st.permutations(range(len(shape))))
    b = Builder(len(shape))
    b.returns(b.op(aten.permute.default, b.input(b.random(*shape)), list(dims)))
    program = check(b, tolerance=0.0)
    moved = [shape[dim] for dim in dims]
    axis = dims.index(len(shape) - 1)
    turns = axis != len(shape) - 1 and min(moved[axis], moved[-1]) >= LANES
    assert kernels(program) == ["map turned"] or not turns


@pytest.mark.parametrize("target", ["host", "x86-64-v2", "arm"])
@pytest.mark.parametrize("threads", [1, 2])
def test_with_what_is_fused(target: str, threads: int) -> None:
    """A gate that is half of another tensor, a sum and an activation."""
    b = Builder(0)
    x, whole = b.input(b.random(2, 21, 37)), b.input(b.random(2, 37, 42))
    half = b.op(aten.slice.Tensor, whole, 2, 21, 42)
    y = b.op(aten.mul.Tensor, b.op(aten.permute.default, x, [0, 2, 1]), half)
    b.returns(b.op(aten.relu.default, b.op(aten.add.Tensor, y, b.constant(b.random(21)))))
    program = check(b, target=target, threads=threads, tolerance=1e-6)
    assert kernels(program) == ["map turned"]


@pytest.mark.parametrize("channels", [16, 24, 21])
def test_images_in_blocks_become_plain(channels: int) -> None:
    """What convolutions make and read too is returned through a copy."""
    b = Builder(1)
    y = b.conv(b.input(b.random(2, 3, 9, 19)), channels, (3, 3), padding=1)
    b.returns(y, b.conv(y, 32, (1, 1)))
    program = check(b, tolerance=3e-6)
    copies = [origin for origin in kernels(program) if origin.startswith("map")]
    assert copies == ["map turned" if channels % LANES == 0 else "map"]


def test_other_dtypes_are_moved_one_by_one() -> None:
    b = Builder(2)
    x = b.input((b.random(16, 24) * 9).int())
    b.returns(b.op(aten.permute.default, x, [1, 0]))
    program = check(b, tolerance=0.0)
    assert kernels(program) == ["map"]
