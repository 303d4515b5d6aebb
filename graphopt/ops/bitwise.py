"""Elementwise operators of truth values and of bits: logic, and shifts of integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tvm import tirx

from graphopt.ops.binary import binary, overloads
from graphopt.ops.math import dtype_of, not_equal, share
from graphopt.ops.opdef import Call, Expr, OpDef, Sample
from graphopt.ops.scalar import truth

_aten = torch.ops.aten


def _logic(combine: Callable[[Expr, Expr], Expr]) -> Callable[..., Expr]:
    def compute(call: Call, a: Expr, b: Expr) -> Expr:
        return not_equal(combine(truth(a), truth(b)), tirx.const(0, "int8"))

    return compute


def _bitwise(combine: Callable[[Expr, Expr], Expr]) -> Callable[..., Expr]:
    def compute(call: Call, a: Expr, b: Expr) -> Expr:
        if call.dtype == torch.bool:
            return not_equal(combine(truth(a), truth(b)), tirx.const(0, "int8"))
        return combine(a, b)

    return compute


def _left_shift(call: Call, a: Expr, b: Expr) -> Expr:
    """0 where all bits are shifted out, and where the amount is negative, as in PyTorch."""
    zero = tirx.const(0, dtype_of(a))
    amount, inside = _amount(b, torch.iinfo(call.dtype).bits)
    return tirx.Select(inside == 1, a << amount, zero)


def _right_shift(call: Call, a: Expr, b: Expr) -> Expr:
    """Copies of the sign come in; they are all that is left where the amount is negative, too."""
    kind = torch.iinfo(call.dtype)
    signed = kind.min < 0
    amount, inside = _amount(b, kind.bits - signed)
    a = share(a)
    left = a >> tirx.const(kind.bits - 1, dtype_of(a)) if signed else tirx.const(0, dtype_of(a))
    return tirx.Select(inside == 1, a >> amount, left)


def _amount(b: Expr, bits: int) -> tuple[Expr, Expr]:
    """(how far to shift, 1 where that is fewer than all `bits`): beyond, shifts are undefined."""
    b = share(b)
    zero = tirx.const(0, dtype_of(b))
    inside = share(tirx.Cast("int8", tirx.all(b >= zero, b < tirx.const(bits, dtype_of(b)))))
    return share(tirx.Select(inside == 1, b, zero)), inside


def _integers_only(call: Call) -> str | None:
    if call.dtype.is_floating_point or call.dtype == torch.bool:
        return f"a shift of {call.dtype}, which is not an integer"
    return None


def _shift(name: str, compute: Callable[..., Expr]) -> OpDef:
    packet = getattr(_aten, name)
    targets = (packet.Tensor, packet.Tensor_Scalar, packet.Scalar_Tensor)
    return binary(name, targets, compute, check=_integers_only, samples=_SHIFTS)


def _truths(g: torch.Generator) -> tuple[Any, ...]:
    return torch.randn(3, 1, 5, generator=g) > 0, torch.randn(4, 1, generator=g) > 0


def _integers(g: torch.Generator) -> tuple[Any, ...]:
    return (
        torch.randint(-100, 100, (37,), generator=g, dtype=torch.int32),
        torch.randint(-100, 100, (37,), generator=g, dtype=torch.int32),
    )


def _shifted(dtype: torch.dtype, amounts: torch.dtype) -> Sample:
    """All bits of the dtype, by amounts in and out of range."""
    kind = torch.iinfo(dtype)

    def make(g: torch.Generator) -> tuple[Any, ...]:
        values = torch.randint(kind.min, kind.max, (9, 1), generator=g, dtype=dtype)
        low = 0 if amounts == torch.uint8 else -3
        return values, torch.arange(low, kind.bits + 3).to(amounts)

    return Sample(make)


_BITS = (Sample(_truths), Sample(_integers))
_SHIFTS = (
    *(_shifted(dtype, dtype) for dtype in (
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)),
    _shifted(torch.int16, torch.int64), _shifted(torch.int64, torch.uint8),
    Sample(lambda g: (*_integers(g)[:1], 3)), Sample(lambda g: (5, torch.arange(9))),
)  # fmt: skip

BITWISE: tuple[OpDef, ...] = (
    binary("logical_and", (_aten.logical_and.default,), _logic(lambda a, b: a & b)),
    binary("logical_or", (_aten.logical_or.default,), _logic(lambda a, b: a | b)),
    binary("logical_xor", (_aten.logical_xor.default,), _logic(lambda a, b: a ^ b)),
    binary("bitwise_and", overloads("bitwise_and"), _bitwise(lambda a, b: a & b), samples=_BITS),
    binary("bitwise_or", overloads("bitwise_or"), _bitwise(lambda a, b: a | b), samples=_BITS),
    binary("bitwise_xor", overloads("bitwise_xor"), _bitwise(lambda a, b: a ^ b), samples=_BITS),
    _shift("bitwise_left_shift", _left_shift),
    _shift("bitwise_right_shift", _right_shift),
)
