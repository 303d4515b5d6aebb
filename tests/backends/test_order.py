"""The places of the largest and smallest elements, against PyTorch's stable sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphopt.ops.order import order
from tests.backends.harness import Builder, check, origins

NAN, INF = float("nan"), float("inf")
SPECIAL = [1.0, NAN, -0.0, 0.0, INF, -INF, -NAN, 2.0, -3.0, 0.0, 1e-40, -1e-40, INF]


def ways(b: Builder, x: torch.Tensor, ks: set[int], dims: list[int] | None = None) -> None:
    """Return the order of `x` along these dimensions for each k, both ways."""
    node = b.input(x)
    for dim in range(x.dim()) if dims is None else dims:
        for k in sorted(ks | {x.shape[dim]}):
            if k <= x.shape[dim]:
                for largest in (True, False):
                    b.returns(b.op(order, node, k, dim, largest))


def test_nan_infinities_and_zeros() -> None:
    """NaN is larger than all else, and zeros are equal; so for one place, a list and a sort."""
    b = Builder()
    line = torch.tensor(SPECIAL)
    ways(b, line, {1, 5})
    ways(b, line.repeat(9), {1, 17})
    ways(b, line[:, None].repeat(3, 9), {1})
    ways(b, torch.full((3, 20), NAN), {1, 2})
    ways(b, torch.full((70,), -INF), {1, 2, 70})
    check(b)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    shape = [draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 150)), draw(st.integers(1, 20))]
    shape = shape[: draw(st.integers(2, 3))]
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    return {
        "shape": shape, "dim": dim, "k": draw(st.integers(1, shape[dim])),
        "values": draw(st.sampled_from([2, 30, 10**6])), "largest": draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=3, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.lists(cases(), min_size=10, max_size=10), st.integers(0, 2**31))
def test_any_sizes(drawn: list[dict[str, Any]], seed: int) -> None:
    """Few different values are many ties: equal elements keep their order."""
    b = Builder(seed)
    for case in drawn:
        x = torch.randint(0, case["values"], case["shape"], generator=b.generator).float()
        b.returns(b.op(order, b.input(x), case["k"], case["dim"], case["largest"]))
    assert set(origins(check(b))) == {"order"}


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float16]
)
def test_other_types(dtype: torch.dtype) -> None:
    b = Builder(1)
    ways(b, torch.randint(-100, 100, (3, 90), generator=b.generator).to(dtype), {1, 3, 20})
    if not dtype.is_floating_point and dtype != torch.bool:
        limits = torch.iinfo(dtype)
        ways(b, torch.tensor([limits.max, 0, limits.min, 1, limits.max, limits.min]), {1, 2})
    check(b)


def test_more_bits_than_float() -> None:
    b = Builder(2)
    x = torch.randint(-(2**40), 2**40, (2, 200), generator=b.generator)
    ways(b, x, {1, 4, 30})
    check(b)


def test_long_rows() -> None:
    """Digits of more bits; and what cannot be among the first is left out before the sort."""
    b = Builder(3)
    ways(b, b.random(5000), {1, 16, 17, 100})
    ways(b, torch.arange(6000.0), {20, 1500})
    ways(b, torch.zeros(6000), {20})
    check(b, threads=2)


@pytest.mark.parametrize("target", ["x86-64-v2", "cortex-a72"])
def test_other_instruction_sets(target: str) -> None:
    b = Builder(4)
    ways(b, b.random(3, 70, 13), {1, 3, 20})
    check(b, target=target)


def test_what_follows_is_fused() -> None:
    b = Builder(5)
    places = b.op(order, b.input(b.random(4, 9, 11)), 1, 1, True)
    rows = b.op(torch.ops.aten._to_copy.default, places, dtype=torch.float32)
    b.returns(b.op(torch.ops.aten.mul.Tensor, rows, 0.5))
    assert origins(check(b)) == ["order"]


def test_shapes_that_do_not_fit() -> None:
    x = torch.empty(2, 5, device="meta")
    assert order(x, 3, -1, True).shape == (2, 3)
    assert order(x, 0, 1, True).shape == (2, 0)
    with pytest.raises(ValueError, match="6 of 5 elements"):
        order(x, 6, 1, True)
    with pytest.raises(ValueError, match="dimension 2 of a tensor of 2"):
        order(x, 1, 2, True)
