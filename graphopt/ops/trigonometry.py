"""Trigonometric and hyperbolic functions and their inverses; see `math` for the habits they follow.

Beyond sine and cosine they reduce to what `math` has, or to a minimax polynomial of our own.
"""

from __future__ import annotations

from math import inf, log, pi

from tvm import tirx

from graphopt.ops.math import (
    SHIFT,
    bits,
    const,
    copy_sign,
    exp,
    from_bits,
    horner,
    log1p,
    share,
)
from graphopt.ops.opdef import Expr

# π/2 in three parts; the first two have 8 and 11 bits, so that 13-bit multiples are exact.
_HALF_PI = (201 / 128, 2029 / 2**22, 7.549789948768648e-8)
_SIN = (-0.16666667, 0.0083333794, -0.00019853025, 2.8317181e-06)
_COS = (0.041666646, -0.0013887305, 2.4431425e-05)
# atan(z) = z + z³·P(z²) for |z| ≤ 1.
_ATAN = (
    *(-0.33333298563957214, 0.19998548924922943, -0.14264242351055145, 0.10952185839414597),
    *(-0.0840345025062561, 0.057957593351602554, -0.03117784671485424, 0.010914606042206287),
    -0.0017936218064278364,
)
# asin(z) = z + z³·P(z²) for |z| ≤ ½.
_ASIN = (
    *(0.16666752099990845, 0.07495297491550446, 0.04547037556767464),
    *(0.02417951449751854, 0.04216630756855011),
)
# sinh(z) = z + z³·P(z²) for |z| ≤ 1.
_SINH = (
    *(0.1666666716337204, 0.008333349600434303),
    *(0.0001983615948120132, 2.8169513370812638e-06),
)
_HUGE = 2.0**28
"""Above, x² + 1 and x² have one square root, and so have x² - 1 and x²."""


def _odd(z: Expr, coefficients: tuple[float, ...]) -> Expr:
    """z + z³·P(z²)."""
    z = share(z)
    t = share(z * z)
    return share((z * t) * horner(t, coefficients) + z)


def _quarter_turns(x: Expr) -> tuple[Expr, Expr]:
    """(q, r) with x = q·π/2 + r, |r| ≤ π/4, q an int32 of which only the last bits are right."""
    x = share(x)
    shifted = share(x * const(2 / pi) + const(SHIFT))
    n = share(shifted - const(SHIFT))
    r = x
    for part in _HALF_PI:
        r = share(r + n * const(-part))
    return share(bits(shifted) & 3), r


def _sine_cosine(r: Expr) -> tuple[Expr, Expr]:
    """Sine and cosine for |r| ≤ π/4."""
    t = share(r * r)
    sine = (t * r) * horner(t, _SIN) + r
    return sine, (t * t) * horner(t, _COS) + (t * const(-0.5) + const(1.0))


def _sine(x: Expr, quadrants: int) -> Expr:
    """sin(x + quadrants·π/2)."""
    q, r = _quarter_turns(x)
    q = share(q + quadrants)
    sine, cosine = _sine_cosine(r)
    value = tirx.Select((q & 1) == 0, sine, cosine)
    return from_bits(bits(value) ^ ((q & 2) << 30))


def sin(x: Expr) -> Expr:
    """Sine, max error 1e-7 for |x| ≤ 10⁴; precision fades beyond, and is gone at 10⁶."""
    x = share(x)
    return tirx.Select(x == const(0.0), x, _sine(x, 0))


def cos(x: Expr) -> Expr:
    """Cosine, max error 1e-7 for |x| ≤ 10⁴; precision fades beyond, and is gone at 10⁶."""
    return _sine(x, 1)


def tan(x: Expr) -> Expr:
    """Tangent, off as if `x` were by 1.5e-7, for |x| ≤ 10⁴; precision fades beyond, as of `sin`."""
    x = share(x)
    q, r = _quarter_turns(x)
    sine, cosine = _sine_cosine(r)
    odd = (q & 1) == 1
    under = tirx.Select(odd, sine * const(-1.0), cosine)
    # The select keeps -0.
    return tirx.Select(x == const(0.0), x, tirx.Select(odd, cosine, sine) / under)


