"""Recognize activation functions that are written out in elementary ops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.graph import shape, value
from graphopt.passes._formula import close, number, read_outside
from graphopt.passes._nodes import aten, bind, calls, is_float, only_user, same_type
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules

_CLAMPS = (aten.relu.default, aten.hardtanh.default, aten.clamp.default)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class FuseActivation(Pass):
    """Recognize activation functions written out in elementary ops, and merge clamps.

    ::

        x · sigmoid(x)                    →  silu(x)
        clamp(x + 3, 0, 6) / 6            →  hardsigmoid(x)
        clamp(x / 6 + 0.5, 0, 1)          →  hardsigmoid(x)
        x · clamp(x + 3, 0, 6) / 6        →  hardswish(x)
        clamp(relu(x), max=6)             →  hardtanh(x, 0, 6)

    in any order of the factors. Refused where an intermediate value is read elsewhere. GELU is
    recognized by `fuse_gelu`.
    """

    name = "fuse_activation"
    effect = APPROX(rtol=1e-5, atol=1e-6)
    after = ("canonicalize",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rules until none fits."""
        notes = NoteBook()
        rules: tuple[Rule[Any], ...] = (
            Rule("fuse activation", _PRODUCTS, _activation, _fused, _unshared),
            Rule("fuse hardsigmoid", _CLAMPS, _clamped_line, _fused, _unshared),
            Rule("merge clamps", _CLAMPS, _nested_clamps, _one_clamp),
            Rule("turn clamp from 0 into relu", (aten.clamp.default,), _half_clamp, _relu),
        )
        apply_rules(graph, rules, notes)
        return notes.result()


@dataclass(frozen=True)
class Found:
    """A recognized activation of `x`, the root node, and the nodes that only it may read."""

    op: Any
    x: fx.Node
    root: fx.Node
    inner: tuple[fx.Node, ...]


def _unshared(_gm: fx.GraphModule, found: Found) -> Refusal | None:
    return read_outside(found.root, found.inner)


def _fused(ed: Editor, found: Found) -> fx.Node:
    return ed.call(found.op, found.x)


def _activation(gm: fx.GraphModule, root: fx.Node) -> Found | None:
    if not is_float(root):
        return None
    product = _factors(gm, root)
    if product is None:
        return None
    coefficient, factors, products = product
    found: Found | None = None
    if len(factors) == 1 and close(coefficient, 1 / 6):
        found = _relu6_of_shifted(gm, factors[0], aten.hardsigmoid.default, root)
    elif len(factors) == 2:
        for x, other in (factors, factors[::-1]):
            found = found or _gated(gm, x, other, coefficient, root)
    if found is None or not same_type(value(found.x), value(root)):
        return None
    return Found(found.op, found.x, root, (*products, *found.inner))


def _gated(
    gm: fx.GraphModule, x: fx.Node, gate: fx.Node, coefficient: float, root: fx.Node
) -> Found | None:
    """x times a function of x."""
    for gate_op, op in (
        (aten.sigmoid.default, aten.silu.default),
        (aten.hardsigmoid.default, aten.hardswish.default),
    ):
        if calls(gate, gate_op) and gate.args[0] is x and close(coefficient, 1):
            return Found(op, x, root, (gate,))
    if close(coefficient, 1 / 6):
        found = _relu6_of_shifted(gm, gate, aten.hardswish.default, root)
        return found if found is not None and found.x is x else None
    return None


def _relu6_of_shifted(gm: fx.GraphModule, node: fx.Node, op: Any, root: fx.Node) -> Found | None:
    """clamp(x + 3, 0, 6)."""
    if _bounds(node) != (0.0, 6.0):
        return None
    shifted = node.args[0]
    x = _plus(gm, shifted, 3.0)
    return None if x is None else Found(op, x, root, (node, shifted))  # type: ignore[arg-type]


