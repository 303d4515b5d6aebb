"""Transcendental functions as branch-free TIR expressions, so that kernels vectorize them.

Every function takes and gives scalar float32 expressions and must be called while the kernel is
being built, inside the (vectorized) loop that uses its result: values used twice are bound by a
statement there, which keeps the trees small. Each states its largest error in units in the last
place (ulp) as `tests/ops/test_math.py` measures it, with and without fused multiply-add. The
polynomials are minimax fits of our own. Range reduction follows Cody and Waite, "Software Manual
for the Elementary Functions" (1980).

Three habits of TVM shape the code. Its simplifier cancels float terms as if they were reals, so
every rounding that must happen is bound by `share`; it negates comparisons as if there were no
NaN, so NaN is told by bits or kept in the branch a false comparison selects; and signed overflow
and the conversion of NaN to an integer are undefined, so bits are only added where they cannot
wrap.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import inf, log, nan
from typing import Any

from tvm import tirx
from tvm.ir import Op, register_op_attr
from tvm.tirx.script.builder import ir as T

from graphopt.ops.opdef import Expr


def _declare_opaque() -> Any:
    """Declare an operation that gives its operand.

    The simplifier puts a bound value back in place wherever the value is pure, over and over (a
    power took minutes). This one claims to read memory, so it stays, and becomes an LLVM
    instruction that TVM takes for impure too, though LLVM knows it for the value itself.
    """
    name = "graphopt.opaque"
    register_op_attr(name, "TCallEffectKind", tirx.CallEffectKind.ReadState.value)
    register_op_attr(name, "TVectorizable", True)
    register_op_attr(name, "TScriptPrinterName", name)
    tirx.op.register_intrin_lowering(name, "default", f=lambda call: call.args[0])
    tirx.op.register_intrin_lowering(name, "llvm", f=_identity)
    return Op.get(name)


def _identity(call: Any) -> Expr:
    value = call.args[0]
    dtype = dtype_of(value)
    if dtype.startswith("float"):
        one, zero = tirx.const(1.0, dtype), tirx.const(-0.0, dtype)
        return tirx.call_llvm_intrin(dtype, "llvm.fmuladd", value, one, zero)
    return tirx.call_llvm_intrin(dtype, "llvm.umax", value, tirx.const(0, dtype))


_OPAQUE = _declare_opaque()


def _declare_bound(name: str, beyond: Callable[[Expr, Expr], Expr], intrinsic: str) -> Any:
    """Declare an operation of a value and a limit: the limit where the value is beyond it.

    That is one instruction on x86, where NaN is kept in the second operand, and would be two on
    Arm, whose own instruction keeps NaN in either.
    """

    def select(call: Any) -> Expr:
        x, limit = call.args
        return tirx.Select(beyond(limit, x), limit, x)

    def own(call: Any) -> Expr:
        return tirx.call_llvm_intrin(dtype_of(call), intrinsic, *call.args)

    register_op_attr(name, "TCallEffectKind", tirx.CallEffectKind.Pure.value)
    register_op_attr(name, "TVectorizable", True)
    register_op_attr(name, "TScriptPrinterName", name)
    tirx.op.register_intrin_lowering(name, "default", f=select)
    tirx.op.register_intrin_lowering(name, "llvm.aarch64", f=own)
    return Op.get(name)


_AT_MOST = _declare_bound("graphopt.at_most", operator.lt, "llvm.minimum")
_AT_LEAST = _declare_bound("graphopt.at_least", operator.gt, "llvm.maximum")

SHIFT = 12582912.0
"""1.5 · 2²³: adding it rounds a float32 below 2²² to an integer, which shows in the low bits."""
_SHIFT_BITS = 0x4B400000
SHIFT_TO_EXPONENT = SHIFT + 127
"""The same, with the integer in the low bits ready to become the exponent of a power of two."""
_SQRT_HALF_BITS = 0x3F3504F3
LN2_HIGH = 355 / 512
LN2_LOW = -2.121944400546905827679e-4

_EXP = (0.49999994, 0.16666517, 0.04166828, 0.008369249, 0.0013820776)
_EXP2 = (0.6931472, 0.24022648, 0.05550358, 0.009618503, 0.001339189, 0.00015329236)
# 2^r = 1 + r·P(r) for |r| ≤ ½, relative error 1.5e-7.
_EXP2_SHORT = (
    *(0.6931470036506653, 0.24022246897220612, 0.0555071122944355),
    *(0.009671294130384922, 0.0013269407209008932),
)
_EXPM1 = (0.5, 0.16666666, 0.041666485, 0.008333541, 0.0013933228, 0.00019766994)
_LOG = (
    *(0.3333333134651184, -0.2500081956386566, 0.2000124156475067, -0.166234090924263),
    *(0.14201579988002777, -0.13159610331058502, 0.12762212753295898, -0.07636427879333496),
)


def const(value: float) -> Expr:
    """A float32 constant."""
    return tirx.const(value, "float32")


def number(value: bool | int | float, dtype: str) -> Expr:
    """A constant of any dtype; a whole number that is none of its numbers wraps, as in PyTorch."""
    signed = dtype.startswith("int")
    if signed or dtype.startswith("uint"):
        bits = int(dtype.removeprefix("u").removeprefix("int"))
        lowest = -(1 << bits - 1) if signed else 0
        value = (int(value) - lowest) % (1 << bits) + lowest
    return tirx.const(value, dtype)


def dtype_of(x: Expr) -> str:
    """The dtype of an expression, by TVM's name."""
    # `==` and `!=` give a deferred object, for Python's sake.
    return str((x if hasattr(x, "ty") else x.asobject()).ty.dtype)


