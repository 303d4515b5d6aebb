"""Linear resizing: any sizes and layouts, bands of rows, what is fused behind it."""

from __future__ import annotations

import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from graphopt.backends.kernels import resize
from tests.backends.harness import Builder, aten, check, origins

SIZES = st.tuples(st.integers(1, 19), st.integers(1, 19))


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.integers(1, 2), st.sampled_from([1, 3, 8, 20]), SIZES, SIZES, st.booleans(),
    st.sampled_from([1, 100, 16384]),
)  # fmt: skip
def test_any_size(
    batch: int, channels: int, size: tuple[int, int], out: tuple[int, int], align: bool, task: int
) -> None:
    """Larger and smaller, one pixel, plain and blocked inputs and outputs, tasks of a few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize, "_TASK", task)
        b = Builder(channels)
        x = b.input(b.random(batch, channels, *size))
        y = b.conv(x, channels, (1, 1))
        plain, first, second = (
            b.op(aten.upsample_bilinear2d.vec, each, list(out), align, None) for each in (x, y, y)
        )
        b.returns(plain, b.op(aten.sigmoid.default, first), b.conv(second, 4, (1, 1)))
        program = check(b, tolerance=3e-6)
    assert origins(program).count("resize") == 3


FACTORS = st.sampled_from([0.5, 0.7, 1.0, 1.04, 1.1, 1.3, 2.0, 2.6])


@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(SIZES, FACTORS, FACTORS)
@example((8, 3), 1.25, 1.06)
def test_any_factor(size: tuple[int, int], tall: float, wide: float) -> None:
    """PyTorch steps by a factor where the size changes, and copies where it does not."""
    assume(min(int(size[0] * tall), int(size[1] * wide)) > 0)
    b = Builder(0)
    x = b.input(b.random(1, 2, *size))
    line = b.input(b.random(1, 2, size[1]))
    b.returns(
        b.op(aten.upsample_bilinear2d.vec, x, None, False, [tall, wide]),
        b.op(aten.upsample_linear1d.vec, line, None, False, [wide]),
    )
    check(b, tolerance=3e-6)


@pytest.mark.parametrize("target", ["host", "x86-64-v2", "arm"])
@pytest.mark.parametrize("threads", [1, 2])
def test_joined_by_what_follows(target: str, threads: int) -> None:
    """A sum with what has the larger size, and a line."""
    b = Builder(0)
    x = b.conv(b.input(b.random(1, 3, 9, 7)), 20, (1, 1))
    skipped = b.conv(b.input(b.random(1, 3, 18, 21)), 20, (1, 1))
    larger = b.op(aten.upsample_bilinear2d.vec, x, [18, 21], False, None)
    joined = b.op(aten.relu.default, b.op(aten.add.Tensor, larger, skipped))
    line = b.op(aten.upsample_linear1d.vec, b.input(b.random(2, 5, 9)), None, False, [2.5])
    b.returns(b.conv(joined, 5, (3, 3), padding=1), b.op(aten.relu.default, line))
    program = check(b, target=target, threads=threads, tolerance=3e-6)
    assert origins(program).count("resize") == 2
    assert len(program.steps) == 5


def test_before_depthwise_convolutions_of_plain_inputs() -> None:
    """What is read there is in blocks, the last one of them ragged."""
    b = Builder(1)
    x = b.op(aten.upsample_bilinear2d.vec, b.input(b.random(2, 13, 4, 5)), [9, 8], True, None)
    b.returns(b.conv(x, 13, (3, 3), padding=1, groups=13))
    program = check(b, tolerance=3e-6)
    assert origins(program)[0] == "resize"
    assert program.buffers[program.steps[0].writes[0]].layout != "plain"


def test_rows_are_stretched_once() -> None:
    b = Builder(2)
    x = b.input(b.random(1, 2, 8, 8))
    b.returns(b.op(aten.upsample_bilinear2d.vec, x, [64, 64], False, None))
    program = check(b, tolerance=3e-6)
    # Three operations for each element of the output and of eight rows.
    assert program.steps[0].flops == 3 * 2 * 64 * (64 + 8)