def _clamped_line(gm: fx.GraphModule, root: fx.Node) -> Found | None:
    """clamp(x / 6 + 0.5, 0, 1)."""
    if not is_float(root) or _bounds(root) != (0.0, 1.0):
        return None
    line = root.args[0]
    scaled = _plus(gm, line, 0.5)
    product = _factors(gm, scaled) if calls(scaled, *_PRODUCTS) else None
    if scaled is None or product is None or len(product[1]) != 1:
        return None
    if not close(product[0], 1 / 6):
        return None
    inner = (line, scaled, *product[2])
    return Found(aten.hardsigmoid.default, product[1][0], root, inner)  # type: ignore[arg-type]


def _factors(
    gm: fx.GraphModule, root: fx.Node | None
) -> tuple[float, list[fx.Node], list[fx.Node]] | None:
    """A product as its coefficient, its other factors (two at most), and inner products."""
    coefficient = 1.0
    factors: list[fx.Node] = []
    products: list[fx.Node] = []
    todo: list[object] = [root]
    while todo:
        at = todo.pop()
        given = number(gm, at)
        if given is not None:
            coefficient *= given
        elif not isinstance(at, fx.Node):
            return None
        elif calls(at, *_PRODUCTS) and (at is root or only_user(at) is not None):
            left, right = at.args[:2]
            if at is not root:
                products.append(at)
            if calls(at, aten.div.Tensor):
                given = number(gm, right)
                if not given:
                    return None
                coefficient /= given
                todo.append(left)
            else:
                todo.extend((left, right))
        else:
            factors.append(at)
        if len(factors) > 2 or len(products) > 3:
            return None
    return coefficient, factors, products


def _plus(gm: fx.GraphModule, node: object, wanted: float) -> fx.Node | None:
    """`x` where the node is x + wanted."""
    if not isinstance(node, fx.Node) or not calls(node, aten.add.Tensor) or node.kwargs:
        return None
    left, right = node.args[:2]
    for x, term in ((left, right), (right, left)):
        given = number(gm, term)
        if given is not None and close(given, wanted) and isinstance(x, fx.Node):
            return x if shape(x) == shape(node) else None
    return None


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a clamp."""
    if not calls(node, *_CLAMPS):
        return None
    a = bind(node)
    if calls(node, aten.relu.default):
        return 0.0, math.inf
    low, high = (a["min_val"], a["max_val"]) if "min_val" in a else (a["min"], a["max"])
    return (-math.inf if low is None else low, math.inf if high is None else high)


def _nested_clamps(_gm: fx.GraphModule, root: fx.Node) -> tuple[fx.Node, float, float] | None:
    inner = root.args[0]
    if not isinstance(inner, fx.Node) or only_user(inner) is None or not is_float(inner):
        return None
    first, then = _bounds(inner), _bounds(root)
    x = inner.args[0] if inner.args else None
    if first is None or then is None or not isinstance(x, fx.Node):
        return None
    # Reversed or NaN bounds have rules of their own.
    if not (first[0] <= first[1] and then[0] <= then[1]) or not same_type(value(x), value(root)):
        return None
    low, high = (min(max(bound, then[0]), then[1]) for bound in first)
    return x, low, high


def _one_clamp(ed: Editor, match: tuple[fx.Node, float, float]) -> fx.Node:
    x, low, high = match
    if (low, high) == (0.0, math.inf):
        return ed.call(aten.relu.default, x)
    if math.isfinite(low) and math.isfinite(high):
        return ed.call(aten.hardtanh.default, x, low, high)
    bounds = (bound if math.isfinite(bound) else None for bound in (low, high))
    return ed.call(aten.clamp.default, x, *bounds)


def _half_clamp(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if not is_float(node) or _bounds(node) != (0.0, math.inf):
        return None
    x = node.args[0]
    return x if isinstance(x, fx.Node) and same_type(value(x), value(node)) else None


def _relu(ed: Editor, x: fx.Node) -> fx.Node:
    return ed.call(aten.relu.default, x)
