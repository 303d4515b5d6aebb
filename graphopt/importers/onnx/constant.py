"""ONNX constants, shapes as values, and operators that pass their input on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.importers.onnx.dtypes import to_torch, torch_dtype
from graphopt.importers.onnx.values import (
    LARGEST_EVALUATION,
    Context,
    OnnxNode,
    Refused,
    Value,
    dtype,
    elements,
    integers,
    number,
    shape,
)

aten = torch.ops.aten


def constant(ctx: Context, node: OnnxNode) -> Value:
    """The value in any of the attribute's forms."""
    attributes = node.attributes
    if "value" in attributes:
        return to_torch(attributes["value"].values)
    for name, kind in (("value_float", torch.float32), ("value_int", torch.int64)):
        if name in attributes:
            return torch.tensor(attributes[name], dtype=kind)
        if f"{name}s" in attributes:
            return torch.tensor(list(attributes[f"{name}s"]), dtype=kind)
    raise Refused(f"its value is a {', '.join(attributes) or 'nothing'}")


def constant_of_shape(ctx: Context, node: OnnxNode) -> Value:
    """One value over a shape."""
    sizes = integers(node.value(0), "sizes")
    fill: Any = node.attributes.get("value")
    value = torch.zeros(()) if fill is None else to_torch(fill.values).reshape(())
    if math.prod(sizes) > LARGEST_EVALUATION:
        return ctx.op(aten.expand.default, ctx.node(value), sizes)
    return value.expand(sizes).contiguous()


def shape_of(ctx: Context, node: OnnxNode) -> Value:
    """Shapes are static, so this is a constant whatever the input is."""
    sizes = shape(node.value(0))
    start, end = node.get_int("start", 0), node.get_int("end", len(sizes))
    return torch.tensor(sizes[slice(start, end)], dtype=torch.int64)


def size_of(ctx: Context, node: OnnxNode) -> Value:
    """The number of elements."""
    return torch.tensor(elements(node.value(0)), dtype=torch.int64)


def number_range(ctx: Context, node: OnnxNode) -> Value:
    """start, start + delta, … up to limit; constant."""
    start, limit, delta = (
        number(node.value(i), name) for i, name in enumerate(("start", "limit", "delta"))
    )
    count = max(math.ceil((limit - start) / delta), 0)
    if count > LARGEST_EVALUATION:
        raise Refused(f"it makes {count} numbers")
    first = node.value(0)
    assert isinstance(first, torch.Tensor)
    return (torch.arange(count, dtype=torch.float64) * delta + start).to(first.dtype)


def non_zero(ctx: Context, node: OnnxNode) -> Value:
    """Only of constants: of anything else the number of results is not known."""
    x = node.value(0)
    if isinstance(x, fx.Node):
        raise Refused("the size of its result depends on values")
    return torch.nonzero(x).T.contiguous()


def eye_like(ctx: Context, node: OnnxNode) -> Value:
    """Ones on a diagonal."""
    x = node.value(0)
    kind = torch_dtype(node.get_int("dtype", 0)) if "dtype" in node.attributes else dtype(x)
    rows, columns = shape(x)
    offset = node.get_int("k", 0)
    difference = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    return (difference == offset).to(kind)


def first_input(ctx: Context, node: OnnxNode) -> Value:
    """The input as it is."""
    return node.value(0)


def dropout(ctx: Context, node: OnnxNode) -> Value:
    """Nothing at inference; refused when the model says it is training."""
    node.only_first_output()
    training = node.optional(2)
    if training is not None and number(training, "training mode"):
        raise Refused("it is in training mode")
    return node.value(0)


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Dropout": dropout,
    "EyeLike": eye_like,
    "Identity": first_input,
    "NonZero": non_zero,
    "Range": number_range,
    "Shape": shape_of,
    "Size": size_of,
}
