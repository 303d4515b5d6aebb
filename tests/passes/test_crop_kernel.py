"""crop_kernel: taps that only ever read padding go, and nothing else changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import Build, ops, run
from test_fold_batch_norm import draw

from graphopt import graph as g
from graphopt.passes._nodes import aten, bind
from graphopt.passes.crop_kernel import CropKernel


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "left", "padded"),
    [
        ((14, 14), (3, 3), 1, (24, 24), (24, 24), (1, 1), [0, 0]),
        ((14, 14), (3, 3), 1, (14, 13), (14, 13), (1, 3), [0, 13]),
        ((4, 1), (7, 7), 1, (3, 3), (1, 1), (7, 1), [3, 0]),
        ((1, 2), (5, 5), 2, (2, 2), (1, 1), (1, 3), [0, 1]),
    ],
)
def test_idle_taps_go(
    size: tuple[int, int], kernel: tuple[int, int], stride: int, padding: tuple[int, int],
    dilation: tuple[int, int], left: tuple[int, int], padded: list[int],
) -> None:  # fmt: skip
    b = Build()
    weight = b.const(draw(6, 2, *kernel))
    conv = b.call(
        aten.convolution.default, b.input(2, 4, *size), weight, None,
        [stride] * 2, list(padding), list(dilation), False, [0, 0], 2,
    )  # fmt: skip
    gm = b.done(conv)
    run(gm, CropKernel())
    cropped = next(n for n in gm.graph.nodes if n.target is aten.convolution.default)
    assert g.shape(cropped.args[1])[2:] == left
    assert bind(cropped)["padding"] == padded
    assert set(ops(gm)) == {"slice", "convolution"}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.data())
def test_any_convolution(dims: int, data: st.DataObject) -> None:
    """The result stays the same (`run` compares), also where nothing but padding is left."""
    b = Build()

    def each(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(dims)]

    size, kernel, stride, padding, dilation = (
        each(1, 5), each(1, 5), each(1, 3), each(0, 6), each(1, 5)
    )  # fmt: skip
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [max(n, r - 2 * p) for n, r, p in zip(size, reach, padding, strict=True)]
    conv = b.call(
        aten.convolution.default, b.input(1, 2, *size), b.const(draw(3, 2, *kernel)), None,
        stride, padding, dilation, False, [0] * dims, 1,
    )  # fmt: skip
    gm = b.done(conv)
    run(gm, CropKernel())
    before = ops(gm)
    run(gm, CropKernel())
    assert ops(gm) == before


def test_used_taps_and_transposed_convolutions_stay() -> None:
    b = Build()
    x, weight = b.input(1, 2, 14, 14), b.const(draw(2, 2, 3, 3))
    rest = ([1, 1], [12, 12], [12, 12])
    gm = b.done(
        b.call(aten.convolution.default, x, weight, None, *rest, False, [0, 0], 1),
        b.call(aten.convolution.default, x, weight, None, *rest, True, [0, 0], 1),
    )
    run(gm, CropKernel())
    assert ops(gm) == ["convolution", "convolution"]
