"""Every elementwise operator, and here those of one operand: activations, roundings, casts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import tirx

from graphopt.ops import activation, trigonometry
from graphopt.ops import math as m
from graphopt.ops.binary import BINARY, larger, smaller
from graphopt.ops.bitwise import BITWISE
from graphopt.ops.error_function import erf, erfc
from graphopt.ops.math import (
    at_least,
    at_most,
    const,
    dtype_of,
    equal,
    factor,
    is_nan,
    number,
    ordered,
    share,
)
from graphopt.ops.opdef import Call, Expr, Kind, OpDef, Sample
from graphopt.ops.scalar import (
    is_float,
    refuse_double,
    refuse_dtype,
    to_dtype,
    truth,
    unary_samples,
    wide,
)

_aten = torch.ops.aten


def _float(function: Callable[[Expr], Expr]) -> Callable[..., Expr]:
    """Compute of a function of a float32; integers are converted first."""
    return lambda call, x: function(wide(to_dtype(x, call.dtype)))


def _zero(x: Expr) -> Expr:
    return tirx.const(0, dtype_of(x))


def _relu(call: Call, x: Expr) -> Expr:
    return m.relu(wide(x))


def _abs(call: Call, x: Expr) -> Expr:
    x = share(wide(x))
    return tirx.abs(x) if is_float(x) else tirx.Select(ordered(x) < 0, _zero(x) - x, x)


def _neg(call: Call, x: Expr) -> Expr:
    x = wide(x)
    return x * tirx.const(-1.0, dtype_of(x)) if is_float(x) else _zero(x) - x


def _sign(call: Call, x: Expr) -> Expr:
    x = share(wide(x))
    one = tirx.const(1, dtype_of(x))
    above = tirx.Select(x > _zero(x), one, _zero(x))
    return above if dtype_of(x) == "uint8" else tirx.Select(x < _zero(x), _zero(x) - one, above)


def _rounding(function: Callable[[Expr], Expr]) -> Callable[..., Expr]:
    return lambda call, x: function(wide(x)) if is_float(x) else x


def _gelu(call: Call, x: Expr) -> Expr:
    return (activation.gelu_tanh if call["approximate"] == "tanh" else activation.gelu)(wide(x))


def _check_gelu(call: Call) -> str | None:
    if call["approximate"] not in ("none", "tanh"):
        return f"approximation {call['approximate']!r} is unknown"
    return refuse_double(call)


def _clamp(x: Expr, low: Any, high: Any) -> Expr:
    value = wide(x)
    for bound, end in ((low, at_least), (high, at_most)):
        if bound is not None:
            value = end(value, bound)
    return value


def _clamp_op(low: str | None, high: str | None) -> Callable[..., Expr]:
    def compute(call: Call, x: Expr) -> Expr:
        x = to_dtype(x, call.dtype)
        return _clamp(x, call[low] if low else None, call[high] if high else None)

    return compute


def _hardsigmoid(x: Expr) -> Expr:
    return _clamp(x + const(3.0), 0.0, 6.0) * const(1 / 6)


def _hardswish(x: Expr) -> Expr:
    x = share(x)
    return x * _hardsigmoid(x)


def _leaky_relu(call: Call, x: Expr) -> Expr:
    x = share(wide(x))
    return tirx.Select(x > _zero(x), x, x * factor(number(call["negative_slope"], dtype_of(x))))


def _elu(x: Expr, alpha: float, scale: float, input_scale: float) -> Expr:
    x = share(x)
    below = m.expm1(x * const(input_scale)) * factor(const(alpha * scale))
    return tirx.Select(x > const(0.0), x * const(scale), below)


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _softplus(call: Call, x: Expr) -> Expr:
    x, beta = share(wide(x)), call["beta"]
    scaled = share(x * const(beta))
    return tirx.Select(
        scaled > const(call["threshold"]), x, activation.softplus(scaled) * const(1 / beta)
    )  # fmt: skip


def _isnan(call: Call, x: Expr) -> Expr:
    return is_nan(wide(x)) if is_float(x) else tirx.const(False, "bool")


def _isinf(call: Call, x: Expr) -> Expr:
    if not is_float(x):
        return tirx.const(False, "bool")
    x = wide(x)
    return equal(tirx.abs(x), tirx.const(float("inf"), dtype_of(x)))


def _signbit(call: Call, x: Expr) -> Expr:
    x = wide(x)
    if dtype_of(x) == "float64":
        return tirx.reinterpret("int64", x) < tirx.const(0, "int64")
    return m.bits(x) < 0 if is_float(x) else x < _zero(x)


def _logical_not(call: Call, x: Expr) -> Expr:
    return equal(truth(x), tirx.const(0, "int8"))


def _bitwise_not(call: Call, x: Expr) -> Expr:
    if dtype_of(x) == "bool":
        return _logical_not(call, x)
    return x ^ tirx.const(255 if dtype_of(x) == "uint8" else -1, dtype_of(x))


def _square(call: Call, x: Expr) -> Expr:
    x = share(wide(x))
    return x * x


def _to_copy(call: Call, x: Expr) -> Expr:
    return to_dtype(x, call.dtype)


def _unary(
    name: str,
    compute: Callable[..., Expr],
    *,
    check: Callable[[Call], str | None] | None = refuse_dtype,
    samples: Sequence[Sample] | None = None,
    targets: tuple[Any, ...] | None = None,
    promote: bool = True,
) -> OpDef:
    return OpDef(
        name,
        targets or (getattr(_aten, name).default,),
        Kind.ELEMENTWISE,
        compute,
        promote=promote,
        check=check,
        samples=unary_samples() if samples is None else samples,
    )


def _transcendental(
    name: str, function: Callable[[Expr], Expr], samples: Sequence[Sample] | None = None
) -> OpDef:
    return _unary(name, _float(function), check=refuse_double, samples=samples)


def _integers(g: torch.Generator) -> tuple[Any, ...]:
    return (torch.randint(-100, 100, (37,), generator=g, dtype=torch.int32),)


def _in_range(g: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(37, generator=g) * 40,)


_INTEGERS = (Sample(_integers),)
_MIXED = (*unary_samples(), *_INTEGERS)

UNARY: tuple[OpDef, ...] = (
    _unary("relu", _relu, samples=_MIXED),
    _transcendental("sigmoid", activation.sigmoid, _MIXED),
    _transcendental("tanh", m.tanh),
    _transcendental("exp", m.exp, unary_samples(scale=30.0)),
    _transcendental("log", m.log_natural),
    _transcendental("exp2", m.exp2, unary_samples(scale=30.0)),
    _transcendental("log2", m.log2),
    _transcendental("log10", m.log10),
    _transcendental("log1p", m.log1p),
    _transcendental("expm1", m.expm1),
    _transcendental("sqrt", tirx.sqrt),
    _transcendental("rsqrt", m.rsqrt),
    _transcendental("reciprocal", lambda x: const(1.0) / x),
    _transcendental("erf", erf),
    _transcendental("erfc", erfc),
    _transcendental("sin", trigonometry.sin, unary_samples(scale=30.0, special=False)),
    _transcendental("cos", trigonometry.cos, unary_samples(scale=30.0, special=False)),
    _transcendental("tan", trigonometry.tan, unary_samples(special=False)),
    *(_transcendental(name, getattr(trigonometry, name)) for name in (
        "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh")),
    _transcendental("silu", activation.silu, unary_samples(special=False)),
    _transcendental("mish", activation.mish),
    _transcendental("hardswish", _hardswish),
    _transcendental("hardsigmoid", _hardsigmoid),
    _unary("gelu", _gelu, check=_check_gelu, samples=(
        *unary_samples(special=False), *unary_samples(special=False, kwargs={"approximate": "tanh"})
    )),
    _unary("softplus", _softplus, check=refuse_double, samples=(
        *unary_samples(), *unary_samples(2.0, 5.0)
    )),
    _unary("neg", _neg, samples=_MIXED),
    _unary("abs", _abs, samples=_MIXED),
    _unary("sign", _sign, samples=_MIXED),
    _unary("square", _square, samples=_MIXED),
    _unary("floor", _rounding(m.floor), samples=_MIXED),
    _unary("ceil", _rounding(m.ceil), samples=_MIXED),
    _unary("trunc", _rounding(tirx.trunc), samples=_MIXED),
    _unary("round", _rounding(m.round_half_even), samples=_MIXED),
    _unary("hardtanh", _clamp_op("min_val", "max_val"), samples=unary_samples(-2, 1.5)),
    _unary("clamp", _clamp_op("min", "max"), samples=(
        *unary_samples(-2, 1.5), *unary_samples(None, 1.5), Sample(lambda g: (*_integers(g), -7, 9))
    )),
    _unary("clamp_min", _clamp_op("min", None), samples=unary_samples(-1)),
    _unary("clamp_max", _clamp_op(None, "max"), samples=unary_samples(1)),
    _unary("leaky_relu", _leaky_relu, samples=(*unary_samples(0.2), *unary_samples(0.0))),
    _unary("elu", lambda call, x: _elu(
        wide(x), call["alpha"], call["scale"], call["input_scale"]
    ), check=refuse_double, samples=(*unary_samples(1.5, 1.0, 0.5), *unary_samples(0.0))),
    _unary("celu", lambda call, x: _elu(
        wide(x), call["alpha"], 1.0, 1 / call["alpha"]
    ), check=refuse_double, samples=unary_samples(1.5)),
    _unary("selu", lambda call, x: _elu(wide(x), *_SELU, 1.0), check=refuse_double),
    _unary("isnan", _isnan, samples=_MIXED),
    _unary("isinf", _isinf, samples=_MIXED),
    _unary("signbit", _signbit, samples=_MIXED),
    _unary("logical_not", _logical_not, samples=_MIXED),
    _unary("bitwise_not", _bitwise_not, samples=(
        *_INTEGERS, Sample(lambda g: (torch.randn(37, generator=g) > 0,))
    )),
    _unary("to_copy", _to_copy, targets=(_aten._to_copy.default,), samples=(
        *(Sample(_in_range, {"dtype": dtype}) for dtype in (
            torch.float64, torch.float16, torch.int64, torch.int32, torch.int8, torch.bool)),
        *(Sample(_integers, {"dtype": dtype}) for dtype in (
            torch.float32, torch.int64, torch.int8, torch.uint8, torch.bool)),
    )),
)  # fmt: skip

ELEMENTWISE: tuple[OpDef, ...] = (*UNARY, *BINARY, *BITWISE)

__all__ = ["ELEMENTWISE", "larger", "smaller"]
