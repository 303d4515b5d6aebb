"""fold_affine: constants next to layers go into their weights, chains of them become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, changes, ops, refusals, run
from test_fold_batch_norm import build_conv, build_input, conv, convolutions, draw, valid
from torch import fx

from graphopt import graph as g
from graphopt.passes.fold_affine import FoldAffine

BEFORE = "fold affine into the layer before"
AFTER = "fold affine into the layer after"
CHAIN = "merge affine chain"
MOVED = "move multiplication behind zero padding"
MATMUL = "turn matmul into linear"

Step = Callable[[Build, fx.Node], fx.Node]


def channel(b: Build, x: fx.Node, axis: int) -> fx.Node:
    """A constant with a value for each index of `axis`, none near 0."""
    sizes = [1] * len(g.shape(x))
    sizes[axis] = g.shape(x)[axis]
    random = torch.Generator().manual_seed(sum(sizes))
    return b.const(torch.rand(sizes, generator=random) + 0.5)


STEPS: dict[str, Callable[[Build, fx.Node, int], fx.Node]] = {
    "mul": lambda b, x, axis: b.call(aten.mul.Tensor, x, channel(b, x, axis)),
    "mul number": lambda b, x, axis: b.call(aten.mul.Tensor, x, -2.5),
    "constant mul": lambda b, x, axis: b.call(aten.mul.Tensor, channel(b, x, axis), x),
    "div": lambda b, x, axis: b.call(aten.div.Tensor, x, channel(b, x, axis)),
    "add": lambda b, x, axis: b.call(aten.add.Tensor, x, channel(b, x, axis)),
    "sub": lambda b, x, axis: b.call(aten.sub.Tensor, x, channel(b, x, axis)),
    "sub from": lambda b, x, axis: b.call(aten.sub.Tensor, channel(b, x, axis), x),
    "neg": lambda b, x, axis: b.call(aten.neg.default, x),
    "add one element": lambda b, x, axis: b.call(aten.add.Tensor, x, b.const(torch.tensor([0.3]))),
}
SCALING = ("mul", "mul number", "constant mul", "div", "neg")


@settings(max_examples=30, deadline=None)
@given(convolutions().filter(valid), st.sampled_from(sorted(STEPS)))
def test_after_any_convolution(spec: dict[str, object], step: str) -> None:
    b = Build()
    gm = b.done(STEPS[step](b, build_conv(b, build_input(b, spec), spec), 1))
    assert changes(run(gm, FoldAffine())) == {BEFORE: 1}
    assert ops(gm) == ["convolution"]


@settings(max_examples=30, deadline=None)
@given(convolutions().filter(valid), st.sampled_from(sorted(STEPS)))
def test_before_any_convolution(spec: dict[str, object], step: str) -> None:
    b = Build()
    gm = b.done(build_conv(b, STEPS[step](b, build_input(b, spec), 1), spec))
    result = run(gm, FoldAffine())
    if step in SCALING or not (spec["padding"] or spec["transposed"]):
        assert changes(result) == {AFTER: 1}
        assert ops(gm) == ["convolution"]


@pytest.mark.parametrize("step", STEPS)
def test_around_linear(step: str) -> None:
    b = Build()
    x = STEPS[step](b, b.input(2, 3, 5), 2)
    y = b.call(aten.linear.default, x, b.const(draw(4, 5)), None)
    gm = b.done(STEPS[step](b, y, 2))
    assert changes(run(gm, FoldAffine())) == {BEFORE: 1, AFTER: 1}
    assert ops(gm) == ["linear"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7))
def test_any_chain_becomes_mul_and_add_at_most(steps: list[str]) -> None:
    b = Build()
    x: fx.Node = b.call(aten.relu.default, b.input(2, 3, 4))
    for step in steps:
        x = STEPS[step](b, x, 1)
    gm = b.done(x)
    run(gm, FoldAffine())
    left = ops(gm)[1:]
    assert len(left) <= 2


def test_chain_before_a_layer_folds_whole() -> None:
    b = Build()
    x = b.call(aten.sub.Tensor, b.input(1, 3, 8, 8), b.const(torch.rand(1, 3, 1, 1)))
    x = b.call(aten.div.Tensor, x, b.const(torch.rand(1, 3, 1, 1) + 0.5))
    gm = b.done(conv(b, x, b.const(draw(4, 3, 3, 3)), stride=2))
    run(gm, FoldAffine())
    assert ops(gm) == ["convolution"]


@pytest.mark.parametrize("step", SCALING)
def test_products_fold_through_zero_padding(step: str) -> None:
    b = Build()
    x = STEPS[step](b, b.input(2, 3, 6, 5), 1)
    x = b.call(aten.constant_pad_nd.default, x, [1, 2, 0, 1], 0.0)
    x = b.call(aten.constant_pad_nd.default, x, [1, 1], 0.0)
    gm = b.done(conv(b, x, b.const(draw(4, 3, 3, 3)), padding=1))
    assert changes(run(gm, FoldAffine())) == {MOVED: 2, AFTER: 1}
    assert ops(gm) == ["constant_pad_nd", "constant_pad_nd", "convolution"]


@pytest.mark.parametrize("why", ["value", "channels", "shift", "rows", "reader", "no layer"])
def test_products_stay_before_padding(why: str) -> None:
    b = Build()
    x: Any = b.input(1, 3, 6, 5)
    step = aten.add.Tensor if why == "shift" else aten.mul.Tensor
    factor = b.const(draw(6, 1)) if why == "rows" else channel(b, x, 1)
    y = b.call(step, x, factor)
    sizes = [1, 1, 1, 1, 1, 0] if why == "channels" else [1, 1, 1, 1]
    z = b.call(aten.constant_pad_nd.default, y, sizes, 1.0 if why == "value" else 0.0)
    if why == "no layer":
        out = b.call(aten.relu.default, z)
    else:
        out = conv(b, z, b.const(draw(4, g.shape(z)[1], 3, 3)))
    gm = b.done(out, *([b.call(aten.relu.default, y)] if why == "reader" else []))
    result = run(gm, FoldAffine())
    assert not result.changed
    reasons = {
        "rows": "the constant of shape [6, 1] varies not only from channel to channel",
        "reader": "the result of mul_tensor is also read by relu_default",
    }
    assert refusals(result) == ({MOVED: reasons[why]} if why in reasons else {})


def test_what_does_nothing_goes() -> None:
    b = Build()
    x = b.call(aten.add.Tensor, b.call(aten.relu.default, b.input(3)), 0.0)
    gm = b.done(b.call(aten.div.Tensor, b.call(aten.mul.Tensor, x, 4.0), 4.0))
    run(gm, FoldAffine())
    assert ops(gm) == ["relu"]


def test_matmul_by_a_constant_becomes_linear_with_bias() -> None:
    b = Build()
    y = b.call(aten.matmul.default, b.input(2, 3, 5), b.const(draw(5, 4)))
    gm = b.done(b.call(aten.add.Tensor, y, b.const(draw(4))))
    assert changes(run(gm, FoldAffine())) == {MATMUL: 1, BEFORE: 1}
    assert ops(gm) == ["linear"]


def test_matmul_by_a_transposed_constant_uses_it_as_it_is() -> None:
    b = Build()
    table = b.const(draw(6, 4))
    x = b.call(aten.embedding.default, table, b.input(2, 3, dtype=torch.int64))
    flipped = b.call(aten.permute.default, table, [1, 0])
    gm = b.done(b.call(aten.matmul.default, x, flipped))
    run(gm, FoldAffine())
    assert ops(gm) == ["embedding", "linear"]
    assert len(list(gm.named_buffers())) == 1


@pytest.mark.parametrize("batched", [True, False])
def test_other_matmuls_stay(batched: bool) -> None:
    b = Build()
    right = b.const(draw(2, 5, 4)) if batched else b.input(5, 4)
    gm = b.done(b.call(aten.matmul.default, b.input(2, 3, 5), right))
    assert not run(gm, FoldAffine()).changed


def test_a_number_divided_by_x_stays() -> None:
    b = Build()
    x = conv(b, b.input(1, 2, 5), b.const(draw(3, 2, 3)))
    gm = b.done(b.call(aten.div.Tensor, b.const(torch.ones(1, 3, 1)), x))
    assert not run(gm, FoldAffine()).changed


def _spatial(b: Build) -> fx.Node:
    x = conv(b, b.input(1, 2, 5), b.const(draw(3, 2, 3)))
    return b.call(aten.mul.Tensor, x, b.const(draw(1, 3, 3)))


def _padded(b: Build) -> fx.Node:
    x = b.call(aten.add.Tensor, b.input(1, 2, 5), 1.0)
    return conv(b, x, b.const(draw(3, 2, 3)), padding=1)


def _transposed(b: Build) -> fx.Node:
    x = b.call(aten.add.Tensor, b.input(1, 2, 5), 1.0)
    return conv(b, x, b.const(draw(2, 3, 3)), transposed=True)


def _computed_weight(b: Build) -> fx.Node:
    return b.call(aten.mul.Tensor, conv(b, b.input(1, 2, 5), b.input(3, 2, 3)), 2.0)


def _overflow(b: Build) -> fx.Node:
    x = conv(b, b.input(1, 2, 5), b.const(draw(3, 2, 3)))
    return b.call(aten.mul.Tensor, b.call(aten.relu.default, x), 2.0)


REFUSED: dict[str, tuple[Callable[[Build], fx.Node], dict[str, str]]] = {
    "spatial": (
        _spatial,
        {BEFORE: "the constant of shape [1, 3, 3] varies not only from channel to channel"},
    ),
    "padded": (
        _padded,
        {AFTER: "convolution_default pads with zeros, which the shift would not reach"},
    ),
    "transposed": (
        _transposed,
        {
            AFTER: "convolution_default is a transposed convolution: "
            "the shift would differ between pixels"
        },
    ),
    "computed weight": (
        _computed_weight,
        {BEFORE: "the weight of convolution_default is not constant"},
    ),
    "not adjacent": (_overflow, {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    build, reasons = REFUSED[name]
    b = Build()
    gm = b.done(build(b))
    result = run(gm, FoldAffine())
    assert refusals(result) == reasons
    assert not result.changed


def test_shared_values_are_refused() -> None:
    b = Build()
    x = conv(b, b.input(1, 2, 5), b.const(draw(3, 2, 3)))
    gm = b.done(b.call(aten.mul.Tensor, x, 2.0), x)
    reason = "the result of convolution_default is also read by output"
    assert refusals(run(gm, FoldAffine())) == {BEFORE: reason}
    b = Build()
    x = b.call(aten.mul.Tensor, b.input(1, 2, 5), 2.0)
    gm = b.done(conv(b, x, b.const(draw(3, 2, 3))), b.call(aten.relu.default, x))
    reason = "the result of mul_tensor is also read by relu_default"
    assert refusals(run(gm, FoldAffine())) == {AFTER: reason}


def test_large_shared_weights_are_refused() -> None:
    def build() -> fx.GraphModule:
        b = Build()
        weight = b.const(draw(4, 5))
        x: Any = b.input(2, 5)
        y = b.call(aten.linear.default, x, weight, None)
        return b.done(b.call(aten.mul.Tensor, y, 2.0), b.call(aten.linear.default, x, weight, None))

    assert changes(run(build(), FoldAffine())) == {BEFORE: 1}
    reason = (
        "the weight of linear_default is shared with linear_default_1, "
        "and a copy would take 80 bytes"
    )
    assert refusals(run(build(), FoldAffine(copy_limit=79))) == {BEFORE: reason}


def test_chains_that_would_overflow_or_grow_stay() -> None:
    b = Build()
    x = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, b.input(3), 1e30), 1e30)
    assert not run(b.done(x), FoldAffine()).changed
    b = Build()
    x = b.call(aten.mul.Tensor, b.input(3, 4), b.const(draw(3, 1)))
    x = b.call(aten.mul.Tensor, x, b.const(draw(1, 4)))
    assert not run(b.done(x), FoldAffine()).changed


def test_integers_stay() -> None:
    b = Build()
    x = b.call(aten.mul.Tensor, b.input(3, dtype=torch.int32), 2)
    assert not run(b.done(b.call(aten.mul.Tensor, x, 3)), FoldAffine()).changed
