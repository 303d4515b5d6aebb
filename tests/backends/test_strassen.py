"""Strassen's product: exact algebra, small errors, every size in whole blocks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphopt.backends.kernels import strassen_plan
from graphopt.backends.kernels.conv_product import products, with_strassen
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.strassen_plan import StrassenPlan
from graphopt.backends.target import Target, get_target
from graphopt.program.ir import Program
from tests.backends.harness import Builder, aten, check, compile_and_run, origins


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is possible, and in small tasks."""
    monkeypatch.setattr(strassen_plan, "pays", lambda *_: True)
    monkeypatch.setattr(strassen_plan, "_FEWEST_PIXELS", 2)
    monkeypatch.setattr(strassen_plan, "_MOST_PAIRS", 24)


def _target(name: str, l2_bytes: int = 0) -> Target:
    """A target, perhaps with a small second-level cache: the depth is cut in parts then."""
    target = get_target(name)
    return dataclasses.replace(target, l2_bytes=l2_bytes or target.l2_bytes)


def _linear(
    b: Builder, shape: tuple[int, ...], columns: int, *, whole: bool = False, end: str = ""
) -> None:
    """A product by a constant with a bias, of small whole numbers or of any, and an epilogue."""

    def random(*shape: int) -> torch.Tensor:
        return (b.random(*shape) * 3).round() if whole else b.random(*shape)

    x = b.input(random(*shape))
    weight = random(columns, shape[-1]) / (1 if whole else shape[-1] ** 0.5)
    y = b.op(aten.linear.default, x, b.constant(weight), b.constant(random(columns)))
    if end == "gelu":
        y = b.op(aten.gelu.default, y)
    if end == "residual":
        other = b.op(aten.relu.default, b.input(random(*shape[:-1], columns)))
        y = b.op(aten.relu.default, b.op(aten.add.Tensor, y, other))
    b.returns(y)


def _uses_it(program: Program) -> bool:
    return "strassen" in origins(program)


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize("target", ["host", "x86-64-v3", "x86-64-v4", "x86-64-v2", "arm"])
@pytest.mark.parametrize(("rows", "l2_bytes"), [(64, 0), (53, 0), (53, 20000)])
@pytest.mark.parametrize(("depth", "columns"), [(96, 112), (104, 120)])
def test_of_whole_numbers_it_is_exact(
    target: str, rows: int, l2_bytes: int, depth: int, columns: int
) -> None:
    """Each factor, sum and product is a whole number that float32 holds."""
    b = Builder()
    _linear(b, (1, rows, depth), columns, whole=True)
    assert _uses_it(check(b, target=_target(target, l2_bytes), tolerance=0))


@settings(max_examples=16, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    batch=st.integers(1, 3), rows=st.integers(2, 70), depth=st.integers(2, 18),
    columns=st.integers(2, 18), end=st.sampled_from(["", "gelu", "residual"]),
    l2_bytes=st.sampled_from([0, 8000, 30000]), threads=st.integers(1, 2),
)  # fmt: skip
@pytest.mark.usefixtures("wanted")
def test_any_size(
    batch: int, rows: int, depth: int, columns: int, end: str, l2_bytes: int, threads: int
) -> None:
    b = Builder()
    _linear(b, (batch, rows, 8 * depth), 8 * columns, end=end)
    program = check(b, target=_target("host", l2_bytes), threads=threads)
    assert _uses_it(program)


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize("target", ["x86-64-v2", "arm"])
@pytest.mark.parametrize("end", ["gelu", "residual"])
def test_other_instruction_sets(target: str, end: str) -> None:
    b = Builder()
    _linear(b, (2, 45, 160), 152, end=end)
    program = check(b, target=_target(target, 20000), threads=2)
    assert _uses_it(program)


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize("target", ["host", "arm"])
@pytest.mark.parametrize(
    ("size", "kernel", "behind"),
    [((7, 9), (1, 1), True), ((6, 6), (1, 1), False), ((31,), (1,), True), ((30, 1), (1, 1), True)],
)
def test_pointwise_convolutions(
    target: str, size: tuple[int, ...], kernel: tuple[int, ...], behind: bool
) -> None:
    """In blocks or, as a result, plain; with a residual that the result may replace, or SiLU."""
    b = Builder()
    x = b.op(aten.relu.default, b.conv(b.input(b.random(2, 3, *size)), 56, kernel))
    y = b.op(aten.add.Tensor, b.conv(x, 56, kernel), x)
    y = b.op(aten.silu.default, b.conv(y, 80, kernel))
    b.returns(b.conv(y, 8, kernel) if behind else y)
    program = check(b, target=target, threads=2)
    assert origins(program).count("strassen") == 2


