"""Recognize scaled dot-product attention where it is written out as products and a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes._formula import number, read_outside
from graphopt.passes._nodes import aten, calls, only_user, rank
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules

# Adding this to a score leaves e^score = 0 beside any other score, and beside nothing but equals
# leaves them equal: a float32 score is lost in the rounding.
AS_GOOD_AS_MINUS_INFINITY = -1e9


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Recognize attention written out as two products and a softmax.

    ::

        q ──────────── matmul ─ mul(scale) ─ add(mask) ─ softmax ─ matmul ─
        k ─ permute ─────┘                                 v ────────┘

                →   scaled_dot_product_attention(q, k, v, mask, scale=scale)

    The scale may be a factor or divisor of q, of k or of the scores; there may be several masks,
    added or selected with `where`; the keys may be transposed on their own or together with the
    heads; the second product may be transposed, `vᵀ · softmaxᵀ`, its result then is, too; and
    `where(isnan(shares), 0, shares)` may guard against rows without anything to attend to.

    Refused where the softmax runs over another axis, where scores or shares are read elsewhere,
    where q, k and v have different batch dimensions or are not float32, where a mask is wider
    than the scores, and where masked scores are set to a number that does not act as −∞. A row in
    which all scores are −∞ becomes 0, as PyTorch defines it, instead of NaN.
    """

    name = "fuse_attention"
    # The scale moves past a sum, and the softmax divides after the product or before it.
    effect = APPROX(rtol=2e-5, atol=1e-6)
    after = ("canonicalize",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rule until it fits nowhere."""
        notes = NoteBook()
        rule = Rule("fuse attention", (aten.matmul.default,), _attention, _fused, _check)
        apply_rules(graph, (rule,), notes)
        return notes.result()


@dataclass(frozen=True)
class Mask:
    """What is added to the scores: `tensor · factor`, or `number` where `tensor` is `when`."""

    tensor: fx.Node
    factor: float = 1.0
    when: bool | None = None
    number: float = 0.0


@dataclass(frozen=True)
class Operand:
    """`source` with its dimensions in another order, times a number."""

    source: fx.Node
    order: tuple[int, ...]
    scale: float


@dataclass(frozen=True)
class Scores:
    """How the scores come about: `product · scale` plus masks; `inner` are the nodes between."""

    product: fx.Node
    scale: float
    masks: tuple[Mask, ...]
    inner: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Found:
    """An attention: its root, its softmax and what it is the softmax of; `v` or its transpose."""

    root: fx.Node
    softmax: fx.Node
    scores: Scores
    q: Operand
    k_transposed: Operand
    v: fx.Node
    v_transposed: bool
    inner: tuple[fx.Node, ...]


def _attention(gm: fx.GraphModule, root: fx.Node) -> Found | None:
    left, right = root.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    swap: tuple[fx.Node, ...] = ()
    shares, v = left, right
    if _swaps_last(right):
        shares, v, swap = right.all_input_nodes[0], left, (right,)
    softmax, guard = _guarded(gm, shares)
    if not calls(softmax, aten.softmax.int) or rank(v) < 2:
        return None
    scores = _scores(gm, softmax.args[0])
    if scores is None:
        return None
    q, k = (_operand(gm, side, scores.product) for side in scores.product.args[:2])
    inner = (*swap, *guard, softmax, *scores.inner)
    return Found(root, softmax, scores, q, k, v, bool(swap), inner)


def _guarded(gm: fx.GraphModule, shares: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """`x` and the nodes around it where the node is where(isnan(x), 0, x), as PyTorch exports."""
    if calls(shares, aten.where.self):
        nan, zero, x = shares.args[:3]
        if calls(nan, aten.isnan.default) and number(gm, zero) == 0 and isinstance(x, fx.Node):
            assert isinstance(nan, fx.Node)
            if nan.args[0] is x:
                return x, (shares, nan)
    return shares, ()


def _swaps_last(node: object) -> bool:
    """Whether the node only swaps the last two dimensions."""
    if not isinstance(node, fx.Node) or not calls(node, aten.permute.default):
        return False
    dims = rank(node)
    order = list(range(dims))
    return dims >= 2 and list(node.args[1]) == [*order[:-2], dims - 1, dims - 2]  # type: ignore[arg-type]


def _scores(gm: fx.GraphModule, node: object, factor: float = 1.0) -> Scores | None:
    """Follow what is scaled and masked down to a product; `factor` is what it is times later."""
    if not isinstance(node, fx.Node) or node.kwargs:
        return None
    if calls(node, aten.matmul.default):
        if min(rank(side) for side in node.all_input_nodes) < 2:
            return None
        return Scores(node, factor, (), (node,))
    scaled = _scaled(gm, node)
    if scaled is not None:
        return _above(node, _scores(gm, scaled[0], factor * scaled[1]))
    if calls(node, aten.add.Tensor):
        for scores, mask in (node.args[:2], node.args[1::-1]):
            found = _scores(gm, scores, factor)
            if found is not None and isinstance(mask, fx.Node):
                return _above(node, found, Mask(mask, factor))
    if calls(node, aten.where.self):
        condition, yes, no = node.args[:3]
        assert isinstance(condition, fx.Node)
        for scores, fill, when in ((yes, no, False), (no, yes, True)):
            given = number(gm, fill)
            found = None if given is None else _scores(gm, scores, factor)
            if found is not None and given is not None:
                return _above(node, found, Mask(condition, when=when, number=given * factor))
    return None


def _above(node: fx.Node, scores: Scores | None, *masks: Mask) -> Scores | None:
    if scores is None:
        return None
    return Scores(scores.product, scores.scale, (*scores.masks, *masks), (node, *scores.inner))


def _scaled(gm: fx.GraphModule, node: object) -> tuple[fx.Node, float] | None:
    """What the node multiplies with a number, and the number."""
    if not isinstance(node, fx.Node) or not calls(node, aten.mul.Tensor, aten.div.Tensor):
        return None
    x, by = node.args[:2]
    given = number(gm, by)
    if given is None and calls(node, aten.mul.Tensor):
        x, given = by, number(gm, x)
    if given is None or not isinstance(x, fx.Node) or g.shape(x) != g.shape(node):
        return None
    if calls(node, aten.div.Tensor):
        given = 1 / given if given else math.inf
    return (x, given) if math.isfinite(given) else None


def _operand(gm: fx.GraphModule, side: Any, reader: fx.Node) -> Operand:
    """The side of a product with its permutes and factors taken off, if only it reads them."""
    at: fx.Node = side
    order = tuple(range(rank(at)))
    scale = 1.0
    while only_user(at) is reader:
        reader, scaled = at, _scaled(gm, at)
        if scaled is not None:
            at, scale = scaled[0], scale * scaled[1]
        elif calls(at, aten.permute.default):
            dims: Any = at.args[1]
            at, order = at.all_input_nodes[0], tuple(dims[dim] for dim in order)
        else:
            break
    return Operand(at, order, scale)


def _check(_gm: fx.GraphModule, found: Found) -> Refusal | None:
    softmax, product = found.softmax, found.scores.product
    dims = rank(softmax)
    if softmax.args[1] != dims - 1:
        return Refusal(f"the softmax runs over dimension {softmax.args[1]} of {dims}, not the last")
    shared = read_outside(found.root, found.inner)
    if shared is not None:
        return shared
    sides = [*product.args[:2], found.v]
    batches = [list(g.shape(side)[:-2]) for side in sides]  # type: ignore[arg-type]
    if any(batch != batches[0] for batch in batches):
        return Refusal(f"q, k and v have different batch dimensions: {batches}")
    if g.value(found.root).dtype != torch.float32:
        return Refusal(f"it computes in {g.value(found.root).dtype}, not in float32")
    for mask in found.scores.masks:
        problem = _mask_problem(mask, g.shape(product))
        if problem:
            return Refusal(problem)
    return None


def _mask_problem(mask: Mask, scores: tuple[int, ...]) -> str:
    sizes = g.shape(mask.tensor)
    # Lined up from the last dimension, each size is 1 or the scores' own.
    fits = len(sizes) <= len(scores) and all(
        size in (1, wanted) for size, wanted in zip(sizes[::-1], scores[::-1], strict=False)
    )
    if not fits:
        return f"the mask of shape {list(sizes)} is wider than the scores {list(scores)}"
    if mask.when is None and g.value(mask.tensor).dtype != torch.float32:
        return f"the mask is {g.value(mask.tensor).dtype}, not torch.float32"
    if mask.when is not None and not mask.number <= AS_GOOD_AS_MINUS_INFINITY:
        return f"masked scores are set to {mask.number:g}, which does not act as −∞"
    return ""


def _fused(ed: Editor, found: Found) -> fx.Node:
    q = _moved(ed, found.q.source, found.q.order)
    order = found.k_transposed.order
    k = _moved(ed, found.k_transposed.source, _swapped(order))
    v = found.v
    if found.v_transposed:
        v = _moved(ed, v, _swapped(range(rank(v))))
    scale = found.scores.scale * found.q.scale * found.k_transposed.scale
    mask = _mask(ed, found.scores.masks)
    out = ed.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False, scale=scale)
    return _moved(ed, out, _swapped(range(rank(out)))) if found.v_transposed else out


def _swapped(order: Sequence[int]) -> tuple[int, ...]:
    *batch, rows, columns = order
    return (*batch, columns, rows)


def _moved(ed: Editor, x: fx.Node, order: Sequence[int]) -> fx.Node:
    if list(order) == list(range(rank(x))):
        return x
    return ed.call(aten.permute.default, x, list(order))


def _mask(ed: Editor, masks: tuple[Mask, ...]) -> fx.Node | None:
    """All masks as one to add, or as one of bools: attend where it is true."""
    if not masks:
        return None
    if len(masks) == 1 and masks[0].number == -math.inf:
        (only,) = masks
        total = ed.call(aten.logical_not.default, only.tensor) if only.when else only.tensor
    else:
        total, *rest = (_term(ed, mask) for mask in masks)
        for term in rest:
            total = ed.call(aten.add.Tensor, total, term)
    # PyTorch takes masks of two dimensions or more.
    if rank(total) < 2:
        total = ed.call(aten.reshape.default, total, [1] * (2 - rank(total)) + [*g.shape(total)])
    return total


def _term(ed: Editor, mask: Mask) -> fx.Node:
    if mask.when is None:
        if mask.factor == 1:
            return mask.tensor
        return ed.call(aten.mul.Tensor, mask.tensor, mask.factor)
    fill = ed.constant("masked", torch.tensor(mask.number, dtype=torch.float32))
    zero = ed.constant("attended", torch.tensor(0.0))
    sides = (fill, zero) if mask.when else (zero, fill)
    return ed.call(aten.where.self, mask.tensor, *sides)
