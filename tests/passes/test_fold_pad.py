"""fold_pad: symmetric zero padding becomes the convolution's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, ops, refusals, run
from test_fold_batch_norm import conv, draw
from torch import fx

from graphopt.passes.fold_pad import FoldPad


def padded(
    b: Build, amounts: list[int], value: float = 0.0, *, transposed: bool = False
) -> fx.Node:
    x = b.call(aten.constant_pad_nd.default, b.input(2, 2, 5, 4), amounts, value)
    channels = 2 + sum(amounts[4:6])
    pair = (channels, 3) if transposed else (3, channels)
    return conv(b, x, b.const(draw(*pair, 3, 2)), transposed=transposed)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.data())
def test_symmetric_padding_folds(dims: int, batch: int, data: st.DataObject) -> None:
    b = Build()
    each = [data.draw(st.integers(0, 2)) for _ in range(data.draw(st.integers(1, dims)))]
    x = b.input(batch, 4, *[5, 7, 6][:dims])
    x = b.call(aten.constant_pad_nd.default, x, [n for n in each for _ in range(2)], 0.0)
    weight = b.const(draw(6, 2, *[3] * dims))
    padding = data.draw(st.integers(0, 1))
    stride = data.draw(st.integers(1, 2))
    gm = b.done(conv(b, x, weight, padding=padding, stride=stride, groups=2))
    run(gm, FoldPad())
    assert ops(gm) == ["convolution"]


@pytest.mark.parametrize(
    ("amounts", "value", "transposed", "reason"),
    [
        ([0, 1, 0, 0], 0.0, False, "it is not the same on both sides: [0, 1, 0, 0]"),
        ([1, 1], 2.0, False, "it pads with 2.0, a convolution with 0"),
        ([-1, -1], 0.0, False, "negative padding crops"),
        ([0, 0, 0, 0, 1, 1], 0.0, False, "it pads channels or the batch"),
        ([1, 1], 0.0, True, "the padding of a transposed convolution crops its result"),
    ],
)
def test_refusals(amounts: list[int], value: float, transposed: bool, reason: str) -> None:
    b = Build()
    gm = b.done(padded(b, amounts, value, transposed=transposed))
    result = run(gm, FoldPad())
    assert refusals(result) == {"fold pad into convolution": reason}
    assert ops(gm) == ["constant_pad_nd", "convolution"]


def test_shared_padding_is_refused() -> None:
    b = Build()
    made = padded(b, [1, 1])
    pad = made.args[0]
    assert isinstance(pad, fx.Node)
    gm = b.done(made, b.call(aten.relu.default, pad))
    reason = "the result of constant_pad_nd_default is also read by relu_default"
    assert refusals(run(gm, FoldPad())) == {"fold pad into convolution": reason}
