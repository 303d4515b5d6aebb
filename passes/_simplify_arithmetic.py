"""Rules of the pass `simplify` for elementwise ops; they keep every bit, of -0.0 and NaN too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphopt.graph import constant, infer, value
from graphopt.passes._nodes import aten, calls, only_user, same_type
from graphopt.passes.rewrite import Editor, Refusal, Rule

_COMMUTATIVE = (
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.maximum.default,
    aten.minimum.default,
)

# What the op is called when its second operand is a number instead of a tensor.
_WITH_NUMBER: dict[Any, Any] = {
    aten.add.Tensor: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor,
    aten.mul.Tensor: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor,
    aten.eq.Tensor: aten.eq.Scalar,
    aten.ne.Tensor: aten.ne.Scalar,
    aten.lt.Tensor: aten.lt.Scalar,
    aten.le.Tensor: aten.le.Scalar,
    aten.gt.Tensor: aten.gt.Scalar,
    aten.ge.Tensor: aten.ge.Scalar,
}

_IDEMPOTENT = (
    aten.relu.default,
    aten.abs.default,
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.sign.default,
)
_INVOLUTIONS = (aten.neg.default, aten.logical_not.default)


def _constant_first(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, y = node.args[:2]
    movable = constant(gm, x) is not None and isinstance(y, fx.Node) and constant(gm, y) is None
    return node if movable else None


def _swap(ed: Editor, node: fx.Node) -> fx.Node:
    assert callable(node.target)
    return ed.call(node.target, node.args[1], node.args[0])


def _one_number(gm: fx.GraphModule, node: object) -> bool | int | float | None:
    """The number in a constant of one element."""
    tensor = constant(gm, node)
    if tensor is None or tensor.numel() != 1 or tensor.is_complex():
        return None
    return tensor.item()


def _numeric_operand(gm: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    """The node's form with a number in place of a constant of one element."""
    x, y = node.args[:2]
    number = _one_number(gm, y)
    if number is None or not isinstance(x, fx.Node) or constant(gm, x) is not None:
        return None
    if isinstance(number, bool):
        return None
    if calls(node, aten.maximum.default, aten.minimum.default):
        if math.isnan(number):
            return None
        bounds = (number, None) if calls(node, aten.maximum.default) else (None, number)
        form: tuple[Any, ...] = (aten.clamp.default, x, *bounds)
    else:
        form = (_WITH_NUMBER[node.target], x, number)
    # The constant may have raised the rank or the dtype of the result.
    if not same_type(infer(form[0], form[1:], {}), value(node)):
        return None
    return form


def _neutral(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """x * 1, x / 1, x - 0.0, x + -0.0, pow(x, 1): x, if that has the result's type."""
    x, y = node.args[:2]
    if not isinstance(x, fx.Node) or not same_type(value(x), value(node)):
        return None
    if isinstance(y, bool) or not isinstance(y, int | float):
        return None
    if calls(node, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar):
        return x if y == 1 else None
    return x if y == 0 else None


def _neutral_zero(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    x = _neutral(gm, node)
    return (node, x) if x is not None else None


def _zero_is_neutral(_gm: fx.GraphModule, match: tuple[fx.Node, fx.Node]) -> Refusal | None:
    node, x = match
    if not value(x).dtype.is_floating_point:
        return None
    number: Any = node.args[1]
    negative = math.copysign(1.0, number) < 0
    # x - 0.0 and x + -0.0 are x for every x; the other two are 0.0 for x = -0.0.
    if negative == calls(node, aten.add.Tensor):
        return None
    return Refusal("it turns -0.0 into 0.0")


def _tensor_of_ones(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, y = node.args[:2]
    tensor = constant(gm, y)
    if tensor is None or not isinstance(x, fx.Node) or not same_type(value(x), value(node)):
        return None
    return x if tensor.numel() > 1 and bool((tensor == 1).all()) else None


def _power(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    exact = value(node).dtype in (torch.float32, torch.float64)
    return node if exact and node.args[1] in (2, 0.5) else None


def _without_pow(ed: Editor, node: fx.Node) -> fx.Node:
    x = node.args[0]
    # PyTorch itself computes these two powers so.
    if node.args[1] == 2:
        return ed.call(aten.mul.Tensor, x, x)
    return ed.call(aten.sqrt.default, x)


def _reciprocal(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    one, x = node.args[:2]
    if _one_number(gm, one) != 1 or not isinstance(x, fx.Node) or constant(gm, x) is not None:
        return None
    return x if same_type(value(x), value(node)) and value(x).is_floating_point() else None


def _repeated(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    inner = node.args[0]
    return inner if isinstance(inner, fx.Node) and calls(inner, node.target) else None  # type: ignore[arg-type]


def _undone(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    inner = _repeated(gm, node)
    source = inner.args[0] if inner is not None else None
    if not isinstance(source, fx.Node) or not same_type(value(source), value(node)):
        return None
    return source


def _negated(_gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Any, Any] | None:
    """add or sub with a negated second operand that only it reads."""
    x, y = node.args[:2]
    if not calls(y, aten.neg.default) or only_user(y) is None or not isinstance(x, fx.Node):  # type: ignore[arg-type]
        return None
    opposite = aten.sub.Tensor if calls(node, aten.add.Tensor) else aten.add.Tensor
    return x, opposite, y.args[0]  # type: ignore[union-attr]


def _first(_ed: Editor, x: fx.Node) -> fx.Node:
    return x


def _second(_ed: Editor, match: tuple[fx.Node, fx.Node]) -> fx.Node:
    return match[1]


RULES: tuple[Rule[Any], ...] = (
    Rule("put the constant operand second", _COMMUTATIVE, _constant_first, _swap),
    Rule(
        "turn one-element constant into a number",
        (*_WITH_NUMBER, aten.maximum.default, aten.minimum.default),
        _numeric_operand,
        lambda ed, form: ed.call(*form),
    ),
    Rule(
        "drop mul, div or pow by 1",
        (aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar),
        _neutral,
        _first,
    ),
    Rule(
        "drop add or sub of 0",
        (aten.add.Tensor, aten.sub.Tensor),
        _neutral_zero,
        _second,
        _zero_is_neutral,
    ),
    Rule("drop mul or div by ones", (aten.mul.Tensor, aten.div.Tensor), _tensor_of_ones, _first),
    Rule("turn pow into mul or sqrt", (aten.pow.Tensor_Scalar,), _power, _without_pow),
    Rule(
        "turn 1 / x into reciprocal",
        (aten.div.Tensor,),
        _reciprocal,
        lambda ed, x: ed.call(aten.reciprocal.default, x),
    ),
    Rule("drop repeated op", _IDEMPOTENT, _repeated, _first),
    Rule("drop op undone by itself", _INVOLUTIONS, _undone, _first),
    Rule(
        "merge neg into add or sub",
        (aten.add.Tensor, aten.sub.Tensor),
        _negated,
        lambda ed, m: ed.call(m[1], m[0], m[2]),
    ),
)
