"""fuse_gelu: both formulas in any order and with constants multiplied out; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pass_graphs import Build, aten, changes, ops, refusals, run
from torch import fx, nn

from graphopt.importers import import_model
from graphopt.passes import Context, default_pipeline, run_passes
from graphopt.passes.fuse_gelu import FuseGelu

add, sub, mul, div = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor
pow_ = aten.pow.Tensor_Scalar
SLOPE = math.sqrt(2 / math.pi)

Form = Callable[[Build, fx.Node], fx.Node]


def source(b: Build) -> fx.Node:
    """Arithmetic itself, so that the search for x has to stop in the right place."""
    return b.call(add, b.call(mul, b.input(2, 9), 3.0), b.const(0.25))


def erf(b: Build, x: fx.Node) -> fx.Node:
    return b.call(aten.erf.default, b.call(div, x, b.const(math.sqrt(2))))


def gate(b: Build, x: fx.Node) -> fx.Node:
    return b.call(add, erf(b, x), 1.0)


def cube(b: Build, x: fx.Node) -> fx.Node:
    return b.call(mul, x, b.call(mul, x, x))


def tanh(b: Build, inside: fx.Node) -> fx.Node:
    return b.call(aten.tanh.default, inside)


def half_of_one_plus(b: Build, x: fx.Node, gate: fx.Node) -> fx.Node:
    return b.call(mul, b.call(mul, x, 0.5), b.call(add, gate, 1.0))


def _cubic(b: Build, x: fx.Node) -> fx.Node:
    inner = b.call(add, x, b.call(mul, b.call(pow_, x, 3.0), 0.044715))
    return half_of_one_plus(b, x, tanh(b, b.call(mul, inner, SLOPE)))


def _cubic_by_products(b: Build, x: fx.Node) -> fx.Node:
    inner = b.call(add, b.call(mul, b.const(0.044715), cube(b, x)), x)
    return half_of_one_plus(b, x, tanh(b, b.call(mul, b.const(SLOPE), inner)))


def _cubic_factored(b: Build, x: fx.Node) -> fx.Node:
    bracket = b.call(add, b.call(mul, b.call(mul, x, 0.044715), x), 1.0)
    return half_of_one_plus(b, x, tanh(b, b.call(mul, b.call(mul, x, SLOPE), bracket)))


def _cubic_folded(b: Build, x: fx.Node) -> fx.Node:
    bracket = b.call(add, b.call(mul, b.call(pow_, x, 2), SLOPE * 0.044715), SLOPE)
    return half_of_one_plus(b, x, tanh(b, b.call(mul, x, bracket)))


def _distributed(b: Build, x: fx.Node) -> fx.Node:
    half = b.call(mul, x, 0.5)
    return b.call(add, half, b.call(mul, half, erf(b, x)))


ERF: dict[str, Form] = {
    "PyTorch's order": lambda b, x: b.call(mul, b.call(mul, x, 0.5), gate(b, x)),
    "half last": lambda b, x: b.call(mul, b.call(mul, x, gate(b, x)), 0.5),
    "divided by 2 last": lambda b, x: b.call(div, b.call(mul, gate(b, x), x), 2.0),
    "half with the gate": lambda b, x: b.call(mul, x, b.call(mul, gate(b, x), b.const(0.5))),
    "half inside the gate": lambda b, x: b.call(
        mul, x, b.call(add, b.call(mul, erf(b, x), 0.5), 0.5)
    ),
    "multiplied with a rounded root": lambda b, x: half_of_one_plus(
        b, x, b.call(aten.erf.default, b.call(mul, x, 0.70710678))
    ),
    "scaled twice": lambda b, x: half_of_one_plus(
        b, x, b.call(aten.erf.default, b.call(div, b.call(mul, x, math.sqrt(2)), 2.0))
    ),
    "distributed": _distributed,
}
TANH: dict[str, Form] = {
    "cubic": _cubic,
    "cubic by products": _cubic_by_products,
    "cubic factored": _cubic_factored,
    "cubic with constants folded": _cubic_folded,
}


@pytest.mark.parametrize("name", ERF)
def test_erf_forms(name: str) -> None:
    b = Build()
    gm = b.done(ERF[name](b, source(b)))
    assert changes(run(gm, FuseGelu())) == {"fuse gelu": 1}
    assert ops(gm) == ["mul", "add", "gelu"]


@pytest.mark.parametrize("name", TANH)
def test_tanh_forms(name: str) -> None:
    b = Build()
    gm = b.done(TANH[name](b, source(b)))
    assert changes(run(gm, FuseGelu())) == {"fuse gelu": 1}
    assert ops(gm) == ["mul", "add", "gelu"]
    (gelu,) = (n for n in gm.graph.nodes if n.target is aten.gelu.default)
    assert gelu.kwargs == {"approximate": "tanh"}


def test_half_precision_and_double() -> None:
    for dtype in (torch.float16, torch.float64):
        b = Build()
        x = b.input(2, 9, dtype=dtype)
        gm = b.done(b.call(mul, b.call(mul, x, 0.5), b.call(add, b.call(
            aten.erf.default, b.call(mul, x, math.sqrt(0.5))), 1.0)))  # fmt: skip
        small = torch.linspace(-1, 1, 18, dtype=dtype).reshape(2, 9)
        if dtype == torch.float64:
            run(gm, FuseGelu(), samples=[(small,)])
        else:
            # The formula rounds each step to half precision; PyTorch's kernel only its result.
            assert FuseGelu()(gm, Context()).changed
        assert ops(gm) == ["gelu"]


OTHERS: dict[str, Form] = {
    "whole instead of half": lambda b, x: b.call(mul, x, gate(b, x)),
    "gate of another value": lambda b, x: b.call(
        mul, b.call(mul, x, 0.5), gate(b, b.call(aten.sin.default, x))
    ),
    "no root of 2": lambda b, x: half_of_one_plus(b, x, b.call(aten.erf.default, x)),
    "tanh of x": lambda b, x: half_of_one_plus(b, x, tanh(b, x)),
    "without the cube": lambda b, x: half_of_one_plus(b, x, tanh(b, b.call(mul, x, SLOPE))),
    "a constant per channel": lambda b, x: b.call(
        mul, b.call(mul, x, b.const(torch.full((9,), 0.5))), gate(b, x)
    ),
    "a square outside": lambda b, x: b.call(mul, b.call(mul, b.call(mul, x, x), 0.5), gate(b, x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_stay(name: str) -> None:
    b = Build()
    gm = b.done(OTHERS[name](b, source(b)))
    result = run(gm, FuseGelu())
    assert not result.changed
    assert not result.notes


def test_rough_constants_are_refused() -> None:
    b = Build()
    x = source(b)
    gm = b.done(half_of_one_plus(b, x, b.call(aten.erf.default, b.call(mul, x, 0.7071))))
    reason = "the constants around erf are near those of GELU, but not the same"
    assert refusals(run(gm, FuseGelu())) == {"fuse gelu": reason}
    b = Build()
    x = source(b)
    inner = b.call(add, x, b.call(mul, cube(b, x), 0.0447))
    gm = b.done(half_of_one_plus(b, x, tanh(b, b.call(mul, inner, 0.7979))))
    reason = "the constants around tanh are near those of GELU, but not the same"
    assert refusals(run(gm, FuseGelu())) == {"fuse gelu": reason}


def test_shared_intermediate_values_are_refused() -> None:
    b = Build()
    x = source(b)
    inner = erf(b, x)
    gm = b.done(half_of_one_plus(b, x, inner), b.call(aten.exp.default, inner))
    reason = "its intermediate value erf_default is also read by exp_default"
    assert refusals(run(gm, FuseGelu())) == {"fuse gelu": reason}


def test_the_input_may_be_read_elsewhere() -> None:
    b = Build()
    x = source(b)
    gm = b.done(ERF["distributed"](b, x), x, b.call(aten.exp.default, x))
    assert changes(run(gm, FuseGelu())) == {"fuse gelu": 1}


def test_a_long_sum_of_them() -> None:
    b = Build()
    x = source(b)
    for _ in range(20):
        x = b.call(add, ERF["half last"](b, x), x)
    gm = b.done(x)
    # GELU of GELU of …: the values grow, and so do their roundings.
    assert changes(run(gm, FuseGelu())) == {"fuse gelu": 20}


class Written(nn.Module):
    """As models write it in Python."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        exact = x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
        new = 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + 0.044715 * torch.pow(x, 3.0))))
        fast = 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
        return exact, new, fast


def test_from_pytorch_through_the_pipeline() -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    gm = import_model(Written().eval(), (x,))
    run_passes(gm, default_pipeline(), Context(verify=2))
    # ½x is one node for all three by then. Both tanh forms are the same, so one is left.
    assert ops(gm) == ["gelu", "gelu"]
    for mine, theirs in zip(gm(x), Written()(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
