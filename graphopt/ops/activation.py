"""Activation functions, made of what `math` has; see there for the habits they follow."""

from __future__ import annotations

from math import log, pi, sqrt

from tvm import tirx

from graphopt.ops.math import (
    LN2_HIGH,
    LN2_LOW,
    SHIFT_TO_EXPONENT,
    at_least,
    at_most,
    bits,
    const,
    exp,
    exp_nonpositive,
    from_bits,
    horner,
    log1p,
    share,
)
from graphopt.ops.opdef import Expr

# r·coth(r/2) in r², |r| ≤ ln(2)/2.
_R_COTH = (2.0, 0.16666584, -0.0027639069)
# S(x) = erf(x/√2)/2 = x·P(x²)/Q(x²) up to 5.5, a little too steep so that it gets to ±½.
_NORMAL = (
    *(0.3989422619342804, 0.033853400498628616, 0.004677302204072475),
    *(0.00016883258649613708, 6.352091986627784e-06, 2.2748356087731736e-08),
)
_NORMAL_UNDER = (
    *(1.0, 0.25152379274368286, 0.028646288439631462),
    *(0.0018844843143597245, 7.36493238946423e-05, 1.1974724429819616e-06),
)

_LOGISTIC_END = 87.3
"""Beyond, e^x or e^-x is no normal float32."""


def _logistic(x: Expr) -> Expr:
    """1 / (1 + e to the -x), for |x| ≤ 87.3.

    With r = -x - k·ln 2 and R = r·coth(r/2), a polynomial of r², e^-x is 2^k·(R + r) / (R - r). The
    division that there is anyway takes that in, so that R needs no more than three terms.
    """
    x = share(x)
    shifted = share(x * const(-1 / log(2)) + const(SHIFT_TO_EXPONENT))
    n = share(shifted - const(SHIFT_TO_EXPONENT))
    r = share((n * const(-LN2_HIGH) - x) + n * const(-LN2_LOW))
    value = share(horner(share(r * r), _R_COTH))
    under = share(value - r)
    return under / ((value + r) * from_bits(bits(shifted) << 23) + under)


def _in_logistic_range(x: Expr) -> Expr:
    return at_least(at_most(x, _LOGISTIC_END), -_LOGISTIC_END)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e to the -x), max 2.5 ulp; 1.2e-38 below -87.3."""
    return _logistic(_in_logistic_range(x))


def silu(x: Expr) -> Expr:
    """x · sigmoid(x), max 3.2 ulp down to -87.3, -1e-36 below: the limit, where PyTorch has NaN."""
    raised = at_least(x, -_LOGISTIC_END)
    return raised * _logistic(at_most(raised, _LOGISTIC_END))


def softplus(x: Expr) -> Expr:
    """log(1 + e to the x), max 2.5 ulp, without overflow."""
    x = share(x)
    return at_least(x, 0.0) + log1p(exp_nonpositive(const(0.0) - tirx.abs(x)))


def mish(x: Expr) -> Expr:
    """x · tanh(softplus(x)), max 5 ulp above -80; NaN at -inf, as PyTorch."""
    # With w = e^x: tanh(log(1 + w)) = w(w + 2) / (w(w + 2) + 2).
    x = share(x)
    w = share(exp(at_most(x, 20.0)))
    s = share(w * (w + const(2.0)))
    return x * (s / (s + const(2.0)))


def gelu(x: Expr) -> Expr:
    """x · Φ(x), Φ the normal distribution function, max error 2.5e-7 · |x|; 0 below -5.5.

    One quotient of two polynomials takes about half the time of an exponential.
    """
    raised = at_least(x, -5.5)
    c = share(at_most(raised, 5.5))
    t = share(c * c)
    half_erf = (c * horner(t, _NORMAL)) / horner(t, _NORMAL_UNDER)
    return raised * at_least(half_erf + const(0.5), 0.0)


def gelu_tanh(x: Expr) -> Expr:
    """The tanh form of GELU, written as x · sigmoid(2u) to keep the precision of its tail.

    Max error 2e-7 · |x|.
    """
    scale = 2 * sqrt(2 / pi)
    c = share(at_least(x, -20.0))
    u = c * ((c * c) * const(0.044715 * scale) + const(scale))
    return c * _logistic(_in_logistic_range(u))
