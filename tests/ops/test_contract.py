"""Every operator's samples, lowered, compiled and run, give what PyTorch gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import fx

from graphopt import graph as G
from graphopt.ops import ALL_OPS
from graphopt.ops.opdef import Call, Kind, OpDef, Sample
from tests.backends.harness import Builder, aten, compile_and_run

# PyTorch's float32 formula is less precise than ours, or as free in its last digits.
# tests/ops/test_elementwise.py holds each function to its own limit, in float64.
LOOSE = frozenset({
    "gelu", "pow", "pow_scalar", "sin", "cos", "mish", "silu", "softplus", "elu", "celu", "selu",
    "sigmoid", "tanh", "exp", "expm1", "erf", "log", "log1p", "rsqrt",
})  # fmt: skip
LOOSE_ULP, LOOSE_ABSOLUTE = 16.0, 1e-6
# Arguments that have no default in one overload and do not exist in the others.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "rounding_mode": ("floor", "trunc"),
    "half_to_float": (False,),
}
# A convolution behind these would not make their result blocked, and each costs a compilation.
ALWAYS_PLAIN = frozenset({
    "reshape", "permute", "expand", "select", "index_select", "gather", "embedding", "prod",
})  # fmt: skip
# Of the samples of special values, what differs from PyTorch, and why.
NOT_AS_PYTORCH = {
    "div Tensor_mode 1 floor": "inf / x is inf and -x / inf is -0; PyTorch has NaN and -1",
}


@dataclass(frozen=True)
class Case:
    """One sample of one overload, with PyTorch's answer."""

    name: str
    op: OpDef
    target: Any
    sample: Sample
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: torch.Tensor

    @property
    def may_be_blocked(self) -> bool:
        """Whether a convolution by 1 can stand in front of the first operand and not change it."""
        first = self.args[0][0] if isinstance(self.args[0], list) else self.args[0]
        if not isinstance(first, torch.Tensor):
            return False
        image = first.dtype == torch.float32 and first.dim() in (3, 4)
        return image and 0 not in self.sample.constants and bool(first.isfinite().all())


def _fit(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for this overload: numbers where it takes no tensors, none too many."""
    fitted = []
    schema = [argument for argument in target._schema.arguments if not argument.kwarg_only]
    for number, value in enumerate(args):
        if number >= len(schema):
            if isinstance(value, torch.Tensor):
                break
        elif isinstance(value, torch.Tensor) and "Tensor" not in str(schema[number].type):
            value = value.flatten()[0].item()
        fitted.append(value)
    return tuple(fitted)


def _cases(op: OpDef) -> Iterator[Case]:
    for target in op.targets:
        names = {argument.name for argument in target._schema.arguments}
        extra = [{}]
        for required, values in REQUIRED.items():
            if required in names:
                extra = [{required: value} for value in values]
        for number, sample in enumerate(op.samples):
            args = _fit(target, sample.args(torch.Generator().manual_seed(number)))
            for more in extra:
                kwargs = {k: v for k, v in {**sample.kwargs, **more}.items() if k in names}
                try:
                    expected = target(*args, **kwargs)
                except (RuntimeError, TypeError):
                    continue  # The sample is for another overload.
                name = " ".join(
                    [op.name, target._overloadname, str(number), *map(str, more.values())]
                )
                if name in NOT_AS_PYTORCH:
                    continue
                yield Case(name, op, target, sample, args, kwargs, expected)


CASES = [case for op in ALL_OPS for case in _cases(op)]


def _group(op: OpDef) -> str:
    if op.kind is Kind.ELEMENTWISE:
        return "unary" if len(op.operands) == 1 else "binary"
    return "injective" if op.kind is Kind.VIEW else op.kind.name.lower()


def _same(b: Builder, x: fx.Node) -> fx.Node:
    """A depthwise convolution by 1 that changes nothing but the layout; quickly compiled."""
    channels, rank = G.shape(x)[1], len(G.shape(x)) - 2
    weight = b.constant(torch.ones(channels, 1, *[1] * rank))
    return b.op(
        aten.convolution.default, x, weight, None, [1] * rank, [0] * rank, [1] * rank, False,
        [0] * rank, channels,
    )  # fmt: skip


def _build(b: Builder, case: Case, blocked: bool) -> fx.Node:
    def operand(value: Any, position: int) -> Any:
        if isinstance(value, list):
            return [operand(item, position) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        if position in case.sample.constants:
            return b.constant(value)
        node = b.input(value)
        image = value.dtype == torch.float32 and value.dim() == case_rank
        return _same(b, node) if blocked and image else node

    first = case.args[0][0] if isinstance(case.args[0], list) else case.args[0]
    case_rank = first.dim() if isinstance(first, torch.Tensor) else 0
    node = b.op(case.target, *(operand(v, i) for i, v in enumerate(case.args)), **case.kwargs)
    refusal = case.op.check(Call(node)) if case.op.check else None
    assert refusal is None, f"{case.name}: {refusal}"
    wanted = case.expected
    image = wanted.dtype == torch.float32 and wanted.dim() in (3, 4)
    wants_blocks = image and case.op.name not in ALWAYS_PLAIN and case.op.kind is not Kind.ANCHOR
    if blocked and wants_blocks and wanted.isfinite().all():
        return _same(b, node)
    return node


def _compare(case: Case, actual: npt.NDArray[Any]) -> str | None:
    """What is wrong with the answer."""
    wanted = case.expected.numpy()
    if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        return f"{actual.shape} {actual.dtype}, not {wanted.shape} {wanted.dtype}"
    if wanted.dtype.kind != "f":
        return None if np.array_equal(actual, wanted) else "integers differ"
    finite = np.isfinite(wanted)
    if not np.array_equal(actual[~finite], wanted[~finite], equal_nan=True):
        return "infinities or NaN differ"
    numbers = wanted[finite].astype(np.float64)
    folded = case.op.kind in (Kind.REDUCTION, Kind.ANCHOR)
    size = np.full_like(numbers, np.abs(numbers).max(initial=0)) if folded else np.abs(numbers)
    loose = case.op.name in LOOSE
    unit = np.spacing(size.astype(wanted.dtype)).astype(np.float64)
    limit = unit * (LOOSE_ULP if loose else case.sample.ulp)
    # What is denormal may become 0.
    limit = np.maximum(limit, LOOSE_ABSOLUTE if loose else 1.2e-38)
    error = np.abs(actual[finite].astype(np.float64) - numbers)
    if (error <= limit).all():
        return None
    worst = int((error - limit).argmax())
    return f"{error[worst] / unit[worst]:.1f} ulp off at {numbers[worst]}"


@pytest.mark.parametrize("op", ALL_OPS, ids=lambda op: op.name)
def test_every_overload_has_a_sample(op: OpDef) -> None:
    assert {case.target for case in CASES if case.op is op} == set(op.targets)


@pytest.mark.parametrize("blocked", [False, True], ids=["plain", "blocked"])
@pytest.mark.parametrize("group", ["unary", "binary", "injective", "reduction", "anchor"])
def test_samples_as_pytorch(group: str, blocked: bool) -> None:
    """All samples of a kind of operator in one graph."""
    b = Builder()
    cases = [c for c in CASES if _group(c.op) == group and (c.may_be_blocked or not blocked)]
    b.returns(*(_build(b, case, blocked) for case in cases))
    _, results = compile_and_run(b.finish(), b.inputs)
    wrong = [
        f"{case.name}: {problem}"
        for case, result in zip(cases, results, strict=True)
        if (problem := _compare(case, result))
    ]
    assert not wrong, "\n".join(wrong)
