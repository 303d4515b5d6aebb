"""ONNX activation functions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.importers.onnx.elementwise import unary
from graphopt.importers.onnx.values import Context, OnnxNode, Refused, Value, axis_of, rank, shape

aten = torch.ops.aten


def leaky_relu(ctx: Context, node: OnnxNode) -> Value:
    """x, or alpha x below zero."""
    return ctx.op(aten.leaky_relu.default, node.value(0), node.get_float("alpha", 0.01))


def elu(ctx: Context, node: OnnxNode) -> Value:
    """x, or alpha (exp(x) - 1) below zero."""
    return ctx.op(aten.elu.default, node.value(0), node.get_float("alpha", 1.0))


def selu(ctx: Context, node: OnnxNode) -> Value:
    """Elu times gamma; the defaults are the operator's own constants."""
    alpha = node.get_float("alpha", 1.6732632423543772)
    return ctx.op(
        aten.elu.default, node.value(0), alpha, node.get_float("gamma", 1.0507009873554805)
    )


def celu(ctx: Context, node: OnnxNode) -> Value:
    """x, or alpha (exp(x / alpha) - 1) below zero."""
    alpha = node.get_float("alpha", 1.0)
    return ctx.op(aten.elu.default, node.value(0), alpha, 1.0, 1.0 / alpha)


def hard_sigmoid(ctx: Context, node: OnnxNode) -> Value:
    """alpha x + beta clipped to [0, 1]; with 1/6 and 1/2 it is PyTorch's own."""
    x, alpha, beta = node.value(0), node.get_float("alpha", 0.2), node.get_float("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return ctx.op(aten.hardsigmoid.default, x)
    line = ctx.op(aten.add.Tensor, ctx.op(aten.mul.Tensor, x, alpha), beta)
    return ctx.op(aten.clamp.default, line, 0.0, 1.0)


def gelu(ctx: Context, node: OnnxNode) -> Value:
    """Exact, or with the tanh formula."""
    approximate = node.get_str("approximate", "none")
    return ctx.op(aten.gelu.default, node.value(0), approximate=approximate)


def prelu(ctx: Context, node: OnnxNode) -> Value:
    """x, or slope x below zero; the slope broadcasts like any operand."""
    x, slope = node.value(0), node.value(1)
    below = ctx.op(aten.lt.Scalar, x, 0)
    return ctx.op(aten.where.self, below, ctx.op(aten.mul.Tensor, x, slope), x)


def thresholded_relu(ctx: Context, node: OnnxNode) -> Value:
    """x where it is over alpha, else 0."""
    x = node.value(0)
    over = ctx.op(aten.gt.Scalar, x, node.get_float("alpha", 1.0))
    return ctx.op(aten.where.self, over, x, ctx.op(aten.mul.Tensor, x, 0.0))


def softplus(ctx: Context, node: OnnxNode) -> Value:
    """log(1 + exp(x))."""
    return _softplus(ctx, node.value(0))


def _softplus(ctx: Context, x: Value) -> Value:
    # max(x, 0) + log1p(exp(-|x|)) cannot overflow.
    small = ctx.op(aten.exp.default, ctx.op(aten.neg.default, ctx.op(aten.abs.default, x)))
    return ctx.op(aten.add.Tensor, ctx.op(aten.relu.default, x), ctx.op(aten.log1p.default, small))


def softsign(ctx: Context, node: OnnxNode) -> Value:
    """x / (1 + |x|)."""
    x = node.value(0)
    return ctx.op(aten.div.Tensor, x, ctx.op(aten.add.Tensor, ctx.op(aten.abs.default, x), 1.0))


def mish(ctx: Context, node: OnnxNode) -> Value:
    """x tanh(softplus(x))."""
    x = node.value(0)
    return ctx.op(aten.mul.Tensor, x, ctx.op(aten.tanh.default, _softplus(ctx, x)))


def swish(ctx: Context, node: OnnxNode) -> Value:
    """x sigmoid(alpha x)."""
    x, alpha = node.value(0), node.get_float("alpha", 1.0)
    if alpha == 1.0:
        return ctx.op(aten.silu.default, x)
    scaled = ctx.op(aten.mul.Tensor, x, alpha)
    return ctx.op(aten.mul.Tensor, x, ctx.op(aten.sigmoid.default, scaled))


def softmax(ctx: Context, node: OnnxNode) -> Value:
    """Along one axis; before opset 13 over all axes from `axis` on taken together."""
    return _along(ctx, node, lambda x, axis: ctx.op(aten.softmax.int, x, axis))


def log_softmax(ctx: Context, node: OnnxNode) -> Value:
    """x - log(sum(exp(x))), with the largest x taken out first so that nothing overflows."""

    def apply(x: Value, axis: int) -> Value:
        shifted = ctx.op(aten.sub.Tensor, x, ctx.op(aten.amax.default, x, [axis], True))
        exponentials = ctx.op(aten.exp.default, shifted)
        total = ctx.op(aten.sum.dim_IntList, exponentials, [axis], True)
        return ctx.op(aten.sub.Tensor, shifted, ctx.op(aten.log.default, total))

    return _along(ctx, node, apply)


def _along(ctx: Context, node: OnnxNode, apply: Callable[[Value, int], Value]) -> Value:
    x = node.value(0)
    if rank(x) == 0:
        raise Refused("its input has no dimensions")
    axis = axis_of(node.get_int("axis", -1 if ctx.opset >= 13 else 1), rank(x))
    sizes = shape(x)
    if ctx.opset >= 13 or all(size == 1 for size in sizes[axis + 1 :]):
        return apply(x, axis)
    outer = ctx.op(aten.reshape.default, x, [*sizes[:axis], -1])
    return ctx.op(aten.reshape.default, apply(outer, axis), list(sizes))


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {
    "Celu": celu,
    "Elu": elu,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": unary(aten.hardswish.default),
    "LeakyRelu": leaky_relu,
    "LogSoftmax": log_softmax,
    "Mish": mish,
    "PRelu": prelu,
    "Relu": unary(aten.relu.default),
    "Selu": selu,
    "Sigmoid": unary(aten.sigmoid.default),
    "Softmax": softmax,
    "Softplus": softplus,
    "Softsign": softsign,
    "Swish": swish,
    "ThresholdedRelu": thresholded_relu,
}
