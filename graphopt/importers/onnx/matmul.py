"""ONNX matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from graphopt.importers.onnx.shape import expand_to, permute_to, reshape_to
from graphopt.importers.onnx.values import Context, OnnxNode, Value, dtype, elements, rank, shape

aten = torch.ops.aten


def matmul(ctx: Context, node: OnnxNode) -> Value:
    """numpy's matmul; by a constant matrix it is a linear layer."""
    left, right = node.value(0), node.value(1)
    by_matrix = isinstance(left, fx.Node) and isinstance(right, torch.Tensor) and rank(right) == 2
    if by_matrix and dtype(left).is_floating_point:
        return ctx.op(aten.linear.default, left, _named_transpose(ctx, right))
    return ctx.op(aten.matmul.default, left, right)


def gemm(ctx: Context, node: OnnxNode) -> Value:
    """alpha A B + beta C, with A and B optionally transposed."""
    left, right, addend = node.value(0), node.value(1), node.optional(2)
    alpha, beta = node.get_float("alpha", 1.0), node.get_float("beta", 1.0)
    if node.get_int("transA", 0):
        left = permute_to(ctx, left, (1, 0))
    if not dtype(left).is_floating_point:
        return _integer_gemm(ctx, node, left, right, addend)
    weight = right if node.get_int("transB", 0) else _named_transpose(ctx, right)
    if alpha != 1.0:
        weight = ctx.op(aten.mul.Tensor, weight, alpha)
    if addend is None or beta == 0.0:
        return ctx.op(aten.linear.default, left, weight)
    if beta != 1.0:
        addend = ctx.op(aten.mul.Tensor, addend, beta)
    columns = shape(weight)[0]
    if elements(addend) == (shape(addend)[-1] if rank(addend) else 1):
        bias = reshape_to(ctx, addend, [elements(addend)])
        return ctx.op(aten.linear.default, left, weight, expand_to(ctx, bias, [columns]))
    return ctx.op(aten.add.Tensor, ctx.op(aten.linear.default, left, weight), addend)


def _integer_gemm(
    ctx: Context, node: OnnxNode, left: Value, right: Value, addend: Value | None
) -> Value:
    if node.get_int("transB", 0):
        right = permute_to(ctx, right, (1, 0))
    result = ctx.op(aten.matmul.default, left, right)
    if node.get_float("alpha", 1.0) != 1.0:
        result = ctx.op(aten.mul.Tensor, result, int(node.get_float("alpha", 1.0)))
    if addend is None:
        return result
    return ctx.op(aten.add.Tensor, result, addend, alpha=int(node.get_float("beta", 1.0)))


def _named_transpose(ctx: Context, weight: Value) -> Value:
    """The transpose; a constant keeps its name in the ONNX file."""
    turned = permute_to(ctx, weight, (1, 0))
    if isinstance(weight, torch.Tensor) and isinstance(turned, torch.Tensor):
        _, name = ctx.names.get(id(weight), (weight, "weight"))
        ctx.name(turned, name)
    return turned


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {"Gemm": gemm, "MatMul": matmul}
