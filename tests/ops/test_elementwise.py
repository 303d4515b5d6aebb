"""Every elementwise operator against PyTorch on its samples, compiled into one library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from graphopt.ops.elementwise import ELEMENTWISE
from graphopt.ops.opdef import Call, OpDef, Sample
from graphopt.ops.scalar import TIR_NAMES, to_dtype
from tests.ops.evaluate import ARM64, X86, Function, Library, function_bodies, lower

# PyTorch's own float32 formula has less precision than ours there, so it computes in float64.
IN_DOUBLE = {"gelu", "pow", "pow_scalar", "sin", "cos", "mish", "silu", "softplus", "elu", "celu"}


def strides(shape: tuple[int, ...], out: tuple[int, ...]) -> tuple[int, ...]:
    """Element steps of an operand of `shape`, broadcast to `out`."""
    full = (1,) * (len(out) - len(shape)) + shape
    steps, step = [], 1
    for extent in reversed(full):
        steps.append(0 if extent == 1 else step)
        step *= extent
    return tuple(reversed(steps))


class Case:
    """One sample of one overload: the compiled function's description and PyTorch's answer."""

    def __init__(self, op: OpDef, target: Any, sample: Sample) -> None:
        self.op = op
        args = sample.args(torch.Generator().manual_seed(0))
        names = {argument.name for argument in target._schema.arguments}
        kwargs = {k: v for k, v in sample.kwargs.items() if k in names}
        graph = fx.Graph()
        nodes = []
        for value in args:
            if isinstance(value, torch.Tensor):
                node = graph.placeholder(f"x{len(nodes)}")
                node.meta["val"] = value.to("meta")
                nodes.append(node)
            else:
                nodes.append(value)
        self.expected = target(*args, **kwargs)
        if op.name in IN_DOUBLE and self.expected.dtype == torch.float32:
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
            self.expected = target(*wide, **kwargs).float()
        node = graph.call_function(target, tuple(nodes), kwargs)
        node.meta["val"] = target(*args, **kwargs).to("meta")
        call = Call(node)
        self.refusal = op.check(call) if op.check else None
        values = call.operands(op.operands)
        tensors = [v for v in values if isinstance(v, fx.Node)]
        placeholders = [n for n in nodes if isinstance(n, fx.Node)]
        given_tensors = [a for a in args if isinstance(a, torch.Tensor)]
        by_node = dict(zip(placeholders, given_tensors, strict=True))
        self.inputs = [by_node[t] for t in tensors]
        common = None
        if op.promote:
            common = self.inputs[0].dtype
            for other in values[1:]:
                other = by_node[other] if isinstance(other, fx.Node) else other
                common = torch.result_type(torch.empty(2, dtype=common), other)

        def compute(*loaded: Any) -> Any:
            given = iter(loaded)
            operands = [next(given) if isinstance(v, fx.Node) else v for v in values]
            if common is not None:
                operands = [to_dtype(v, common) for v in operands]
            assert op.compute is not None
            return to_dtype(op.compute(call, *operands), call.dtype)

        shape = tuple(self.expected.shape)
        self.function = Function(
            compute,
            tuple(TIR_NAMES[i.dtype] for i in self.inputs),
            TIR_NAMES[self.expected.dtype],
            shape,
            tuple(
                None if tuple(i.shape) == shape else strides(tuple(i.shape), shape)
                for i in self.inputs
            ),
        )


def _cases() -> dict[str, Case]:
    found = {}
    for op in ELEMENTWISE:
        for target in op.targets:
            for number, sample in enumerate(op.samples):
                name = f"{op.name}_{target._overloadname}_{number}"
                try:
                    found[name] = Case(op, target, sample)
                except (RuntimeError, TypeError):
                    # The samples are tensors; this overload takes a number there, or PyTorch
                    # has no such case (a negative integer power, an alpha for bools).
                    continue
    return found


CASES = _cases()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    functions = {name: case.function for name, case in CASES.items() if case.refusal is None}
    return Library(functions, tmp_path_factory.mktemp("elementwise"), X86)


def test_every_operator_has_a_running_case() -> None:
    ran = {case.op.name for case in CASES.values() if case.refusal is None}
    assert ran == {op.name for op in ELEMENTWISE}


@pytest.mark.parametrize("name", CASES)
def test_sample_as_pytorch(library: Library, name: str) -> None:
    case = CASES[name]
    assert case.refusal is None
    got = library.run(name, *(i.numpy() for i in case.inputs), count=case.expected.numel())
    want = case.expected.numpy().ravel()
    if want.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
        return
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    number = np.isfinite(want)
    rest = ~number & ~np.isnan(want)
    np.testing.assert_array_equal(got[rest], want[rest])
    # 4 ulp; a factor below 2⁻¹²⁶ may become 0.
    limit = np.maximum(4 * np.spacing(np.abs(want[number])), np.float32(1e-36)).astype(float)
    if case.op.name in ("gelu", "sin", "cos"):
        limit = np.maximum(limit, 1e-6)
    error = np.abs(got[number].astype(float) - want[number])
    assert (error <= limit).all(), (error / limit).max()


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 70), seed=st.integers(0, 99))
def test_any_size(library: Library, count: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    want = np.maximum(x, 0)
    np.testing.assert_array_equal(library.run("relu_default_0", x), want)


def test_relu_is_one_instruction(library: Library) -> None:
    body = function_bodies(library.assembly, ["relu_default_0"])["relu_default_0"]
    assert "vmaxps" in body
    assert "vblendv" not in body


def test_unary_float_operators_vectorize_on_arm() -> None:
    functions = {
        name: case.function
        for name, case in CASES.items()
        if name.endswith("default_0") and case.function.inputs == ("float32",)
        and case.function.output == "float32"
    }  # fmt: skip
    assembly = lower(functions, ARM64).inspect_source("asm")
    bodies = function_bodies(assembly, list(functions))
    assert set(bodies) == set(functions)
    for name, body in bodies.items():
        assert "\tbl\t" not in body, name
        assert ".4s" in body or "fneg" in body, name


def test_refusals_say_why() -> None:
    gelu = next(op for op in ELEMENTWISE if op.name == "gelu")
    case = Case(gelu, torch.ops.aten.gelu.default, Sample(lambda g: (torch.ones(3).double(),)))
    assert case.refusal is not None
    assert "float64" in case.refusal
