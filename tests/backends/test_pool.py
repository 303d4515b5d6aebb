"""Pooling of blocked images: borders, strides, dilation, ceil mode, divisors, NaN."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from tests.backends.harness import Builder, aten, check, compile_and_run, origins


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.booleans(), st.integers(1, 2), st.integers(1, 20), st.integers(5, 23), st.integers(5, 23),
    st.sampled_from([(3, 3), (2, 2), (2, 3), (5, 5)]), st.sampled_from([(1, 1), (2, 2), (3, 1)]),
    st.integers(0, 1), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_window(
    is_max: bool, batch: int, channels: int, height: int, width: int, kernel: tuple[int, int],
    stride: tuple[int, int], padding: int, ceil: bool, flag: bool,
) -> None:  # fmt: skip
    b = Builder(height)
    x = b.conv(b.input(b.random(batch, 3, height, width)), channels, (1, 1))
    if is_max:
        dilation = 2 if flag else 1
        reach = (kernel[0] - 1) * dilation + 1, (kernel[1] - 1) * dilation + 1
        assume(reach[0] <= height + 2 * padding and reach[1] <= width + 2 * padding)
        y = b.op(aten.max_pool2d.default, x, kernel, stride, padding, dilation, ceil)
    else:
        divisor = 3 if flag and ceil else None
        y = b.op(aten.avg_pool2d.default, x, kernel, stride, padding, ceil, flag, divisor)
    after = aten.silu if flag else aten.relu
    b.returns(b.conv(b.op(after.default, y), 4, (1, 1)))
    assert origins(check(b, tolerance=5e-6))[1] == "pool"


_THREE = st.tuples(*[st.integers(1, 3)] * 3)


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.booleans(), st.integers(1, 2), st.integers(1, 20), st.tuples(*[st.integers(1, 9)] * 3),
    _THREE, _THREE, _THREE, st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_window_of_frames(
    is_max: bool, batch: int, channels: int, size: tuple[int, ...], kernel: tuple[int, ...],
    stride: tuple[int, ...], dilation: tuple[int, ...], ceil: bool, flag: bool,
) -> None:  # fmt: skip
    """Windows cross borders of frames, rows and columns, with and without padding."""
    padding = [k // 2 if flag else 0 for k in kernel]
    steps = dilation if is_max else (1, 1, 1)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, steps, strict=True)]
    # PyTorch's averages want a window to fit without the padding.
    size = tuple(
        max(n, r - 2 * p if is_max else r) for n, r, p in zip(size, reach, padding, strict=True)
    )
    steps_over = (d > 1 and r > n for d, r, n in zip(steps, reach, size, strict=True))
    assume(not any(steps_over))  # A window of nothing but padding gives -inf.
    b = Builder(channels)
    x = b.conv(b.input(b.random(batch, 3, *size)), channels, (1, 1, 1))
    if is_max:
        y = b.op(aten.max_pool3d.default, x, kernel, stride, padding, dilation, ceil)
    else:
        divisor = 3 if flag and ceil else None
        y = b.op(aten.avg_pool3d.default, x, kernel, stride, padding, ceil, not flag, divisor)
    after = aten.silu if flag else aten.relu
    b.returns(b.conv(b.op(after.default, y), 4, (1, 1, 1)))
    assert origins(check(b, tolerance=5e-6))[1] == "pool"


@pytest.mark.parametrize("target", ["host", "arm"])
def test_nan_wins(target: str) -> None:
    b = Builder(1)
    image = b.random(1, 16, 9, 9)
    image[0, 3, 4, 4] = float("nan")
    image[0, 9, 0, 0] = float("inf")
    x = b.op(aten.mul.Tensor, b.input(image), b.conv(b.input(b.random(1, 3, 9, 9)), 16, (1, 1)))
    y = b.op(aten.max_pool2d.default, x, [3, 3], [1, 1], [1, 1])
    z = b.op(aten.max_pool2d.default, y, [2, 2], [2, 2], [0, 0])
    b.returns(
        b.op(aten.isnan.default, b.op(aten.permute.default, b.conv(z, 4, (1, 1)), [0, 1, 2, 3]))
    )
    gm = b.finish()
    program, (actual,) = compile_and_run(gm, b.inputs, target, 1)
    assert "pool" in origins(program)
    np.testing.assert_array_equal(actual, gm(*b.inputs)[0].numpy())