def _arc(rise: Expr, run: Expr) -> Expr:
    """The angle of a point of the first quadrant, whose coordinates are not negative."""
    steep = share(tirx.Cast("int32", rise > run))
    small = tirx.Select(steep == 1, run, rise)
    large = share(tirx.Select(steep == 1, rise, run))
    # Both may be 0, or both infinite.
    ratio = small / tirx.Select(large == const(0.0), const(1.0), large)
    alike = tirx.Select(small == large, const(1.0), ratio)
    angle = _odd(tirx.Select(large == const(inf), alike, ratio), _ATAN)
    return tirx.Select(steep == 1, const(pi / 2) - angle, angle)


def atan(x: Expr) -> Expr:
    """Arc tangent, max 2 ulp."""
    x = share(x)
    return copy_sign(share(_arc(share(tirx.abs(x)), const(1.0))), x)


def atan2(y: Expr, x: Expr) -> Expr:
    """The angle of the point (x, y), max 3 ulp; signs of zeros and infinities as in C."""
    y, x = share(y), share(x)
    angle = share(_arc(share(tirx.abs(y)), share(tirx.abs(x))))
    left = bits(x) < 0
    return copy_sign(share(tirx.Select(left, const(pi) - angle, angle)), y)


def _asin_parts(x: Expr) -> tuple[Expr, Expr]:
    """(whether |x| ≤ ½, asin |x| there, and half of acos |x| where not)."""
    a = share(tirx.abs(x))
    near = share(tirx.Cast("int32", a <= const(0.5)))
    half = tirx.sqrt((const(1.0) - a) * const(0.5))
    return near, _odd(tirx.Select(near == 1, a, half), _ASIN)


def asin(x: Expr) -> Expr:
    """Arc sine, max 2.5 ulp; NaN beyond ±1."""
    x = share(x)
    near, part = _asin_parts(x)
    value = share(tirx.Select(near == 1, part, const(pi / 2) - part * const(2.0)))
    return copy_sign(value, x)


def acos(x: Expr) -> Expr:
    """Arc cosine, max 2.5 ulp; NaN beyond ±1."""
    x = share(x)
    near, part = _asin_parts(x)
    negative = bits(x) < 0
    middle = const(pi / 2) - tirx.Select(negative, part * const(-1.0), part)
    double = share(part * const(2.0))
    return tirx.Select(near == 1, middle, tirx.Select(negative, const(pi) - double, double))


def _half_exp(x: Expr) -> tuple[Expr, Expr]:
    """(e^x / 2, e^-x / 2), the first infinite only where a float32 of that size would be."""
    root = share(exp(x * const(0.5)))
    return share((root * const(0.5)) * root), const(0.5) / (root * root)


def sinh(x: Expr) -> Expr:
    """Hyperbolic sine, max 4 ulp."""
    x = share(x)
    a = share(tirx.abs(x))
    rising, falling = _half_exp(a)
    return copy_sign(share(tirx.Select(a < const(1.0), _odd(a, _SINH), rising - falling)), x)


def cosh(x: Expr) -> Expr:
    """Hyperbolic cosine, max 4 ulp."""
    rising, falling = _half_exp(tirx.abs(share(x)))
    return rising + falling


def _log_twice(a: Expr, less_one: Expr) -> Expr:
    """log(2a) for huge values, log1p(`less_one`) for others."""
    huge = share(tirx.Cast("int32", a > const(_HUGE)))
    argument = tirx.Select(huge == 1, a, less_one)
    return log1p(argument) + tirx.Select(huge == 1, const(log(2)), const(0.0))


def asinh(x: Expr) -> Expr:
    """Inverse hyperbolic sine, max 4 ulp."""
    x = share(x)
    a = share(tirx.abs(x))
    t = share(a * a)
    less_one = a + t / (tirx.sqrt(t + const(1.0)) + const(1.0))
    return copy_sign(share(_log_twice(a, less_one)), x)


def acosh(x: Expr) -> Expr:
    """Inverse hyperbolic cosine, max 4 ulp; NaN below 1."""
    x = share(x)
    t = share(x - const(1.0))
    # A root each: their product would be positive again below -1.
    return _log_twice(x, t + tirx.sqrt(t) * tirx.sqrt(t + const(2.0)))


def atanh(x: Expr) -> Expr:
    """Inverse hyperbolic tangent, max 4 ulp; NaN beyond ±1."""
    x = share(x)
    a = share(tirx.abs(x))
    return copy_sign(share(log1p((a * const(2.0)) / (const(1.0) - a)) * const(0.5)), x)