def ordered(x: Expr) -> Expr:
    """The same number in a dtype to compare in: a signed one.

    TVM makes `x <= -1` of `x < 0`, and ends the program where `x` can have no negative values.
    """
    return tirx.Cast("int32", x) if dtype_of(x) == "uint8" else x


def equal(a: Expr, b: Expr) -> Expr:
    """Whether two values are the same number."""
    return (a == b).asobject()


def not_equal(a: Expr, b: Expr) -> Expr:
    """Whether two values are not the same number; true for NaN."""
    if not dtype_of(a).startswith("float"):
        return (a != b).asobject()
    # TVM compiles != to a comparison that is false for NaN.
    return equal(tirx.Cast("int8", equal(a, b)), tirx.const(0, "int8"))


def share(value: Expr) -> Expr:
    """The value, computed once and opaque to TVM's simplifier."""
    if isinstance(value, (tirx.Var, tirx.IntImm, tirx.FloatImm)):
        return value
    return hidden(value)


def hidden(value: Expr) -> Expr:
    """The value, a constant too, opaque to TVM's simplifier."""
    return T.bind(tirx.call_intrin(dtype_of(value), _OPAQUE, value))


def factor(x: Expr) -> Expr:
    """A value to multiply or divide: TVM takes 0 times anything for 0, but times inf it is NaN."""
    return hidden(x) if isinstance(x, tirx.FloatImm) and x.value == 0 else x


def bits(x: Expr) -> Expr:
    """The bits of a float32 as int32."""
    return tirx.reinterpret("int32", x)


def from_bits(x: Expr) -> Expr:
    """The float32 of these bits."""
    return tirx.reinterpret("float32", x)


def is_nan(x: Expr) -> Expr:
    """Whether a float32 or float64 is NaN."""
    if dtype_of(x) == "float64":
        magnitude = tirx.reinterpret("int64", x) & tirx.const(2**63 - 1, "int64")
        return magnitude > tirx.const(0x7FF0000000000000, "int64")
    return (bits(x) & 0x7FFFFFFF) > 0x7F800000


def at_most(x: Expr, bound: float) -> Expr:
    """`min(x, bound)`, NaN where `x` is; of 0 and -0 either."""
    return share(_bounded(_AT_MOST, share(x), bound))


def at_least(x: Expr, bound: float) -> Expr:
    """`max(x, bound)`, NaN where `x` is; of 0 and -0 either."""
    return share(_bounded(_AT_LEAST, share(x), bound))


