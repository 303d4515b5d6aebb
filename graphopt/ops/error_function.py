"""The error function and its complement; see `math` for the habits it follows."""

from __future__ import annotations

from tvm import tirx

from graphopt.ops.math import (
    at_most,
    bits,
    const,
    copy_sign,
    exp,
    exp2_finite,
    from_bits,
    horner,
    share,
)
from graphopt.ops.opdef import Expr
from graphopt.ops.scalar import float64

_ERF = (
    *(0.12837915122509003, -0.37612444162368774, 0.11279930919408798),
    *(-0.026595590636134148, 0.004435879644006491),
)
_ERFC = (
    *(1.6279646158218384, 0.9180058240890503, 0.14970773458480835, -0.03017890453338623),
    *(0.002487889723852277, 0.0006252189050428569, -0.00021636414749082178),
    2.066807064693421e-05,
)
_MIDDLE = 3.0
# erfc(x)·e^(x²) = P((x - 3) / (x + 3)) for 0.45 ≤ x ≤ 10.7.
_SCALED = (
    *(0.179001152705, -0.326233570514, 0.245603633503, -0.150115376935),
    *(0.0716688258307, -0.0243993402244, 0.00424961522618, 0.000737277244175),
    -0.00054073442261,
)
# (e^d - 1) / d.
_EXPM1_SHORT = (1.0, 1 / 2, 1 / 6, 1 / 24)


def _tail(a: Expr) -> Expr:
    """erfc for 0.45 ≤ a ≤ 10.7."""
    # As in fdlibm (Sun, 1993): the square of the first 12 bits is exact, and what is left of a² is
    # small. An error of a² itself would be an error of the result, 100 times as large.
    head = share(from_bits(bits(a) & tirx.const(-4096, "int32")))
    rest = share(float64((head - a) * (head + a)))
    x, middle = share(float64(a)), tirx.const(_MIDDLE, "float64")
    scaled = share(horner(share((x - middle) / (x + middle)), _SCALED))
    near = (rest * horner(rest, _EXPM1_SHORT)) * scaled + scaled
    return tirx.Cast("float32", float64(exp((head * head) * const(-1.0))) * near)


def erf(x: Expr) -> Expr:
    """The error function, max 1.5 ulp."""
    x = share(x)
    a = share(tirx.abs(x))
    t = share(a * a)
    near = a * horner(t, _ERF) + a
    c = at_most(a, 3.95)
    far = const(1.0) - exp2_finite((c * horner(c, _ERFC)) * const(-1.0))
    return copy_sign(tirx.Select(a < const(0.58), near, far), x)


def erfc(x: Expr) -> Expr:
    """1 - erf(x), max 2 ulp; denormal results within 1 of their ulp."""
    x = share(x)
    a = share(tirx.abs(x))
    far = share(_tail(share(tirx.Select(a > const(0.5), at_most(a, 10.7), const(0.5)))))
    both = tirx.Select(x < const(0.0), const(2.0) - far, far)
    # NaN takes the way of small values.
    return tirx.Select(a > const(0.5), both, const(1.0) - erf(x))
