"""Recognize layer normalization where it is written out in elementary ops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes._formula import number, read_outside
from graphopt.passes._nodes import aten, bind, calls, only_user, other_readers, rank
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Recognize layer normalization written out, and take its weight and bias in.

    ::

        x ─┬─ mean ─ sub ─┬───────────────────────────────────── div ─   →   layer_norm(x)
           └─────────┘    └─ mul(self) ─ mean ─ add(eps) ─ sqrt ──┘

        layer_norm(x) ─ mul(w) ─ add(b)   →   layer_norm(x, w, b)

    The square may be a power, the root a reciprocal one to multiply with, and weight and bias may
    be folded in as `x · k + (b − mean · k)` with `k = w / √(variance + eps)`. Refused where means
    run over other than the trailing dimensions, where eps is added to the root instead, where an
    intermediate value is read elsewhere, and in half precision, where the sums would round
    differently.
    """

    name = "fuse_layer_norm"
    # The same sums in another order.
    effect = APPROX(rtol=1e-5, atol=1e-6)
    after = ("canonicalize",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rules until none fits."""
        notes = NoteBook()
        rules: tuple[Rule[Any], ...] = (
            Rule("fuse layer_norm", (aten.div.Tensor, aten.mul.Tensor), _quotient, _norm, _check),
            Rule("fuse layer_norm", (aten.add.Tensor,), _folded, _norm, _check),
            Rule(
                "take weight or bias into layer_norm",
                (aten.mul.Tensor, aten.add.Tensor),
                _factor,
                _with_factor,
                _unread,
            ),
        )
        apply_rules(graph, rules, notes)
        return notes.result()


@dataclass(frozen=True)
class Spread:
    """A node that is √(mean((x − mean(x))²) + eps), or 1 over it, and the nodes it is made of.

    Attributes:
        outside: eps is added to the root and not under it.
    """

    x: fx.Node
    mean: fx.Node
    axes: tuple[int, ...]
    eps: float
    inner: tuple[fx.Node, ...]
    outside: bool = False


@dataclass(frozen=True)
class Found:
    """A written-out normalization: its root, its parts, and the nodes only it may read."""

    root: fx.Node
    spread: Spread
    inner: tuple[fx.Node, ...]
    weight: Any = None
    bias: Any = None

    @property
    def sizes(self) -> list[int]:
        """The normalized dimensions."""
        return [g.shape(self.spread.x)[axis] for axis in self.spread.axes]


def _quotient(gm: fx.GraphModule, root: fx.Node) -> Found | None:
    """(x − mean) / spread, or times its reciprocal; one of the factors may be times a weight."""
    over: list[Any] = []
    products: list[fx.Node] = []
    factors = root.args[:1] if calls(root, aten.div.Tensor) else root.args[:2]
    for factor in factors:
        if isinstance(factor, fx.Node) and calls(factor, aten.mul.Tensor):
            products.append(factor)
            over.extend(factor.args[:2])
        else:
            over.append(factor)
    centred = next((factor for factor in over if calls(factor, aten.sub.Tensor)), None)
    if centred is None:
        return None
    over.remove(centred)
    spread: Spread | None = None
    if calls(root, aten.div.Tensor):
        spread = _root(gm, root.args[1])
    for factor in over if spread is None else ():
        spread = _inverse_root(gm, factor)
        if spread is not None:
            over.remove(factor)
            break
    if spread is None or centred.args[:2] != (spread.x, spread.mean) or len(over) > 1:
        return None
    inner = (*products, centred, spread.mean, *spread.inner)
    found = Found(root, spread, inner, *over)
    if over and not _spans(gm, found.weight, found.sizes, root):
        return None
    return found


def _folded(gm: fx.GraphModule, root: fx.Node) -> Found | None:
    """x · k + (bias − mean · k), with k = weight / spread."""
    for scaled, moved in (root.args[:2], root.args[1::-1]):
        if not (calls(scaled, aten.mul.Tensor) and calls(moved, aten.sub.Tensor)):
            continue
        bias, product = moved.args[:2]  # type: ignore[union-attr]
        if not calls(product, aten.mul.Tensor):
            continue
        for x, k in (scaled.args[:2], scaled.args[1::-1]):  # type: ignore[union-attr]
            if not isinstance(k, fx.Node) or not calls(k, aten.mul.Tensor):
                continue
            for inverse, weight in (k.args[:2], k.args[1::-1]):
                spread = _inverse_root(gm, inverse)
                if spread is None or spread.x is not x:
                    continue
                if set(product.args[:2]) != {spread.mean, k}:  # type: ignore[union-attr]
                    continue
                inner: Any = (scaled, moved, product, k, spread.mean, *spread.inner)
                found = Found(root, spread, inner, weight, bias)
                if all(_spans(gm, operand, found.sizes, root) for operand in (weight, bias)):
                    return found
    return None


def _root(gm: fx.GraphModule, node: Any) -> Spread | None:
    if calls(node, aten.add.Tensor):
        # The other way to keep off zero; PyTorch's layer_norm has none such.
        for inside, eps in (node.args[:2], node.args[1::-1]):
            spread = _root(gm, inside)
            if spread is not None and number(gm, eps) is not None:
                return Spread(spread.x, spread.mean, spread.axes, 0.0, spread.inner, outside=True)
        return None
    if calls(node, aten.sqrt.default) or _is_power(node, 0.5):
        return _variance(gm, node.args[0], (node,))
    return None


def _inverse_root(gm: fx.GraphModule, node: Any) -> Spread | None:
    if calls(node, aten.rsqrt.default) or _is_power(node, -0.5):
        return _variance(gm, node.args[0], (node,))
    if calls(node, aten.reciprocal.default):
        under = node.args[0]
    elif calls(node, aten.div.Tensor) and number(gm, node.args[0]) == 1:
        under = node.args[1]
    else:
        return None
    spread = _root(gm, under)
    if spread is None:
        return None
    inner = (node, *spread.inner)
    return Spread(spread.x, spread.mean, spread.axes, spread.eps, inner, spread.outside)


def _variance(gm: fx.GraphModule, node: object, above: tuple[fx.Node, ...]) -> Spread | None:
    """mean((x − mean)²), with or without eps."""
    eps = 0.0
    if calls(node, aten.add.Tensor):
        assert isinstance(node, fx.Node)
        for inside, term in (node.args[:2], node.args[1::-1]):
            given = number(gm, term)
            if given is not None:
                eps, above, node = given, (*above, node), inside
                break
    outer = _mean(node)
    if outer is None or not (math.isfinite(eps) and eps >= 0):
        return None
    square, axes, means = outer
    centred = square.args[0]
    multiplied = calls(square, aten.mul.Tensor) and square.args[1] is centred
    if not (multiplied or _is_power(square, 2)) or not isinstance(centred, fx.Node):
        return None
    if not calls(centred, aten.sub.Tensor):
        return None
    # Squared, mean − x is as good as x − mean.
    for x, mean in (centred.args[:2], centred.args[1::-1]):
        under = _mean(mean)
        if under is not None and under[0] is x and under[1] == axes:
            assert isinstance(x, fx.Node)
            assert isinstance(mean, fx.Node)
            inner = (*above, *means, square, centred, *under[2])
            return Spread(x, mean, axes, eps, inner)
    return None


def _mean(node: object) -> tuple[fx.Node, tuple[int, ...], tuple[fx.Node, ...]] | None:
    """What the node is the mean of, over which dimensions (kept as 1), and the nodes of it."""
    nodes: tuple[fx.Node, ...] = ()
    kept: tuple[int, ...] | None = None
    if calls(node, aten.reshape.default):
        assert isinstance(node, fx.Node)
        nodes, kept, node = (node,), g.shape(node), node.args[0]
    if not isinstance(node, fx.Node) or not calls(node, aten.mean.dim):
        return None
    a = bind(node)
    axes = tuple(a["dim"])
    sizes = [1 if axis in axes else n for axis, n in enumerate(g.shape(a["self"]))]
    if a["dtype"] is not None or (kept or g.shape(node)) != tuple(sizes):
        return None
    return a["self"], axes, (node, *nodes)


def _is_power(node: Any, exponent: float) -> bool:
    return calls(node, aten.pow.Tensor_Scalar) and node.args[1] == exponent


def _check(_gm: fx.GraphModule, found: Found) -> Refusal | None:
    spread = found.spread
    dims = rank(spread.x)
    if spread.outside:
        return Refusal("eps is added to the standard deviation, not to the variance")
    if spread.axes != tuple(range(dims - len(spread.axes), dims)):
        return Refusal(f"it normalizes dimensions {list(spread.axes)} of {dims}, not trailing ones")
    if g.value(found.root).dtype not in _DTYPES:
        return Refusal(f"sums in {g.value(found.root).dtype} would round differently")
    return read_outside(found.root, found.inner)


def _norm(ed: Editor, found: Found) -> fx.Node:
    weight, bias = (
        None if operand is None else _spread_out(ed, operand, found.sizes)
        for operand in (found.weight, found.bias)
    )
    spread = found.spread
    return ed.call(aten.layer_norm.default, spread.x, found.sizes, weight, bias, spread.eps, True)


def _factor(gm: fx.GraphModule, root: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """A layer_norm that has room for the constant it is multiplied with, or that is added."""
    for norm, other in (root.args[:2], root.args[1::-1]):
        if not isinstance(norm, fx.Node) or not calls(norm, aten.layer_norm.default):
            continue
        a = bind(norm)
        free = a["bias"] is None
        if calls(root, aten.mul.Tensor):
            free = free and a["weight"] is None
        if free and _spans(gm, other, a["normalized_shape"], root):
            return root, norm, other  # type: ignore[return-value]
    return None


def _spans(gm: fx.GraphModule, operand: Any, sizes: list[int], root: fx.Node) -> bool:
    """Whether the operand is a constant that only varies along the normalized dimensions."""
    tensor = g.constant(gm, operand)
    if tensor is None or tensor.dtype != g.value(root).dtype or tensor.ndim > rank(root):
        return False
    if tensor.numel() == 1 != math.prod(sizes):
        return False  # a number: later passes merge it with others
    leading = tensor.shape[: max(0, tensor.ndim - len(sizes))]
    return all(n == 1 for n in leading)


def _unread(_gm: fx.GraphModule, match: tuple[fx.Node, fx.Node, fx.Node]) -> Refusal | None:
    root, norm, _ = match
    if only_user(norm) is root:
        return None
    others = other_readers(norm, root)
    return Refusal(f"the result of {norm.name} is also read by {others or 'the same op'}")


def _with_factor(ed: Editor, match: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node:
    root, norm, other = match
    a = bind(norm)
    name = "weight" if calls(root, aten.mul.Tensor) else "bias"
    a[name] = _spread_out(ed, other, list(a["normalized_shape"]))
    origin = g.merge_origins((norm, root))
    return ed.call(aten.layer_norm.default, *a.values(), origin=origin)


def _spread_out(ed: Editor, operand: fx.Node, sizes: list[int]) -> fx.Node:
    """The constant in the shape of the normalized dimensions."""
    tensor = g.constant(ed.gm, operand)
    assert tensor is not None
    if list(tensor.shape) == sizes:
        return operand
    tail = tensor.reshape(tensor.shape[max(0, tensor.ndim - len(sizes)) :])
    hint = str(operand.target)
    return ed.constant(hint, tail.expand(sizes).contiguous(), g.origin(operand))
