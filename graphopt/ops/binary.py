"""Elementwise operators of two operands and more: arithmetic, comparisons, logic, choice."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from tvm import tirx
from tvm_ffi import structural_equal

from graphopt.ops.division import check_div, div, fmod, remainder
from graphopt.ops.math import (
    copy_sign,
    dtype_of,
    equal,
    factor,
    hidden,
    is_nan,
    not_equal,
    number,
    ordered,
    share,
)
from graphopt.ops.opdef import Call, Expr, Kind, OpDef, Sample
from graphopt.ops.power import pow as power
from graphopt.ops.power import pow_constant
from graphopt.ops.scalar import (
    float64,
    is_float,
    pair_samples,
    refuse_double,
    to_dtype,
    truth,
    wide,
    widened,
)
from graphopt.ops.trigonometry import atan2

_aten = torch.ops.aten


def _scaled(value: Expr, alpha: Any) -> Expr:
    return value if alpha == 1 else value * factor(number(alpha, dtype_of(value)))


def _add(call: Call, a: Expr, b: Expr) -> Expr:
    a, b = wide(a), wide(b)
    return a + _scaled(b, call["alpha"])


def _sub(call: Call, a: Expr, b: Expr) -> Expr:
    a, b = wide(a), wide(b)
    if is_float(a) and structural_equal(a, b):
        a = hidden(a)  # TVM would answer 0, but of inf it is NaN.
    return a - _scaled(b, call["alpha"])


def _rsub(call: Call, a: Expr, b: Expr) -> Expr:
    return _sub(call, b, a)


def _mul(call: Call, a: Expr, b: Expr) -> Expr:
    a, b = wide(a), wide(b)
    return factor(a) * factor(b)


def _pow(call: Call, a: Expr, b: Expr) -> Expr:
    return power(widened(call, a), widened(call, b))


def _check_float_pow(call: Call) -> str | None:
    if not call.dtype.is_floating_point:
        return "an integer power is only compiled for a constant exponent"
    return refuse_double(call)


def _pow_scalar(call: Call, x: Expr) -> Expr:
    exponent = call["exponent"]
    x = wide(to_dtype(x, call.dtype))
    if is_float(x):
        return pow_constant(x, float(exponent))
    value = tirx.const(1, dtype_of(x))
    x = share(x)
    for _ in range(int(exponent)):
        value = x * value
    return value


def _check_pow_scalar(call: Call) -> str | None:
    if call.dtype.is_floating_point:
        return refuse_double(call)
    if not 0 <= call["exponent"] <= 16:
        return f"an integer to the {call['exponent']} is only compiled for exponents from 0 to 16"
    return None


def larger(a: Expr, b: Expr) -> Expr:
    """The larger of two values of one dtype, NaN where either is."""
    a, b = share(a), share(b)
    # A false comparison gives b, which is then the NaN, or a is.
    value = tirx.Select(ordered(a) > ordered(b), a, b)
    return tirx.Select(is_nan(a), a, value) if is_float(a) else value


def smaller(a: Expr, b: Expr) -> Expr:
    """The smaller of two values of one dtype, NaN where either is."""
    a, b = share(a), share(b)
    value = tirx.Select(ordered(a) < ordered(b), a, b)
    return tirx.Select(is_nan(a), a, value) if is_float(a) else value


def _hypot(call: Call, a: Expr, b: Expr) -> Expr:
    """√(a² + b²) by way of float64, in which no square is too large; inf beside NaN is inf."""
    a, b = share(widened(call, a)), share(widened(call, b))
    x, y = share(float64(a)), share(float64(b))
    length = share(tirx.Cast("float32", tirx.sqrt(x * x + y * y)))
    far = share(larger(tirx.Cast("int8", _is_infinite(a)), tirx.Cast("int8", _is_infinite(b))))
    return tirx.Select(far == 1, tirx.const(inf, "float32"), length)


def _is_infinite(x: Expr) -> Expr:
    return tirx.abs(x) == tirx.const(inf, "float32")


def _copysign(call: Call, a: Expr, b: Expr) -> Expr:
    return copy_sign(tirx.abs(widened(call, a)), widened(call, b))


def _present(choose: Callable[[Expr, Expr], Expr]) -> Callable[..., Expr]:
    """Compute `choose`, but of a number and NaN the number."""

    def compute(call: Call, a: Expr, b: Expr) -> Expr:
        a, b = share(wide(a)), share(wide(b))
        if not is_float(a):
            return choose(a, b)
        missing = share(tirx.Cast("int8", is_nan(b)))
        return tirx.Select(is_nan(a), b, tirx.Select(missing == 1, a, choose(a, b)))

    return compute


def _clamp_tensors(call: Call, x: Expr, *bounds: Expr) -> Expr:
    value = wide(to_dtype(x, call.dtype))
    rest = [wide(to_dtype(bound, call.dtype)) for bound in bounds]
    if call.arguments.get("min") is not None:
        value = larger(value, rest.pop(0))
    if call.arguments.get("max") is not None:
        value = smaller(value, rest.pop(0))
    return value


def _comparison(compare: Callable[[Expr, Expr], Expr], nan: bool | None) -> Callable[..., Expr]:
    """Compute a comparison; `nan` says what a value compared with itself gives where it is NaN."""

    def compute(call: Call, a: Expr, b: Expr) -> Expr:
        a, b = wide(a), wide(b)
        # TVM would answer for a number that equals itself; this is how people ask for NaN.
        if nan is not None and is_float(a) and structural_equal(a, b):
            missing = is_nan(a)
            return missing if nan else equal(tirx.Cast("int8", missing), tirx.const(0, "int8"))
        return compare(ordered(a), ordered(b))

    return compute


def _where(call: Call, condition: Expr, a: Expr, b: Expr) -> Expr:
    a, b = to_dtype(a, call.dtype), to_dtype(b, call.dtype)
    if dtype_of(condition) != "bool":
        condition = not_equal(condition, tirx.const(0, dtype_of(condition)))
    if call.dtype == torch.bool:
        return not_equal(tirx.Select(condition, truth(a), truth(b)), tirx.const(0, "int8"))
    return tirx.Select(condition, a, b)


def _prelu(call: Call, x: Expr, weight: Expr) -> Expr:
    x, weight = share(wide(x)), factor(wide(weight))
    return tirx.Select(x > tirx.const(0, dtype_of(x)), x, x * weight)


def binary(
    name: str,
    targets: tuple[Any, ...],
    compute: Callable[..., Expr],
    *,
    check: Callable[[Call], str | None] | None = None,
    operands: tuple[str, ...] = ("self", "other"),
    samples: tuple[Sample, ...] | None = None,
    promote: bool = True,
) -> OpDef:
    """An elementwise operator of two operands; `samples` are the usual pairs unless given."""
    if samples is None:
        samples = pair_samples()
    return OpDef(
        name,
        targets,
        Kind.ELEMENTWISE,
        compute,
        operands=operands,
        promote=promote,
        check=check,
        samples=samples,
    )


def _compare(name: str, compare: Callable[[Expr, Expr], Expr], nan: bool | None = None) -> OpDef:
    packet = getattr(_aten, name)
    return binary(name, (packet.Tensor, packet.Scalar), _comparison(compare, nan))


def overloads(name: str) -> tuple[Any, ...]:
    """Its overloads for a second operand that is a tensor or a number."""
    packet = getattr(_aten, name)
    return (packet.Tensor, packet.Scalar)


def _pairs(**kwargs: Any) -> tuple[Sample, ...]:
    return pair_samples(**kwargs)


def _triple(g: torch.Generator) -> tuple[Any, ...]:
    a = torch.randn(3, 1, 5, generator=g)
    return a > 0, torch.randn(4, 1, generator=g), torch.randn(5, generator=g)


def _powers(g: torch.Generator) -> tuple[Any, ...]:
    return torch.rand(3, 1, 5, generator=g) * 4, torch.randn(4, 1, generator=g) * 3


BINARY: tuple[OpDef, ...] = (
    binary("add", overloads("add"), _add, samples=_pairs(kwargs={"alpha": 2})),
    binary("sub", overloads("sub"), _sub, samples=(*_pairs(), *_pairs(kwargs={"alpha": 0}))),
    binary("rsub", overloads("rsub"), _rsub, samples=_pairs()),
    binary("mul", overloads("mul"), _mul),
    binary(
        "div",
        (*overloads("div"), _aten.div.Tensor_mode, _aten.div.Scalar_mode),
        div,
        check=check_div,
        samples=_pairs(nonzero=True),
    ),
    binary("fmod", overloads("fmod"), fmod, check=refuse_double, samples=_pairs(nonzero=True)),
    binary(
        "remainder",
        overloads("remainder"),
        remainder,
        check=refuse_double,
        samples=_pairs(nonzero=True),
    ),
    binary(
        "pow",
        (_aten.pow.Tensor_Tensor, _aten.pow.Scalar),
        _pow,
        operands=("self", "exponent"),
        check=_check_float_pow,
        samples=(Sample(_powers),),
    ),
    binary(
        "pow_scalar",
        (_aten.pow.Tensor_Scalar,),
        _pow_scalar,
        operands=("self",),
        check=_check_pow_scalar,
        samples=tuple(
            Sample(lambda g, e=e: (torch.rand(37, generator=g) * 4, e))  # type: ignore[misc]
            for e in (0, 1, 2, 3, -2, 0.5, -0.5, 1.5, 0.3, 11)
        ),
    ),
    binary(
        "atan2",
        (_aten.atan2.default,),
        lambda call, a, b: atan2(widened(call, a), widened(call, b)),
        check=refuse_double,
    ),
    binary("hypot", (_aten.hypot.default,), _hypot, check=refuse_double),
    binary("copysign", overloads("copysign"), _copysign, check=refuse_double),
    binary("maximum", (_aten.maximum.default,), lambda call, a, b: larger(wide(a), wide(b))),
    binary("minimum", (_aten.minimum.default,), lambda call, a, b: smaller(wide(a), wide(b))),
    binary("fmax", (_aten.fmax.default,), _present(larger)),
    binary("fmin", (_aten.fmin.default,), _present(smaller)),
    binary(
        "clamp_tensor",
        (_aten.clamp.Tensor, _aten.clamp_min.Tensor, _aten.clamp_max.Tensor),
        _clamp_tensors,
        operands=("self", "min", "max"),
        samples=(Sample(lambda g: tuple(torch.randn(37, generator=g) for _ in range(3))),),
    ),
    _compare("eq", lambda a, b: equal(a, b), False),
    _compare("ne", lambda a, b: not_equal(a, b), True),
    _compare("lt", lambda a, b: a < b),
    _compare("le", lambda a, b: a <= b),
    _compare("gt", lambda a, b: a > b),
    _compare("ge", lambda a, b: a >= b),
    binary(
        "where",
        (_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar),
        _where,
        operands=("condition", "self", "other"),
        promote=False,
        samples=(Sample(_triple),),
    ),
    binary(
        "prelu", (_aten._prelu_kernel.default,), _prelu, operands=("self", "weight"),
        samples=(
            Sample(
                lambda g: (torch.randn(2, 3, 5, generator=g), torch.rand(1, 3, 1, generator=g))
            ),
        ),
    ),
)  # fmt: skip