def relu(x: Expr) -> Expr:
    """`max(x, 0)`, NaN where `x` is; of 0 and -0 either."""
    return _bounded(_AT_LEAST, share(x), 0)


def _bounded(operation: Any, x: Expr, bound: float) -> Expr:
    dtype = dtype_of(x)
    limit = number(bound, dtype)
    if dtype.startswith("float"):
        return tirx.call_intrin(dtype, operation, x, limit)
    have, end = ordered(x), ordered(limit)
    return tirx.Select(end < have if operation is _AT_MOST else end > have, limit, x)


def copy_sign(magnitude: Expr, sign: Expr) -> Expr:
    """A non-negative float32 under the sign of another."""
    return from_bits(bits(magnitude) | (bits(sign) & tirx.const(-(2**31), "int32")))


def round_half_even(x: Expr) -> Expr:
    """The nearest integer, halves to even. Exact."""
    return tirx.round(x)


def floor(x: Expr) -> Expr:
    """The largest integer not above. Exact."""
    return tirx.floor(x)


def ceil(x: Expr) -> Expr:
    """The smallest integer not below. Exact."""
    return tirx.ceil(x)


def horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """The polynomial with these coefficients, constant first, in the dtype of `x`."""
    value = tirx.const(coefficients[-1], dtype_of(x))
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + tirx.const(coefficient, dtype_of(x))
    return value


def _power_of_two(exponent: Expr) -> Expr:
    """2 to an int32 in [-126, 127]."""
    return from_bits((exponent + 127) << 23)


def _split(x: Expr) -> tuple[Expr, Expr]:
    """(k, r) with x = k·ln 2 + r, |r| ≤ ln(2)/2, k an int32; for |x| below 2²¹."""
    x = share(x)
    shifted = share(x * const(1 / log(2)) + const(SHIFT))
    n = share(shifted - const(SHIFT))
    r = share((x + n * const(-LN2_HIGH)) + n * const(-LN2_LOW))
    return share(bits(shifted) - _SHIFT_BITS), r


def _exp_near_zero(r: Expr) -> Expr:
    """Like exp, for |r| ≤ ln(2)/2."""
    a, b, c, d, e = (const(value) for value in _EXP)
    t = share(r * r)
    # Estrin's scheme: half the latency of Horner's.
    return share((t * (((e * t) + (d * r + c)) * t + (b * r + a)) + r) + const(1.0))


def exp(x: Expr) -> Expr:
    """e to the x, max 1.05 ulp; overflows to inf, denormal results within 1 of their ulp."""
    k, r = _split(at_least(at_most(x, 89.0), -104.0))
    # 2^k in two factors: k runs from -150 to 128.
    half = share(k >> 1)
    return (_exp_near_zero(r) * _power_of_two(half)) * _power_of_two(k - half)


def exp_nonpositive(x: Expr) -> Expr:
    """e to the x for x ≤ 0 (up to 88 works), max 1.05 ulp; results below 2⁻¹²⁶ become 0."""
    x = share(x)
    k, r = _split(x)
    return tirx.Select(x < const(-87.33), const(0.0), _exp_near_zero(r) * _power_of_two(k))


def _exp2_parts(x: Expr) -> tuple[Expr, Expr]:
    """(k, v) with 2 to the x = v·2^k, k an int32; for |x| below 2²¹."""
    x = share(x)
    shifted = share(x + const(SHIFT))
    r = share(x - share(shifted - const(SHIFT)))
    return share(bits(shifted) - _SHIFT_BITS), r * horner(r, _EXP2) + const(1.0)


def exp2_finite(x: Expr) -> Expr:
    """2 to the x for -126 ≤ x ≤ 127."""
    k, value = _exp2_parts(x)
    return value * _power_of_two(k)


def exp2(x: Expr) -> Expr:
    """2 to the x, max 1.5 ulp; overflows to inf, denormal results within 1 of their ulp."""
    k, value = _exp2_parts(at_least(at_most(x, 129.0), -151.0))
    # In two factors, as in `exp`.
    half = share(k >> 1)
    return (value * _power_of_two(half)) * _power_of_two(k - half)


