"""ONNX arithmetic, comparison, logic and type conversion, element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import fx

from graphopt.importers.onnx.dtypes import torch_dtype
from graphopt.importers.onnx.values import (
    Context,
    OnnxNode,
    Refused,
    Value,
    dtype,
    number,
    rank,
    scalar,
)

aten = torch.ops.aten
Handler = Callable[[Context, OnnxNode], Value]


def unary(target: Any) -> Handler:
    """A handler for operators that are one ATen operator of one tensor."""

    def handler(ctx: Context, node: OnnxNode) -> Value:
        return ctx.op(target, node.value(0))

    return handler


def arithmetic(ctx: Context, target: Any, left: Value, right: Value, **kwargs: Any) -> Value:
    """A two-operand operator; a one-element constant on the right becomes a plain number."""
    value = scalar(right)
    if isinstance(left, fx.Node) and value is not None and rank(right) <= rank(left):
        return ctx.op(target, left, value, **kwargs)
    return ctx.op(target, left, right, **kwargs)


def binary(target: Any, *, commutes: bool = False) -> Handler:
    """A handler for operators that are one ATen operator of two tensors."""

    def handler(ctx: Context, node: OnnxNode) -> Value:
        left, right = node.value(0), node.value(1)
        if commutes and isinstance(right, fx.Node) and not isinstance(left, fx.Node):
            left, right = right, left
        return arithmetic(ctx, target, left, right)

    return handler


def plain_binary(target: Any) -> Handler:
    """As `binary`, for ATen operators that do not take numbers."""

    def handler(ctx: Context, node: OnnxNode) -> Value:
        return ctx.op(target, node.value(0), node.value(1))

    return handler


def variadic(target: Any) -> Handler:
    """A handler that folds any number of operands with a two-operand operator."""

    def handler(ctx: Context, node: OnnxNode) -> Value:
        values = [node.value(i) for i in range(len(node.operands))]
        return reduce(lambda left, right: ctx.op(target, left, right), values)

    return handler


def div(ctx: Context, node: OnnxNode) -> Value:
    """Integers divide towards zero."""
    left, right = node.value(0), node.value(1)
    if dtype(left).is_floating_point:
        return arithmetic(ctx, aten.div.Tensor, left, right)
    return ctx.op(aten.div.Tensor_mode, left, right, rounding_mode="trunc")


def mod(ctx: Context, node: OnnxNode) -> Value:
    """The sign follows the divisor, or with `fmod` the dividend."""
    target = aten.fmod.Tensor if node.get_int("fmod", 0) else aten.remainder.Tensor
    return ctx.op(target, node.value(0), node.value(1))


def power(ctx: Context, node: OnnxNode) -> Value:
    """The result has the type of the base, whatever the exponent's."""
    base, exponent = node.value(0), node.value(1)
    kind = dtype(base)
    value = scalar(exponent)
    if value is not None and rank(exponent) <= rank(base):
        if not isinstance(value, int) and value.is_integer() and abs(value) < 2**31:
            value = int(value)
        if isinstance(value, int) and value < 0 and not kind.is_floating_point:
            base = ctx.op(aten._to_copy.default, base, dtype=torch.float64)
        result = ctx.op(aten.pow.Tensor_Scalar, base, value)
    else:
        result = ctx.op(aten.pow.Tensor_Tensor, base, exponent)
    return result if dtype(result) == kind else ctx.op(aten._to_copy.default, result, dtype=kind)


def mean(ctx: Context, node: OnnxNode) -> Value:
    """The mean of any number of operands."""
    total = variadic(aten.add.Tensor)(ctx, node)
    return ctx.op(aten.div.Tensor, total, float(len(node.operands)))


def clip(ctx: Context, node: OnnxNode) -> Value:
    """Bounds are attributes before opset 11 and inputs since."""
    x = node.value(0)
    if ctx.opset < 11:
        bounds = [node.attributes.get(name) for name in ("min", "max")]
        low, high = (None if b is None else float(b) for b in bounds)
        return _clamp(ctx, x, low, high)
    low_value, high_value = node.optional(1), node.optional(2)
    if isinstance(low_value, fx.Node) or isinstance(high_value, fx.Node):
        if low_value is not None:
            x = ctx.op(aten.maximum.default, x, low_value)
        return x if high_value is None else ctx.op(aten.minimum.default, x, high_value)
    return _clamp(
        ctx,
        x,
        None if low_value is None else number(low_value, "lower bound"),
        None if high_value is None else number(high_value, "upper bound"),
    )


def _clamp(ctx: Context, x: Value, low: float | None, high: float | None) -> Value:
    if low is None and high is None:
        return x
    return ctx.op(aten.clamp.default, x, low, high)


def cast(ctx: Context, node: OnnxNode) -> Value:
    """To the type the attribute names."""
    return to_dtype(ctx, node.value(0), torch_dtype(node.get_int("to", 0)))


