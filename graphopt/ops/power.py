"""Powers as branch-free TIR expressions: products and roots where they do, float64 where not."""

from __future__ import annotations

from math import inf, log, nan

from tvm import tirx

from graphopt.ops.math import bits, const, from_bits, horner, is_nan, share
from graphopt.ops.opdef import Expr

_SHIFT = 6755399441055744.0
"""1.5 · 2⁵²: adding it rounds a small float64 to an integer, which shows in the low bits."""
_SHIFT_BITS = 0x4338000000000000
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_MANTISSA = 2**52 - 1
# Fits good to 2⁻³⁹ and better: the results are rounded to float32.
_EXP = (
    *(1.0, 1.0, 0.5000000000462086, 0.16666666791648568, 0.04166666426635479),
    *(0.008333279724607484, 0.0013889209612502477, 0.00019910295141679574),
    2.4706417393625373e-05,
)
_LOG = (
    *(2.0, 0.6666666666658188, 0.40000000055156126, 0.2857141663097365, 0.2222340899086669),
    *(0.1812238601298929, 0.16835459099028888),
)


def _const64(value: float) -> Expr:
    return tirx.const(value, "float64")


def _int64(value: int) -> Expr:
    return tirx.const(value, "int64")


def _exp64(x: Expr) -> Expr:
    """e to the x as float64, relative error below 1e-11, for |x| ≤ 600."""
    x = share(x)
    shifted = share(x * _const64(1 / log(2)) + _const64(_SHIFT))
    n = share(shifted - _const64(_SHIFT))
    r = share(x + n * _const64(-log(2)))
    exponent = tirx.reinterpret("int64", shifted) - _int64(_SHIFT_BITS)
    return horner(r, _EXP) * tirx.reinterpret("float64", (exponent + _int64(1023)) << _int64(52))


def _log64(x: Expr) -> Expr:
    """Natural logarithm of a positive, finite, normal float64, relative error below 1e-12."""
    raw = share(tirx.reinterpret("int64", x) - _int64(_SQRT_HALF_BITS))
    # The biased exponent is positive, so it can become the low bits of 2⁵² + itself.
    biased = (raw + _int64(1023 << 52)) >> _int64(52)
    exponent = tirx.reinterpret("float64", biased | _int64(0x4330000000000000))
    mantissa = share(
        tirx.reinterpret("float64", (raw & _int64(_MANTISSA)) + _int64(_SQRT_HALF_BITS))
    )
    ratio = share((mantissa - _const64(1.0)) / (mantissa + _const64(1.0)))
    k = share(exponent) - _const64(2.0**52 + 1023)
    rest = share(ratio * horner(share(ratio * ratio), _LOG))
    return k * _const64(log(2)) + rest


def pow(x: Expr, y: Expr) -> Expr:
    """x to the y, max 0.51 ulp, by float64; C's special values, negative x with integer y too."""
    x, y = share(x), share(y)
    a = share(tirx.abs(x))
    positive = tirx.Select(a > const(0.0), a, const(1.0))
    usable = tirx.Select(a < const(inf), positive, const(1.0))
    logarithm = share(_log64(tirx.Cast("float64", usable)))
    logarithm = tirx.Select(a == const(inf), _const64(inf), logarithm)
    logarithm = tirx.Select(a == const(0.0), _const64(-inf), logarithm)
    t = share(logarithm * tirx.Cast("float64", y))
    t = share(tirx.Select(t > _const64(200.0), _const64(200.0), t))
    t = tirx.Select(t > _const64(-200.0), t, _const64(-200.0))
    # 1 to the ±inf is 0 · inf in the logarithm.
    magnitude = share(tirx.Cast("float32", _exp64(t)))
    magnitude = share(tirx.Select(a == const(1.0), const(1.0), magnitude))
    whole = share(tirx.floor(y))
    halved = share(y * const(0.5))
    sign = tirx.Select(
        tirx.floor(halved) < halved, bits(x) & tirx.const(-(2**31), "int32"), tirx.const(0, "int32")
    )
    # A whole exponent keeps the sign if odd; infinities count as whole and even.
    signed = share(from_bits(bits(magnitude) ^ sign))
    rootless = tirx.Select(a < const(inf), tirx.Select(x < const(0.0), const(nan), magnitude), magnitude)
    value = share(tirx.Select(whole == y, signed, share(rootless)))
    value = share(tirx.Select(is_nan(x), x, share(tirx.Select(is_nan(y), y, value))))
    value = share(tirx.Select(x == const(1.0), const(1.0), value))
    return tirx.Select(y == const(0.0), const(1.0), value)


def pow_constant(x: Expr, exponent: float) -> Expr:
    """x to a constant: `pow`, but small multiples of ½ by products and roots, half an ulp each."""
    doubled = exponent * 2
    if exponent == 0.0:
        return const(1.0)
    if not doubled.is_integer() or abs(exponent) > 8 or (doubled % 2 and abs(exponent) > 2.5):
        return pow(x, const(exponent))
    x = share(x)

    def product(times: int) -> Expr:
        if times == 1:
            return x
        if times % 2:
            return product(times - 1) * x
        half = share(product(times // 2))
        return half * half

    times = int(abs(exponent))
    if doubled % 2 == 0:
        value = product(times)
    else:
        value = tirx.sqrt(x) if times == 0 else product(times) * tirx.sqrt(x)
    return value if exponent > 0 else const(1.0) / value
