"""Powers as TIR expressions: products and roots where they do, the C library where not."""

from __future__ import annotations

from tvm import tirx

from graphopt.ops.math import const, share
from graphopt.ops.opdef import Expr


def pow(x: Expr, y: Expr) -> Expr:
    """x to the y by the C library's `powf`, one call per element: right everywhere, but slow."""
    return tirx.pow(x, y)


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
