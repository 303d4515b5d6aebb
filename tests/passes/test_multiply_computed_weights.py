"""multiply_computed_weights: layers whose weights are no constants become matrix products."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, ops, refusals, run
from test_fold_batch_norm import conv, draw

from graphopt.passes.multiply_computed_weights import MultiplyComputedWeights


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.data())
def test_convolutions(dims: int, batch: int, groups: int, data: st.DataObject) -> None:
    b = Build()
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    x, weight = b.input(batch, 4, *[5, 7, 6][:dims]), b.input(6, 4 // groups, *kernel)
    bias = data.draw(st.sampled_from([None, "constant", "computed"]))
    given_bias = b.const(draw(6)) if bias == "constant" else b.input(6) if bias else None
    stride, padding, dilation = (data.draw(st.integers(low, 2)) for low in (1, 0, 1))
    arguments = [[n] * dims for n in (stride, padding, dilation)]
    gm = b.done(b.call(
        aten.convolution.default, x, weight, given_bias, *arguments, False, [0] * dims, groups
    ))  # fmt: skip
    run(gm, MultiplyComputedWeights())
    assert "convolution" not in ops(gm)
    assert ops(gm).count("matmul") == 1


def test_a_computed_bias_alone_is_added() -> None:
    b = Build()
    x, bias = b.input(1, 4, 5, 5), b.input(3)
    weight = b.const(draw(3, 4, 3, 3))
    gm = b.done(b.call(
        aten.convolution.default, x, weight, bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    ))  # fmt: skip
    run(gm, MultiplyComputedWeights())
    assert ops(gm) == ["convolution", "reshape", "add"]


@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(computed: bool, bias: bool) -> None:
    b = Build()
    x = b.input(2, 3, 4)
    weight = b.input(5, 4) if computed else b.const(draw(5, 4))
    given_bias = b.input(5) if bias else None
    gm = b.done(b.call(aten.linear.default, x, weight, given_bias))
    run(gm, MultiplyComputedWeights())
    layer = ["permute", "matmul"] if computed else ["linear"]
    assert ops(gm) == [*layer, *(["add"] if bias else [])]


def test_constant_weights_stay() -> None:
    b = Build()
    gm = b.done(conv(b, b.input(1, 2, 5, 5), b.const(draw(3, 2, 3, 3))))
    assert not run(gm, MultiplyComputedWeights()).changed


def test_transposed_is_refused() -> None:
    b = Build()
    gm = b.done(conv(b, b.input(1, 2, 5, 5), b.input(2, 3, 3, 3), transposed=True))
    result = run(gm, MultiplyComputedWeights())
    assert refusals(result) == {"multiply computed weights of a convolution": "it is transposed"}