def cast_like(ctx: Context, node: OnnxNode) -> Value:
    """To the type of another value."""
    return to_dtype(ctx, node.value(0), dtype(node.value(1)))


def to_dtype(ctx: Context, x: Value, kind: torch.dtype) -> Value:
    """`x` converted; itself when it has the type already."""
    return x if dtype(x) == kind else ctx.op(aten._to_copy.default, x, dtype=kind)


def where(ctx: Context, node: OnnxNode) -> Value:
    """Choose element by element."""
    return ctx.op(aten.where.self, node.value(0), node.value(1), node.value(2))


def is_inf(ctx: Context, node: OnnxNode) -> Value:
    """Infinities of the signs the attributes ask for."""
    x = node.value(0)
    positive, negative = node.get_int("detect_positive", 1), node.get_int("detect_negative", 1)
    if positive and negative:
        return ctx.op(aten.isinf.default, x)
    if not positive and not negative:
        raise Refused("it detects neither sign of infinity")
    return ctx.op(aten.eq.Scalar, x, float("inf") if positive else float("-inf"))


def comparison(target: Any, flipped: Any) -> Handler:
    """A comparison; one-element constants on either side become plain numbers."""

    def handler(ctx: Context, node: OnnxNode) -> Value:
        left, right = node.value(0), node.value(1)
        tensor, constant, overload = left, right, target
        if isinstance(right, fx.Node) and not isinstance(left, fx.Node):
            tensor, constant, overload = right, left, flipped
        value = scalar(constant)
        if isinstance(tensor, fx.Node) and value is not None and rank(constant) <= rank(tensor):
            return ctx.op(overload.Scalar, tensor, value)
        return ctx.op(target.Tensor, left, right)

    return handler


def bit_shift(ctx: Context, node: OnnxNode) -> Value:
    """Unsigned integers, to the left or to the right; 0 where all bits are shifted out."""
    kind = dtype(node.value(0))
    if kind != torch.uint8:
        raise Refused(f"its input is {kind}; of unsigned integers only 8 bits are compiled")
    left = node.get_str("direction", "") == "LEFT"
    target = aten.bitwise_left_shift.Tensor if left else aten.bitwise_right_shift.Tensor
    return ctx.op(target, node.value(0), node.value(1))


HANDLERS: dict[str, Handler] = {
    "Abs": unary(aten.abs.default),
    "Acos": unary(aten.acos.default),
    "Acosh": unary(aten.acosh.default),
    "Add": binary(aten.add.Tensor, commutes=True),
    "And": plain_binary(aten.logical_and.default),
    "Asin": unary(aten.asin.default),
    "Asinh": unary(aten.asinh.default),
    "Atan": unary(aten.atan.default),
    "Atanh": unary(aten.atanh.default),
    "BitShift": bit_shift,
    "BitwiseAnd": plain_binary(aten.bitwise_and.Tensor),
    "BitwiseNot": unary(aten.bitwise_not.default),
    "BitwiseOr": plain_binary(aten.bitwise_or.Tensor),
    "BitwiseXor": plain_binary(aten.bitwise_xor.Tensor),
    "Cast": cast,
    "CastLike": cast_like,
    "Ceil": unary(aten.ceil.default),
    "Clip": clip,
    "Cos": unary(aten.cos.default),
    "Cosh": unary(aten.cosh.default),
    "Div": div,
    "Equal": comparison(aten.eq, aten.eq),
    "Erf": unary(aten.erf.default),
    "Exp": unary(aten.exp.default),
    "Floor": unary(aten.floor.default),
    "Greater": comparison(aten.gt, aten.lt),
    "GreaterOrEqual": comparison(aten.ge, aten.le),
    "IsInf": is_inf,
    "IsNaN": unary(aten.isnan.default),
    "Less": comparison(aten.lt, aten.gt),
    "LessOrEqual": comparison(aten.le, aten.ge),
    "Log": unary(aten.log.default),
    "Max": variadic(aten.maximum.default),
    "Mean": mean,
    "Min": variadic(aten.minimum.default),
    "Mod": mod,
    "Mul": binary(aten.mul.Tensor, commutes=True),
    "Neg": unary(aten.neg.default),
    "Not": unary(aten.logical_not.default),
    "Or": plain_binary(aten.logical_or.default),
    "Pow": power,
    "Reciprocal": unary(aten.reciprocal.default),
    "Round": unary(aten.round.default),
    "Sign": unary(aten.sign.default),
    "Sin": unary(aten.sin.default),
    "Sinh": unary(aten.sinh.default),
    "Sqrt": unary(aten.sqrt.default),
    "Sub": binary(aten.sub.Tensor),
    "Sum": variadic(aten.add.Tensor),
    "Tan": unary(aten.tan.default),
    "Tanh": unary(aten.tanh.default),
    "Where": where,
    "Xor": plain_binary(aten.logical_xor.default),
}
