"""fuse_activation: written-out activations are recognized in any order, and clamps merge."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, ops, refusals, run
from torch import fx

from graphopt.passes.fuse_activation import FuseActivation

add, mul, div = aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor


def source(b: Build) -> fx.Node:
    """Something that is no input, so that nothing is left if an activation is missed."""
    return b.call(aten.sin.default, b.call(mul, b.input(2, 9), 4.0))


def six(b: Build, x: fx.Node) -> fx.Node:
    return b.call(aten.clamp.default, b.call(add, x, 3), 0, 6)


def line(b: Build, x: fx.Node) -> fx.Node:
    return b.call(add, b.call(mul, x, 1 / 6), 0.5)


CASES: dict[str, tuple[Callable[[Build, fx.Node], fx.Node], list[str]]] = {
    "silu": (lambda b, x: b.call(mul, x, b.call(aten.sigmoid.default, x)), ["silu"]),
    "silu reversed": (lambda b, x: b.call(mul, b.call(aten.sigmoid.default, x), x), ["silu"]),
    "hardsigmoid": (lambda b, x: b.call(div, six(b, x), 6), ["hardsigmoid"]),
    "hardsigmoid of relu6": (
        lambda b, x: b.call(
            mul, b.call(aten.hardtanh.default, b.call(add, x, 3.0), 0.0, 6.0), 1 / 6
        ),
        ["hardsigmoid"],
    ),
    "hardsigmoid of a line": (
        lambda b, x: b.call(aten.clamp.default, line(b, x), 0.0, 1.0),
        ["hardsigmoid"],
    ),
    "hardswish": (lambda b, x: b.call(div, b.call(mul, x, six(b, x)), 6.0), ["hardswish"]),
    "hardswish, divided first": (
        lambda b, x: b.call(mul, b.call(div, six(b, x), 6.0), x),
        ["hardswish"],
    ),
    "hardswish, constant tensor": (
        lambda b, x: b.call(mul, b.call(mul, x, six(b, x)), b.const(torch.tensor(1 / 6))),
        ["hardswish"],
    ),
    "hardswish of hardsigmoid": (
        lambda b, x: b.call(mul, x, b.call(aten.hardsigmoid.default, x)),
        ["hardswish"],
    ),
    "hardswish of a line": (
        lambda b, x: b.call(mul, x, b.call(aten.clamp.default, line(b, x), 0.0, 1.0)),
        ["hardswish"],
    ),
    "other slope": (
        lambda b, x: b.call(aten.clamp.default, b.call(add, b.call(mul, x, 0.2), 0.5), 0.0, 1.0),
        ["mul", "add", "clamp"],
    ),
    "gate of another value": (
        lambda b, x: b.call(mul, x, b.call(aten.sigmoid.default, b.call(aten.neg.default, x))),
        ["neg", "sigmoid", "mul"],
    ),
    "relu6 of relu": (
        lambda b, x: b.call(aten.clamp.default, b.call(aten.relu.default, x), None, 6.0),
        ["hardtanh"],
    ),
    "clamp from 0": (lambda b, x: b.call(aten.clamp.default, x, 0), ["relu"]),
    "clamps to one value": (
        lambda b, x: b.call(
            aten.clamp.default, b.call(aten.clamp.default, x, 0.5, 2.0), -1.0, 0.25
        ),
        ["hardtanh"],
    ),
    "reversed bounds": (
        lambda b, x: b.call(aten.clamp.default, b.call(aten.relu.default, x), 2.0, 1.0),
        ["relu", "clamp"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forms(name: str) -> None:
    build, expected = CASES[name]
    b = Build()
    gm = b.done(build(b, source(b)))
    run(gm, FuseActivation())
    assert ops(gm) == ["mul", "sin", *expected]


def test_shared_intermediate_values_are_refused() -> None:
    b = Build()
    x = source(b)
    sigmoid = b.call(aten.sigmoid.default, x)
    gm = b.done(b.call(mul, x, sigmoid), b.call(aten.exp.default, sigmoid))
    reason = "its intermediate value sigmoid_default is also read by exp_default"
    assert refusals(run(gm, FuseActivation())) == {"fuse activation": reason}
    b = Build()
    shifted = b.call(add, b.call(mul, b.input(3), 1 / 6), 0.5)
    gm = b.done(b.call(aten.clamp.default, shifted, 0, 1), shifted)
    reason = "its intermediate value add_tensor is also read by output"
    assert refusals(run(gm, FuseActivation())) == {"fuse hardsigmoid": reason}


BOUNDS = [None, -1.5, 0.0, 0.5, 2.0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from([p for p in itertools.product(BOUNDS, BOUNDS) if p != (None, None)]),
        min_size=1,
        max_size=4,
    )
)
def test_any_chain_of_clamps_keeps_its_values(
    bounds: list[tuple[float | None, float | None]],
) -> None:
    b = Build()
    x = source(b)
    for low, high in bounds:
        x = b.call(aten.clamp.default, x, low, high)
    run(b.done(x), FuseActivation())


def test_nan_goes_through() -> None:
    b = Build()
    x = b.input(3)
    gm = b.done(b.call(aten.clamp.default, b.call(aten.relu.default, x), None, 6.0))
    run(gm, FuseActivation(), samples=[(torch.tensor([float("nan"), -0.0, float("inf")]),)])
