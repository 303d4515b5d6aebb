"""Division of numbers, its rounded quotients and what they leave."""

from __future__ import annotations

from math import copysign, inf

from tvm import tirx

from graphopt.ops.math import dtype_of, factor, share
from graphopt.ops.opdef import Call, Expr
from graphopt.ops.scalar import float64, is_float, refuse_double, wide, widened


def _quotient(a: Expr, b: Expr) -> Expr:
    """a / b for floats."""
    a = factor(a)
    if isinstance(b, tirx.FloatImm) and b.value == 0:
        # TVM refuses to divide by 0; this gives the same infinities and NaN.
        return a * tirx.const(copysign(inf, b.value), dtype_of(b))
    return a / b


def div(call: Call, a: Expr, b: Expr) -> Expr:
    """a / b, or that rounded down or to zero as `rounding_mode` says."""
    mode = call.arguments.get("rounding_mode")
    if mode is None:
        return _quotient(widened(call, a), widened(call, b))
    a, b = wide(a), wide(b)
    if not is_float(a):
        a, b = _divisible(a, b)
        return tirx.floordiv(a, b) if mode == "floor" else tirx.truncdiv(a, b)
    # In float64 a quotient below 2²⁸ never rounds up to a whole number it is not.
    quotient = _quotient(float64(a), float64(b))
    return tirx.Cast("float32", (tirx.floor if mode == "floor" else tirx.trunc)(quotient))


def _divisible(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Integers with the same quotient and remainder, at which no processor traps.

    Those of x86 do, and end the program, at b = 0, where PyTorch raises: a is divided by 1 then.
    And at the smallest a / -1, which wraps here as in PyTorch.
    """
    if isinstance(b, tirx.IntImm) and b.value not in (0, -1):
        # Shared: TVM cannot lower a rounded quotient whose numerator it knows to be 0 or 1.
        return share(a), b
    dtype = dtype_of(a)
    one = tirx.const(1, dtype)
    if dtype.startswith("uint"):
        return a, share(tirx.Select(b == 0, one, b))
    a, b = share(a), share(b)
    negative = b == tirx.const(-1, dtype)
    divisor = share(tirx.Select(tirx.any(b == tirx.const(0, dtype), negative), one, b))
    return share(tirx.Select(negative, -a, a)), divisor


def check_div(call: Call) -> str | None:
    """Reason against rounding modes that there are not, and against rounding in float64."""
    if call.arguments.get("rounding_mode") not in (None, "floor", "trunc"):
        return f"rounding mode {call['rounding_mode']!r} is unknown"
    if call.arguments.get("rounding_mode") is not None:
        return refuse_double(call)
    return None


def _float_fmod(a: Expr, b: Expr) -> Expr:
    """What is left of a / b rounded to zero; exact for quotients below 2²⁸."""
    a, b = share(a), share(b)
    x, y = share(float64(a)), share(float64(b))
    left = share(tirx.trunc(_quotient(x, y))) * factor(y)
    rest = share(tirx.Cast("float32", x - left))
    end = tirx.const(inf, "float32")
    infinite = tirx.Select(tirx.abs(a) < end, a, tirx.const(float("nan"), "float32"))
    return share(tirx.Select(tirx.abs(b) == end, infinite, rest))


def fmod(call: Call, a: Expr, b: Expr) -> Expr:
    """What a / b rounded to zero leaves, with the sign of a."""
    a, b = wide(a), wide(b)
    return _float_fmod(a, b) if is_float(a) else tirx.truncmod(*_divisible(a, b))


def remainder(call: Call, a: Expr, b: Expr) -> Expr:
    """What a / b rounded down leaves, with the sign of b."""
    a, b = wide(a), wide(b)
    if not is_float(a):
        return tirx.floormod(*_divisible(a, b))
    b = share(b)
    rest = _float_fmod(a, b)
    zero = tirx.const(0.0, "float32")
    below = tirx.Select(b < zero, rest, rest + b)
    above = tirx.Select(b < zero, rest + b, rest)
    return tirx.Select(rest < zero, below, tirx.Select(rest > zero, above, rest))