@pytest.mark.usefixtures("wanted")
def test_samples_are_not_summed_with_each_other() -> None:
    """What is not finite in one sample changes no other one, whose results are the same alone."""
    b = Builder()
    _linear(b, (2, 40, 64), 64)
    gm = b.finish()
    (x,) = b.inputs
    program, (clean,) = compile_and_run(gm, [x])
    assert _uses_it(program)
    broken = x.clone()
    broken[0, 3, 5] = torch.nan
    _, (result,) = compile_and_run(gm, [broken])
    assert np.isnan(result[0]).any()
    np.testing.assert_array_equal(result[1], clean[1])


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize(
    ("shape", "columns"), [((64, 64), 64), ((1, 64, 68), 64), ((1, 64, 64), 68), ((1, 1, 64), 64)]
)
def test_other_sizes_are_multiplied_directly(shape: tuple[int, ...], columns: int) -> None:
    """Rows of a matrix may be samples; depth and columns must be whole blocks."""
    b = Builder()
    _linear(b, shape, columns)
    assert not _uses_it(check(b))


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize("samples", [1, 2])
def test_rows_of_a_matrix_are_no_samples_where_inputs_are_one(samples: int) -> None:
    """As models for sequences flatten them before a product; else the first axis is theirs."""
    b = Builder()
    x = b.op(aten.reshape.default, b.input(b.random(samples, 64, 64)), [samples * 64, 64])
    flat = b.op(aten.linear.default, x, b.constant(b.random(96, 64) / 8), None)
    b.returns(flat)
    assert _uses_it(check(b)) == (samples == 1)


def _plans(rows: int, depth: int, columns: int, target: Target) -> list[StrassenPlan]:
    spec = ConvSpec(1, 1, depth, columns, (1, rows), (1, rows), (1, 1))
    return strassen_plan.plans(spec, target.isa, target.l2_bytes, target.cores, plain=True)


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "rpi4", "arm"])
def test_it_is_chosen_for_large_products(target: str) -> None:
    chosen = get_target(target)

    def first(rows: int, depth: int, columns: int) -> str:
        spec = ConvSpec(1, 1, depth, columns, (1, rows), (1, rows), (1, 1))
        ways = with_strassen(products(spec, chosen), spec, chosen, plain=True)
        assert {way.origin.split()[0] for way in ways} >= {"strassen", "conv_direct"}
        return ways[0].origin.split()[0]

    assert first(128, 768, 3072) == "strassen"
    assert first(196, 32, 64) != "strassen"


@pytest.mark.parametrize("l2_bytes", [1 << 18, 1 << 20])
def test_left_factors_fit_the_cache(l2_bytes: int) -> None:
    for depth in (256, 768, 3072):
        target = dataclasses.replace(get_target("x86-64-v3"), l2_bytes=l2_bytes)
        for plan in _plans(128, depth, 768, target):
            assert 7 * 4 * plan.pairs.size * plan.depth <= l2_bytes * 3 // 4
            assert plan.depth * plan.parts * 2 == depth


def test_operations() -> None:
    """An eighth less than a direct product, but for the sums."""
    plan = _plans(128, 768, 768, get_target("x86-64-v3"))[0]
    assert 0.875 < plan.operations / plan.spec.flops < 0.885
