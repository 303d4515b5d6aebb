"""ONNX reductions over axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from graphopt.importers.onnx.elementwise import to_dtype
from graphopt.importers.onnx.shape import axes_of
from graphopt.importers.onnx.values import Context, OnnxNode, Refused, Value, axis_of, dtype, rank

aten = torch.ops.aten
Reduce: TypeAlias = Callable[[Context, Value, list[int], bool], Value]


def reduction(reduce: Reduce, inputs_since: int = 18) -> Callable[[Context, OnnxNode], Value]:
    """A handler that reads axes (an input since opset `inputs_since`) and `keepdims`."""

    def handler(ctx: Context, node: OnnxNode) -> Value:
        x = node.value(0)
        axes = axes_of(ctx, node, inputs_since)
        if not axes:
            if node.get_int("noop_with_empty_axes", 0):
                # The reduction over no axes still applies its function to each element.
                return reduce(ctx, x, [], True) if rank(x) and reduce in _POINTWISE else x
            axes = list(range(rank(x)))
        return reduce(
            ctx, x, [axis_of(axis, rank(x)) for axis in axes], bool(node.get_int("keepdims", 1))
        )

    return handler


def total(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The sum, in the input's own type."""
    if not axes:
        return x
    if dtype(x).is_floating_point:
        return ctx.op(aten.sum.dim_IntList, x, axes, keep)
    return ctx.op(aten.sum.dim_IntList, x, axes, keep, dtype=dtype(x))


def mean(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The mean; of integers it is rounded towards zero."""
    if not axes:
        return x
    if dtype(x).is_floating_point:
        return ctx.op(aten.mean.dim, x, axes, keep)
    wide = to_dtype(ctx, x, torch.float64)
    return to_dtype(ctx, ctx.op(aten.mean.dim, wide, axes, keep), dtype(x))


def largest(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The maximum."""
    return ctx.op(aten.amax.default, x, axes, keep) if axes else x


def smallest(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The minimum."""
    return ctx.op(aten.amin.default, x, axes, keep) if axes else x


def product(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The product, one axis after the other."""
    for axis in sorted(axes, reverse=True):
        x = ctx.op(aten.prod.dim_int, x, axis, keep, dtype=dtype(x))
    return x


def sum_square(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The sum of squares."""
    return total(ctx, ctx.op(aten.mul.Tensor, x, x), axes, keep)


def l1(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The sum of magnitudes."""
    return total(ctx, ctx.op(aten.abs.default, x), axes, keep)


def l2(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The Euclidean length."""
    if not dtype(x).is_floating_point:
        raise Refused("it is of integers")
    return ctx.op(aten.sqrt.default, sum_square(ctx, x, axes, keep))


def log_sum(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """The logarithm of the sum."""
    return ctx.op(aten.log.default, total(ctx, x, axes, keep))


def log_sum_exp(ctx: Context, x: Value, axes: list[int], keep: bool) -> Value:
    """log(sum(exp(x))), with the largest x taken out first so that nothing overflows."""
    if not axes:
        return x
    top = largest(ctx, x, axes, True)
    shifted = ctx.op(aten.exp.default, ctx.op(aten.sub.Tensor, x, top))
    result = ctx.op(aten.add.Tensor, log_sum(ctx, shifted, axes, True), top)
    return result if keep else total(ctx, result, axes, False)


_POINTWISE: tuple[Reduce, ...] = (sum_square, l1, l2, log_sum)

HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {
    "ReduceL1": reduction(l1),
    "ReduceL2": reduction(l2),
    "ReduceLogSum": reduction(log_sum),
    "ReduceLogSumExp": reduction(log_sum_exp),
    "ReduceMax": reduction(largest),
    "ReduceMean": reduction(mean),
    "ReduceMin": reduction(smallest),
    "ReduceProd": reduction(product),
    "ReduceSum": reduction(total, inputs_since=13),
    "ReduceSumSquare": reduction(sum_square),
}
