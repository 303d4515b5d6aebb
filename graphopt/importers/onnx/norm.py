"""ONNX normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from graphopt.importers.onnx.shape import constant_pad, expand_to, reshape_to
from graphopt.importers.onnx.values import Context, OnnxNode, Refused, Value, axis_of, rank, shape

aten = torch.ops.aten


def batch_norm(ctx: Context, node: OnnxNode) -> Value:
    """With the stored mean and variance, or in training mode with those of the batch."""
    if any(node.used[1:]):
        raise Refused("its running statistics are results of the model")
    if ctx.opset < 9 and not node.get_int("spatial", 1):
        raise Refused("spatial = 0")
    x, scale, bias, mean, variance = (node.value(i) for i in range(5))
    eps = node.get_float("epsilon", 1e-5)
    if node.get_int("training_mode", 0):
        # What a network that standardizes its weights (NFNet) is exported with.
        axes = [axis for axis in range(rank(x)) if axis != 1]
        return _scale_channels(ctx, _standardise(ctx, x, axes, eps), scale, bias)
    return ctx.op(aten.batch_norm.default, x, scale, bias, mean, variance, False, 0.0, eps, False)


def layer_norm(ctx: Context, node: OnnxNode) -> Value:
    """Over all axes from `axis` on."""
    node.only_first_output()
    x, scale, bias = node.value(0), node.value(1), node.optional(2)
    over = list(shape(x)[axis_of(node.get_int("axis", -1), rank(x)) :])
    scale = expand_to(ctx, scale, over)
    bias = None if bias is None else expand_to(ctx, bias, over)
    eps = node.get_float("epsilon", 1e-5)
    return ctx.op(aten.layer_norm.default, x, over, scale, bias, eps, False)


def rms_norm(ctx: Context, node: OnnxNode) -> Value:
    """x over the root of its mean square, times scale."""
    x, scale = node.value(0), node.value(1)
    axes = list(range(axis_of(node.get_int("axis", -1), rank(x)), rank(x)))
    square = ctx.op(aten.mean.dim, ctx.op(aten.mul.Tensor, x, x), axes, True)
    shifted = ctx.op(aten.add.Tensor, square, node.get_float("epsilon", 1e-5))
    normal = ctx.op(aten.div.Tensor, x, ctx.op(aten.sqrt.default, shifted))
    return ctx.op(aten.mul.Tensor, normal, scale)


def instance_norm(ctx: Context, node: OnnxNode) -> Value:
    """Per sample and channel."""
    x, scale, bias = node.value(0), node.value(1), node.value(2)
    normal = _standardise(ctx, x, list(range(2, rank(x))), node.get_float("epsilon", 1e-5))
    return _scale_channels(ctx, normal, scale, bias)


def group_norm(ctx: Context, node: OnnxNode) -> Value:
    """Per sample and group of channels; scale and bias are per group before opset 21."""
    x, scale, bias = node.value(0), node.value(1), node.value(2)
    sizes = shape(x)
    groups = node.get_int("num_groups", 1)
    grouped = reshape_to(ctx, x, [sizes[0], groups, sizes[1] // groups, *sizes[2:]])
    axes = list(range(2, rank(x) + 1))
    normal = _standardise(ctx, grouped, axes, node.get_float("epsilon", 1e-5))
    if ctx.opset < 21:
        scale, bias = (_for_channels(ctx, value, sizes[1]) for value in (scale, bias))
    return _scale_channels(ctx, reshape_to(ctx, normal, sizes), scale, bias)


def _for_channels(ctx: Context, per_group: Value, channels: int) -> Value:
    """A number for each group, given to each of its channels."""
    (groups,) = shape(per_group)
    apart = reshape_to(ctx, per_group, [groups, 1])
    return reshape_to(ctx, expand_to(ctx, apart, [groups, channels // groups]), [channels])


def _standardise(ctx: Context, x: Value, axes: list[int], eps: float) -> Value:
    centred = ctx.op(aten.sub.Tensor, x, ctx.op(aten.mean.dim, x, axes, True))
    variance = ctx.op(aten.mean.dim, ctx.op(aten.mul.Tensor, centred, centred), axes, True)
    deviation = ctx.op(aten.sqrt.default, ctx.op(aten.add.Tensor, variance, eps))
    return ctx.op(aten.div.Tensor, centred, deviation)


def _scale_channels(ctx: Context, x: Value, scale: Value, bias: Value) -> Value:
    along = [-1 if i == 1 else 1 for i in range(rank(x))]
    along[1] = shape(x)[1]
    scaled = ctx.op(aten.mul.Tensor, x, reshape_to(ctx, scale, along))
    return ctx.op(aten.add.Tensor, scaled, reshape_to(ctx, bias, along))


def lp_norm(ctx: Context, node: OnnxNode) -> Value:
    """x over its length along an axis."""
    x, order = node.value(0), node.get_int("p", 2)
    axis = axis_of(node.get_int("axis", -1), rank(x))
    if order == 1:
        length = ctx.op(aten.sum.dim_IntList, ctx.op(aten.abs.default, x), [axis], True)
    elif order == 2:
        squares = ctx.op(aten.sum.dim_IntList, ctx.op(aten.mul.Tensor, x, x), [axis], True)
        length = ctx.op(aten.sqrt.default, squares)
    else:
        raise Refused(f"p = {order}")
    # Where the length is 0 so is x, and the result is 0 as well.
    zero = ctx.op(aten.eq.Scalar, length, 0.0)
    one = torch.ones((), dtype=torch.float32)
    return ctx.op(aten.div.Tensor, x, ctx.op(aten.where.self, zero, one, length))


def local_response_norm(ctx: Context, node: OnnxNode) -> Value:
    """x / (bias + alpha mean(x²))^beta, the mean over `size` neighbouring channels."""
    x, size = node.value(0), node.get_int("size", 1)
    sizes = shape(x)
    squares = reshape_to(
        ctx, ctx.op(aten.mul.Tensor, x, x), [sizes[0], 1, sizes[1], math.prod(sizes[2:])]
    )
    before = (size - 1) // 2
    padded = constant_pad(ctx, squares, [(0, 0), (0, 0), (before, size - 1 - before), (0, 0)])
    mean = ctx.op(aten.avg_pool2d.default, padded, [size, 1], [1, 1])
    scaled = ctx.op(aten.mul.Tensor, reshape_to(ctx, mean, sizes), node.get_float("alpha", 1e-4))
    base = ctx.op(aten.add.Tensor, scaled, node.get_float("bias", 1.0))
    return ctx.op(
        aten.div.Tensor, x, ctx.op(aten.pow.Tensor_Scalar, base, node.get_float("beta", 0.75))
    )


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {
    "BatchNormalization": batch_norm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": local_response_norm,
    "LayerNormalization": layer_norm,
    "LpNormalization": lp_norm,
    "RMSNormalization": rms_norm,
}
