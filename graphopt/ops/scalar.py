"""What the elementwise operators share: dtypes, casts and the samples their tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tvm import tirx

from graphopt.ops.math import dtype_of, not_equal, number
from graphopt.ops.opdef import Call, Expr, Sample

TIR_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
"""The dtypes an elementwise operator may have, by TVM's names."""


def is_float(x: Expr) -> bool:
    """Whether an expression is of a floating-point dtype."""
    return dtype_of(x).startswith("float")


def to_dtype(x: Expr, dtype: torch.dtype) -> Expr:
    """The value (or Python number) as another dtype, converted as PyTorch does."""
    name = TIR_NAMES[dtype]
    if isinstance(x, (bool, int, float)):
        return number(bool(x) if name == "bool" else x, name)
    have = dtype_of(x)
    if have == name:
        return x
    if name == "bool":
        return not_equal(x, tirx.const(0, have))
    if have.startswith("float") and name in ("int16", "int8", "uint8"):
        # Out of range is undefined for the short conversion; by way of int32 it wraps.
        x = tirx.Cast("int32", x)
    return tirx.Cast(name, x)


def truth(x: Expr) -> Expr:
    """1 where the value is not zero, as an int8.

    TVM negates and merges comparisons as if there were no NaN; as numbers they are left alone.
    """
    if dtype_of(x) != "bool":
        x = not_equal(x, tirx.const(0, dtype_of(x)))
    return tirx.Cast("int8", x)


def wide(x: Expr) -> Expr:
    """The value in a dtype to compute in: bools as int8, float16 as float32."""
    dtype = dtype_of(x)
    if dtype == "bool":
        return tirx.Cast("int8", x)
    return tirx.Cast("float32", x) if dtype == "float16" else x


def widened(call: Call, x: Expr) -> Expr:
    """An operand in the result's dtype, or the one it is computed in."""
    return wide(to_dtype(x, call.dtype))


def float64(x: Expr) -> Expr:
    """The value as float64, constants as constants."""
    if isinstance(x, tirx.FloatImm):
        return tirx.const(x.value, "float64")
    return tirx.Cast("float64", x)


def refuse_double(call: Call) -> str | None:
    """Reason against float64, in which only plain arithmetic is compiled."""
    if call.dtype == torch.float64:
        return "in float64 only plain arithmetic is compiled; cast to float32"
    return None


def refuse_dtype(call: Call) -> str | None:
    """Reason against a result that is no number graphopt knows."""
    return None if call.dtype in TIR_NAMES else f"dtype {call.dtype} is not compiled"


SPECIAL = (
    *(0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 0.5, -0.5, 1.5, 2.5),
    *(-1.0, 1.0, 88.8, -88.8, 3.0, -3.0, 20.0, 1e30, -1e30),
)


def unary_samples(
    *rest: Any, scale: float = 3.0, kwargs: dict[str, Any] | None = None, special: bool = True
) -> tuple[Sample, ...]:
    """One operand, then `rest`: an odd shape and the special values."""
    shapes: list[Callable[[torch.Generator], tuple[Any, ...]]] = [
        lambda g: (torch.randn(3, 5, 7, generator=g) * scale, *rest)
    ]
    if special:
        shapes.append(lambda g: (torch.tensor(SPECIAL), *rest))
    return tuple(Sample(make, kwargs or {}) for make in shapes)


def pair_samples(
    *, kwargs: dict[str, Any] | None = None, nonzero: bool = False
) -> tuple[Sample, ...]:
    """Two operands: broadcasting floats, special values, integers."""

    def floats(g: torch.Generator) -> tuple[Any, ...]:
        return torch.randn(3, 1, 5, generator=g) * 3, torch.randn(4, 1, generator=g)

    def special(g: torch.Generator) -> tuple[Any, ...]:
        # A remainder is exact for quotients below 2²⁸ only.
        values = torch.tensor([v for v in SPECIAL if not nonzero or abs(v) not in (1e-40, 1e30)])
        return values.reshape(-1, 1), values

    def integers(g: torch.Generator) -> tuple[Any, ...]:
        a = torch.randint(-50, 50, (37,), generator=g, dtype=torch.int32)
        b = torch.randint(1 if nonzero else -9, 9, (37,), generator=g, dtype=torch.int32)
        return a, b

    return tuple(Sample(make, kwargs or {}) for make in (floats, special, integers))