def exp2_nonpositive(x: Expr) -> Expr:
    """2 to the x for x ≤ 0, max 2.2 ulp; results below 2^-126.5 become 0."""
    x = at_least(x, -127.0)
    # The exponent's bits of 2⁻¹²⁷ are those of 0.
    shifted = share(x + const(SHIFT_TO_EXPONENT))
    r = share(x - share(shifted - const(SHIFT_TO_EXPONENT)))
    value = share(r * horner(r, _EXP2_SHORT) + const(1.0))
    return value * from_bits(bits(shifted) << 23)


def _expm1(x: Expr) -> Expr:
    """e to the x, less 1, for -18 ≤ x ≤ 89."""
    k, r = _split(x)
    # Half of everything: 2^128 is not a float.
    half = share(_power_of_two(k - 1))
    value = share((r * r) * horner(r, _EXPM1) + r)
    return (value * half + (half - const(0.5))) * const(2.0)


def expm1(x: Expr) -> Expr:
    """e to the x, less 1, max 1.5 ulp, near 0 too."""
    x = share(x)
    # The select keeps -0.
    return tirx.Select(x == const(0.0), x, _expm1(at_least(at_most(x, 89.0), -18.0)))


def _log_parts(x: Expr) -> tuple[Expr, Expr, Expr, Expr]:
    """(k, f, f², q) with log x = k·ln 2 + f - f²/2 + q, for positive `x`."""
    tiny = x < const(2.0**-126)
    normal = share(tirx.Select(tiny, x * const(2.0**23), x))
    positive = tirx.Select(normal > const(0.0), normal, const(1.0))
    i = share(bits(positive) - _SQRT_HALF_BITS)
    k = share(tirx.Cast("float32", i >> 23) - tirx.Select(tiny, const(23.0), const(0.0)))
    f = share(from_bits((i & 0x7FFFFF) + _SQRT_HALF_BITS) - const(1.0))
    t = share(f * f)
    return k, f, t, (f * t) * horner(f, _LOG)


def _log_of(x: Expr, value: Expr) -> Expr:
    """The value where `x` is positive; -inf at 0, NaN below."""
    below = tirx.Select(x == const(0.0), const(-inf), const(nan))
    # NaN and inf give themselves.
    return tirx.Select(x < const(inf), tirx.Select(x > const(0.0), value, below), x)


def log_natural(x: Expr) -> Expr:
    """Natural logarithm, max 0.9 ulp; -inf at 0, NaN below, denormals included."""
    x = share(x)
    k, f, t, q = _log_parts(x)
    small = share(q + k * const(LN2_LOW))
    value = share(share((small + t * const(-0.5)) + f) + k * const(LN2_HIGH))
    return _log_of(x, value)


def log2(x: Expr) -> Expr:
    """Logarithm to base 2, max 2.5 ulp, exact for powers of 2."""
    x = share(x)
    k, f, t, q = _log_parts(x)
    return _log_of(x, share(share((q + t * const(-0.5)) + f) * const(1 / log(2)) + k))


def log10(x: Expr) -> Expr:
    """Logarithm to base 10, max 2.5 ulp."""
    return log_natural(x) * const(1 / log(10))


def log1p(x: Expr) -> Expr:
    """Natural logarithm of 1 + x, max 1.5 ulp, near 0 too."""
    x = share(x)
    # log(1 + x) = log(u) + log(1 + (x + 1 - u) / u), u the rounded 1 + x.
    u = share(x + const(1.0))
    known = share(u - const(1.0))
    lost = tirx.Select(u > const(0.0), (x - known) / u, const(0.0))
    value = log_natural(u) + tirx.Select(x < const(2.0**24), lost, const(0.0))
    return tirx.Select(x == const(0.0), x, value)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent, max 2.4 ulp."""
    x = share(x)
    t = share(_expm1(at_most(tirx.abs(x) * const(2.0), 19.0)))
    return copy_sign(t / (t + const(2.0)), x)


def rsqrt(x: Expr) -> Expr:
    """1 / sqrt(x), max 1.5 ulp: two correctly rounded steps."""
    return const(1.0) / tirx.sqrt(x)
